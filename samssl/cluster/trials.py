"""Many runs at once under Ray Tune: the jobs of a study, the trials of a sweep.

A run of one worker trains inside its trial, on the trial's own GPU; one of several workers starts Ray
Train from there. Every run has a folder of its own that says what is finished: a trial that is started
again, after a lost node or a killed driver, goes on from the last state in it.
"""

import os
import re
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from torch import nn

from samssl.cluster.launch import STATE_FILE, Executor, train
from samssl.cluster.live import TrialTable
from samssl.cluster.server import tracking_uri
from samssl.cluster.tasks import nodes, resources_at_most, start_ray
from samssl.cluster.tracking import Run
from samssl.config import UserError
from samssl.files import read_json, write_text
from samssl.models.checkpoints import save_state
from samssl.train.context import State
from samssl.train.memory import keep_freed_memory
from samssl.train.resources import ResourcesConfig

STEP, SCORE, ERROR = "step", "score", "error"
"""What trials report: steps done, the best validation so far, and why a run failed."""
ERROR_FILE = "error.txt"
RUN_FILE = "run_id.txt"
"""Beside a state: the MLflow run that it comes from."""
WAITING = {"memory": 1.0}
"""What a trial reserves that waits for its own Ray Train workers: something, for Tune asks for it."""

Point = dict[str, Any]
"""What tells one trial from the others."""


@dataclass(frozen=True)
class Job:
    """One run, or a few that follow each other, as one trial."""

    name: str
    """What it is called in tables; unique among the jobs that run together."""
    run: Callable[[Executor], Any]
    """Does the work, by an executor that suits the trial."""
    folder: Path
    """Where it writes; the error, if there is one, is left there too."""
    resources: ResourcesConfig
    stages: Sequence[Path] = ()
    """Folders of the stages that it goes through."""

    def is_finished(self) -> bool:
        """Whether every stage has finished, which checks no digests."""
        return bool(self.stages) and all(stage_status(folder) == "finished" for folder in self.stages)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    name: str
    point: Point = field(default_factory=dict)
    error: str | None = None
    """Why the run failed, in a sentence or the last line of its traceback."""
    step: int = 0
    score: float | None = None
    """The best validation, where the run trained anything."""
    seconds: float = 0.0
    trial: str = ""
    """Tune's id."""


def run_jobs(jobs: Sequence[Job], storage: Path, title: str, at_once: int = 0) -> list[Outcome]:
    """Run every job that is not finished, `at_once` at one time, or as many as the cluster holds.

    Finished jobs are called here, so that their stages check what they have against what is asked for.
    Tune's own files lie below `storage`, and are made anew by each call.
    """
    outcomes = [_run_here(job) for job in jobs if job.is_finished()]
    waiting = [job for job in jobs if not job.is_finished()]
    if waiting:
        space = {"job": tune.grid_search(list(range(len(waiting))))}
        trials = Trials(lambda point: waiting[point["job"]], storage, title, expected=len(waiting))
        share = cpu_share(len(jobs))  # of all jobs, so that a second call gives each what the first did
        limit = most_at_once([job.resources for job in waiting], share, at_once)
        outcomes += trials.run(space, tune.TuneConfig(max_concurrent_trials=limit), share)
    return outcomes


@dataclass(frozen=True)
class Trials:
    """Trials under Ray Tune, each a job that follows from its point."""

    job_of: Callable[[Point], Job]
    storage: Path
    """Tune's folder is made in it."""
    title: str
    expected: int
    """Number of trials, for the progress that is shown."""
    name: str = "tune"
    """Name of Tune's folder."""
    goes_on: bool = False
    """Whether Tune's own folder, with what its searcher has learnt, is taken up where there is one."""
    passes_state: bool = False
    """Whether states go through Tune, from which a scheduler hands them to other trials."""
    uri: str = field(default_factory=tracking_uri)
    """MLflow's server, by the driver's working directory and environment, which trials may not share."""

    def run(self, space: Point, settings: tune.TuneConfig, share: int) -> list[Outcome]:
        """Run the trials to their end; `share` is the CPUs of each where nothing else is asked for."""
        start_ray()
        trainable = tune.with_resources(
            tune.with_parameters(_trial, trials=self), lambda point: self._resources(point, share)
        )
        path = str(self.storage / self.name)
        if self.goes_on and tune.Tuner.can_restore(path):
            tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True)
        else:
            # A process that has all libraries loaded does one trial after the other.
            settings = replace(settings, trial_dirname_creator=_trial_id, reuse_actors=True)
            tuner = tune.Tuner(
                trainable, param_space=space, tune_config=settings, run_config=self._run_config()
            )
        try:
            return [self._outcome(result) for result in tuner.fit()]
        except (OSError, EOFError) as error:  # the latter from what Tune wrote of a failure and could not end
            free = shutil.disk_usage(self.storage).free
            raise UserError(
                f"Ray Tune's own files in {path} cannot be written or read ({error}); {free / 1e6:.0f} MB of "
                "its disk are free. Once there is room, the same command goes on from what is finished."
            ) from None

    def _run_config(self) -> tune.RunConfig:
        return tune.RunConfig(
            name=self.name,
            storage_path=str(self.storage.absolute()),
            failure_config=tune.FailureConfig(max_failures=2),  # lost nodes; errors are caught in the trial
            callbacks=[TrialTable(self.title, self.expected, self._name)],
            verbose=0,
        )

    def _resources(self, point: Point, share: int) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([trial_bundle(self.job_of(point).resources, share)])

    def _name(self, point: Point) -> str:
        return self.job_of(point).name

    def _outcome(self, result: tune.Result) -> Outcome:
        metrics, point = result.metrics or {}, result.config or {}
        error = metrics.get(ERROR) or (str(result.error).strip().splitlines()[-1] if result.error else None)
        score = metrics.get(SCORE)
        return Outcome(
            self._name(point),
            point,
            error,
            int(metrics.get(STEP, 0)),
            score if score is not None and np.isfinite(score) else None,
            float(metrics.get("time_total_s", 0.0)),
            Path(result.path).name,
        )


def _trial_id(trial: Any) -> str:
    """Name of a trial's folder of Tune, which is more to be relied on than ids in copied results."""
    return str(trial.trial_id)


def _trial(point: Point, trials: Trials) -> None:
    """In the trial's process: its job, whose failure is a result and never the end of the others."""
    os.environ["MLFLOW_TRACKING_URI"] = trials.uri
    job = trials.job_of(point)
    assigned = tune.get_context().get_trial_resources().required_resources
    torch.set_num_threads(max(1, int(assigned.get("CPU", 1))))
    if not assigned.get("GPU"):
        keep_freed_memory()
    inside = job.resources.workers == 1
    executor = Executor(Here(trials.passes_state), _call_here) if inside else NESTED
    try:
        job.run(executor)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        job.folder.mkdir(parents=True, exist_ok=True)
        write_text(job.folder / ERROR_FILE, traceback.format_exc())
        tune.report({ERROR: reason})
        return
    (job.folder / ERROR_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class Here:
    """Trains in the trial's own process; used as `samssl.cluster.launch.train`."""

    passes_state: bool = False
    reports: bool = True
    """Whether Tune hears of validations."""

    def __call__(
        self,
        task: Callable[[Any, "TrialContext"], State],
        config: Any,
        resources: ResourcesConfig,
        run: Run,
        storage: Path,
    ) -> State:
        """Train, from the last state below `storage` if there is one."""
        return task(config, TrialContext(run, storage, self))


def quietly(executor: Executor) -> Executor:
    """`executor` for work whose validations are not what the trial is judged by."""
    if isinstance(executor.train, Here):
        return replace(executor, train=replace(executor.train, reports=False))
    return replace(executor, train=train)


def _call_here(function: Callable[[Any], Any], argument: Any) -> Any:
    return function(argument)


def _train_nested(*arguments: Any) -> State:
    return train(*arguments, callbacks=[TuneReportCallback()])


NESTED = Executor(_train_nested, _call_here)
"""Ray Train workers that report to the trial they were started from; what follows runs in the trial."""


class TrialContext:
    """`samssl.train.context.RunContext` of a run of one worker, inside its trial."""

    rank = 0
    world_size = 1

    def __init__(self, run: Run, storage: Path, here: Here) -> None:
        gpu = tune.get_context().get_trial_resources().required_resources.get("GPU")
        self.device = torch.device("cuda" if gpu else "cpu")
        self.run, self.file, self.here = run, storage / STATE_FILE, here

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The model on the trial's device."""
        return model.to(self.device)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """To MLflow."""
        self.run.log_metrics(metrics, step)

    def picture(self, name: str, image: np.ndarray) -> None:
        """To MLflow's artifacts."""
        self.run.log_picture(name, image)

    def progress(self, step: int, total: int, text: str) -> None:
        """Nothing: the table of all trials shows how far each is."""

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """To the run's folder, and the metrics to Tune, whose scheduler may end the trial here."""
        save_state(state, self.file)
        write_text(self.file.with_name(RUN_FILE), self.run.run_id)
        checkpoint = tune.Checkpoint.from_directory(self.file.parent) if self.here.passes_state else None
        if self.here.reports:
            tune.report(metrics, checkpoint=checkpoint)

    def restore(self) -> State | None:
        """The last state of this run; where states go through Tune, the one that it hands over."""
        handed = tune.get_checkpoint() if self.here.passes_state else None
        if handed is not None:
            with handed.as_directory() as folder:
                donor = (Path(folder) / RUN_FILE).read_text()
                if donor != self.run.run_id:  # else it was only paused
                    self.run.set_tags({"continues": donor})
                return torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        if self.here.passes_state or not self.file.exists():
            return None
        return torch.load(self.file, map_location="cpu", weights_only=True)


def cpu_share(jobs: int) -> int:
    """CPUs of a trial that does not say how many: those that go with a GPU, or its part of a node's."""
    start_ray()
    found = nodes()
    with_gpus = [node for node in found if node.get("GPU", 0) >= 1]
    if with_gpus:
        return max(1, int(min(node.get("CPU", 1) // node["GPU"] for node in with_gpus)))
    at_once_a_node = -(-jobs // len(found))
    return max(1, int(min(node.get("CPU", 1) for node in found)) // at_once_a_node)


def trial_bundle(resources: ResourcesConfig, share: int) -> dict[str, float]:
    """What one trial reserves for itself."""
    if resources.workers > 1:
        return dict(WAITING)
    bundle = {"CPU": float(resources.cpus_per_worker or share)}
    return {**bundle, "GPU": 1.0} if _uses_gpu(resources) else bundle


def most_at_once(runs: Sequence[ResourcesConfig], share: int, asked: int = 0) -> int:
    """How many trials run at once: `asked`, or as many as the cluster holds of the largest.

    Raises:
        UserError: the cluster does not hold so many, with the sum written out.
    """
    start_ray()
    available = resources_at_most()
    need = _largest([_whole_need(resources, share) for resources in runs])
    fits = min(int(available.get(kind, 0) / amount) for kind, amount in need.items() if amount)
    wanted = asked or max(1, fits)
    if wanted > fits:
        sums = "; ".join(
            f"{wanted} x {amount:g} = {wanted * amount:g} {kind}s of {available.get(kind, 0):g}"
            for kind, amount in need.items()
            if amount
        )
        raise UserError(
            f"The cluster does not hold {wanted} trial(s) at once: {sums}. A trial needs its own share and "
            "that of its workers. Change workers, cpus_per_worker or use_gpu of `resources`, or ask for "
            "fewer trials at once."
        )
    return wanted


def _whole_need(resources: ResourcesConfig, share: int) -> dict[str, float]:
    """What a trial and the workers that it starts take together."""
    need = trial_bundle(resources, share)
    if resources.workers > 1:
        need = {"CPU": float(resources.workers * max(1, resources.cpus_per_worker))}
        need["GPU"] = float(resources.workers) if _uses_gpu(resources) else 0.0
    return need


def _largest(needs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: max(need.get(kind, 0.0) for need in needs) for kind in ("CPU", "GPU")}


def _uses_gpu(resources: ResourcesConfig) -> bool:
    if resources.use_gpu is not None:
        return resources.use_gpu
    return resources_at_most().get("GPU", 0) >= resources.workers


def _run_here(job: Job) -> Outcome:
    """A job that is finished, through its stages once more: they have nothing to do, or say what differs."""
    job.run(CHECK)
    return Outcome(job.name)


def _refuse(*_: Any) -> Any:
    raise UserError("The inputs of a finished run have changed while it was checked. Run this again.")


CHECK = Executor(_refuse, _refuse)
"""Of jobs that have nothing left to do."""


def stage_status(folder: Path) -> str | None:
    """How the stage in `folder` ended, or that it runs; None where there is none."""
    return stage_record(folder).get("status")


def stage_record(folder: Path) -> dict[str, Any]:
    """`run.json` of a stage's folder; empty where there is none that can be read."""
    try:
        return read_json(folder / "run.json")
    except (OSError, ValueError):
        return {}


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^\w.=,+-]+", "-", text).strip("-.")
