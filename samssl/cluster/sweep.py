"""A sweep: fine-tuning at many points of a search space, on the validation split; the best is tested once.

<out>/store/                           where the sweep prepares its data set itself
<out>/pretrain/<point>/seed<k>/        where it pretrains
<out>/trials/<point>/seed<k>/          a fine-tuning each
<out>/best/bundle, seed<k>/evaluate/   the best point's bundle, and its scores on the test split
<out>/trials.csv, best.json, report.html
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import optuna
import pandas as pd
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
from samssl.cluster.space import (
    AxisConfig,
    Point,
    check_conditions,
    drawn,
    field_value,
    grid,
    in_words,
    short_names,
    suggest,
)
from samssl.cluster.stage import Place, stage
from samssl.cluster.stages import run_evaluate, run_finetune, run_prepare, run_pretrain
from samssl.cluster.tracking import Run
from samssl.cluster.trials import SCORE, STEP, Job, Trials, cpu_share, most_at_once, quietly, run_jobs, slug
from samssl.config import Count, PositiveInt, UserError, config, config_digest, derive, overridden
from samssl.data.prepare import PrepareConfig
from samssl.evaluate import EvaluateConfig
from samssl.files import read_json, write_json, written_aside
from samssl.models.sam import ModelConfig
from samssl.models.strategies import follow_name, named_fields
from samssl.report.sweep import write_sweep_report
from samssl.train.finetune import FinetuneConfig
from samssl.train.pretrain import PretrainConfig

FINETUNE, PRETRAIN, TRIAL = "finetune.", "pretrain.", "trial"
STOPPED = "stopped"
"""Status of a run that its scheduler has ended before its last step."""


@config
class SearchConfig:
    """How points are chosen, and which of them are given up early."""

    method: Literal["grid", "random", "tpe"] = "grid"
    """`grid`: every combination; `random`: drawn beforehand; `tpe`: Optuna's tree-structured Parzen
    estimator, which learns from the trials before."""
    trials: PositiveInt = 20
    """Points of `random` and `tpe`."""
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """Ends trials early: `asha` and `hyperband` keep the best part at each of a few steps, `median` ends
    what is below the median of the others. `pbt` (population-based training, with `method` random) lets bad
    trials go on from the state of good ones, with settings changed a little."""
    grace_steps: Count = 0
    """No trial is ended before this step, and pbt changes settings as often; 0: at every validation."""
    reduction: PositiveInt = 3
    """Of so many trials, asha and hyperband let one go on."""
    at_once: Count = 0
    """Trials at one time; 0: as many as the cluster holds."""
    seed: Count = 0
    """Another seed, other points of `random` and `tpe`."""


@config
class SweepConfig:
    """Fine-tuning at many points of a search space.

    Folders and stores of the single stages follow from `out` and `name`.
    """

    name: str
    """Name of the sweep: the MLflow experiment."""
    out: Path
    """Folder of the sweep."""
    space: dict[str, AxisConfig]
    """Axes by the field they set, as finetune.strategy.lora.rank: {choice: [1, 2, 4]}; fields of
    `pretrain` too, where it is given."""
    search: SearchConfig = SearchConfig()
    """How the space is searched."""
    model: ModelConfig = ModelConfig()
    """What every trial starts from, and pretraining too; axes name its fields as finetune.model..."""
    prepare: PrepareConfig | None = None
    """Scans to slice store; null: `finetune.data.store` is there."""
    pretrain: PretrainConfig | None = None
    """Self-supervised pretraining that each fine-tuning starts from; null: `finetune.model` as it is."""
    finetune: FinetuneConfig
    """What every trial does, but for the axes."""
    seeds: tuple[Count, ...] = (0,)
    """Each point is tried with each of these; scores of a point are means over them."""

    def __post_init__(self) -> None:
        check_conditions(self.space)
        stages = (FINETUNE, PRETRAIN) if self.pretrain else (FINETUNE,)
        if wrong := [name for name in self.space if not name.startswith(stages)]:
            raise ValueError(
                f"space: '{wrong[0]}' is no field of {' or '.join(s.rstrip('.') for s in stages)}"
            )
        if not self.space:
            raise ValueError("space has no axis")
        if len(self.seeds) > 1 and self.search.method == "tpe" and self.search.scheduler != "none":
            raise ValueError(
                "search.scheduler with method tpe needs one seed: a trial of several ends with the last"
            )
        if self.search.scheduler == "pbt":
            self._check_population()
        for point in points_of(self):
            finetune_of(self, point, seed=0)

    def _check_population(self) -> None:
        if self.search.method != "random" or len(self.seeds) > 1:
            raise ValueError("search.scheduler pbt goes with search.method random and one seed")
        if fixed := [name for name, axis in self.space.items() if axis.when or not name.startswith(FINETUNE)]:
            raise ValueError(f"pbt changes settings of running fine-tunings: it cannot search {fixed[0]}")
        if self.finetune.resources.workers > 1:
            raise ValueError("pbt needs trials of one worker: set finetune.resources.workers=1")

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Derive what the single stages are told from `name` and `out`."""
        follow_name(tree, "finetune.strategy")
        out = Path(str(tree.get("out", "runs/sweep")))
        model = tree.get("model", {})
        derived: dict[str, Any] = {"finetune.out": str(out / "trials"), "finetune.model": model}
        if tree.get("prepare") is not None:
            store = str(out / "store")
            derived |= {
                "prepare.name": tree.get("name", "sweep"),
                "prepare.out": store,
                "finetune.data.store": store,
            }
        if tree.get("pretrain") is not None:
            finetune = tree.get("finetune") or {}
            store = derived.get("finetune.data.store") or (finetune.get("data") or {}).get("store")
            derived |= {"pretrain.out": str(out / "pretrain"), "pretrain.data.store": store}
            derived["pretrain.model"] = model
        for name, value in derived.items():
            derive(tree, name, value)


def run_sweep(config: SweepConfig) -> Path:
    """Run the trials that are not over yet, test the best point, and write the report; returns its path.

    Raises:
        UserError: no trial came to its end.
    """
    place = Place(experiment=config.name)
    with stage("sweep", config, {}, place, always=True) as work:
        place = replace(place, parent_run_id=work.run.run_id)
        if config.prepare:
            run_prepare(config.prepare, place)
        points = _search(config, place)
        table = trial_table(config, points)
        best = best_point(table)
        if best is None:
            failures = "\n".join(f"  {row.point}: {row.error}" for row in table.itertuples())
            raise UserError(f"No trial of the sweep came to its end:\n{failures}")
        tested = _test_best(config, next(point for point in points if in_words(point) == best), place)
        axes = dict(zip(config.space, short_names(list(config.space)), strict=True))
        page = write_sweep_report(config.out, config.name, table, axes, best, tested)
        validated = float(table[table["point"] == best]["score"].mean())
        work.metrics = {"best/val_dice": validated, "best/test_dice": fmean(tested.values())}
        for path in (page, config.out / "trials.csv"):
            work.run.log_file(path)
    print(
        f"\nBest:   {best}\nReport: {page}\nMLflow UI: mlflow ui --backend-store-uri {work.run.uri}",
        flush=True,
    )
    return page


def points_of(config: SweepConfig) -> list[Point]:
    """The points that are known beforehand; none of `tpe`."""
    search = config.search
    if search.method == "grid":
        return grid(config.space)
    return drawn(config.space, search.trials, search.seed) if search.method == "random" else []


def finetune_of(config: SweepConfig, point: Point, seed: int) -> FinetuneConfig:
    """The fine-tuning at one point; its weights are the pretrained ones, where there is pretraining."""
    tuned = _tuned(config, point)
    model = replace(tuned.model, init_seed=tuned.model.init_seed + seed)
    if config.pretrain:
        model = replace(model, checkpoint=_pretrain_of(config, point, seed).out)
    return replace(
        tuned,
        out=_folder(config, point) / f"seed{seed}",
        model=model,
        data=replace(tuned.data, shot_seed=seed),
        optim=replace(tuned.optim, seed=seed),
    )


def _tuned(config: SweepConfig, point: Point) -> FinetuneConfig:
    """`config.finetune` with the axes of `point` set in it."""
    plain = replace(config.finetune, strategy=replace(config.finetune.strategy, name=None))
    return overridden(plain, named_fields(_part(point, FINETUNE)), f"the point {in_words(point)}")


def _pretrain_of(config: SweepConfig, point: Point, seed: int) -> PretrainConfig:
    """The pretraining at one point: one folder for all points that ask for the same."""
    assert config.pretrain is not None, "asked for only where it is given"
    changes = _part(point, PRETRAIN)
    pretrain = overridden(config.pretrain, changes, f"the point {in_words(point)}")
    model = _tuned(config, point).model
    if model != config.model:
        changes |= {name: value for name, value in _part(point, FINETUNE).items() if _names_model(name)}
    folder = config.out / "pretrain" / _label(changes or {"all": "points"})
    if changes and config.search.method == "tpe":  # at the same time as others, so in no common folder
        folder = _folder(config, point) / "pretrain"
    return replace(
        pretrain,
        out=folder / f"seed{seed}",
        optim=replace(pretrain.optim, seed=seed),
        model=replace(model, init_seed=model.init_seed + seed),
    )


def _names_model(name: str) -> bool:
    return name.startswith("model.") or name == "strategy.name"


def _part(point: Point, stage_name: str) -> Point:
    of_stage = {name: field_value(value) for name, value in point.items() if name.startswith(stage_name)}
    return {name.removeprefix(stage_name): value for name, value in of_stage.items()}


def _folder(config: SweepConfig, point: Point) -> Path:
    return config.out / "trials" / _label(point)


def _label(point: Point) -> str:
    """The point as a folder's name: in words, and what tells points apart that read the same."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()
    return f"{slug(in_words(point).replace(', ', ','))[:80]}-{digest[:6]}"


def _search(config: SweepConfig, place: Place) -> list[Point]:
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
        record = _record(file.parent)
        if record.get("status") == "running":
            write_json(file, record | {"status": STOPPED})
            Run(record["tracking_uri"], record["run_id"], file.parent).end("KILLED")


def _pretrain_jobs(config: SweepConfig, point: Point, place: Place) -> Iterator[Job]:
    for seed in config.seeds:
        pretrain = _pretrain_of(config, point, seed)
        name = pretrain.out.relative_to(config.out).as_posix()
        work = partial(run_pretrain, pretrain, replace(place, seed=seed, name=name))
        yield Job(name, work, pretrain.out, pretrain.resources, [pretrain.out])


def _job(config: SweepConfig, place: Place, point: Point, seeds: Sequence[int]) -> Job:
    """The trial at one point, with one seed or with several after each other."""
    name = in_words(point) + (f", seed={seeds[0]}" if len(seeds) == 1 < len(config.seeds) else "")
    folder = _folder(config, point)
    stages = [folder / f"seed{seed}" for seed in seeds]
    resources = finetune_of(config, point, seeds[0]).resources
    work = partial(_run_point, config, place, point, tuple(seeds))
    return Job(name, work, folder, resources, stages)


def _run_point(
    config: SweepConfig, place: Place, point: Point, seeds: Sequence[int], executor: Executor
) -> None:
    """In the trial: fine-tune with each seed, on a pretraining of its own where the search asks for it."""
    for seed in seeds:
        named = replace(place, seed=seed, name=f"{in_words(point)} seed{seed}")
        if (
            config.pretrain
            and not (pretrain := _pretrain_of(config, point, seed)).out.joinpath("encoder.pth").exists()
        ):
            run_pretrain(pretrain, named, quietly(executor))
        run_finetune(finetune_of(config, point, seed), named, executor)
    if len(seeds) > 1:
        scores = [
            _record(_folder(config, point) / f"seed{seed}")["metrics"]["best/val_dice"] for seed in seeds
        ]
        tune.report({SCORE: fmean(scores), STEP: config.finetune.optim.steps})


def trial_table(config: SweepConfig, points: Sequence[Point]) -> pd.DataFrame:
    """One row a point and seed: its axes, how it ended, its score on the validation split, and its cost."""
    rows = []
    for point in points:
        for seed in config.seeds:
            folder = _folder(config, point) / f"seed{seed}"
            record = _record(folder)
            metrics, gpus = record.get("metrics", {}), len(record.get("hardware", {}).get("gpus") or ())
            rows.append(
                {
                    "point": in_words(point),
                    **{name: point.get(name) for name in config.space},
                    "seed": seed,
                    "status": record.get("status", "not run"),
                    "score": metrics.get("best/val_dice"),
                    "best_step": metrics.get("best/step"),
                    "trained_parameters": metrics.get("trained_parameters"),
                    "seconds": record.get("wall_time_s"),
                    "device": "GPU" if gpus else "CPU",
                    "error": record.get("error", ""),
                    "run_id": record.get("run_id"),
                    "folder": folder.relative_to(config.out).as_posix(),
                }
            )
    return pd.DataFrame(rows)


def best_point(table: pd.DataFrame) -> str | None:
    """The point whose mean score is highest, of those that finished with every seed."""
    whole = table.groupby("point", sort=False).filter(lambda rows: bool((rows["status"] == "finished").all()))
    if whole.empty:
        return None
    return str(whole.groupby("point", sort=False)["score"].mean().idxmax())


def _test_best(config: SweepConfig, point: Point, place: Place) -> dict[int, float]:
    """Dice of the best point on the test split by seed; its best bundle is copied."""
    folder, scores = config.out / "best", dict[int, float]()
    for seed in config.seeds:
        bundle = _folder(config, point) / f"seed{seed}" / "bundle"
        out = folder / f"seed{seed}" / "evaluate"
        settings = EvaluateConfig(out=out, bundle=bundle, store=config.finetune.data.store)
        run_evaluate(settings, replace(place, seed=seed, name=f"best, {in_words(point)} seed{seed}"))
        scores[seed] = _record(out)["metrics"]["test/dice"]
    trained = {seed: _record(_folder(config, point) / f"seed{seed}") for seed in config.seeds}
    chosen = max(trained, key=lambda seed: trained[seed]["metrics"]["best/val_dice"])
    with written_aside(folder / "bundle") as partial_copy:
        shutil.copytree(_folder(config, point) / f"seed{chosen}" / "bundle", partial_copy)
    write_json(config.out / "best.json", {"point": point, "seed": chosen, "test/dice": scores})
    return scores


def _record(folder: Path) -> dict[str, Any]:
    """`run.json` of a stage's folder; empty where there is none."""
    try:
        return read_json(folder / "run.json")
    except (OSError, ValueError):
        return {}
