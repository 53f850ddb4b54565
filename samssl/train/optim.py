"""How weights are optimised: the settings of a run, AdamW, the learning rate, precision."""

import math
from typing import Literal

import torch
from torch import nn

from samssl.config import BelowOne, Count, NonNegative, PositiveFloat, PositiveInt, config


@config
class FitConfig:
    """Optimisation of one run."""

    steps: Count = 1000
    """Optimizer steps. 0 leaves the initial weights as they are."""
    batch_size: PositiveInt = 16
    """Slices per step, over all workers together."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass. `auto`: bf16 on a GPU, fp32 on a CPU."""
    log_every: PositiveInt = 20
    """Steps between logged training losses."""
    validate_every: PositiveInt = 200
    """Steps between validations; each one also saves the state to resume from."""
    patience: Count = 0
    """Stop after this many validations without a better score; 0 never stops early."""
    keep_best: bool = True
    """Keep the weights of the best validation beside the last ones."""
    loader_workers: Count = 0
    """Processes per worker that read and augment slices; 0 reads in the training process."""
    seed: Count = 0
    """Seed of batches, augmentation, masks and new layers."""

    def check_workers(self, workers: int) -> None:
        """Refuse a batch that so many workers cannot share equally."""
        if self.batch_size % workers:
            raise ValueError(
                f"optim.batch_size {self.batch_size} cannot be shared by resources.workers {workers}; "
                f"choose a multiple of {workers}"
            )


def build_optimizer(model: nn.Module, fit_config: FitConfig) -> torch.optim.AdamW:
    """AdamW over what trains, with weight decay on matrices and kernels only."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if is_decayed(name, parameter)]
    others = [parameter for name, parameter in named if not is_decayed(name, parameter)]
    groups = [
        {"params": decayed, "weight_decay": fit_config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=fit_config.lr, betas=(0.9, fit_config.beta2))


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels decay; norms, biases, position terms and learnt tokens do not."""
    learnt_inputs = ("pos_embed", "rel_pos", "attention_biases", "mask_token", "iou_token")
    return parameter.ndim >= 2 and not any(part in name for part in learnt_inputs)


def learning_rate(step: int, fit_config: FitConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    if step < fit_config.warmup_steps:
        return fit_config.lr * (step + 1) / fit_config.warmup_steps
    progress = (step - fit_config.warmup_steps) / max(1, fit_config.steps - fit_config.warmup_steps)
    if fit_config.schedule == "poly":
        return fit_config.lr * (1 - progress) ** 0.9
    return fit_config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def uses_bf16(fit_config: FitConfig, device: torch.device) -> bool:
    """Whether the forward pass runs in bf16 autocast."""
    return fit_config.precision == "bf16" or (fit_config.precision == "auto" and device.type == "cuda")
