"""The one training loop.

Everything random in a step depends on the seed and the step alone, so a resumed run continues as if it
had never stopped, and any number of workers sees the same batches.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from samssl.config import BelowOne, Count, NonNegative, PositiveFloat, PositiveInt, UserError, config
from samssl.models.checkpoints import put_weights, trained_weights
from samssl.train.context import RunContext, State


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


class KeyedDataset(Protocol):
    """A dataset whose items are drawn by `(index, key)`; all randomness of an item comes from its key."""

    def __len__(self) -> int:
        """Number of different items."""
        ...

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        """Item `index` as the draw `key` varies it."""
        ...


@dataclass(frozen=True)
class Validation:
    """What one validation found; the score is better when it is higher."""

    score: float
    metrics: dict[str, float]


@dataclass
class Progress:
    """How far a run has come, as it is saved."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    validations_since_best: int = 0
    history: list[tuple[int, str, float]] = field(default_factory=list)
    """(step, metric, value) of everything logged."""
    recent_losses: list[dict[str, float]] = field(default_factory=list)
    """Training losses since they were logged last."""


def fit(
    model: nn.Module,
    data: KeyedDataset,
    validate: Callable[[int], Validation],
    fit_config: FitConfig,
    context: RunContext,
) -> State:
    """Train the parameters of `model` that require gradients; `model(batch)` gives a dict with `loss`.

    `validate` is called on every rank with the step, and reads the same `model`.

    Returns the state that was saved last: `weights` after the last step, `optimizer`, and `progress`
    with the history and, where `keep_best`, the weights of the best validation.
    """
    model = model.to(context.device)
    optimizer = build_optimizer(model, fit_config)
    state = context.restore()
    progress = _resume(state, model, optimizer) if state else Progress()
    if state is None:
        state = _validate_and_save(model, optimizer, validate, progress, fit_config, context)
    trained = context.prepare_model(model)
    meter = RateMeter(progress.step, fit_config, context)
    for step, batch in _batches(data, fit_config, context, start=progress.step):
        if _is_over(progress, fit_config):
            break
        losses = _train_step(trained, batch, optimizer, step, fit_config, context)
        progress.step = step + 1
        meter.update(progress, losses, optimizer.param_groups[0]["lr"])
        if progress.step % fit_config.validate_every == 0 or progress.step == fit_config.steps:
            state = _validate_and_save(model, optimizer, validate, progress, fit_config, context)
    return state


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
    learnt_input = any(part in name for part in ("pos_embed", "rel_pos", "mask_token", "iou_token"))
    return parameter.ndim >= 2 and not learnt_input


def learning_rate(step: int, fit_config: FitConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    if step < fit_config.warmup_steps:
        return fit_config.lr * (step + 1) / fit_config.warmup_steps
    progress = (step - fit_config.warmup_steps) / max(1, fit_config.steps - fit_config.warmup_steps)
    if fit_config.schedule == "poly":
        return fit_config.lr * (1 - progress) ** 0.9
    return fit_config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def batch_draws(length: int, position: int, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` draws `(index, key)` from place `position` of an endless stream of shuffled epochs."""
    draws = []
    for place in range(position, position + count):
        epoch, offset = divmod(place, length)
        draws.append((_epoch_order(length, epoch, seed)[offset], sample_key(seed, place)))
    return draws


def sample_key(seed: int, place: int) -> int:
    """A well-mixed 62-bit number from the seed and the place in the stream (splitmix64's finaliser)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) % 2**64
    return (mixed ^ (mixed >> 31)) >> 2


@functools.lru_cache(maxsize=2)
def _epoch_order(length: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(sample_key(seed, -1 - epoch))
    return torch.randperm(length, generator=generator).tolist()


class _Drawn(Dataset):
    """A view of a keyed dataset for `DataLoader`, which wants integers."""

    def __init__(self, data: KeyedDataset) -> None:
        self.data = data

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        return self.data[draw]


class _BatchSampler:
    """The draws of this rank, step by step."""

    def __init__(self, length: int, fit_config: FitConfig, context: RunContext, start: int) -> None:
        fit_config.check_workers(context.world_size)
        share = fit_config.batch_size // context.world_size
        self.length, self.config, self.start = length, fit_config, start
        self.first, self.share = context.rank * share, share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.config.steps):
            position = step * self.config.batch_size + self.first
            yield batch_draws(self.length, position, self.share, self.config.seed)


def _batches(
    data: KeyedDataset, fit_config: FitConfig, context: RunContext, start: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    sampler = _BatchSampler(len(data), fit_config, context, start)
    loader = DataLoader(
        _Drawn(data),
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
        num_workers=fit_config.loader_workers,
        pin_memory=context.device.type == "cuda",
    )
    return enumerate(loader, start=start)


def _train_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.AdamW,
    step: int,
    fit_config: FitConfig,
    context: RunContext,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, fit_config)
    model.train()
    torch.manual_seed(sample_key(fit_config.seed, step))
    batch = {name: value.to(context.device, non_blocking=True) for name, value in batch.items()}
    with torch.autocast(context.device.type, torch.bfloat16, enabled=uses_bf16(fit_config, context.device)):
        losses = model(batch)
    loss = losses["loss"]
    if not torch.isfinite(loss):
        raise UserError(
            f"The loss became {loss.item()} at step {step}. Lower optim.lr or raise optim.warmup_steps, "
            "and give another `out`."
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if fit_config.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), fit_config.clip_norm)
    optimizer.step()
    return {name: value.detach().item() for name, value in losses.items()}


def uses_bf16(fit_config: FitConfig, device: torch.device) -> bool:
    """Whether the forward pass runs in bf16 autocast."""
    return fit_config.precision == "bf16" or (fit_config.precision == "auto" and device.type == "cuda")


def _validate_and_save(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    validate: Callable[[int], Validation],
    progress: Progress,
    fit_config: FitConfig,
    context: RunContext,
) -> State:
    """Validate at the current step, remember the weights if they are the best so far, and save."""
    model.eval()
    with torch.no_grad():
        validation = validate(progress.step)
    _log(progress, validation.metrics, context)
    progress.validations_since_best += 1
    if validation.score > progress.best_score:
        progress.best_score, progress.best_step = validation.score, progress.step
        progress.best_weights = trained_weights(model) if fit_config.keep_best else {}
        progress.validations_since_best = 0
    state = {
        "weights": trained_weights(model),
        "optimizer": optimizer.state_dict(),
        "progress": dict(vars(progress)),
    }
    context.save(state, {"score": progress.best_score})
    return state


def _is_over(progress: Progress, fit_config: FitConfig) -> bool:
    return bool(fit_config.patience) and progress.validations_since_best >= fit_config.patience


def _log(progress: Progress, metrics: dict[str, float], context: RunContext) -> None:
    progress.history.extend((progress.step, name, value) for name, value in metrics.items())
    context.log(metrics, progress.step)


def _resume(state: State, model: nn.Module, optimizer: torch.optim.AdamW) -> Progress:
    put_weights(model, state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


class RateMeter:
    """Logs the training loss every `log_every` steps, and shows the rate and the time left."""

    def __init__(self, step: int, fit_config: FitConfig, context: RunContext) -> None:
        self.config, self.context = fit_config, context
        self.started, self.first = time.monotonic(), step

    def update(self, progress: Progress, losses: dict[str, float], lr: float) -> None:
        """Take in one finished step."""
        progress.recent_losses.append(losses)
        step, total = progress.step, self.config.steps
        if step % self.config.log_every and step != total:
            return
        means = {f"train/{name}": _mean([entry[name] for entry in progress.recent_losses]) for name in losses}
        progress.recent_losses.clear()
        rate = (step - self.first) / (time.monotonic() - self.started)
        _log(progress, {**means, "lr": lr}, self.context)
        self.context.log({"images_per_second": rate * self.config.batch_size}, step)
        left = _clock((total - step) / rate)
        text = f"loss {means['train/loss']:.4f}, {rate * self.config.batch_size:.0f} slices/s, {left} left"
        self.context.progress(step, total, text)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
