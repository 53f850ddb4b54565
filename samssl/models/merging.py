"""A fine-tuned segmenter as plain SAM weights, where SAM's own modules can compute the same."""

from typing import Any

from torch import Tensor

from samssl.config import UserError
from samssl.models.strategies import StrategyConfig


def check_mergeable(strategy: StrategyConfig) -> None:
    """Refuse a strategy whose result no plain SAM computes.

    Raises:
        UserError: saying what stands in the way, and what to fine-tune with instead.
    """
    if strategy.method == "adapter":
        raise UserError(
            "Adapters cannot be merged: a GELU lies between their two layers, which no weights of SAM's own "
            "make up for. Use the bundle as it is, or fine-tune with strategy.method=lora."
        )
    if strategy.head != "sam":
        raise UserError(
            "The decoder of this bundle has a mask token for each class, and segment_anything's has four for "
            "one foreground. Use the bundle as it is, or fine-tune one label with strategy.head=sam."
        )


def merged_weights(segmenter: Any, strategy: StrategyConfig) -> dict[str, Tensor]:
    """The state dict of SAM under Meta's key names, LoRA added to the weights it adapts.

    `segmenter` is what `segmenter_from` made under `strategy`, and is used up.

    Raises:
        UserError: see `check_mergeable`.
    """
    check_mergeable(strategy)
    plain = without_lora(segmenter, strategy)
    return {name: value.detach().contiguous() for name, value in plain.state_dict().items()}


def without_lora(segmenter: Any, strategy: StrategyConfig) -> Any:
    """The same function, LoRA added to the weights it adapts; `segmenter` is used up."""
    return segmenter.merge_and_unload() if strategy.method == "lora" else segmenter
