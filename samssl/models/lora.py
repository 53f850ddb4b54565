"""LoRA on SAM's queries and values, through PEFT (arXiv:2106.09685; placement of arXiv:2404.09957).

SAM's encoder fuses q, k and v in one Linear, which PEFT adapts as a whole. Here its LoRA has twice
the rank, the first half wired to q and the second to v by a mask on the gradient of B, which starts
at zero: k is never changed, and q and v each get an update of the asked rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samssl.config import PositiveInt, UserError, config

DECODER_PROJECTIONS = r"mask_decoder\.transformer\..*\.(q_proj|v_proj)"
ADAPTER = "default"
NO_LORA = (
    "LoRA does not reach into the encoder of vit_t yet. Set strategy.method=vanilla, or "
    "strategy.scope=decoder."
)


@config
class LoraConfig:
    """Low-rank updates of q and v."""

    rank: PositiveInt = 4
    """Rank of each update."""
    alpha: PositiveInt = 4
    """The update is scaled by alpha / rank; equal to `rank` means unscaled, as published."""
    blocks: tuple[int, ...] | None = None
    """Encoder blocks to adapt, counted from 0; null adapts all."""


def inject_lora(
    model: nn.Module, lora: LoraConfig, trained_modules: Sequence[str], *, in_encoder: bool
) -> Any:
    """Wrap `model` (modules named as SAM's) as a PeftModel in which LoRA and `trained_modules` train.

    The output is unchanged until the first optimizer step.

    Raises:
        UserError: the encoder cannot be adapted, or has no block of that number.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    if in_encoder:
        check_blocks(model, lora)
    blocks = r"\d+" if lora.blocks is None else "(" + "|".join(str(block) for block in lora.blocks) + ")"
    fused = rf"image_encoder\.blocks\.{blocks}\.attn\.qkv"
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern={fused: 2 * lora.rank},
        alpha_pattern={fused: 2 * lora.alpha},
        target_modules=rf"({fused})|({DECODER_PROJECTIONS})" if in_encoder else DECODER_PROJECTIONS,
        modules_to_save=list(trained_modules),
    )
    wrapped = get_peft_model(model, settings)  # pyright: ignore[reportArgumentType]
    keep_keys_frozen(wrapped)
    return wrapped


def check_blocks(model: nn.Module, lora: LoraConfig) -> None:
    """Refuse an encoder without SAM's blocks, or numbers of blocks that it does not have."""
    encoder = model.get_submodule("image_encoder")
    if not isinstance(encoder, ImageEncoderViT):
        raise UserError(NO_LORA)
    depth = len(encoder.blocks)
    beyond = [block for block in lora.blocks or () if not 0 <= block < depth]
    if beyond:
        raise UserError(f"strategy.lora.blocks names {beyond}, but the encoder has blocks 0 to {depth - 1}.")


def keep_keys_frozen(model: nn.Module) -> None:
    """Mask the gradient of every fused qkv update so that half of it drives q and half drives v."""
    for name, module in model.named_modules():
        if name.endswith("attn.qkv") and hasattr(module, "lora_B"):
            weight = module.get_submodule(f"lora_B.{ADAPTER}").get_parameter("weight")
            mask = fused_mask(weight)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))


def fused_mask(weight: Tensor) -> Tensor:
    """1 where B [3 * D, 2 * rank] of a fused qkv is trained: q rows by its first half, v by its second."""
    width, rank = weight.shape[0] // 3, weight.shape[1] // 2
    mask = torch.zeros_like(weight)
    mask[:width, :rank] = 1
    mask[2 * width :, rank:] = 1
    return mask


def count_trained(model: nn.Module) -> int:
    """How many numbers train: masked entries of fused updates are not counted."""
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fused = "attn.qkv.lora_B" in name
            total += int(fused_mask(parameter).sum()) if fused else parameter.numel()
    return total
