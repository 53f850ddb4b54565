"""What was logged while the tracking server was away: kept in a stage's folder, delivered in order.

    outbox/00000001.json     one letter: the run, what kind of thing is logged, and the thing
    outbox/00000001/<file>   the file that goes with it
    outbox/refused/          letters that the server answered with an error

A letter is deleted when it has been delivered. One that was delivered just before its process was killed is
delivered again, so every kind must be one that the server takes twice as once: metrics carry the moment
at which they were logged.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from samssl.cluster import server
from samssl.files import read_json, write_json

FOLDER = "outbox"
REFUSED = "refused"
METRICS = "metrics"
"""The kind of letter whose `content` is `{"metrics": [...]}`; letters in a row are joined."""
MAX_METRICS = 1000
"""What MLflow takes in one call."""


@dataclass(frozen=True)
class Letter:
    """One thing to log."""

    run_id: str
    kind: str
    content: dict[str, Any]
    """Plain values, as JSON holds them."""
    file: Path | None = None
    """What goes with it: an artifact."""


@dataclass(frozen=True)
class Outbox:
    """The letters of one stage that wait for the server at `uri`; `send` hands one to it."""

    folder: Path
    uri: str
    send: Callable[[str, Letter], None]

    def post(self, letter: Letter) -> None:
        """Send `letter`, after whatever waits; keep it where the server is away."""
        if not self.waiting() and server.may_try(self.uri):
            try:
                self.send(self.uri, letter)
            except Exception as error:
                if not server.is_away(error):
                    raise
                self._pause()
            else:
                server.has_answered(self.uri)
                return
        self._keep(letter)
        self.deliver()

    def deliver(self) -> bool:
        """Send what waits, oldest first, if the server is there; returns whether nothing waits any more."""
        if not self.waiting():
            return True
        if not server.may_try(self.uri):
            return False
        with self._lock():
            delivered = 0
            for letter, paths in _joined(self.waiting()):
                try:
                    self.send(self.uri, letter)
                except Exception as error:
                    if server.is_away(error):
                        self._pause()
                        return False
                    self._refuse(paths, error)
                else:
                    delivered += len(paths)
                    for path in paths:
                        _remove(path)
        server.has_answered(self.uri)
        print(
            f"MLflow at {server.shown(self.uri)}: delivered {delivered} entries of {self.folder}", flush=True
        )
        return True

    def waiting(self) -> list[Path]:
        """The letters that were not delivered yet, oldest first."""
        return sorted(self.folder.glob("*.json"))

    def close(self) -> None:
        """Delete the folder if it is empty; nobody else may be posting."""
        if self.folder.is_dir() and not self.waiting() and not (self.folder / REFUSED).exists():
            shutil.rmtree(self.folder)

    def _keep(self, letter: Letter) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            waiting = self.waiting()
            path = self.folder / f"{int(waiting[-1].stem) + 1 if waiting else 1:08}.json"
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # of a letter cut short
            if letter.file:
                copy = path.with_suffix("") / letter.file.name
                copy.parent.mkdir()
                shutil.copy2(letter.file, copy)
                letter = replace(letter, file=None)
            write_json(path, asdict(letter))

    def _refuse(self, paths: Sequence[Path], error: Exception) -> None:
        refused = self.folder / REFUSED
        refused.mkdir(exist_ok=True)
        for path in paths:
            for part in (path, path.with_suffix("")):
                if part.exists():
                    shutil.move(part, refused / part.name)
        print(f"MLflow refused what is now in {refused}: {str(error).splitlines()[0]}", flush=True)

    def _pause(self) -> None:
        server.pause(self.uri, f"What is logged waits in {self.folder} and is delivered later.")

    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".lock")


def _joined(paths: Sequence[Path]) -> Iterator[tuple[Letter, list[Path]]]:
    """Each letter and the file that holds it; metrics of one run in a row as one letter."""
    whole: Letter | None = None
    held: list[Path] = []
    for path in paths:
        letter = _read(path)
        if whole and _join(whole, letter):
            whole = replace(whole, content={METRICS: whole.content[METRICS] + letter.content[METRICS]})
            held.append(path)
            continue
        if whole:
            yield whole, held
        whole, held = letter, [path]
    if whole:
        yield whole, held


def _join(first: Letter, second: Letter) -> bool:
    if (first.run_id, first.kind, second.kind) != (second.run_id, METRICS, METRICS):
        return False
    return len(first.content[METRICS]) + len(second.content[METRICS]) <= MAX_METRICS


def _read(path: Path) -> Letter:
    letter, files = Letter(**read_json(path)), path.with_suffix("")
    return replace(letter, file=next(files.iterdir())) if files.is_dir() else letter


def _remove(path: Path) -> None:
    path.unlink()
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
