"""Putting a saved state back, into whole parameters and into sharded ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samssl.models.checkpoints import CheckpointError, trained_tensors
from samssl.train.distributed import scattered


def put_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole `weights` into what `trained_tensors` names.

    Raises:
        CheckpointError: names or shapes are not those of the parameters.
    """
    tensors = trained_tensors(model)
    wrong = sorted(tensors.keys() ^ weights.keys()) + [
        name for name in tensors.keys() & weights.keys() if tensors[name].shape != weights[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"The saved state does not fit the model: {', '.join(wrong[:8])}. Give another `out`, or the "
            "model and method that it was saved from."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(scattered(weights[name], tensor))


def put_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load `optimizer.state_dict()` as it was saved: whole tensors, in the order of the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shared_out = {
        index: {name: scattered(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shared_out})


def running_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What batch norms gather while they train, by name."""
    return {
        f"{name}.{own}": buffer
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for own, buffer in module.named_buffers(recurse=False)
    }


def put_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `values` of `running_buffers` back."""
    buffers = running_buffers(model)
    with torch.no_grad():
        for name, value in values.items():
            buffers[name].copy_(value)
