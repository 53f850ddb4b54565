"""Where in SAM's image encoders LoRA and adapters go: blocks of attention, counted from 0."""

from collections.abc import Sequence

from segment_anything.modeling.image_encoder import Block
from timm.models.tiny_vit import TinyVitBlock
from torch import nn

from samssl.config import UserError

PUBLISHED_BLOCKS = (0, 1, 10, 11)
"""What the official code of arXiv:2404.09957 adapts unless it is told otherwise."""


def attention_blocks(encoder: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `encoder` that hold attention (`attn`, `mlp`) by name, in the order of the tokens' way.

    In TinyViT they are counted through all stages; its first stage has none.
    """
    return {
        name: module for name, module in encoder.named_modules() if isinstance(module, (Block, TinyVitBlock))
    }


def chosen_blocks(encoder: nn.Module, numbers: Sequence[int] | None, field: str) -> dict[str, nn.Module]:
    """The attention blocks of these numbers by name; all of them where `numbers` is None.

    Raises:
        UserError: naming `field`, where the encoder has no block of such a number.
    """
    blocks = attention_blocks(encoder)
    if numbers is None:
        return blocks
    beyond = [number for number in numbers if not 0 <= number < len(blocks)]
    if beyond:
        raise UserError(
            f"{field} names {beyond}, but the encoder has blocks 0 to {len(blocks) - 1}. Choose among these."
        )
    names = list(blocks)
    return {names[number]: blocks[names[number]] for number in numbers}


def published_blocks(encoder: nn.Module) -> tuple[int, ...]:
    """`PUBLISHED_BLOCKS`, as far as the encoder has them."""
    depth = len(attention_blocks(encoder))
    return tuple(number for number in PUBLISHED_BLOCKS if number < depth)
