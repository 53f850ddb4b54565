"""Weights in Meta's format: loaded whole or not at all, written whole or not at all."""

import errno
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samssl.config import UserError
from samssl.files import written_aside


class CheckpointError(UserError):
    """Weights that do not fit the model they were given for."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors` file or a `torch.save` file, read without unpickling code.

    A `{"model": ...}` or `{"state_dict": ...}` wrapping, as training scripts write it, is opened.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {path}. Check model.checkpoint.") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as model weights ({reason}). "
            "Give a file of plain tensors: a SAM .pth as Meta publishes it, or .safetensors."
        ) from None
    for wrapping in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors. Give a SAM-format checkpoint.")
    return dict(content)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load `weights` into `module`, every key and shape or none of them.

    Raises:
        CheckpointError: as `check_fit`; `module` is unchanged.
    """
    check_fit(module, weights, source)
    module.load_state_dict(weights, strict=True)


def check_fit(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Whether keys and shapes are those of `module`, which may lie on the meta device.

    Raises:
        CheckpointError: listing missing, unexpected and mis-shaped keys by name.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    misshaped = [
        f"{key} is {_shape(weights[key])}, needs {_shape(own[key])}"
        for key in sorted(own.keys() & weights.keys())
        if own[key].shape != weights[key].shape
    ]
    if missing or unexpected or misshaped:
        raise CheckpointError(
            f"{source} does not fit this model, and nothing was loaded."
            + _list("missing", missing)
            + _list("unexpected", unexpected)
            + _list("of another shape", misshaped)
            + _likely_variant(weights)
        )


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the state dict of `module` with Meta's key names; `path` is whole or untouched."""
    weights = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    if path.suffix == ".safetensors":
        save_tensors(weights, path)
    else:
        save_state(weights, path)


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, whole or not at all; the same content gives the same bytes.

    Raises:
        OSError: the disk is full, or `path` cannot be written.
    """
    with written_aside(path) as partial, partial.open("wb") as file:  # a stream: its name is not stored
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a failed write
            raise OSError(
                errno.EIO, f"Writing failed, probably because the disk is full ({error})", str(path)
            ) from None


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a `.safetensors` file, `metadata` in its header, whole or not at all.

    Raises:
        OSError: the disk is full, or `path` cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_aside(path) as partial:
        try:
            plain = {name: value.contiguous() for name, value in tensors.items()}
            save_file(plain, partial, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise OSError(
                errno.EIO, f"Writing failed, probably because the disk is full ({error})", str(path)
            ) from None


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values: the same weights in any file format give the same."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {_shape(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains, and the buffers of the modules they belong to, by name.

    Such buffers change with training too: the statistics that batch norms gather.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    owners = {name.rpartition(".")[0] for name in trained}
    saved = model.state_dict().keys()
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[0] in owners and name in saved
    }
    return {**trained, **buffers}


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` into the parameters and buffers of these names; the rest of `model` is left as it is.

    Raises:
        CheckpointError: a name or a shape is not the model's.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wrong = [
        name for name, value in weights.items() if name not in tensors or tensors[name].shape != value.shape
    ]
    if wrong:
        raise CheckpointError(f"These tensors do not fit the model: {', '.join(wrong[:8])}.")
    with torch.no_grad():
        for name, value in weights.items():
            tensors[name].copy_(value)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"


def _list(what: str, keys: Iterable[str], limit: int = 12) -> str:
    keys = list(keys)
    more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"\n  {what} ({len(keys)}): {', '.join(keys[:limit])}{more}" if keys else ""


def _likely_variant(weights: Mapping[str, Tensor]) -> str:
    widths = {128: "micro", 768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    if "image_encoder.norm_head.weight" in weights:
        return "\nIts encoder is MobileSAM's: check that model.variant is vit_t."
    position = weights.get("image_encoder.pos_embed")
    if position is None or position.ndim != 4 or position.shape[-1] not in widths:
        return "\nIt is no SAM checkpoint: those have keys image_encoder., prompt_encoder. and mask_decoder."
    return f"\nIts encoder is as wide as {widths[position.shape[-1]]}: check model.variant."
