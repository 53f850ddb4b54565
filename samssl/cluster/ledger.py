"""Which run wrote what: as the tracking server knows it, or as the `run.json` of stage folders say.

A stage's `run.json` holds the tags of its run, so that a chain can be followed where there is no server:
through the folders around the start, and those that the runs in them read from.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlflow.exceptions import MlflowException

from samssl.cluster.server import SQLITE, ask, shown, tracking_uri
from samssl.cluster.tracking import Run, find_runs
from samssl.config import UserError
from samssl.files import read_json
from samssl.models.initial import RUN_FILE

RECORD = "run.json"
PLACES = {
    "encoder": RUN_FILE,
    "state": "state.pt",
    "bundle": "bundle",
    "cases": "cases.parquet",
    "export": "model",
    "safetensors": "model/encoder.safetensors",
    "manifest": ".",
}
"""Where in its folder a stage writes what, for records that do not say."""
DEEPEST = 6
"""How many folders above a start may belong to its study."""


class Writer(Protocol):
    """A run, wherever it is written down."""

    @property
    def run_id(self) -> str:
        """Its id in MLflow."""
        ...

    def tags(self) -> dict[str, str]:
        """Its tags."""
        ...


class Ledger(Protocol):
    """All runs that are known."""

    @property
    def whole(self) -> bool:
        """Whether a run that is not in it does not exist."""
        ...

    def find(self, tags: Mapping[str, str]) -> list[Any]:
        """The `Writer`s that have all these tags, newest first."""
        ...

    def by_id(self, run_id: str) -> Writer:
        """The run with this id; a `UserError` where there is none."""
        ...


@dataclass(frozen=True)
class ServerLedger:
    """What the tracking server knows."""

    uri: str = field(default_factory=tracking_uri)
    whole: bool = True

    def find(self, tags: Mapping[str, str]) -> list[Run]:
        """As `Ledger.find`."""
        return find_runs(tags)

    def by_id(self, run_id: str) -> Run:
        """As `Ledger.by_id`."""
        try:
            ask(self.uri, lambda client: client.get_run(run_id))
        except MlflowException:
            raise UserError(
                f"'{run_id}' is neither a path nor a run in {shown(self.uri)}. Check its spelling and "
                "MLFLOW_TRACKING_URI."
            ) from None
        return Run(self.uri, run_id)


@dataclass(frozen=True)
class RecordedRun:
    """A run as its stage's folder records it."""

    run_id: str
    recorded: dict[str, str]

    def tags(self) -> dict[str, str]:
        """Its tags."""
        return dict(self.recorded)


class FolderLedger:
    """What the folders around `start` record."""

    whole = False

    def __init__(self, start: Path) -> None:
        self.runs: dict[str, RecordedRun] = {}
        waiting = [folder for folder in _stage_folders(_root_of(start))]
        read = set[Path]()
        while waiting:
            folder = waiting.pop()
            if folder in read or not (folder / RECORD).is_file():
                continue
            read.add(folder)
            run = _recorded(folder)
            self.runs[run.run_id] = run
            waiting += _read_from(run)

    def find(self, tags: Mapping[str, str]) -> list[RecordedRun]:
        """As `Ledger.find`, in no order."""
        return [run for run in self.runs.values() if tags.items() <= run.recorded.items()]

    def by_id(self, run_id: str) -> RecordedRun:
        """As `Ledger.by_id`."""
        if run_id not in self.runs:
            raise UserError(
                f"MLflow at {shown(tracking_uri())} cannot be reached, and no folder near the start records "
                f"the run {run_id}. Give the path of a stage's folder."
            )
        return self.runs[run_id]


def ledger_for(start: str) -> Ledger:
    """The tracking server's, or where that is away what the folders around the path `start` record.

    Raises:
        UserError: the server cannot be reached, and `start` is no path.
    """
    uri, path = tracking_uri(), Path(start)
    here = uri.startswith(SQLITE)
    if here and path.exists() and not Path(uri.removeprefix(SQLITE)).exists():
        return FolderLedger(path)
    try:
        ask(uri, lambda client: client.search_experiments(max_results=1))
    except UserError:
        if not path.exists():
            raise
        return FolderLedger(path)
    return ServerLedger()


def _recorded(folder: Path) -> RecordedRun:
    record = read_json(folder / RECORD)
    tags: dict[str, str] = {"stage": record["stage"], **record.get("tags", {})}
    for role, digest in record["inputs"].items():
        tags[f"input.{role}"] = digest
    for role, digest in record["outputs"].items():
        tags[f"output.{role}"] = digest
        noted, usual = tags.get(f"path.{role}"), folder / PLACES.get(str(role), str(role))
        moved = usual.exists() and not (noted and Path(noted).exists())
        tags[f"path.{role}"] = str(usual) if moved or not noted else noted
    return RecordedRun(record["run_id"], tags)


def _read_from(run: RecordedRun) -> Iterator[Path]:
    """The folders whose stages may have written what `run` read."""
    for name, value in run.recorded.items():
        if name.startswith("input_path."):
            yield from (Path(value), Path(value).parent)


def _root_of(start: Path) -> Path:
    """The topmost stage folder that `start` lies in: its study's, where it belongs to one."""
    start = start.absolute()
    above = [start, *start.parents][:DEEPEST]
    return next((folder for folder in reversed(above) if (folder / RECORD).is_file()), start)


def _stage_folders(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        if RECORD in files:
            yield Path(folder)
        folders[:] = sorted(name for name in folders if name not in ("cases", "ray") and name[-5:] != ".zarr")
