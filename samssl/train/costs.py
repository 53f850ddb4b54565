"""What one forward and backward pass costs: bytes, operations and seconds, measured on this machine."""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from samssl.train.distributed import gradient_norm


def _forward(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Fused attention that torch's counter does not know; plain attention would need the memory of its scores."""


@dataclass(frozen=True)
class Costs:
    """Of one pass; weights and their gradients are not in it."""

    kept: float
    """Bytes that the forward pass keeps for the backward pass."""
    working: float
    """Bytes beyond those at the worst moment."""
    flops: float
    """Floating-point operations, a multiplication and an addition counted as two."""
    seconds: float

    def plus(self, other: "Costs", times: int = 1) -> "Costs":
        """Both one after the other, `other` several times; working memory is used again."""
        summed = {
            field.name: getattr(self, field.name) + times * getattr(other, field.name)
            for field in fields(self)
        }
        return Costs(**(summed | {"working": max(self.working, self.working + other.working)}))

    def minus(self, other: "Costs") -> "Costs":
        """What is in `self` beyond `other`."""
        return Costs(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))


def step_costs(model: nn.Module, batch: dict[str, Tensor], bf16: bool, repeats: int = 3) -> Costs:
    """Costs of `model(batch)["loss"]` and its gradients, on the CPU."""
    model.train()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(batch)["loss"]

    def step() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)

    step()
    seconds = min(_seconds(step) for _ in range(repeats))
    kept, peak = pass_memory(model, batch, forward)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        step()
    return Costs(kept, max(0.0, peak - kept), float(counter.get_total_flops()), seconds)


def pass_memory(
    model: nn.Module, batch: dict[str, Tensor], forward: Callable[[], Tensor]
) -> tuple[float, float]:
    """Bytes alive after the forward pass, and at most; each gradient is let go as soon as it is whole."""
    hooks = [
        parameter.register_post_accumulate_grad_hook(_forget)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    with LiveBytes([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        loss = forward()
        kept = live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    return float(kept), float(live.peak)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still alive; `known` ones are not counted."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.held = [tensor.untyped_storage() for tensor in known]
        self.places = {storage._cdata for storage in self.held}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.places:
            return
        self.places.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, place: int, size: int) -> None:
        self.places.discard(place)
        self.now -= size


def peak_flops(bf16: bool, side: int = 2048) -> float:
    """FLOP/s of a square matrix product on this machine."""
    a = torch.rand(side, side, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * side**3 / min(_seconds(lambda: a @ a) for _ in range(4))


def seconds_per_weight(count: int = 2**24) -> float:
    """Time that clipping and fused AdamW take for each weight on this machine."""
    weight = nn.Parameter(torch.zeros(count))
    weight.grad = torch.ones(count)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def step() -> None:
        gradient_norm([weight], clip=1.0)
        optimizer.step()

    step()
    return min(_seconds(step) for _ in range(3)) / count


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
