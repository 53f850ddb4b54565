"""The table of trials while they run: on a terminal it moves, in a log it is plain lines."""

import sys
import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

SECONDS_BETWEEN_LINES = 15.0
ROWS = 20
"""Trials in the table at one time, those that run first."""
STATES = {
    **{Trial.PENDING: "waits", Trial.RUNNING: "runs", Trial.PAUSED: "paused"},
    **{Trial.TERMINATED: "done", Trial.ERROR: "lost"},
}
"""Tune's words in ours."""


class TrialTable(tune.Callback):
    """Follows the trials of one experiment."""

    def __init__(self, title: str, expected: int, name_of: Callable[[dict[str, Any]], str]) -> None:
        self.title, self.expected, self.name_of = title, expected, name_of
        self.started = self.told = time.monotonic()
        self.trials: list[Trial] = []
        self.live: Live | None = None
        self.ended: set[str] = set()
        """Trials that Tune has called over, and not yet marked so."""

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial begins, or begins again."""
        self.ended.discard(trial.trial_id)
        self._show(trials)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has validated."""
        self._show(trials)
        if not sys.stdout.isatty() and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self._tell(trial)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial is over, or was ended by its scheduler; Tune says so of its state only after this."""
        self.ended.add(trial.trial_id)
        self._show(trials)
        if not sys.stdout.isatty():
            self._tell(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial was lost too often."""
        self.on_trial_complete(iteration, trials, trial)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Leave the last table standing."""
        self._show(trials)
        if self.live:
            self.live.stop()
            self.live = None

    def _tell(self, trial: Trial) -> None:
        self.told = time.monotonic()
        cells = [cell for cell in self._row(trial) if cell]
        print(f"{self.title}: {self._count()}; {', '.join(cells)}", flush=True)

    def _show(self, trials: list[Trial]) -> None:
        self.trials = trials
        if not sys.stdout.isatty():
            return
        if self.live is None:
            self.live = Live(refresh_per_second=2)
            self.live.start()
        self.live.update(self._page())

    def _page(self) -> Group:
        columns = ("run", "state", "progress", "best", "time")
        table = Table(*columns, title=self.title, caption=self._count(), expand=True)
        running_first = sorted(self.trials, key=lambda trial: trial.status != Trial.RUNNING)
        for trial in running_first[:ROWS]:
            table.add_row(*self._row(trial))
        return Group(table, ProgressBar(total=self.expected, completed=self._over()))

    def _over(self) -> int:
        return sum(trial.is_finished() or trial.trial_id in self.ended for trial in self.trials)

    def _count(self) -> str:
        over = self._over()
        return f"{over} of {self.expected} done{self._left(over)}"

    def _left(self, over: int) -> str:
        if not over or over >= self.expected:
            return ""
        minutes = (time.monotonic() - self.started) / over * (self.expected - over) / 60
        return f", about {minutes:.0f} min left"

    def _row(self, trial: Trial) -> tuple[str, str, str, str, str]:
        last = trial.last_result or {}
        status = trial.status
        if trial.trial_id in self.ended and status != Trial.ERROR:
            status = Trial.TERMINATED
        state = "failed" if last.get("error") else STATES[status]
        score = last.get("score")
        return (
            self.name_of(trial.config),
            state,
            f"step {last['step']:.0f}" if "step" in last else "",
            f"score {score:.4f}" if score is not None else "",
            f"{last['time_total_s']:.0f} s" if "time_total_s" in last else "",
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the terminal, for Tune keeps its callbacks in a file."""
        return vars(self) | {"live": None, "trials": []}
