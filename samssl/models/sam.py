"""SAM from `segment_anything` at every size."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from samssl.config import Count, config
from samssl.models.checkpoints import read_weights
from samssl.models.initial import (
    LoadReport,
    Normalisation,
    PublishedName,
    fit_to,
    initial_file,
    normalisation_for,
)
from samssl.models.tinyvit import STRIDE, TinyViT

Variant = Literal["micro", "vit_t", "vit_b", "vit_l", "vit_h"]

MICRO_IMAGE_SIZE = 64
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
NORMALISATION = "normalisation"
"""Attribute of an image encoder."""


@config
class ModelConfig:
    """Which SAM, and the weights it starts from."""

    variant: Variant = "vit_b"
    """`vit_b`, `vit_l`, `vit_h` as Meta published them, with `micro`, the same classes fit for a laptop;
    `vit_t` is MobileSAM."""
    checkpoint: PublishedName | Path | None = None
    """`sam`, `medsam`, `mobile_sam` or `mae`: published weights, their files in the folder that
    SAMSSL_CHECKPOINTS names or else in `checkpoints`. A path: a SAM-format or official MAE file (.pth,
    .safetensors), or the folder of an earlier run, of pretrain or with mode promptable. null or `random`:
    drawn from `init_seed`."""
    init_seed: Count = 0
    """Seed of what the checkpoint does not have: everything where there is none."""
    normalisation: Normalisation | None = None
    """Of intensities in 0..1 on their way into the encoder: `sam` subtracts SAM's mean and divides by its
    standard deviation, `unit` leaves them (MedSAM). null: what the weights were trained with."""
    image_size: Annotated[int, Ge(8)] = 1024
    """Side of the square model input in pixels; any multiple of the patch size (16; micro: 4)."""

    def __post_init__(self) -> None:
        if self.image_size % patch_size(self.variant):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the patch size of {self.variant}, "
                f"which is {patch_size(self.variant)}; choose a multiple"
            )


def patch_size(variant: Variant) -> int:
    """Side of one patch in pixels."""
    return 4 if variant == "micro" else 16


def build_micro() -> Sam:
    """SAM's own classes with small dimensions: 64 px, patch 4, 4 blocks of 128, windows of 6 padded to 18."""
    grid = (MICRO_IMAGE_SIZE // 4, MICRO_IMAGE_SIZE // 4)
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=MICRO_IMAGE_SIZE,
            patch_size=4,
            embed_dim=128,
            depth=4,
            num_heads=4,
            out_chans=64,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
            use_rel_pos=True,
            window_size=6,
            global_attn_indexes=(1, 3),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=64,
            image_embedding_size=grid,
            input_image_size=(MICRO_IMAGE_SIZE, MICRO_IMAGE_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=256, num_heads=4),
            transformer_dim=64,
            iou_head_hidden_dim=64,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def build_vit_t() -> Sam:
    """MobileSAM: TinyViT with SAM's prompt encoder and mask decoder, as published for 1024 px."""
    side = TinyViT.img_size
    return Sam(
        image_encoder=TinyViT(),  # pyright: ignore[reportArgumentType]
        prompt_encoder=PromptEncoder(
            embed_dim=256,
            image_embedding_size=(side // STRIDE, side // STRIDE),
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def resolve(model: ModelConfig) -> ModelConfig:
    """`model` with its checkpoint as a file (None: random) and its normalisation said.

    Raises:
        CheckpointError: the checkpoint's name or folder leads to no file.
    """
    file = initial_file(model.checkpoint, model.variant)
    return replace(model, checkpoint=file, normalisation=model.normalisation or normalisation_for(file))


def build_sam(model: ModelConfig) -> Sam:
    """SAM at `model.variant` with the weights of `model.checkpoint`; the rest is drawn from `init_seed`.

    Raises:
        CheckpointError: the file is not a weights file, or its keys or shapes are another model's.
    """
    model = resolve(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.init_seed)
        sam = architecture(model.variant)
        weights, report = _fitted(sam, model)
        if report.new:
            initialise(sam.image_encoder)
    sam.load_state_dict(weights, strict=False)  # what is missing is `report.new`
    setattr(sam.image_encoder, NORMALISATION, model.normalisation)
    return sam.eval()


def check_checkpoint(model: ModelConfig) -> LoadReport:
    """Refuse `model.checkpoint` as `build_sam` would, without building the model; says what it would load.

    Raises:
        CheckpointError: see `build_sam`.
    """
    with torch.device("meta"):
        sam = architecture(model.variant)
    return _fitted(sam, resolve(model))[1]


def _fitted(sam: Sam, model: ModelConfig) -> tuple[dict[str, Tensor], LoadReport]:
    if isinstance(model.checkpoint, Path):
        return fit_to(sam, read_weights(model.checkpoint), model.checkpoint)
    source = f"{model.variant} drawn at random from init_seed {model.init_seed}"
    return {}, LoadReport(source, "no checkpoint", new=tuple(sam.state_dict()))


def architecture(variant: Variant) -> Sam:
    """SAM at that size, with weights as its modules draw them."""
    ours: dict[str, Callable[[], Sam]] = {"micro": build_micro, "vit_t": build_vit_t}
    return {**sam_model_registry, **ours}[variant]()


def initialise(image_encoder: ImageEncoderViT | TinyViT) -> None:
    """Draw a fresh encoder as ViTs are drawn for MAE: Xavier linear layers, position terms from N(0, 0.02).

    `segment_anything` leaves positions at zero, from where a fresh encoder cannot tell patches apart.
    TinyViT is drawn as it is built.
    """
    if isinstance(image_encoder, TinyViT):
        return
    for name, parameter in image_encoder.named_parameters():
        if "pos" in name:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("weight") and parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.startswith("blocks") and name.endswith(("qkv.bias", "proj.bias", "lin1.bias", "lin2.bias")):
            nn.init.zeros_(parameter)
    nn.init.xavier_uniform_(image_encoder.patch_embed.proj.weight.flatten(1))


def normalise(images: Tensor, image_encoder: nn.Module) -> Tensor:
    """Intensities in [0, 1], [B, 1 or 3, H, W], to the three channels that `image_encoder` expects.

    Which normalisation that is, `build_sam` has noted on the encoder; one built otherwise expects SAM's.
    """
    if getattr(image_encoder, NORMALISATION, "sam") == "unit":
        return images.expand(-1, 3, -1, -1)
    mean = images.new_tensor(PIXEL_MEAN).view(1, 3, 1, 1)
    std = images.new_tensor(PIXEL_STD).view(1, 3, 1, 1)
    return (images * 255 - mean) / std
