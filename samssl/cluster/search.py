"""Running the trials of a sweep: points that are known beforehand, or that Optuna or a population finds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch

from samssl.cluster.launch import Executor
from samssl.cluster.space import AxisConfig, Point, in_words, suggest
from samssl.cluster.stage import STOPPED, Place
from samssl.cluster.stages import run_finetune, run_pretrain
from samssl.cluster.sweep_design import (
    PRETRAIN,
    SweepConfig,
    finetune_of,
    point_folder,
    points_of,
    pretrain_of,
)
from samssl.cluster.tracking import Run
from samssl.cluster.trials import (
    SCORE,
    STEP,
    Job,
    Trials,
    cpu_share,
    most_at_once,
    quietly,
    run_jobs,
    stage_record,
)
from samssl.config import config_digest
from samssl.files import write_json

TRIAL = "trial"
"""In a point of a population: the id of its trial."""


def search(config: SweepConfig, place: Place) -> list[Point]:
    """Run the trials; every point that was tried."""
    points = points_of(config)
    if config.pretrain and (points or not any(name.startswith(PRETRAIN) for name in config.space)):
        jobs = {job.folder: job for point in points or [{}] for job in _pretrain_jobs(config, point, place)}
        run_jobs(list(jobs.values()), config.out, "pretrain", config.search.at_once)
    if config.search.method == "tpe":
        return _search_adaptively(config, place)
    if config.search.scheduler == "pbt":
        return _search_as_population(config, place)
    jobs = [_job(config, place, point, [seed]) for point in points for seed in config.seeds]
    if config.search.scheduler == "none":
        run_jobs(jobs, config.out, "trials", config.search.at_once)
    else:
        numbers = {"number": tune.grid_search(list(range(len(jobs))))}
        _run_with(config, lambda point: jobs[point["number"]], numbers, len(jobs))
    return points


def _search_adaptively(config: SweepConfig, place: Place) -> list[Point]:
    def job_of(point: Point) -> Job:
        return _job(config, place, point, config.seeds)

    sampler = optuna.samplers.TPESampler(seed=config.search.seed)
    searcher = OptunaSearch(partial(_propose, config.space), metric=SCORE, mode="max", sampler=sampler)
    return _run_with(config, job_of, {}, config.search.trials, searcher)


def _search_as_population(config: SweepConfig, place: Place) -> list[Point]:
    """Points by the end of each trial; a trial's folder changes with its settings."""

    def job_of(point: Point) -> Job:
        return _job(config, place, _named(point, tune.get_context().get_trial_id()), config.seeds)

    domains = {name: axis.domain() for name, axis in config.space.items()}
    return _run_with(config, job_of, domains, config.search.trials)


def _named(point: Point, trial: str | None) -> Point:
    """`point` with the id of its trial, which tells apart trials whose settings have become the same."""
    return {**point, TRIAL: trial} if trial else point


def _propose(space: dict[str, AxisConfig], trial: optuna.Trial) -> None:
    """Optuna keeps what was suggested itself."""
    suggest(trial, space)


def _run_with(
    config: SweepConfig,
    job_of: Callable[[Point], Job],
    space: Point,
    expected: int,
    searcher: OptunaSearch | None = None,
) -> list[Point]:
    """Trials whose searcher or scheduler remembers: a killed sweep goes on with what Tune has kept of it."""
    parts = {"space": config.space, "search": config.search, "seeds": config.seeds}
    name = f"tune-{config_digest(parts)[:8]}"
    population = config.search.scheduler == "pbt"
    trials = Trials(job_of, config.out, config.name, expected, name, goes_on=True, passes_state=population)
    share = cpu_share(expected)
    settings = tune.TuneConfig(
        num_samples=config.search.trials if searcher or population else 1,
        search_alg=searcher,
        scheduler=_scheduler(config),
        max_concurrent_trials=most_at_once([config.finetune.resources], share, config.search.at_once),
    )
    outcomes = trials.run(space, settings, share)
    _mark_stopped(config.out / "trials")
    points = [_named(outcome.point, outcome.trial if population else None) for outcome in outcomes]
    tried = {in_words(point): point for point in points}
    return [tried[name] for name in sorted(tried)]  # Tune's own order changes when it goes on


def _scheduler(config: SweepConfig) -> TrialScheduler:
    """What ends trials early; none of them ends one at its last step, where its bundle is not written yet."""
    search, optim = config.search, config.finetune.optim
    grace = search.grace_steps or optim.validate_every
    common: dict[str, Any] = {"time_attr": STEP, "metric": SCORE, "mode": "max"}
    if search.scheduler == "pbt":
        mutations: dict[str, Any] = {name: axis.domain() for name, axis in config.space.items()}
        return PopulationBasedTraining(
            perturbation_interval=grace, hyperparam_mutations=mutations, synch=False, **common
        )
    if search.scheduler == "asha":
        longest = optim.steps + 1
        return ASHAScheduler(max_t=longest, grace_period=grace, reduction_factor=search.reduction, **common)
    if search.scheduler == "hyperband":
        return HyperBandScheduler(max_t=optim.steps + 1, reduction_factor=search.reduction, **common)
    if search.scheduler == "median":
        return MedianStoppingRule(grace_period=grace, **common)
    return FIFOScheduler()


def _mark_stopped(trials: Path) -> None:
    """Close what a scheduler has ended, once nothing runs any more: nobody else will."""
    for file in trials.glob("*/seed*/run.json"):
        record = stage_record(file.parent)
        if record.get("status") == "running":
            write_json(file, record | {"status": STOPPED})
            Run(record["tracking_uri"], record["run_id"], file.parent).end("KILLED")


def _pretrain_jobs(config: SweepConfig, point: Point, place: Place) -> Iterator[Job]:
    for seed in config.seeds:
        pretrain = pretrain_of(config, point, seed)
        name = pretrain.out.relative_to(config.out).as_posix()
        work = partial(run_pretrain, pretrain, replace(place, seed=seed, name=name))
        yield Job(name, work, pretrain.out, pretrain.resources, [pretrain.out])


def _job(config: SweepConfig, place: Place, point: Point, seeds: Sequence[int]) -> Job:
    """The trial at one point, with one seed or with several after each other."""
    name = in_words(point) + (f", seed={seeds[0]}" if len(seeds) == 1 < len(config.seeds) else "")
    folder = point_folder(config, point)
    stages = [folder / f"seed{seed}" for seed in seeds]
    resources = finetune_of(config, point, seeds[0]).resources
    work = partial(_run_point, config, place, point, tuple(seeds))
    return Job(name, work, folder, resources, stages)


def _run_point(
    config: SweepConfig, place: Place, point: Point, seeds: Sequence[int], executor: Executor
) -> None:
    """In the trial: fine-tune with each seed, on a pretraining of its own where the search asks for it.

    The last report tells the mean over seeds. In a population it also tells the trial's own settings: one
    that took over a finished state validates nothing more, and Tune would show its donor's.
    """
    for seed in seeds:
        named = replace(place, seed=seed, name=f"{in_words(point)} seed{seed}")
        if (
            config.pretrain
            and not (pretrain := pretrain_of(config, point, seed)).out.joinpath("encoder.pth").exists()
        ):
            run_pretrain(pretrain, named, quietly(executor))
        run_finetune(finetune_of(config, point, seed), named, executor)
    if len(seeds) > 1 or config.search.scheduler == "pbt":
        scores = [
            stage_record(point_folder(config, point) / f"seed{seed}")["metrics"]["best/val_dice"]
            for seed in seeds
        ]
        tune.report({SCORE: fmean(scores), STEP: config.finetune.optim.steps})
