"""How an encoder runs its blocks: plainly, computed again in the backward pass, compiled, or sharded.

The encoder's loop asks `run_block`; the training loop says how, block by block.
"""

import functools
import importlib.util
import os
import re
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BLOCK = re.compile(r"(^|\.)image_encoder\.(blocks|layers)\.\d+$")


def run_block(block: nn.Module, function: Callable[..., Tensor], tokens: Tensor, *rest: object) -> Tensor:
    """`function(block, tokens, *rest)`, in the way that was chosen for `block`."""
    run = getattr(block, "run_as_forward", None)
    return run(function, tokens, *rest) if run else _run(block, function, tokens, *rest)


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks (of TinyViT: the stages) of the image encoder inside `model`."""
    return [module for name, module in model.named_modules() if BLOCK.search(name)]


def choose_block_mode(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """From now on recompute and compile every encoder block of `model`, or do not."""
    for block in encoder_blocks(model):
        setattr(block, "recomputed", recompute)  # noqa: B010
        setattr(block, "compiled", compiled)  # noqa: B010


def expose_as_forward(block: nn.Module) -> str:
    """Give `block` a method through which `run_block` goes; its name, for those who hook methods (FSDP)."""
    setattr(block, "run_as_forward", types.MethodType(_run, block))  # noqa: B010
    return "run_as_forward"


def why_not_compiled(device: torch.device) -> str | None:
    """A sentence where torch.compile cannot work on this machine, None where it can."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler):
        return "optim.compile is left out: there is no C++ compiler. Install g++, or set CXX to one."
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "optim.compile is left out: the package triton, which compiles for GPUs, is not installed."
    return None


def _run(block: nn.Module, function: Callable[..., Tensor], tokens: Tensor, *rest: object) -> Tensor:
    if getattr(block, "compiled", False):
        function = _compiled(function)
    if getattr(block, "recomputed", False) and torch.is_grad_enabled():
        once = lambda: (nullcontext(), _statistics_left(block))  # noqa: E731
        return checkpoint(function, block, tokens, *rest, use_reentrant=False, context_fn=once)
    return function(block, tokens, *rest)


@contextmanager
def _statistics_left(block: nn.Module) -> Iterator[None]:
    """Inside, batch norms do not gather statistics: they did so when the block ran first."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: value.clone() for name, value in norm.named_buffers(recurse=False)})
    try:
        yield
    finally:  # recomputation stops by an exception as soon as it has what it needs
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)
