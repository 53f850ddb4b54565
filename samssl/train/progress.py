"""How far a run has come, and what it tells about it."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from samssl.train.context import RunContext
from samssl.train.feed import Batch
from samssl.train.optim import FitConfig, learning_rate


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
    skipped: int = 0
    """Steps whose loss or gradient was no number, and which changed nothing."""
    skipped_in_row: int = 0
    """How many of them were the last ones."""


def log(progress: Progress, metrics: dict[str, float], context: RunContext) -> None:
    """Record metrics at the current step, in the run's own history too."""
    progress.history.extend((progress.step, name, value) for name, value in metrics.items())
    context.log(metrics, progress.step)


class RateMeter:
    """Logs the training loss every `log_every` steps, and shows the rate and the time left."""

    def __init__(self, step: int, fit_config: FitConfig, context: RunContext) -> None:
        self.config, self.context = fit_config, context
        self.started, self.first = time.monotonic(), step
        self.waited = self.worked = 0.0

    def timed(self, steps: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """The same steps, while the time until each has come is added up."""
        while True:
            asked = time.monotonic()
            step = next(steps, None)
            self.came = time.monotonic()
            self.waited += self.came - asked
            if step is None:
                return
            yield step

    def update(self, progress: Progress, losses: dict[str, float] | None) -> None:
        """Take in one finished step; `losses` is None where it was skipped."""
        self.worked += time.monotonic() - self.came
        if losses is not None:
            progress.recent_losses.append(losses)
        step, total = progress.step, self.config.steps
        if step % self.config.log_every and step != total:
            return
        recent = progress.recent_losses
        means = {f"train/{name}": _mean([entry[name] for entry in recent]) for name in (recent or [{}])[0]}
        recent.clear()
        lr = learning_rate(step - 1, self.config)
        log(progress, {**means, "lr": lr, "skipped_steps": float(progress.skipped)}, self.context)
        self._show(step, total, means.get("train/loss", math.nan))

    def _show(self, step: int, total: int, loss: float) -> None:
        rate = (step - self.first) / (time.monotonic() - self.started)
        wait_share = self.waited / (self.waited + self.worked)
        self.waited = self.worked = 0.0
        speed = {"images_per_second": rate * self.config.batch_size, "wait_share": wait_share}
        self.context.log(speed, step)
        left = _clock((total - step) / rate)
        text = f"loss {loss:.4f}, {rate * self.config.batch_size:.0f} slices/s, {left} left"
        self.context.progress(step, total, text)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
