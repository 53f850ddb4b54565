"""What a pretrain run will need: memory by part and time per step, before it is started.

The run's own code is measured in miniature. One step of the method runs on this machine around an encoder
with one block of each kind (windowed, global), and once more with one further block of each; blocks of a
kind cost the same, so the whole follows by counting them. Large batches follow from batches of one and two.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samssl.config import UserError
from samssl.models.recompute import choose_block_mode, encoder_blocks
from samssl.train.costs import Costs, peak_flops, seconds_per_weight, step_costs
from samssl.train.memory import GIB, keep_freed_memory
from samssl.train.optim import uses_bf16
from samssl.train.pretrain import PretrainConfig, build_method

GPU_RUNTIME = 0.7 * GIB
"""CUDA's context and libraries, and what the allocator cannot hand out; an estimate."""
MEASURED_TOKENS = 16_384
"""Batches of no more tokens than this are measured as they are."""


@dataclass(frozen=True)
class Plan:
    """Bytes on one worker's device, by part, and what a step costs there."""

    parts: dict[str, float]
    """Bytes, in the order in which they are told."""
    peak: float
    """The most that is there at one time, in bytes."""
    memory: float
    """What the device has, in bytes."""
    flops: float
    """Floating-point operations of one step of one worker."""
    seconds: float | None
    """Time of one step; None where the hardware's FLOP/s are not given."""
    how_timed: str

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the device a twentieth of its memory."""
        return self.peak <= 0.95 * self.memory


@dataclass(frozen=True)
class Weights:
    """Parameters of a method by number: all, those that train, of one block, and outside of blocks."""

    total: int
    trained: int
    block: int
    outside: int


def describe_plan(config: PretrainConfig, gib: float | None, tflops: float | None, utilisation: float) -> str:
    """The plan as text, for this machine, or for one GPU a worker with `gib` and `tflops`."""
    plan = make_plan(config, gib, tflops, utilisation)
    micro = micro_batch(config)
    lines = [
        f"{config.method} of {config.model.variant} at {config.model.image_size} px: a step of "
        f"{config.optim.batch_size} slices on {config.resources.workers} worker(s), "
        f"{config.optim.accumulate} x {micro} each ({config.resources.strategy})"
    ]
    lines += [f"  {name:24} {size / GIB:8.2f} GiB" for name, size in plan.parts.items()]
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    lines.append(
        f"  {'peak of a worker':24} {plan.peak / GIB:8.2f} of {plan.memory / GIB:.1f} GiB: {verdict}"
    )
    lines.append(f"  {'operations':24} {plan.flops / 1e12:8.2f} TFLOP a step of a worker")
    time_text = f"{plan.seconds:8.3f} s" if plan.seconds else "       ?"
    lines.append(f"  {'time':24} {time_text} a step ({plan.how_timed})")
    if not plan.fits:
        lines.append("  " + _advice(config))
    return "\n".join(lines)


def make_plan(
    config: PretrainConfig, gib: float | None = None, tflops: float | None = None, utilisation: float = 0.35
) -> Plan:
    """Measure the step in miniature and add it up.

    Raises:
        UserError: `tflops` without `gib`.
    """
    if tflops and not gib:
        raise UserError("Give --gib with --tflops: the memory of the GPU whose FLOP/s these are.")
    if here := gib is None:
        keep_freed_memory()  # as workers do
    device = torch.device("cpu" if here else "cuda")
    runtime = _resident() if here else GPU_RUNTIME
    bf16 = uses_bf16(config.optim, device)
    model, weights = _build(config)
    costs = whole_costs(model, config, bf16)
    parts = _parts(config, weights, costs, runtime, here)
    memory = _physical_memory() / config.resources.workers if gib is None else gib * GIB
    flops = costs.flops * config.optim.accumulate
    seconds, how = _time(config, costs, weights, here, bf16, tflops, utilisation)
    return Plan(parts, _peak(config, parts), memory, flops, seconds, how)


def micro_batch(config: PretrainConfig) -> int:
    """Slices in one forward and backward pass of one worker."""
    return config.optim.batch_size // config.resources.workers // config.optim.accumulate


def whole_costs(model: nn.Module, config: PretrainConfig, bf16: bool) -> Costs:
    """Costs of one forward and backward pass of the micro-batch, from passes of small encoders."""
    kinds = _kinds(model)
    base = [blocks[0] for blocks in kinds]
    batch, tokens = micro_batch(config), (config.model.image_size // 16) ** 2
    measured = batch if batch * tokens <= MEASURED_TOKENS else 2

    def measure(blocks: list[nn.Module], size: int) -> Costs:
        with _with_blocks(model, blocks):
            return step_costs(model, _images(config, size), bf16)

    def whole(size: int) -> Costs:
        if len(kinds) == 0:
            return step_costs(model, _images(config, size), bf16)
        least = measure(base, size)
        total = least
        for blocks in kinds:
            if len(blocks) > 1:
                one_more = measure([*base, blocks[1]], size)
                total = total.plus(one_more.minus(least), len(blocks) - 1)
        return total

    if measured == batch:
        return whole(batch)
    one, two = whole(1), whole(2)
    return one.plus(two.minus(one), batch - 1)


def _build(config: PretrainConfig) -> tuple[nn.Module, Weights]:
    """The method with random weights and the blocks that are measured, and how many weights the whole has."""
    model = build_method(replace(config, model=replace(config.model, checkpoint=None)))
    choose_block_mode(model, recompute=config.optim.checkpoint_activations, compiled=False)
    counts = [_count(block) for block in encoder_blocks(model)]
    total = _count(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return model, Weights(total, trained, max(counts, default=0), total - sum(counts))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kinds(model: nn.Module) -> list[list[nn.Module]]:
    """Encoder blocks that cost the same, together; none where the encoder is no row of like blocks."""
    blocks = encoder_blocks(model)
    if not all(hasattr(block, "window_size") for block in blocks):
        return []
    kinds: dict[bool, list[nn.Module]] = {}
    for block in blocks:
        kinds.setdefault(bool(block.window_size), []).append(block)
    return [kinds[windowed] for windowed in sorted(kinds, reverse=True)]


@contextmanager
def _with_blocks(model: Any, blocks: list[nn.Module]) -> Iterator[None]:
    encoder = model.image_encoder
    kept, encoder.blocks = encoder.blocks, nn.ModuleList(blocks)
    try:
        yield
    finally:
        encoder.blocks = kept


def _images(config: PretrainConfig, batch: int) -> dict[str, Tensor]:
    """Noise, which has a target in every patch."""
    size = config.model.image_size
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(batch, config.data.input.num_channels, size, size, generator=generator),
        "key": torch.arange(batch),
    }


def _parts(
    config: PretrainConfig, weights: Weights, costs: Costs, runtime: float, here: bool
) -> dict[str, float]:
    """Bytes by part; parameters, gradients and moments are float32."""
    sharded = config.resources.strategy == "fsdp" and config.resources.workers > 1
    workers = config.resources.workers if sharded else 1
    trained = 4.0 * weights.trained
    parts = {
        "weights": 4.0 * weights.total / workers,
        "gradients": trained / workers,
        "optimizer": 2 * trained / workers,
        "average of weights": (trained / workers) if config.optim.ema_decay else 0.0,
        "kept activations": costs.kept,
        "working memory": costs.working,
        "runtime": runtime,
    }
    if sharded:  # the unit outside of blocks and its gradient; two blocks and a block's gradient
        parts["gathered weights"] = 4.0 * (2 * weights.outside + 3 * weights.block)
    if here:  # on a GPU's host
        parts["state being saved"] = 3 * trained + (trained if config.optim.ema_decay else 0.0)
    return {name: size for name, size in parts.items() if size}


def _peak(config: PretrainConfig, parts: dict[str, float]) -> float:
    """Gradients come as activations go, unless they are there from the start."""
    passing = ("gradients", "kept activations")
    lasting = sum(size for name, size in parts.items() if name not in passing)
    from_the_start = config.optim.accumulate > 1 or config.resources.workers > 1
    together = sum if from_the_start else max
    return lasting + together(parts.get(name, 0.0) for name in passing)


def _time(
    config: PretrainConfig,
    costs: Costs,
    weights: Weights,
    here: bool,
    bf16: bool,
    tflops: float | None,
    utilisation: float,
) -> tuple[float | None, str]:
    passes = config.optim.accumulate
    if here:
        seconds = costs.seconds * passes + seconds_per_weight() * weights.trained
        seconds *= config.resources.workers  # they share the cores
        share = costs.flops * passes * config.resources.workers / seconds / peak_flops(bf16)
        return seconds, f"measured here in parts; {share:.0%} of this machine's matrix products"
    if not tflops:
        return None, "give --tflops"
    return costs.flops * passes / (tflops * 1e12 * utilisation), f"{utilisation:.0%} of {tflops:g} TFLOP/s"


def _physical_memory() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _resident() -> float:
    """Bytes of this process: Python and the libraries that a worker loads too."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return float(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS: bytes


def _advice(config: PretrainConfig) -> str:
    hints = []
    if not config.optim.checkpoint_activations:
        hints.append("optim.checkpoint_activations=true")
    if micro_batch(config) > 1:
        hints.append("a larger optim.accumulate")
    if config.resources.strategy != "fsdp" or config.resources.workers == 1:
        hints.append("more workers with resources.strategy=fsdp")
    return f"Try {', '.join(hints) or 'a smaller variant or image size'}."
