"""MLflow runs that outlive their workers, and the server's absences.

The driver opens and ends every run; workers are handed `Run`, which is plain data, and log into it by
id, so that a restarted worker or a resumed driver goes on in the same run.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    Metric,
    Param,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.time import get_current_time_millis
from PIL import Image

from samssl.cluster import registry, server
from samssl.cluster.outbox import FOLDER, METRICS, Letter, Outbox
from samssl.cluster.server import SQLITE, ask, client_of, tracking_uri
from samssl.files import write_bytes

MAX_PARAM_LENGTH = 6000
MAX_PARAMS_IN_BATCH = 100
PARENT_TAG = "mlflow.parentRunId"

DataUse = Literal["pretraining", "training", "evaluation"]


@dataclass(frozen=True)
class Run:
    """One MLflow run, wherever this is unpickled."""

    uri: str
    run_id: str
    folder: Path | None = None
    """The folder of its stage: what cannot be logged now waits in `outbox` below it."""

    @property
    def client(self) -> MlflowClient:
        """A client of this run's server."""
        return client_of(self.uri)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log what is finite; NaN has no place in a chart."""
        now = get_current_time_millis()
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._post(METRICS, {METRICS: [[name, value, now, step] for name, value in finite.items()]})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log dotted config names, those that are new; MLflow never changes a param."""
        self._post("params", {name: str(value)[:MAX_PARAM_LENGTH] for name, value in params.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those of the same name."""
        self._post("tags", {name: str(value) for name, value in tags.items()})

    def log_dataset(self, name: str, digest: str, use: DataUse) -> None:
        """Show the data in MLflow's Datasets column; its digest there has 36 characters at most."""
        source = json.dumps({"manifest": digest})
        about = {"name": name, "digest": digest[:36], "source_type": "slice store", "source": source}
        self._post("dataset", about | {"tags": {MLFLOW_DATASET_CONTEXT: use}})

    def log_model_input(self, model_id: str) -> None:
        """Link the run with a logged model that it starts from."""
        self._post("model_input", {"model_id": model_id})

    def register(self, registration: registry.Registration) -> None:
        """Put what the run wrote into the model registry."""
        self._post("register", registration.to_tree())

    def log_picture(self, name: str, image: np.ndarray) -> None:
        """Store an RGB image [H, W, 3] of uint8 as the artifact `name`, and in the stage's folder."""
        assert self.folder is not None, "pictures are logged by stages"
        path = self.folder / name
        write_bytes(path, _png(image))
        self._post("artifact", {"folder": str(Path(name).parent)}, path)

    def log_file(self, path: Path) -> None:
        """Store a file as an artifact of the same name."""
        self._post("artifact", {"folder": ""}, path)

    def tags(self) -> dict[str, str]:
        """All tags of the run."""
        return dict(ask(self.uri, lambda client: client.get_run(self.run_id)).data.tags)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._post("end", {"status": status, "time": get_current_time_millis()})

    def _post(self, kind: str, content: dict[str, Any], file: Path | None = None) -> None:
        letter = Letter(self.run_id, kind, content, file)
        if self.folder:
            Outbox(self.folder / FOLDER, self.uri, send).post(letter)
        else:
            send(self.uri, letter)


def send(uri: str, letter: Letter) -> None:
    """Log what `letter` holds; a second time it changes nothing."""
    client, run_id, content = client_of(uri), letter.run_id, letter.content
    if letter.kind == METRICS:
        client.log_batch(run_id, metrics=[Metric(*entry) for entry in content[METRICS]])
    elif letter.kind == "params":
        _send_params(client, run_id, content)
    elif letter.kind == "tags":
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in content.items()])
    elif letter.kind == "dataset":
        tags = [InputTag(name, value) for name, value in content["tags"].items()]
        data = Dataset(**{name: value for name, value in content.items() if name != "tags"})
        client.log_inputs(run_id, [DatasetInput(data, tags)])
    elif letter.kind == "model_input":
        _send_model_input(client, run_id, content["model_id"])
    elif letter.kind == "artifact":
        client.log_artifact(run_id, str(letter.file), content["folder"] or None)
    elif letter.kind == "register":
        registry.register(uri, run_id, registry.Registration.from_tree(content))
    else:
        assert letter.kind == "end", letter.kind
        client.set_terminated(run_id, content["status"], content["time"])


def deliver_below(folder: Path) -> int:
    """Deliver what waits in the stages below `folder`, where the server is there; how much still waits."""
    uri, left = tracking_uri(), 0
    server.forget_pause(uri)
    for path in _outboxes(folder):
        outbox = Outbox(path, uri, send)
        if outbox.deliver():
            outbox.close()
        left += len(outbox.waiting())
    return left


def open_run(experiment: str, name: str, tags: Mapping[str, str], folder: Path | None = None) -> Run:
    """Start the run of the stage in `folder`, making database, experiment and artifact folder if new.

    Raises:
        UserError: the server cannot be reached.
    """
    uri = tracking_uri()
    if PARENT_TAG in tags:  # the study has met the server, whichever process this part of it runs in
        server.has_answered(uri)
    place = ask(uri, lambda client: experiment_id(client, uri, experiment))
    run = ask(uri, lambda client: client.create_run(place, tags=dict(tags), run_name=name))
    return Run(uri, run.info.run_id, folder)


def continue_run(run_id: str, folder: Path | None = None) -> Run | None:
    """The run with this id, set running again; None where this tracking server does not know it."""
    uri = tracking_uri()
    try:
        ask(uri, lambda client: client.update_run(run_id, status="RUNNING"))
    except MlflowException:
        return None
    return Run(uri, run_id, folder)


def find_runs(tags: Mapping[str, str]) -> list[Run]:
    """Runs of any experiment that have all these tags, newest first."""
    uri = tracking_uri()
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())

    def search(client: MlflowClient) -> list[Run]:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        if not experiments:
            return []
        newest = ["attributes.start_time DESC"]
        found = client.search_runs(experiments, query, ViewType.ACTIVE_ONLY, order_by=newest)
        return [Run(uri, run.info.run_id) for run in found]

    return ask(uri, search)


def _send_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    known = client.get_run(run_id).data.params
    entries = [Param(name, value) for name, value in params.items() if name not in known]
    for first in range(0, len(entries), MAX_PARAMS_IN_BATCH):
        client.log_batch(run_id, params=entries[first : first + MAX_PARAMS_IN_BATCH])


def _send_model_input(client: MlflowClient, run_id: str, model_id: str) -> None:
    inputs = client.get_run(run_id).inputs
    linked = inputs.model_inputs if inputs else []
    if model_id not in [entry.model_id for entry in linked]:  # MLflow would link it once more
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])


def _outboxes(folder: Path) -> Iterator[Path]:
    """The outboxes of a stage's folder and of the stages in it, but none of what lies below data."""
    for root, folders, _ in os.walk(folder):
        if FOLDER in folders:
            yield Path(root) / FOLDER
        data = {name for name in folders if name.endswith(".zarr")} | {FOLDER, "cases", "ray"}
        folders[:] = sorted(set(folders) - data)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of this name, made where it is new."""
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return experiment.experiment_id
    location = None  # a server decides for itself
    if uri.startswith(SQLITE):
        location = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        made = client.get_experiment_by_name(name)  # by another process, a moment before
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or made is None:
            raise
        return made.experiment_id
