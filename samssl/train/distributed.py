"""Training on several processes: fully sharded parameters (FSDP), and states gathered from them.

Each encoder block is a unit of its own: its weights are whole only while it runs, forwards and backwards.
A saved state is always whole, so that any number of workers, sharded or not, goes on from it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from samssl.models.recompute import encoder_blocks, expose_as_forward


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` in place, with parameters shared out among all processes.

    The encoder runs the insides of its blocks itself and not `block.forward`, so that sharding hooks the
    method that `run_block` goes through.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in encoder_blocks(model):
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, expose_as_forward(block))
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    # Whatever runs first becomes the root, and that would be a part where validation comes before training.
    model._get_fsdp_state()._lazy_init()  # pyright: ignore[reportCallIssue]
    return model


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Ordinary, whole parameters inside, whatever calls them; without gradients."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, and any other tensor itself; it shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any) -> Any:
    """A copy on the CPU of every tensor in lists and dicts, sharded ones made whole. Every rank calls it.

    Only rank 0 keeps whole copies of what was sharded; the others get empty tensors.
    """
    if isinstance(value, Tensor):
        return _gather(value)
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(item) for item in value)
    return value


def _gather(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu().clone()
    full = tensor.full_tensor().detach()
    return full.cpu().clone() if dist.get_rank() == 0 else full.new_empty(0, device="cpu")


def scattered(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor shared out as `like` is; as it is where `like` is no sharded tensor of its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    device = like.to_local().device
    return distribute_tensor(tensor.to(device), like.device_mesh, like.placements, src_data_rank=None)


def gradient_norm(parameters: list[nn.Parameter], clip: float) -> float:
    """Norm of the whole gradient, which is scaled down to the norm `clip` where that is not 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return float(norm)


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each value's mean over all ranks; NaN where it is none on one of them. Every rank calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float32, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, (sums / dist.get_world_size()).tolist(), strict=True))


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been at work."""
    return isinstance(model, FSDPModule)
