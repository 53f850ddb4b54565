"""Bottleneck adapters (arXiv:1902.00751), placed as arXiv:2404.09957 places them.

One follows the attention of a block, `y + up(gelu(down(y)))` on its output projection, and one lies beside
the MLP, `mlp(x) + up(gelu(down(x)))`. `up` starts at zero, so that an untrained adapter changes nothing.
"""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn

from samssl.config import config
from samssl.models.placement import chosen_blocks


@config
class AdapterConfig:
    """Two small trained layers around frozen ones."""

    ratio: Annotated[float, Interval(gt=0, le=1)] = 0.25
    """Width of the bottleneck as a share of the tokens' width."""
    blocks: tuple[int, ...] | None = None
    """Attention blocks of the encoder to adapt, counted from 0. null adapts all; in profile `paper` it is
    0, 1, 10 and 11, as far as the encoder has them. In the decoder both layers are adapted."""


class Bottleneck(nn.Module):
    """`up(gelu(down(tokens)))`, zero until it is trained."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """What is to be added to the tokens."""
        return self.up(F.gelu(self.down(tokens)))


class AdaptedOutput(nn.Module):
    """A frozen projection, followed by a bottleneck with a skip."""

    def __init__(self, base: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B C"]:
        """Adapted output of `base`."""
        output = self.base(tokens)
        return output + self.adapter(output)


class AdaptedMlp(nn.Module):
    """A frozen MLP with a bottleneck beside it."""

    def __init__(self, base: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, tokens: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """The sum of both."""
        return self.base(tokens) + self.adapter(tokens)


def insert_adapters(model: nn.Module, adapters: AdapterConfig, *, in_encoder: bool) -> None:
    """Adapt the mask decoder of `model` (modules named as SAM's) in place, and its image encoder.

    Which attention of a decoder layer the official code adapts is not known to us: here it is the tokens'
    self-attention, and the MLP. TinyViT normalises inside its MLP, so that there the bottleneck beside it
    sees tokens before that norm.

    Raises:
        UserError: the encoder has no block of a number that is asked for.
    """
    for layer in model.get_submodule("mask_decoder.transformer.layers").children():
        _adapt(layer, "self_attn.out_proj", adapters.ratio)
    if in_encoder:
        encoder = model.get_submodule("image_encoder")
        for block in chosen_blocks(encoder, adapters.blocks, "strategy.adapter.blocks").values():
            _adapt(block, "attn.proj", adapters.ratio)


def _adapt(block: nn.Module, projection: str, ratio: float) -> None:
    output, mlp = block.get_submodule(projection), block.get_submodule("mlp")
    assert isinstance(output, nn.Linear)
    width = output.out_features
    hidden = max(1, round(width * ratio))
    block.set_submodule(projection, AdaptedOutput(output, Bottleneck(width, hidden)))
    block.set_submodule("mlp", AdaptedMlp(mlp, Bottleneck(width, hidden)))
