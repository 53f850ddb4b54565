"""How weights are optimised: the settings of a run, AdamW, the learning rate, their average, precision."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import nn

from samssl.config import BelowOne, Count, NonNegative, PositiveFloat, PositiveInt, config
from samssl.train.distributed import local


@config
class FitConfig:
    """Optimisation of one run."""

    steps: Count = 1000
    """Optimizer steps. 0 leaves the initial weights as they are."""
    batch_size: PositiveInt = 16
    """Slices per step, over all workers together."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW, at a batch of `lr_batch_size` if that is given."""
    lr_batch_size: Count = 0
    """The batch that `lr` is meant for: the peak is lr * batch_size / lr_batch_size; 0 does not scale."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Each encoder block learns at this multiple of the rate of the block after it; 1 treats all alike."""
    warmup_steps: Count = 50
    """Steps over which the learning rate rises linearly to `lr`."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """How the learning rate falls to 0 after the warm-up: half a cosine, or (1 - progress) ** 0.9."""
    weight_decay: NonNegative = 0.05
    """AdamW's decay of matrices and convolution kernels; norms, biases and positions are not decayed."""
    beta2: BelowOne = 0.95
    """AdamW's second momentum; the first is 0.9."""
    clip_norm: NonNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    max_skipped: Count = 10
    """Steps with a loss or gradient that is no number are skipped; after more than so many in a row, stop."""
    ema_decay: BelowOne = 0.0
    """Decay of a running average of the weights, which is then what is validated and exported; 0 is off."""
    accumulate: PositiveInt = 1
    """Parts into which a worker splits its share of a batch, one forward and backward pass each."""
    checkpoint_activations: bool = False
    """Keep only each encoder block's input, and compute the block again in the backward pass."""
    compile: bool = False
    """Compile the encoder blocks with torch.compile; the first steps take minutes longer."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass. `auto`: bf16 on a GPU, fp32 on a CPU."""
    log_every: PositiveInt = 20
    """Steps between logged training losses."""
    validate_every: PositiveInt = 200
    """Steps between validations."""
    save_every: Count = 0
    """Steps between saved states to resume from; 0 saves at each validation."""
    patience: Count = 0
    """Stop after this many validations without a better score; 0 never stops early."""
    keep_best: bool = True
    """Keep the weights of the best validation beside the last ones."""
    loader_workers: Count = 0
    """Processes per worker that read and augment slices; 0 reads in the training process."""
    seed: Count = 0
    """Seed of batches, augmentation, masks and new layers."""

    def check_workers(self, workers: int) -> None:
        """Refuse a batch that so many workers cannot share equally, in `accumulate` parts each."""
        if self.batch_size % workers:
            raise ValueError(
                f"optim.batch_size {self.batch_size} cannot be shared by resources.workers {workers}; "
                f"choose a multiple of {workers}"
            )
        if self.batch_size // workers % self.accumulate:
            raise ValueError(
                f"optim.accumulate {self.accumulate} does not divide the {self.batch_size // workers} slices "
                f"of each worker; choose optim.batch_size as a multiple of {workers * self.accumulate}"
            )


def build_optimizer(model: nn.Module, fit_config: FitConfig) -> torch.optim.AdamW:
    """AdamW over what trains: weight decay on matrices and kernels only, lower rates at lower depths.

    A group's `lr_scale` is its share of `learning_rate`.
    """
    scales = layer_scales(model, fit_config.layer_decay)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = {}
    for scale in sorted({scales[name] for name, _ in named} or {1.0}, reverse=True):
        for weight_decay in (fit_config.weight_decay, 0.0):
            groups[scale, weight_decay > 0] = {
                "params": [],
                "weight_decay": weight_decay,
                "lr_scale": scale,
            }
    for name, parameter in named:
        decays = is_decayed(name, parameter) and fit_config.weight_decay > 0
        groups[scales[name], decays]["params"].append(parameter)
    fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return torch.optim.AdamW(
        list(groups.values()), lr=peak_lr(fit_config), betas=(0.9, fit_config.beta2), fused=fused
    )


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """For every parameter `decay` to the power of how many layers lie between it and the encoder's end."""
    depths = {name: _depth(name) for name, _ in model.named_parameters()}
    top = max((depth for depth in depths.values() if depth is not None), default=0) + 1
    return {name: decay ** (0 if depth is None else top - depth) for name, depth in depths.items()}


def _depth(name: str) -> int | None:
    """0 for the embedding, i + 1 for encoder block i (of TinyViT: layer i), None for all that follows."""
    if re.search(r"\bimage_encoder\.(patch_embed|pos_embed)\b", name):
        return 0
    block = re.search(r"\bimage_encoder\.(?:blocks|layers)\.(\d+)\.", name)
    return int(block[1]) + 1 if block else None


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels decay; norms, biases, position terms and learnt tokens do not."""
    learnt_inputs = ("pos_embed", "rel_pos", "attention_biases", "mask_token", "iou_token")
    return parameter.ndim >= 2 and not any(part in name for part in learnt_inputs)


def peak_lr(fit_config: FitConfig) -> float:
    """The highest learning rate: `lr`, scaled linearly to the batch where `lr_batch_size` is given."""
    if not fit_config.lr_batch_size:
        return fit_config.lr
    return fit_config.lr * fit_config.batch_size / fit_config.lr_batch_size


def learning_rate(step: int, fit_config: FitConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0, at the encoder's end and beyond it."""
    lr = peak_lr(fit_config)
    if step < fit_config.warmup_steps:
        return lr * (step + 1) / fit_config.warmup_steps
    progress = (step - fit_config.warmup_steps) / max(1, fit_config.steps - fit_config.warmup_steps)
    if fit_config.schedule == "poly":
        return lr * (1 - progress) ** 0.9
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def uses_bf16(fit_config: FitConfig, device: torch.device) -> bool:
    """Whether the forward pass runs in bf16 autocast."""
    return fit_config.precision == "bf16" or (fit_config.precision == "auto" and device.type == "cuda")


class WeightAverage:
    """Exponential moving average of the weights that train."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = {name: local(p) for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: value.clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights of a finished step."""
        weights = list(self.live.values())
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the model's place, and the weights that train back in it afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.live.items():
            kept = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)
