"""Do all nodes of a cluster see what a run reads and writes? Asked before the run starts.

Two settings decide it: `out`, with the stores and checkpoints beside it, and MLFLOW_TRACKING_URI. A path is
taken for shared if a file written on one node is read on the others, not by its name. Nodes that an
autoscaler adds later are not asked.
"""

import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from samssl.cluster.server import shown
from samssl.config import UserError, as_url

JOB_COPIES = "working_dir_files"
"""Folder of a Ray node with the working directories of jobs, as long as they run."""
LOCAL = ("cache", "folder")
"""Last parts of the names of fields with a folder that each node may have for itself."""
TRACKING = "MLFLOW_TRACKING_URI"
WAIT_S = 120
"""For a node's answer; it may have to start a worker first."""
SERVER_WAIT_S = 10


@dataclass(frozen=True)
class Asked:
    """What each node is asked."""

    written: dict[str, str]
    """Settings that name a folder to write to, with the file that the driver has left there."""
    read: dict[str, tuple[str, Any]]
    """Settings that name something to read, with where it is and what the driver finds there."""
    server: tuple[str, int] | None
    """Host and port of the tracking server."""


def check_places(config: Any, tracking_uri: str) -> None:
    """Refuse to start where a node would write or look elsewhere; does nothing on a single machine.

    `config.out` is the folder that the run writes. Ray has been started, if the run is to use a cluster.

    Raises:
        UserError: naming each setting, its value, and the nodes that do not see it.
    """
    _check_kept(config.out, tracking_uri)
    nodes = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    if len(nodes) < 2:
        return
    database = _sqlite_file(tracking_uri)
    folders = {"out": config.out} | ({TRACKING: database.parent} if database else {})
    read = dict(_inputs(config))
    with _probes(folders, nodes) as written:
        unseen = _ask(nodes, Asked(written, read, _server(tracking_uri)))
    if unseen:
        places = {name: place for name, (place, _) in read.items()}
        places |= {"out": str(config.out), TRACKING: shown(tracking_uri)}
        raise UserError(_refusal(len(nodes), unseen, places))
    if database:
        _warn_of_sqlite(len({node["NodeManagerHostname"] for node in nodes}))


def named_paths(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every path in a config by its dotted name; a URL as it was written."""
    if isinstance(value, Path):
        yield prefix, as_url(value)
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from named_paths(part, f"{prefix}[{number}]")
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from named_paths(part, f"{prefix}.{name}")
    elif is_dataclass(value):
        for field in fields(value):
            name = f"{prefix}.{field.name}" if prefix else field.name
            yield from named_paths(getattr(value, field.name), name)


def _check_kept(out: Path, tracking_uri: str) -> None:
    """Refuse places inside the copy of the working directory that a job runs in."""
    copy = Path.cwd()
    if JOB_COPIES not in copy.parts:
        return
    advice = "The job runs in a copy of the working directory, which is thrown away. Give"
    if out.is_relative_to(copy):
        raise UserError(f"out={out} would be lost. {advice} `out` as an absolute path that every node sees.")
    database = _sqlite_file(tracking_uri)
    if database and database.is_relative_to(copy):
        raise UserError(
            f"MLflow's runs would be lost in {database}. {advice} the job {TRACKING}: a server, as in "
            "http://HOST:5000, or on a single machine sqlite:////absolute/path/mlflow.db."
        )


def _sqlite_file(tracking_uri: str) -> Path | None:
    parts = urlsplit(tracking_uri)
    return Path(parts.path.removeprefix("/")) if parts.scheme == "sqlite" else None


def _server(tracking_uri: str) -> tuple[str, int] | None:
    parts = urlsplit(tracking_uri)
    port = parts.port or {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}.get(parts.scheme)
    return (parts.hostname, port) if parts.hostname and port else None


def _inputs(config: Any) -> Iterator[tuple[str, tuple[str, Any]]]:
    """What the driver finds at the paths of a config, except what the run has written itself."""
    for name, place in named_paths(config):
        found = _look(place)
        local = name.rpartition(".")[2] in LOCAL
        if found is not None and not local and not Path(place).is_relative_to(config.out):
            yield name, (place, found)


def _look(place: str) -> Any:
    """What tells a file or folder from another of the same name: its size, or the names in it.

    None where there is nothing, or nothing that may be read.
    """
    try:
        filesystem, path = fsspec.url_to_fs(place)
        if filesystem.isfile(path):
            return filesystem.size(path)
        return sorted(name.rpartition("/")[2] for name in filesystem.ls(path, detail=False))
    except Exception:  # each file system has its own for what is missing or not allowed
        return None


@contextmanager
def _probes(folders: dict[str, Path], nodes: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """A file of an unlikely name in each folder; it and what nodes put beside it are removed in the end."""
    probes = {name: folder / f".probe-{uuid.uuid4().hex}" for name, folder in folders.items()}
    try:
        for probe in probes.values():
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_text(probe.name)
        yield {name: str(probe) for name, probe in probes.items()}
    finally:
        for probe in map(str, probes.values()):
            for left in (probe, *(_beside(probe, node["NodeID"]) for node in nodes)):
                Path(left).unlink(missing_ok=True)


def _beside(probe: str, node_id: str) -> str:
    return f"{probe}-{node_id}"


def _ask(nodes: list[dict[str, Any]], asked: Asked) -> dict[str, list[str]]:
    """Settings that some node does not see as the driver does, with the addresses of those nodes."""
    waiting = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        waiting[node["NodeID"]] = _answer.options(scheduling_strategy=there).remote(asked, node["NodeID"])
    unseen: dict[str, list[str]] = {}
    for node in nodes:
        address, node_id = node["NodeManagerAddress"], node["NodeID"]
        try:
            missed = set(ray.get(waiting[node_id], timeout=WAIT_S))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"The node {address} of the cluster cannot run samssl: {reason}") from error
        missed |= {
            name for name, probe in asked.written.items() if not Path(_beside(probe, node_id)).is_file()
        }
        for name in sorted(missed):
            unseen.setdefault(name, []).append(address)
    return unseen


@ray.remote(num_cpus=0)
def _answer(asked: Asked, node_id: str) -> list[str]:
    """On a node: the settings whose place is not the driver's; leaves a file beside each probe."""
    missed = [name for name, (place, found) in asked.read.items() if _look(place) != found]
    for name, probe in asked.written.items():
        try:
            Path(probe).read_text()
            Path(_beside(probe, node_id)).touch()
        except OSError:
            missed.append(name)
    if asked.server and not _answers(asked.server):
        missed.append(TRACKING)
    return missed


def _answers(server: tuple[str, int]) -> bool:
    try:
        socket.create_connection(server, timeout=SERVER_WAIT_S).close()
    except OSError:
        return False
    return True


def _warn_of_sqlite(machines: int) -> None:
    if machines > 1:
        print(
            f"WARNING: {machines} machines share the SQLite file of {TRACKING}. Most file systems over a "
            "network lock such a file badly: for more than a trial set it to a server (`mlflow server`).",
            flush=True,
        )


def _refusal(count: int, unseen: dict[str, list[str]], values: dict[str, str]) -> str:
    lines = [f"  {name}={values[name]}: not on {', '.join(addresses)}" for name, addresses in unseen.items()]
    return (
        f"The cluster has {count} nodes, and not all of them see what this run reads and writes:\n"
        + "\n".join(lines)
        + "\nPut `out`, stores and checkpoints on a file system that every node has at the same path, and "
        f"set {TRACKING} to a server that every node reaches, as in http://HOST:5000."
    )
