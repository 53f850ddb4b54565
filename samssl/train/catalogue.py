"""The fine-tuning strategies as a table: what trains, where it lies, and the memory that training takes.

Models are built without weights (on torch's meta device), and one training step runs on shapes alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from samssl.models.lora import count_trained
from samssl.models.placement import attention_blocks, published_blocks
from samssl.models.sam import MICRO_IMAGE_SIZE, Variant, architecture
from samssl.models.strategies import (
    PUBLISHED_METHODS,
    Method,
    Profile,
    Scope,
    StrategyConfig,
    segmenter_from,
    strategy_name,
)
from samssl.train.costs import pass_memory
from samssl.train.memory import GIB
from samssl.train.plan import GPU_RUNTIME

PUBLISHED_VARIANTS: tuple[Variant, ...] = ("vit_h", "vit_b", "vit_t")
SCOPES: tuple[Scope, ...] = ("decoder", "encoder_decoder")
IMAGE_SIZE = 1024
NOTES = f"""
2 classes, background included. Memory: one image of {IMAGE_SIZE} px (micro: {MICRO_IMAGE_SIZE} px) on a
GPU in fp32, weights, gradients and AdamW's moments included; estimated from shapes with fused attention,
not measured."""


@dataclass(frozen=True)
class Entry:
    """One strategy."""

    name: str
    trained: int
    """Numbers that learn."""
    total: int
    """Parameters of the model as it is tuned; weights that heads replace are not counted."""
    placement: str
    """What is adapted, in words."""
    memory: float
    """Bytes of training, at most."""


def describe_strategies(every: bool, profile: Profile) -> str:
    """The 18 published strategies under `profile` as an aligned table; `every` adds what is beyond them."""
    rows = [("strategy", "trained", "of all", "share", "memory", "adapted")]
    for variant, scope, method in combinations(every, profile):
        entry = measure(variant, scope, method, profile)
        share = f"{entry.trained / entry.total:.2%}"
        memory = f"{entry.memory / GIB:.1f} GiB"
        rows.append((entry.name, f"{entry.trained:,}", f"{entry.total:,}", share, memory, entry.placement))
    return f"profile {profile}\n{_aligned(rows)}\n{NOTES}"


def combinations(every: bool, profile: Profile) -> Iterator[tuple[Variant, Scope, Method]]:
    """The published strategies, or all; a profile that the paper does not have is left out."""
    variants: Sequence[Variant] = get_args(Variant)[::-1] if every else PUBLISHED_VARIANTS
    methods: Sequence[Method] = PUBLISHED_METHODS
    if every and profile == "fixed":
        methods = (*PUBLISHED_METHODS, "bitfit", "norm")
    return ((variant, scope, method) for variant in variants for scope in SCOPES for method in methods)


def measure(variant: Variant, scope: Scope, method: Method, profile: Profile) -> Entry:
    """Build the strategy on the meta device, count, and estimate one training step."""
    strategy = StrategyConfig(method=method, scope=scope, profile=profile)
    with torch.device("meta"):
        sam = architecture(variant)
        placement = place_in_words(strategy, sam.image_encoder)
        segmenter = segmenter_from(sam, strategy, num_classes=2, seed=0)
    named = segmenter.named_parameters()
    total = sum(parameter.numel() for name, parameter in named if "original_module" not in name)
    trained = count_trained(segmenter)
    size = MICRO_IMAGE_SIZE if variant == "micro" else IMAGE_SIZE
    memory = training_bytes(segmenter, total, trained, size)
    return Entry(strategy_name(variant, scope, method), trained, total, placement, memory)


def place_in_words(strategy: StrategyConfig, encoder: nn.Module) -> str:
    """Where LoRA or adapters lie; a dash where weights themselves are trained."""
    if strategy.method not in ("adapter", "lora"):
        return "-"
    what = {"lora": ("q, v of", "every attention"), "adapter": ("attention and MLP of", "both layers")}
    parts, in_decoder = what[strategy.method]
    if strategy.scope == "decoder":
        return f"{parts} the decoder ({in_decoder})"
    depth = len(attention_blocks(encoder))
    blocks = published_blocks(encoder) if strategy.profile == "paper" else range(depth)
    listed = f"0-{depth - 1}" if len(blocks) == depth else ", ".join(map(str, blocks))
    return f"{parts} blocks {listed} and the decoder ({in_decoder})"


def training_bytes(segmenter: nn.Module, total: int, trained: int, image_size: int) -> float:
    """The most that a training step of one image holds; gradients come as activations go."""
    kept, peak = activation_bytes(segmenter, torch.empty(1, 1, image_size, image_size, device="meta"))
    return 4.0 * (total + 2 * trained) + max(4.0 * trained, kept) + (peak - kept) + GPU_RUNTIME


def activation_bytes(segmenter: nn.Module, images: Tensor) -> tuple[float, float]:
    """Bytes that a forward pass keeps for the backward pass, and the most that both need at one time."""
    segmenter.train()

    def forward() -> Tensor:
        return segmenter(images).square().mean()

    with FusedAttention():
        return pass_memory(segmenter, {"image": images}, forward)


class FusedAttention(TorchFunctionMode):
    """Inside, attention keeps no scores, as kernels do; on the meta device torch would keep them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or the fused kernel's shapes in its place."""
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        learnt_mask = mask is not None and mask.requires_grad  # fused kernels have no gradient for it
        if func is not F.scaled_dot_product_attention or learnt_mask:
            return func(*args, **kwargs)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(*args[:3], attn_mask=mask, scale=kwargs.get("scale"))[0]


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as they need to be: text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
