"""MLflow runs to a plain folder and into another tracking server, for clusters without one.

    runs.json              which runs, and where they come from
    runs/<run id>.json     name, status, times, params, metrics with their history, tags, data sets
    artifacts/<run id>/    the artifacts, as they are

What the runs come from goes with them, so that lineage works at the other end. Registered models do not: a
run's files are registered again by `samssl promote`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow.entities import DatasetInput, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from samssl.cluster.outbox import MAX_METRICS, METRICS, Letter
from samssl.cluster.server import ask, client_of, shown, tracking_uri
from samssl.cluster.tracking import PARENT_TAG, experiment_id, find_runs, send
from samssl.config import UserError, config
from samssl.files import read_json, write_json, written_aside

FORMAT = 1
ORIGIN_TAG = "imported_from"
"""The id that an imported run had where it was made."""
WHOLE_TAG = "imported"
"""Set when a run has been imported to its end."""
MODEL_PREFIX = "model."
"""Tags that name logged models, which do not travel."""
Record = dict[str, Any]


@config
class ExportRunsConfig:
    """MLflow runs, and the runs that they come from, to a folder."""

    out: Path
    """The folder; an earlier export in it is replaced."""
    experiment: str | None = None
    """All runs of the experiment of this name, as of a study."""
    run: str | None = None
    """The run with this id, and its children."""

    def __post_init__(self) -> None:
        if (self.experiment is None) == (self.run is None):
            raise ValueError("give either experiment=NAME or run=ID")


@config
class ImportRunsConfig:
    """Runs in a folder into the tracking server of MLFLOW_TRACKING_URI; those that it has are left alone."""

    folder: Path
    """What `samssl export-runs` wrote."""
    experiment: str | None = None
    """Experiment that they go into; null: the one that they come from."""


def run_export_runs(config: ExportRunsConfig) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: there are no such runs, or something else is in the way.
    """
    uri = tracking_uri()
    if config.out.exists() and any(config.out.iterdir()) and not (config.out / "runs.json").is_file():
        raise UserError(f"{config.out} holds something else than exported runs. Choose another `out`.")
    runs = ask(uri, lambda client: _with_origins(client, _wanted(client, config)))
    if not runs:
        raise UserError(
            f"{shown(uri)} has no runs of {config.experiment or config.run}. `mlflow ui` lists them."
        )
    with written_aside(config.out) as folder:
        for run_id, run in runs.items():
            write_json(
                folder / "runs" / f"{run_id}.json", ask(uri, lambda client, run=run: _record(client, run))
            )
            _download(client_of(uri), run_id, folder / "artifacts" / run_id)
        write_json(folder / "runs.json", {"format": FORMAT, "from": shown(uri), "runs": list(runs)})
    print(f"export-runs: {len(runs)} runs in {config.out}", flush=True)


def run_import_runs(config: ImportRunsConfig) -> dict[str, str]:
    """Make the runs; returns the id here of every run in the folder. Twice imports once.

    Raises:
        UserError: the folder is no export.
    """
    records = _read(config.folder)
    uri = tracking_uri()
    with FileLock(config.folder / ".lock"):
        known = {run_id: _known(uri, run_id) for run_id in records}
        new = [run_id for run_id, (_, whole) in known.items() if not whole]
        ids = {run_id: found for run_id, (found, _) in known.items() if found}
        for run_id in sorted(records.keys() - ids.keys(), key=lambda run_id: records[run_id]["start"]):
            ids[run_id] = _create(uri, records[run_id], config.experiment)
        for run_id in new:
            _fill(uri, ids, records[run_id], config.folder / "artifacts" / run_id)
    print(f"import-runs: {len(new)} runs into {shown(uri)}, {len(records) - len(new)} were there", flush=True)
    return ids


def _wanted(client: MlflowClient, config: ExportRunsConfig) -> list[MlflowRun]:
    if config.experiment:
        experiment = client.get_experiment_by_name(config.experiment)
        return list(_search(client, [experiment.experiment_id], "")) if experiment else []
    try:
        found = [client.get_run(str(config.run))]
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise
    for run in found:
        children = f"tags.`{PARENT_TAG}` = '{run.info.run_id}'"
        found += _search(client, [run.info.experiment_id], children)
    return found


def _search(client: MlflowClient, experiments: list[str], query: str) -> Iterator[MlflowRun]:
    token: str | None = None
    while True:
        page = client.search_runs(experiments, query, ViewType.ACTIVE_ONLY, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _with_origins(client: MlflowClient, runs: list[MlflowRun]) -> dict[str, MlflowRun]:
    """The runs and those that wrote their inputs, by id, as far as the server has them."""
    found = {run.info.run_id: run for run in runs}
    waiting = list(runs)
    while waiting:
        for run_id in _links(waiting.pop().data.tags).values():
            if run_id in found:
                continue
            try:
                found[run_id] = client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                continue
            waiting.append(found[run_id])
    return found


def _links(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that name other runs."""
    names = [name for name in tags if name.startswith("run.") or name in (PARENT_TAG, "ssl_run_id")]
    return {name: tags[name] for name in names}


def _record(client: MlflowClient, run: MlflowRun) -> Record:
    info, run_id = run.info, run.info.run_id
    history = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    return {
        "run_id": run_id,
        "experiment": client.get_experiment(info.experiment_id).name,
        "name": info.run_name,
        "status": info.status,
        "start": info.start_time,
        "end": info.end_time,
        "params": dict(run.data.params),
        "tags": {name: value for name, value in run.data.tags.items() if not name.startswith(MODEL_PREFIX)},
        "metrics": {
            name: [[entry.value, entry.timestamp, entry.step] for entry in entries]
            for name, entries in history.items()
        },
        "datasets": [_dataset(entry) for entry in (run.inputs.dataset_inputs if run.inputs else [])],
    }


def _dataset(entry: DatasetInput) -> Record:
    data, use = entry.dataset, {tag.key: tag.value for tag in entry.tags}
    fields = ("name", "digest", "source_type", "source", "schema", "profile")
    return {**{name: getattr(data, name) for name in fields}, "tags": use}


def _download(client: MlflowClient, run_id: str, to: Path) -> None:
    to.mkdir(parents=True)
    if client.list_artifacts(run_id):
        client.download_artifacts(run_id, "", str(to))


def _read(folder: Path) -> dict[str, Record]:
    try:
        listed = read_json(folder / "runs.json")
    except (OSError, ValueError):
        listed = {}
    if listed.get("format") != FORMAT:
        raise UserError(
            f"{folder} holds no runs that this version can import: `samssl export-runs` writes them."
        )
    return {run_id: read_json(folder / "runs" / f"{run_id}.json") for run_id in listed["runs"]}


def _known(uri: str, run_id: str) -> tuple[str | None, bool]:
    """The run's id at `uri`, if it was made or imported there, and whether all of it is there."""
    imported = find_runs({ORIGIN_TAG: run_id})
    if imported:
        return imported[0].run_id, WHOLE_TAG in imported[0].tags()
    try:
        ask(uri, lambda client: client.get_run(run_id))
    except MlflowException:
        return None, False
    return run_id, True


def _create(uri: str, record: Record, experiment: str | None) -> str:
    place = ask(uri, lambda client: experiment_id(client, uri, experiment or record["experiment"]))
    tags = {ORIGIN_TAG: record["run_id"]}
    run = ask(
        uri,
        lambda client: client.create_run(
            place, start_time=record["start"], tags=tags, run_name=record["name"]
        ),
    )
    return run.info.run_id


def _fill(uri: str, ids: Mapping[str, str], record: Record, artifacts: Path) -> None:
    """Log everything, so that a second time changes nothing."""
    run_id = ids[record["run_id"]]
    for letter in _letters(run_id, record, artifacts):
        ask(uri, lambda client, letter=letter: send(uri, letter))
    links = {
        name: ids.get(linked) or _known(uri, linked)[0] for name, linked in _links(record["tags"]).items()
    }
    tags = record["tags"] | {name: linked for name, linked in links.items() if linked}
    ended = {"status": record["status"], "time": record["end"]}
    if record["end"]:
        ask(uri, lambda client: send(uri, Letter(run_id, "end", ended)))
    ask(uri, lambda client: send(uri, Letter(run_id, "tags", tags | {WHOLE_TAG: "yes"})))


def _letters(run_id: str, record: Record, artifacts: Path) -> Iterator[Letter]:
    yield Letter(run_id, "params", record["params"])
    entries = [[name, *entry] for name, history in record["metrics"].items() for entry in history]
    for first in range(0, len(entries), MAX_METRICS):
        yield Letter(run_id, METRICS, {METRICS: entries[first : first + MAX_METRICS]})
    for data in record["datasets"]:
        yield Letter(run_id, "dataset", data)
    for path in sorted(path for path in artifacts.rglob("*") if path.is_file()):
        folder = path.parent.relative_to(artifacts).as_posix()
        yield Letter(run_id, "artifact", {"folder": "" if folder == "." else folder}, path)
