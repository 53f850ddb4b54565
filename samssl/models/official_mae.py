"""Official MAE checkpoints (arXiv:2111.06377) as the trunk of SAM's image encoder.

They are plain ViTs at 224 px: a class token, positions on 14 x 14 patches (ViT-H/14: 16 x 16), no windows
and no relative positions. Blocks and patch embedding go over as they are, `mlp.fc` becoming `mlp.lin`.
Positions are interpolated bicubically to SAM's grid, without the class token's. Kernels of other patches
(ViT-H has 14 px, SAM 16) are resampled so that an enlarged patch embeds as the original did (the
pseudo-inverse of FlexiViT, arXiv:2212.08013). What SAM has beyond that stays as it is drawn.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from samssl.models.checkpoints import CheckpointError, check_fit

PREFIX = "image_encoder."
POSITIONS = "image_encoder.pos_embed"
KERNEL = "image_encoder.patch_embed.proj.weight"

_TRUNK = re.compile(r"patch_embed\.proj\.\w+|blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.\w+")
_BEYOND = re.compile(r"(image_encoder\.(neck\.|blocks\.\d+\.attn\.rel_pos_)|prompt_encoder\.|mask_decoder\.)")


@dataclass(frozen=True)
class Adapted:
    """An MAE checkpoint under SAM's names."""

    weights: dict[str, Tensor]
    interpolated: tuple[str, ...]
    """Names in `weights` that were resampled."""
    ignored: tuple[str, ...]
    """Names in the checkpoint without a place in SAM: class token, last norm, MAE's own decoder."""


def is_mae(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of an official MAE checkpoint, with or without its decoder."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    return all(name in weights for name in needed)


def from_mae(sam: nn.Module, weights: Mapping[str, Tensor], source: str) -> Adapted:
    """The trunk of `sam` from an MAE checkpoint, every tensor of the trunk or none.

    Raises:
        CheckpointError: depth or width are another variant's, or the encoder is no ViT.
    """
    own = sam.state_dict()
    if POSITIONS not in own or KERNEL not in own:
        raise CheckpointError(
            f"{source} is an official MAE checkpoint, which fits the ViTs only. Change model.variant."
        )
    adapted = {PREFIX + _rename(name): value for name, value in weights.items() if _TRUNK.fullmatch(name)}
    adapted[POSITIONS] = interpolate_positions(weights["pos_embed"], own[POSITIONS].shape[1], source)
    kernel, patch = adapted[KERNEL], own[KERNEL].shape[-1]
    if kernel.shape[-1] != patch:
        adapted[KERNEL] = resize_kernel(kernel, patch)
    beyond = {name: value for name, value in own.items() if name not in adapted and _BEYOND.match(name)}
    check_fit(sam, {**beyond, **adapted}, source)
    resampled = [POSITIONS, *([KERNEL] if adapted[KERNEL] is not kernel else [])]
    ignored = [name for name in weights if name != "pos_embed" and not _TRUNK.fullmatch(name)]
    return Adapted(adapted, tuple(resampled), tuple(ignored))


def interpolate_positions(
    positions: Float[Tensor, "1 N D"], side: int, source: str
) -> Float[Tensor, "1 side side D"]:
    """Positions of a square grid behind a class token, bicubically on a grid of `side` x `side`.

    Raises:
        CheckpointError: the grid is not square.
    """
    old = math.isqrt(positions.shape[1] - 1)
    if old * old != positions.shape[1] - 1:
        raise CheckpointError(
            f"{source} has {positions.shape[1]} positions; a class token and a square grid "
            "were expected. Give an official MAE checkpoint of a ViT as it was published."
        )
    grid = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous()


def resize_kernel(kernel: Float[Tensor, "D C p p"], patch: int) -> Float[Tensor, "D C q q"]:
    """The kernel of `patch` pixels whose product with a bicubically resized patch is that of `kernel`.

    Exact for enlarged patches, closest in the least squares sense for reduced ones.
    """
    old = kernel.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(basis, size=(patch, patch), mode="bicubic", align_corners=False).flatten(1)
    solved = torch.linalg.pinv(resized) @ kernel.double().flatten(2).transpose(1, 2)
    return solved.transpose(1, 2).unflatten(2, (patch, patch)).to(kernel.dtype).contiguous()


def _rename(name: str) -> str:
    return name.replace(".mlp.fc", ".mlp.lin")
