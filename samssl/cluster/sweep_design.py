"""What a sweep consists of: its settings, the points that are known beforehand, and the runs at a point."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from samssl.cluster.space import (
    AxisConfig,
    Point,
    check_conditions,
    drawn,
    field_value,
    grid,
    in_words,
)
from samssl.cluster.trials import slug
from samssl.config import Count, PositiveInt, config, derive, overridden
from samssl.data.prepare import PrepareConfig
from samssl.models.sam import ModelConfig
from samssl.models.strategies import follow_name, named_fields
from samssl.train.finetune import FinetuneConfig
from samssl.train.pretrain import PretrainConfig

FINETUNE, PRETRAIN = "finetune.", "pretrain."


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
            folder = str(out / "store")
            store = (tree["prepare"] or {}).get("store") or folder
            derived |= {
                "prepare.name": tree.get("name", "sweep"),
                "prepare.out": folder,
                "finetune.data.store": store,
            }
        if tree.get("pretrain") is not None:
            finetune = tree.get("finetune") or {}
            store = derived.get("finetune.data.store") or (finetune.get("data") or {}).get("store")
            derived |= {"pretrain.out": str(out / "pretrain"), "pretrain.data.store": store}
            derived["pretrain.model"] = model
        for name, value in derived.items():
            derive(tree, name, value)
        if isinstance(tree.get("prepare"), dict):
            PrepareConfig.fill(tree["prepare"])


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
        model = replace(model, checkpoint=pretrain_of(config, point, seed).out)
    return replace(
        tuned,
        out=point_folder(config, point) / f"seed{seed}",
        model=model,
        data=replace(tuned.data, shot_seed=seed),
        register=replace(tuned.register, enabled=False),  # `samssl promote` registers the one that is wanted
        optim=replace(tuned.optim, seed=seed),
    )


def _tuned(config: SweepConfig, point: Point) -> FinetuneConfig:
    """`config.finetune` with the axes of `point` set in it."""
    plain = replace(config.finetune, strategy=replace(config.finetune.strategy, name=None))
    return overridden(plain, named_fields(_part(point, FINETUNE)), f"the point {in_words(point)}")


def pretrain_of(config: SweepConfig, point: Point, seed: int) -> PretrainConfig:
    """The pretraining at one point: one folder for all points that ask for the same."""
    assert config.pretrain is not None, "asked for only where it is given"
    changes = _part(point, PRETRAIN)
    pretrain = overridden(config.pretrain, changes, f"the point {in_words(point)}")
    model = _tuned(config, point).model
    if model != config.model:
        changes |= {name: value for name, value in _part(point, FINETUNE).items() if _names_model(name)}
    folder = config.out / "pretrain" / _label(changes or {"all": "points"})
    if changes and config.search.method == "tpe":  # at the same time as others, so in no common folder
        folder = point_folder(config, point) / "pretrain"
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


def point_folder(config: SweepConfig, point: Point) -> Path:
    """Folder of the trials at one point, one for each seed."""
    return config.out / "trials" / _label(point)


def _label(point: Point) -> str:
    """The point as a folder's name: in words, and what tells points apart that read the same."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()
    return f"{slug(in_words(point).replace(', ', ','))[:80]}-{digest[:6]}"
