"""The one training loop.

Everything random in a step depends on the seed and the step alone, so a resumed run continues as if it
had never stopped, and any number of workers sees the same batches.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from samssl.config import UserError
from samssl.models.checkpoints import trained_tensors
from samssl.models.recompute import choose_block_mode, why_not_compiled
from samssl.train.alarms import loss_alarms, sound
from samssl.train.context import RunContext, State
from samssl.train.distributed import gathered, gradient_norm, is_sharded, mean_over_ranks, whole
from samssl.train.feed import (
    Batch,
    KeyedDataset,
    Order,
    Shuffled,
    batch_draws,
    batches,
    sample_key,
    say_draws,
)
from samssl.train.optim import FitConfig, WeightAverage, build_optimizer, learning_rate, peak_lr, uses_bf16
from samssl.train.progress import Progress, RateMeter, log
from samssl.train.resume import put_buffers, put_optimizer, put_trained, running_buffers


@dataclass(frozen=True)
class Validation:
    """What one validation found; the score is better when it is higher."""

    score: float
    metrics: dict[str, float]
    alarms: dict[str, str] = field(default_factory=dict)
    """Name and sentence of what is wrong; each is told once in a run."""


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
    `initial` is a state that an earlier `fit` returned: a fresh run goes on from its step, weights and
    optimizer as if it were its own.

    Returns the state that was saved last: `weights` after the last step (their average where
    `ema_decay` is given; then `raw_weights` are those that train), with the statistics of batch norms;
    `optimizer`; and `progress` with the history and, where `keep_best`, the weights of the best
    validation.

    Raises:
        UserError: more than `max_skipped` steps in a row had a loss or gradient that is no number.
    """
    order = order or Shuffled(len(data))
    run = _Run.start(model, validate, fit_config, context, initial)
    meter = RateMeter(run.progress.step, fit_config, context)
    for step, batch in meter.timed(batches(data, order, fit_config, context, start=run.progress.step)):
        if run.is_over():
            break
        losses = run.train_step(step, batch, on_device)
        run.progress.step = step + 1
        if run.progress.skipped_in_row > fit_config.max_skipped:
            raise UserError(_why_stopped(run.progress, data, order, fit_config))
        meter.update(run.progress, losses)
        run.validate_and_save()
    return run.state


@dataclass
class _Run:
    """What one call of `fit` holds."""

    model: nn.Module
    trained: nn.Module
    """`model` as gradients are computed: in DDP's wrapping where there are several workers."""
    optimizer: torch.optim.AdamW
    average: WeightAverage | None
    validate: Callable[[int], Validation]
    progress: Progress
    config: FitConfig
    context: RunContext
    state: State = field(default_factory=dict)
    """What was saved last, once nothing is left to do."""

    @classmethod
    def start(
        cls,
        model: nn.Module,
        validate: Callable[[int], Validation],
        fit_config: FitConfig,
        context: RunContext,
        initial: State | None,
    ) -> "_Run":
        """At the last state that was saved; where there is none at `initial`, or validated and saved anew."""
        _choose_block_mode(model, fit_config, context)
        trained = context.prepare_model(model)
        model = trained.module if isinstance(trained, nn.parallel.DistributedDataParallel) else trained
        optimizer = build_optimizer(model, fit_config)
        saved = context.restore()
        run = cls(model, trained, optimizer, None, validate, Progress(), fit_config, context)
        if saved or initial:
            run._resume(saved or initial or {})
        if run.average is None and fit_config.ema_decay:
            run.average = WeightAverage(model, fit_config.ema_decay)
        if saved:
            run.state = saved if run.is_finished() else {}
        else:
            context.log({"peak_lr": peak_lr(fit_config)}, run.progress.step)
            if not initial:
                run._validate()
            run.progress.validations_since_best = 0
            run._save()
        return run

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.progress.step >= self.config.steps or self.is_over()

    def is_over(self) -> bool:
        """Whether the score has not got better for as long as `patience` says."""
        return bool(self.config.patience) and self.progress.validations_since_best >= self.config.patience

    def train_step(
        self, step: int, batch: Batch, on_device: Callable[[Batch], Batch]
    ) -> dict[str, float] | None:
        """One optimizer step; None where it was skipped, on every rank alike."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config) * group["lr_scale"]
        self.trained.train()
        torch.manual_seed(sample_key(self.config.seed, step))
        self.optimizer.zero_grad(set_to_none=True)
        buffers = {name: value.clone() for name, value in running_buffers(self.model).items()}
        losses = mean_over_ranks(self._backward(batch, on_device), self.context.device)
        if not (math.isfinite(losses["loss"]) and math.isfinite(self._clip())):
            self.progress.skipped += 1
            self.progress.skipped_in_row += 1
            put_buffers(self.model, buffers)
            return None
        self.progress.skipped_in_row = 0
        self.optimizer.step()
        if self.average:
            self.average.update()
        return losses

    def _backward(self, batch: Batch, on_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """Gradients of the mean loss over this worker's share, part by part; the mean of each loss."""
        device, parts = self.context.device, self.config.accumulate
        sums: dict[str, float] = {}
        for part in range(parts):
            piece = {name: value.chunk(parts)[part] for name, value in batch.items()}
            piece = on_device({name: value.to(device, non_blocking=True) for name, value in piece.items()})
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(self.config, device)):
                _synchronise_gradients(self.trained, part == parts - 1)
                losses = self.trained(piece)
            (losses["loss"] / parts).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().item() / parts
        return sums

    def _clip(self) -> float:
        """The gradient's norm over all parameters, before it is clipped."""
        return gradient_norm(list(self.model.parameters()), self.config.clip_norm)

    def validate_and_save(self) -> None:
        """Whatever is due at the current step; at the last one both."""
        step, every = self.progress.step, self.config.validate_every
        last = step == self.config.steps
        if step % every == 0 or last:
            self._validate()
        if step % (self.config.save_every or every) == 0 or last or self.is_over():
            self._save()

    def _validate(self) -> None:
        """Validate at the current step, and remember the weights if they are the best so far."""
        self.model.eval()
        progress = self.progress
        with self._to_export():
            with torch.no_grad(), whole(self.model):
                validation = self.validate(progress.step)
            log(progress, validation.metrics, self.context)
            sound(progress, loss_alarms(progress, self.config) | validation.alarms, self.context)
            progress.validations_since_best += 1
            if validation.score > progress.best_score:
                progress.best_score, progress.best_step = validation.score, progress.step
                progress.best_weights = gathered(trained_tensors(self.model)) if self.config.keep_best else {}
                progress.validations_since_best = 0

    def _save(self) -> None:
        """Copy the state and hand it over to be kept."""
        progress = dict(vars(self.progress))
        progress |= {
            "history": list(self.progress.history),
            "recent_losses": list(self.progress.recent_losses),
        }
        with self._to_export():
            weights = gathered(trained_tensors(self.model))
        raw = gathered(trained_tensors(self.model)) if self.average else {}
        optimizer = gathered(self.optimizer.state_dict())
        state = {"weights": weights, "raw_weights": raw}
        state |= {"optimizer": optimizer, "progress": progress}
        reached = {"step": float(self.progress.step), "score": self.progress.best_score}
        self.context.save(state, reached)
        self.state = state if self.is_finished() else {}

    def _resume(self, state: State) -> None:
        self.progress = Progress(**state["progress"])
        self.progress.history = list(self.progress.history)
        self.progress.recent_losses = list(self.progress.recent_losses)
        put_trained(self.model, state["weights"])
        if self.config.ema_decay:
            self.average = WeightAverage(self.model, self.config.ema_decay)  # of what is in place now
        if state.get("raw_weights"):
            put_trained(self.model, state["raw_weights"])
        put_optimizer(self.optimizer, state["optimizer"])

    def _to_export(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are validated and exported."""
        return self.average.in_place() if self.average else nullcontext()


def _choose_block_mode(model: nn.Module, fit_config: FitConfig, context: RunContext) -> None:
    reason = why_not_compiled(context.device) if fit_config.compile else None
    if reason and context.rank == 0:
        print(reason, flush=True)
    choose_block_mode(
        model, recompute=fit_config.checkpoint_activations, compiled=fit_config.compile and not reason
    )


def _synchronise_gradients(trained: nn.Module, now: bool) -> None:
    """Let only the last part of a step add up gradients over the workers."""
    if isinstance(trained, nn.parallel.DistributedDataParallel):
        trained.require_backward_grad_sync = now
    elif is_sharded(trained):
        trained.set_requires_gradient_sync(now)  # pyright: ignore[reportCallIssue]


def _why_stopped(progress: Progress, data: KeyedDataset, order: Order, fit_config: FitConfig) -> str:
    """The sentence that names the slices of the steps that were skipped last."""
    last = progress.step - 1
    first = last - progress.skipped_in_row + 1
    size = fit_config.batch_size
    draws = batch_draws(order, first * size, (last - first + 1) * size, fit_config.seed)
    return (
        f"The loss or its gradient was no number in {last - first + 1} steps in a row (steps {first} to "
        f"{last}). {say_draws(data, draws)} If the slices are sound, lower optim.lr or raise "
        "optim.warmup_steps; optim.max_skipped says how many such steps in a row are passed over. Give "
        "another `out`."
    )
