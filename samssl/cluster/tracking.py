"""MLflow runs that outlive their workers.

The driver opens and ends every run; workers are handed `Run`, which is plain data, and log into it by
id, so that a restarted worker or a resumed driver goes on in the same run.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

MAX_PARAM_LENGTH = 6000
MAX_PARAMS_IN_BATCH = 100
PARENT_TAG = "mlflow.parentRunId"
SQLITE = "sqlite:///"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or one SQLite file below the working directory.

    The path of an SQLite file is made absolute: workers run in folders of their own.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}runs/mlflow.db"
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}" if uri.startswith(SQLITE) else uri


@dataclass(frozen=True)
class Run:
    """One MLflow run, wherever this is unpickled."""

    uri: str
    run_id: str

    @property
    def client(self) -> MlflowClient:
        """A client of this run's server."""
        return MlflowClient(tracking_uri=self.uri)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log what is finite; NaN has no place in a chart."""
        now = get_current_time_millis()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.client.log_batch(self.run_id, metrics=[Metric(n, v, now, step) for n, v in finite.items()])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log dotted config names, those that are new; MLflow never changes a param."""
        known = self.client.get_run(self.run_id).data.params
        entries = [Param(n, str(value)[:MAX_PARAM_LENGTH]) for n, value in params.items() if n not in known]
        for first in range(0, len(entries), MAX_PARAMS_IN_BATCH):
            self.client.log_batch(self.run_id, params=entries[first : first + MAX_PARAMS_IN_BATCH])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those of the same name."""
        self.client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_dataset(self, name: str, digest: str) -> None:
        """Show the data in MLflow's Datasets column; its digest there has 36 characters at most."""
        dataset = Dataset(
            name, digest[:36], source_type="slice store", source=json.dumps({"manifest": digest})
        )
        self.client.log_inputs(self.run_id, [DatasetInput(dataset)])

    def log_picture(self, name: str, image: np.ndarray) -> None:
        """Store an RGB image [H, W, 3] of uint8 as the artifact `name`."""
        self.client.log_image(self.run_id, image, artifact_file=name)

    def log_file(self, path: Path) -> None:
        """Store a file as an artifact of the same name."""
        self.client.log_artifact(self.run_id, str(path))

    def download(self, folder: str, to: Path) -> None:
        """Copy the artifacts below `folder` into `to`; does nothing where there are none."""
        if self.client.list_artifacts(self.run_id, folder):
            to.mkdir(parents=True, exist_ok=True)
            self.client.download_artifacts(self.run_id, folder, str(to))

    def tags(self) -> dict[str, str]:
        """All tags of the run."""
        return dict(self.client.get_run(self.run_id).data.tags)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def open_run(experiment: str, name: str, tags: Mapping[str, str]) -> Run:
    """Start a run, making database, experiment and artifact folder where they are new."""
    uri = tracking_uri()
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri)
    run = client.create_run(_experiment_id(client, uri, experiment), tags=dict(tags), run_name=name)
    return Run(uri, run.info.run_id)


def continue_run(run_id: str) -> Run | None:
    """The run with this id, set running again; None where this tracking server does not know it."""
    run = Run(tracking_uri(), run_id)
    try:
        run.client.update_run(run_id, status="RUNNING")
    except MlflowException:
        return None
    return run


def find_runs(tags: Mapping[str, str]) -> list[Run]:
    """Runs of any experiment that have all these tags, newest first."""
    client = MlflowClient(tracking_uri=tracking_uri())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if not experiments:
        return []
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found = client.search_runs(
        experiments, query, ViewType.ACTIVE_ONLY, order_by=["attributes.start_time DESC"]
    )
    return [Run(tracking_uri(), run.info.run_id) for run in found]


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return experiment.experiment_id
    location = None  # a server decides for itself
    if uri.startswith(SQLITE):
        location = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
    return client.create_experiment(name, artifact_location=location)
