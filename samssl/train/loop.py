"""The one training loop.

Everything random in a step depends on the seed and the step alone, so a resumed run continues as if it
had never stopped, and any number of workers sees the same batches.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from samssl.config import UserError
from samssl.models.checkpoints import put_weights, trained_weights
from samssl.train.context import RunContext, State
from samssl.train.feed import Batch, KeyedDataset, Order, Shuffled, batches, sample_key
from samssl.train.optim import FitConfig, build_optimizer, learning_rate, uses_bf16


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
    *,
    order: Order | None = None,
    on_device: Callable[[Batch], Batch] = lambda batch: batch,
    initial: State | None = None,
) -> State:
    """Train the parameters of `model` that require gradients; `model(batch)` gives a dict with `loss`.

    `validate` is called on every rank with the step, and reads the same `model`. `order` says which items
    an epoch shows (by default each once); `on_device` completes a batch that has reached the accelerator.
    `initial` is the state of an earlier run to go on from, where this one has none of its own yet.

    Returns the state that was saved last: `weights` after the last step, `optimizer`, and `progress`
    with the history and, where `keep_best`, the weights of the best validation.
    """
    model = model.to(context.device)
    optimizer = build_optimizer(model, fit_config)
    state = context.restore() or initial
    progress = _resume(state, model, optimizer) if state else Progress()
    if state is None:
        state = _validate_and_save(model, optimizer, validate, progress, fit_config, context)
    trained = context.prepare_model(model)
    meter = RateMeter(progress.step, fit_config, context)
    order = order or Shuffled(len(data))
    for step, batch in batches(data, order, fit_config, context, start=progress.step):
        if _is_over(progress, fit_config):
            break
        batch = on_device(
            {name: value.to(context.device, non_blocking=True) for name, value in batch.items()}
        )
        losses = _train_step(trained, batch, optimizer, step, fit_config, context)
        progress.step = step + 1
        meter.update(progress, losses, optimizer.param_groups[0]["lr"])
        if progress.step % fit_config.validate_every == 0 or progress.step == fit_config.steps:
            state = _validate_and_save(model, optimizer, validate, progress, fit_config, context)
    return state


def _train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.AdamW,
    step: int,
    fit_config: FitConfig,
    context: RunContext,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, fit_config)
    model.train()
    torch.manual_seed(sample_key(fit_config.seed, step))
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
