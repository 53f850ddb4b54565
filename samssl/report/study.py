"""A study folder as the report reads it, without assuming that every run in it succeeded.

    <study>/config.yaml                      the study's name, and whether its subjects are simulated
    <study>/store/                           slice store
    <study>/pretrain/seed<k>/                history.csv, reconstructions/step_000100.png ...
    <study>/arms/<arm>/seed<k>/finetune/     history.csv
    <study>/arms/<arm>/seed<k>/evaluate/     cases.parquet, predictions.zarr/<case>

Every stage's folder also holds `run.json` and `environment.json`. Results that no finished run backs
are left out, and a sentence in `Study.notes` says so.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from samssl.config import UserError, read_yaml
from samssl.files import read_json, sha256_file
from samssl.interactive import click_rows

TABLE_COLUMNS = ("case", "label", "label_id", "dice", "reference_voxels", "predicted_voxels")


@dataclass(frozen=True)
class Stage:
    """One stage's `run.json`."""

    folder: str
    """Path below the study folder, as `arms/ssl/seed0/finetune`."""
    stage: str
    arm: str | None
    seed: int | None
    run_id: str
    status: str
    wall_time_s: float | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The scored test cases of one arm and seed, one row a case and label."""

    stage: Stage
    table: pd.DataFrame


@dataclass(frozen=True)
class Study:
    """Everything that the report needs from one study folder."""

    root: Path
    name: str
    simulated: bool
    """The study made its own subjects."""
    classes: dict[str, tuple[str, ...]] | None
    """What fine-tuning told apart, by the labels of each class; None: every label of the store."""
    overlapping: bool
    """Whether these classes were regions that may share voxels."""
    environment: dict[str, Any]
    """Versions and git commit of the first evaluation."""
    stages: tuple[Stage, ...]
    evaluations: dict[str, dict[int, Evaluation]]
    """Arm -> seed -> evaluation; finished ones only, never empty."""
    notes: tuple[str, ...]
    """One sentence for each part that is missing or left out."""

    @cached_property
    def home(self) -> Path:
        """Folder of the store and of the pretraining runs: above this one where settings share them."""
        own, above = self.root / "store", self.root.parent / "store"
        return self.root.parent if above.is_dir() and not own.is_dir() else self.root

    @cached_property
    def pretrain_folders(self) -> dict[int, Path]:
        """Seed -> folder of the pretraining runs that are there, finished or not."""
        return _seed_folders(self.home / "pretrain")

    @cached_property
    def tolerances_mm(self) -> list[float]:
        """Every tolerance by which surfaces were scored; one, where all arms were scored alike."""
        tables = (ran.table for seeds in self.evaluations.values() for ran in seeds.values())
        return sorted({float(mm) for table in tables for mm in table.get("surface_tolerance_mm", ())})

    def history(self, folder: Path) -> pd.DataFrame | None:
        """`history.csv` of one stage (step, metric, value), or None where there is none."""
        try:
            history = pd.read_csv(folder / "history.csv")
            return history[["step", "metric", "value"]]
        except (OSError, ValueError, KeyError):
            return None


def read_study(root: Path) -> Study:
    """Read the study folder at `root`.

    Raises:
        UserError: when the folder does not exist or holds no finished evaluation.
    """
    root = root.resolve()
    if not root.is_dir():
        raise UserError(
            f"There is no study folder {root}. Name the one that `samssl study` wrote: study=PATH."
        )
    notes: list[str] = []
    stages = tuple(stage for folder in _stage_folders(root) if (stage := _read_stage(root, folder, notes)))
    evaluations = _read_evaluations(root, stages, notes)
    if not evaluations:
        reasons = "\n".join(f"  {note}" for note in notes)
        raise UserError(
            f"{root} holds no finished evaluation, so there is nothing to report. "
            f"Run `samssl study` (or `samssl evaluate`) into it first.\n{reasons}".rstrip()
        )
    first = next(iter(next(iter(evaluations.values())).values()))
    settings = _read_settings(root)
    learnt = (settings.get("finetune") or {}).get("data") or {}
    return Study(
        root=root,
        name=str(settings.get("name") or root.name),
        simulated=bool(settings.get("simulate")),
        classes=learnt.get("classes"),
        overlapping=bool(learnt.get("overlapping")),
        environment=_read_environment(root / first.stage.folder),
        stages=stages,
        evaluations=evaluations,
        notes=(*notes, *_broken_links(stages)),
    )


def _read_settings(root: Path) -> dict[str, Any]:
    try:
        return read_yaml(root / "config.yaml")
    except UserError:  # a study folder put together by hand need not have one
        return {}


def _read_environment(folder: Path) -> dict[str, Any]:
    try:
        environment = read_json(folder / "environment.json")
    except (OSError, ValueError):
        return {}
    return {key: environment[key] for key in ("git_commit", "python", "packages") if key in environment}


def _stage_folders(root: Path) -> Iterator[Path]:
    """Every stage's folder that is there, in the order in which a study runs them."""
    if (root / "store").is_dir():
        yield root / "store"
    yield from _seed_folders(root / "pretrain").values()
    for arm in _arm_folders(root):
        for seed_folder in _seed_folders(arm).values():
            yield from (path for name in ("finetune", "evaluate") if (path := seed_folder / name).is_dir())


def _arm_folders(root: Path) -> list[Path]:
    return sorted(path for path in (root / "arms").glob("*") if path.is_dir() and path.name[0] != ".")


def _seed_folders(parent: Path) -> dict[int, Path]:
    """`{0: parent/seed0, ...}` in the order of the seeds."""
    matches = (
        (re.fullmatch(r"seed(\d+)", path.name), path) for path in parent.glob("seed*") if path.is_dir()
    )
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _read_stage(root: Path, folder: Path, notes: list[str]) -> Stage | None:
    name = folder.relative_to(root).as_posix()
    try:
        record = read_json(folder / "run.json")
        stage = Stage(
            folder=name,
            stage=record["stage"],
            arm=record.get("arm"),
            seed=record.get("seed"),
            run_id=record["run_id"],
            status=record["status"],
            wall_time_s=record.get("wall_time_s"),
            hardware=record.get("hardware") or {},
            inputs=record.get("inputs") or {},
            outputs=record.get("outputs") or {},
        )
    except FileNotFoundError:
        notes.append(f"{name} has no run.json: that run did not finish, and its results are left out.")
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        notes.append(f"{name}/run.json cannot be read as a run record, and that run's results are left out.")
        return None
    if stage.status == "failed" and record.get("error"):
        notes.append(f"The run in {name} failed: {record.get('error')} Its results are left out.")
    elif stage.status != "finished":
        notes.append(f"The run in {name} is marked '{stage.status}', and its results are left out.")
    return stage


def _read_evaluations(
    root: Path, stages: tuple[Stage, ...], notes: list[str]
) -> dict[str, dict[int, Evaluation]]:
    finished = {stage.folder: stage for stage in stages if stage.status == "finished"}
    evaluations: dict[str, dict[int, Evaluation]] = {}
    for arm in _arm_folders(root):
        for seed, seed_folder in _seed_folders(arm).items():
            folder = seed_folder / "evaluate"
            name = folder.relative_to(root).as_posix()
            if not folder.is_dir():
                notes.append(f"Arm {arm.name} has no evaluation for seed {seed}.")
            elif name in finished and (table := _read_table(folder, finished[name], notes)) is not None:
                evaluations.setdefault(arm.name, {})[seed] = Evaluation(finished[name], table)
    return evaluations


def _read_table(folder: Path, stage: Stage, notes: list[str]) -> pd.DataFrame | None:
    path, name = folder / "cases.parquet", f"{stage.folder}/cases.parquet"
    try:
        table, digest = pd.read_parquet(path), sha256_file(path)
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        notes.append(f"{name} is missing or cannot be read, and that evaluation is left out.")
        return None
    if digest != stage.outputs.get("cases", digest):
        notes.append(f"{name} is not the table that its run wrote, and that evaluation is left out.")
        return None
    if missing := [column for column in TABLE_COLUMNS if column not in table.columns]:
        notes.append(f"{name} lacks {', '.join(missing)}, and that evaluation is left out.")
        return None
    if table["dice"].notna().sum() == 0:
        notes.append(f"{name} has a score for no label of any case, and that evaluation is left out.")
        return None
    return click_rows(table)


def _broken_links(stages: tuple[Stage, ...]) -> list[str]:
    """A sentence for each stage whose input is not what the stage before it in this folder wrote."""
    finished = {stage.folder: stage for stage in stages if stage.status == "finished"}
    sentences = []
    for stage in finished.values():
        sources = {"manifest": "store", "bundle": stage.folder.replace("/evaluate", "/finetune")}
        for thing, source in sources.items():
            used = stage.inputs.get(thing)
            written = finished[source].outputs.get(thing) if source in finished else None
            if used and written and used != written:
                sentences.append(
                    f"{stage.folder} used the {thing} {used[:12]}, but {source} now holds {written[:12]}: "
                    "its results belong to another version."
                )
    return sentences
