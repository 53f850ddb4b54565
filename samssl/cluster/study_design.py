"""What a study consists of: arms, in every data set, fold, number of shots and seed.

A study of one set (`prepare`) has its folders directly below `out`; one of several (`datasets`) has a
folder for each, laid out in the same way.

    <out>[/<dataset>][/fold<k>]/store, pretrain/seed<k>            the home of a data set
    <home>[/<n>-shot]/arms/<arm>/seed<k>/finetune, evaluate        a setting, in which arms are compared
    <home>[/<n>-shot]/report.html, summary.json                    ... and its report
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from samssl.config import (
    Count,
    PositiveFloat,
    PositiveInt,
    absolute_paths,
    config,
    derive,
    overridden,
)
from samssl.data.prepare import PrepareConfig
from samssl.data.recipes.simulated import SimulateConfig
from samssl.models.sam import ModelConfig
from samssl.models.strategies import follow_name, named_fields
from samssl.shapes import SURFACE_TOLERANCE_MM
from samssl.train.finetune import FinetuneConfig
from samssl.train.pretrain import PretrainConfig

BASE, SSL, EXPANSIVE = "base", "ssl", "expansive"
MODEL = "model."
SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")


@config
class ArmConfig:
    """One way to get a model from the labelled cases."""

    init: str = BASE
    """Initial weights. `base`: the study's model; `ssl`: that model pretrained on the set's own scans;
    `expansive`: that model trained with prompts on the labels of the other sets; or whatever
    `model.checkpoint` may be, as medsam, random or a path."""
    set: dict[str, Any] = field(default_factory=dict)
    """What differs from the study's `finetune`, by dotted name: {strategy.name: vit_b/decoder/lora}."""
    trainer: Literal["samssl", "nnunet"] = "samssl"
    """`nnunet`: nnU-Net's own planner and trainer on the same cases; `init` and `set` are not used."""


@config
class SetConfig:
    """One data set of a study of several."""

    simulate: SimulateConfig | None = None
    """Makes the scans first, where they are simulated."""
    prepare: PrepareConfig
    """Scans to slice store."""
    pretrain: dict[str, Any] = field(default_factory=dict)
    """What of the study's `pretrain` is different for this set, by dotted name."""
    finetune: dict[str, Any] = field(default_factory=dict)
    """What of the study's `finetune` is different for this set, by dotted name."""


@config
class StudyConfig:
    """Arms that are compared on the same cases, shots and seeds.

    Folders, stores and models of the single stages follow from `out`, `name` and `model`.
    """

    name: str
    """Name of the study: the MLflow experiment."""
    out: Path
    """Folder of the study."""
    model: ModelConfig = ModelConfig()
    """The base model of every arm, and what pretraining starts from."""
    simulate: SimulateConfig | None = None
    """Makes the scans first, where they are simulated."""
    prepare: PrepareConfig | None = None
    """Scans to slice store, in a study of one data set."""
    datasets: dict[str, SetConfig] = field(default_factory=dict)
    """Name of each data set and how it is prepared, in a study of several."""
    pretrain: PretrainConfig
    """Base weights to self-supervised weights."""
    expansive: FinetuneConfig | None = None
    """Base weights to those of arms that start from `expansive`; `mode` promptable."""
    finetune: FinetuneConfig
    """Fine-tuning, the same in every arm except for what its `set` says."""
    arms: dict[str, ArmConfig] = field(
        default_factory=lambda: {"ssl": ArmConfig(init=SSL), "no_ssl": ArmConfig()}
    )
    """Name of each arm and what makes it differ from the others."""
    cross: tuple[dict[str, list[Any]], ...] = ()
    """Further arms, one for each combination of the values listed: [{init: [base, ssl],
    strategy.method: [lora, adapter]}]. They are called by their values."""
    treatment: str = "ssl"
    """Arm that the report compares with `baseline`."""
    baseline: str = "no_ssl"
    """Arm that the comparison starts from."""
    shots: tuple[Count, ...] = ()
    """Numbers of shots, each a comparison of its own; none: `finetune.data.shots`."""
    folds: PositiveInt = 1
    """Splits of each data set, which test on different patients."""
    seeds: tuple[Count, ...] = (0,)
    """Each seed draws its own base weights (where no checkpoint is given), shots, batches and new layers."""
    nnunet_device: Literal["cuda", "cpu", "mps"] = "cuda"
    """Where arms with the trainer nnunet train."""
    surface_tolerance_mm: PositiveFloat = SURFACE_TOLERANCE_MM
    """As in evaluate, for every arm."""
    trials_at_once: Count = 0
    """Runs at one time; 0: as many as the cluster holds."""
    published: Path | None = None
    """YAML file of published values, shown beside ours and marked as such."""
    dry_run: bool = False
    """Say how many runs there would be and what they would cost, and do nothing."""
    gpu_tflops: PositiveFloat = 312.0
    """Peak TFLOP/s of a GPU, by which `dry_run` reckons hours; 312 is an A100 in bf16."""

    def __post_init__(self) -> None:
        if (self.prepare is None) == (not self.datasets):
            raise ValueError("give `prepare` for a study of one data set, or `datasets` for one of several")
        for name in (*self.datasets, *arms_of(self)):
            if not SAFE_NAME.fullmatch(name):
                raise ValueError(f"'{name}' names a folder: use letters, digits and any of _ . + = -")
        starts = {arm.init for arm in arms_of(self).values()}
        if EXPANSIVE in starts and (self.expansive is None or len(self.datasets) < 2):
            raise ValueError(
                "init=expansive needs `expansive` and at least two `datasets`: it learns from the others"
            )
        for setting in settings_of(self):
            for name, arm in arms_of(self).items():
                if arm.trainer == "samssl":
                    finetune_of(self, setting, name, self.seeds[0])

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Derive what the single stages are told from `name`, `out`, `model` and `seeds`."""
        follow_name(tree, "finetune.strategy")
        out, name = Path(str(tree.get("out", "runs/study"))), tree.get("name", "study")
        for stage in ("finetune", "expansive"):
            if isinstance(tree.get(stage), dict):
                FinetuneConfig.fill(tree[stage])
        ignored = _fill_stages(tree, out)
        for dataset, entry in (tree.get("datasets") or {}).items():
            if isinstance(entry, dict):
                ignored += [f"datasets.{dataset}.{name}" for name in _fill_set(entry, dataset, out / dataset)]
        if tree.get("prepare") is not None:
            ignored += _fill_set(tree, name, out)
        if ignored:
            print(f"study: follows from other fields, and is ignored: {', '.join(ignored)}", flush=True)


@dataclass(frozen=True)
class Setting:
    """Where arms are compared: one data set, fold and number of shots."""

    dataset: str
    home: Path
    """Folder of the store and of what is pretrained on it."""
    folder: Path
    """Folder of the arms and their report."""
    shots: int
    fold: int | None
    """None where the study has one split of each data set."""
    chosen: SetConfig

    @property
    def label(self) -> str:
        """What the overview calls it: `hippocampus`, or `hippocampus, fold 1, 5-shot`."""
        fold = [f"fold {self.fold}"] if self.fold is not None else []
        shots = [self.folder.name] if self.folder != self.home else []
        return ", ".join([self.dataset, *fold, *shots])

    @property
    def store(self) -> Path:
        """The slice store."""
        return self.home / "store"

    @property
    def prepare(self) -> PrepareConfig:
        """How the store is made."""
        prepare = self.chosen.prepare
        fold = prepare.split.fold if self.fold is None else self.fold
        return replace(prepare, out=self.store, split=replace(prepare.split, fold=fold))


def settings_of(config: StudyConfig) -> list[Setting]:
    """Every setting, those of one data set after each other."""
    return [setting for home in _homes(config) for setting in _with_shots(config, home)]


def _homes(config: StudyConfig) -> Iterator[Setting]:
    sets = config.datasets
    if config.prepare:
        sets = {"": SetConfig(simulate=config.simulate, prepare=config.prepare)}
    folds = range(config.folds) if config.folds > 1 else [None]
    for (name, chosen), fold in itertools.product(sets.items(), folds):
        home = config.out / name / ("" if fold is None else f"fold{fold}")
        yield Setting(name or config.name, home, home, 0, fold, chosen)


def _with_shots(config: StudyConfig, home: Setting) -> Iterator[Setting]:
    if not config.shots:
        shots = home.chosen.finetune.get("data.shots", config.finetune.data.shots)
        yield replace(home, shots=int(shots))
    for shots in config.shots:
        yield replace(home, shots=shots, folder=home.home / (f"{shots}-shot" if shots else "all"))


def arms_of(config: StudyConfig) -> dict[str, ArmConfig]:
    """All arms by name: those listed, then those crossed."""
    arms = dict(config.arms)
    for axes in config.cross:
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            name = "-".join(_in_name(value) for value in values)
            arms[name] = ArmConfig(init=str(point.pop("init", BASE)), set=point)
    return arms


def _in_name(value: Any) -> str:
    return re.sub(r"[^\w.+=]+", "-", str(value)).strip("-")


def model_of(config: StudyConfig, arm: ArmConfig, seed: int) -> ModelConfig:
    """What the arm starts from, before any training of the study."""
    changes = named_fields(arm.set)
    changes = {name.removeprefix(MODEL): value for name, value in changes.items() if name.startswith(MODEL)}
    if arm.init not in (BASE, SSL, EXPANSIVE):
        changes["checkpoint"] = arm.init
    model = absolute_paths(overridden(config.model, changes, "the arm's settings"))
    return replace(model, init_seed=model.init_seed + seed)


def start_folder(config: StudyConfig, setting: Setting, arm: ArmConfig, seed: int) -> Path | None:
    """Folder of the run whose weights the arm starts from; None where it starts from the base model."""
    if arm.init not in (SSL, EXPANSIVE):
        return None
    variant = model_of(config, arm, seed).variant
    kind = "pretrain" if arm.init == SSL else "expansive"
    kind = kind if variant == config.model.variant else f"{kind}-{variant}"
    return setting.home / kind / f"seed{seed}"


def arm_folder(setting: Setting, name: str, seed: int) -> Path:
    """Folder of one arm's run."""
    return setting.folder / "arms" / name / f"seed{seed}"


def pretrain_of(config: StudyConfig, setting: Setting, arm: ArmConfig, seed: int) -> PretrainConfig:
    """The pretraining that the arm starts from."""
    folder = start_folder(config, setting, arm, seed)
    assert folder is not None, "the arm starts from its own set's scans"
    pretrain = overridden(config.pretrain, setting.chosen.pretrain, f"datasets.{setting.dataset}.pretrain")
    return replace(
        pretrain,
        out=folder,
        model=model_of(config, arm, seed),
        data=replace(pretrain.data, store=setting.store),
        optim=replace(pretrain.optim, seed=seed),
    )


def expansive_of(config: StudyConfig, setting: Setting, arm: ArmConfig, seed: int) -> FinetuneConfig:
    """The task-expansive training that the arm starts from: on every set but its own, in the same fold."""
    folder, expansive = start_folder(config, setting, arm, seed), config.expansive
    assert folder is not None, "the arm starts from the other sets' labels"
    assert expansive is not None, "checked with the configuration"
    others = [
        home.store for home in _homes(config) if home.fold == setting.fold and home.dataset != setting.dataset
    ]
    return replace(
        expansive,
        out=folder,
        model=model_of(config, arm, seed),
        data=replace(expansive.data, store=others[0], more_stores=tuple(others[1:]), shots=0),
        optim=replace(expansive.optim, seed=seed),
    )


def finetune_of(config: StudyConfig, setting: Setting, name: str, seed: int) -> FinetuneConfig:
    """The fine-tuning of one arm, from the weights that it starts from.

    Raises:
        ConfigError: the arm's or the set's changes do not go with the rest.
    """
    arm = arms_of(config)[name]
    changes = {**setting.chosen.finetune, **named_fields(arm.set)}
    changes = {field_name: value for field_name, value in changes.items() if not field_name.startswith(MODEL)}
    model = model_of(config, arm, seed)
    start = start_folder(config, setting, arm, seed)
    plain = replace(config.finetune, model=model, strategy=replace(config.finetune.strategy, name=None))
    tuned = overridden(plain, changes, f"arm {name}")
    return replace(
        tuned,
        out=arm_folder(setting, name, seed) / "finetune",
        model=replace(model, checkpoint=start) if start else model,
        data=replace(tuned.data, store=setting.store, shots=setting.shots, shot_seed=seed),
        optim=replace(tuned.optim, seed=seed),
    )


def alone(config: StudyConfig, setting: Setting) -> StudyConfig:
    """The study of one setting and nothing else: the configuration that its report refers to."""
    return replace(
        config,
        out=setting.folder,
        simulate=setting.chosen.simulate,
        prepare=setting.prepare,
        datasets={},
        finetune=overridden(config.finetune, setting.chosen.finetune, f"datasets.{setting.dataset}.finetune"),
        shots=(setting.shots,),
        folds=1,
    )


def _fill_stages(tree: dict[str, Any], out: Path) -> list[str]:
    """Fill in what `pretrain`, `finetune` and `expansive` are told; the fields that were given in vain."""
    stages = ["pretrain", "finetune", *(["expansive"] if tree.get("expansive") is not None else [])]
    derived: dict[str, Any] = {}
    for stage in stages:
        derived |= {
            f"{stage}.out": str(out / stage),
            f"{stage}.data.store": str(out / "store"),
            f"{stage}.model": tree.get("model", {}),
            f"{stage}.optim.seed": 0,
        }
    derived["finetune.data.shot_seed"] = 0
    shared = _given(tree, "pretrain", "data", "input")
    derived |= {f"{stage}.data.input": shared for stage in stages[1:]}
    return [name for name, value in derived.items() if derive(tree, name, value)]


def _fill_set(tree: dict[str, Any], name: str, out: Path) -> list[str]:
    """Fill in what `prepare` and `simulate` of a set are told; the fields that were given in vain."""
    derived: dict[str, Any] = {"prepare.name": name, "prepare.out": str(out / "store")}
    derived["prepare.store"] = None  # or stages would look for it in the study's folder
    if tree.get("simulate") is not None:
        derived |= {"simulate.out": str(out / "cohort"), "prepare.data.root": str(out / "cohort")}
    ignored = [field_name for field_name, value in derived.items() if derive(tree, field_name, value)]
    if isinstance(tree["prepare"], dict):
        PrepareConfig.fill(tree["prepare"])
    return ignored


def _given(tree: Any, *names: str) -> Any:
    """What the nested `tree` says under these names; an empty mapping where it says nothing."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree or {}
