"""LoRA through PEFT (arXiv:2106.09685), by default on queries and values, as arXiv:2404.09957 places it.

Encoders fuse q, k and v in one Linear, which PEFT adapts as a whole. Here its LoRA has the asked rank once
for each part that is adapted, and in B a part's rows meet their own share of the rank alone: a part that
is not adapted is never changed, and each that is gets an update of the asked rank.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.tiny_vit import Attention as TinyAttention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from samssl.config import PositiveInt, UserError, config
from samssl.models.placement import chosen_blocks

Target = Literal["q", "k", "v", "proj", "mlp"]

DECODER_PROJECTIONS = r"mask_decoder\.transformer\..*\.(q_proj|v_proj)"
ADAPTER = "default"


@config
class LoraConfig:
    """Low-rank updates of linear layers."""

    rank: PositiveInt = 4
    """Rank of each update."""
    alpha: PositiveInt = 4
    """The update is scaled by alpha / rank; equal to `rank` means unscaled, as published."""
    targets: tuple[Target, ...] = ("q", "v")
    """What is adapted in an encoder block: q, k, v, the attention's output `proj`, the layers of the `mlp`.
    In the mask decoder it is q and v of every attention, whatever is said here."""
    blocks: tuple[int, ...] | None = None
    """Attention blocks of the encoder to adapt, counted from 0. null adapts all; in profile `paper` it is
    0, 1, 10 and 11, as far as the encoder has them."""
    ranks: tuple[PositiveInt, ...] | None = None
    """A rank for each adapted block of the encoder, in their order, instead of `rank`; the scale stays
    alpha / rank."""
    dora: bool = False
    """Learn the length of each row of an adapted weight apart from its direction (DoRA, arXiv:2402.09353)."""

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {list(self.targets)} must name something, and nothing twice")


def inject_lora(
    model: nn.Module, lora: LoraConfig, trained_modules: Sequence[str], *, in_encoder: bool
) -> Any:
    """Wrap `model` (modules named as SAM's) as a PeftModel in which LoRA and `trained_modules` train.

    The output is unchanged until the first optimizer step.

    Raises:
        UserError: the encoder has no block of a number that is asked for, or `ranks` are not one a block.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    ranks = encoder_ranks(model.get_submodule("image_encoder"), lora) if in_encoder else {}
    patterns = {rf"image_encoder\.{re.escape(name)}": rank for name, rank in ranks.items()}
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=patterns,
        alpha_pattern={name: rank * lora.alpha / lora.rank for name, rank in patterns.items()},
        target_modules="|".join([*patterns, DECODER_PROJECTIONS]),
        modules_to_save=list(trained_modules),
        use_dora=lora.dora,
    )
    wrapped = get_peft_model(model, settings)  # pyright: ignore[reportArgumentType]
    separate_parts(wrapped, fused_parts(lora))
    return wrapped


def fused_parts(lora: LoraConfig) -> list[str]:
    """Which of q, k and v are adapted."""
    return [part for part in "qkv" if part in lora.targets]


def encoder_ranks(encoder: nn.Module, lora: LoraConfig) -> dict[str, int]:
    """PEFT's rank of each adapted linear layer by name; a fused qkv has the rank once for each part.

    Raises:
        UserError: see `inject_lora`.
    """
    blocks = chosen_blocks(encoder, lora.blocks, "strategy.lora.blocks")
    ranks = (lora.rank,) * len(blocks) if lora.ranks is None else lora.ranks
    if len(ranks) != len(blocks):
        raise UserError(
            f"strategy.lora.ranks has {len(ranks)} ranks for {len(blocks)} adapted blocks. Give one for each."
        )
    found: dict[str, int] = {}
    for (name, block), rank in zip(blocks.items(), ranks, strict=True):
        if parts := fused_parts(lora):
            found[f"{name}.attn.qkv"] = rank * len(parts)
        if "proj" in lora.targets:
            found[f"{name}.attn.proj"] = rank
        if "mlp" in lora.targets:
            layers = block.get_submodule("mlp").named_children()
            found |= {f"{name}.mlp.{layer}": rank for layer, part in layers if isinstance(part, nn.Linear)}
    return found


def separate_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Give each of `parts` its share of the rank in every adapted qkv, and the other parts none."""
    for name, fused in list(model.named_modules()):
        if not (name.endswith("attn.qkv") and hasattr(fused, "lora_B")):
            continue
        updates = fused.get_submodule("lora_B")
        assert isinstance(updates, nn.ModuleDict)
        whole = updates[ADAPTER]
        assert isinstance(whole, nn.Linear)
        rows = part_of_rows(model.get_submodule(name.rpartition(".")[0]), whole.out_features)
        updates[ADAPTER] = SeparateRows(whole, rows, parts)
        for magnitude in fused.get_submodule("lora_magnitude_vector").children():  # of DoRA
            learnt = TrainedEntries(magnitude.get_parameter("weight"), rows, parts)
            parametrize.register_parametrization(magnitude, "weight", learnt)


def part_of_rows(attention: nn.Module, num_rows: int) -> list[str]:
    """`q`, `k` or `v` for each of the `num_rows` rows of the weight of `attention.qkv`.

    SAM has the three one after the other, TinyViT head by head.
    """
    if isinstance(attention, TinyAttention):
        head = ["q"] * attention.key_dim + ["k"] * attention.key_dim + ["v"] * attention.val_dim
        return head * attention.num_heads
    width = num_rows // 3
    return ["q"] * width + ["k"] * width + ["v"] * width


class SeparateRows(nn.Linear):
    """B [rows, rank * parts] of a fused update: a row meets the rank of its own part, if it has one."""

    def __init__(self, whole: nn.Linear, rows: Sequence[str], parts: Sequence[str]) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.weight = whole.weight
        rank = whole.in_features // len(parts)
        numbers = torch.tensor([parts.index(row) if row in parts else -1 for row in rows])
        mask = numbers[:, None] == torch.arange(whole.in_features) // rank
        self.register_buffer("mask", mask.to(whole.weight), persistent=False)
        self.num_untrained = whole.weight.numel() - rank * sum(row in parts for row in rows)

    def forward(self, input: Float[Tensor, "*B R"]) -> Float[Tensor, "*B C"]:
        """`input` by the weights that take part."""
        return F.linear(input, self.weight * self.get_buffer("mask"))


class TrainedEntries(nn.Module):
    """A vector with an entry a row: those of adapted parts learn, the others stay what they are now."""

    def __init__(self, vector: Tensor, rows: Sequence[str], parts: Sequence[str]) -> None:
        super().__init__()
        mask = torch.tensor([float(row in parts) for row in rows])
        self.register_buffer("mask", mask.to(vector), persistent=False)
        self.register_buffer("untrained", vector.detach().clone(), persistent=False)
        self.num_untrained = sum(row not in parts for row in rows)

    def forward(self, values: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
        """`values` where they learn."""
        return values.where(self.get_buffer("mask") > 0, self.get_buffer("untrained"))


def count_trained(model: nn.Module) -> int:
    """How many numbers train; those of fused updates that take no part are not counted."""
    untrained = sum(
        module.num_untrained
        for module in model.modules()
        if isinstance(module, (SeparateRows, TrainedEntries))
    )
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - untrained
