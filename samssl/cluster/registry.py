"""Encoders in MLflow's model registry: safetensors, a version for each run, an alias that moves on.

A version has the tags `encoder.sha256` (of the run's `encoder.pth`) and `file.sha256` (of the registered
file), and names its run, so that its lineage can be followed like a file's.
"""

import tempfile
from pathlib import Path

import mlflow
import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from samssl.cluster.tracking import Run, tracking_uri
from samssl.config import UserError
from samssl.files import sha256_file
from samssl.models.checkpoints import read_weights, save_tensors
from samssl.models.initial import NORMALISATION_KEY
from samssl.models.sam import ModelConfig
from samssl.train.registering import RegisterConfig

REGISTERED_FILE = "encoder.safetensors"
URI = "models:/"


def register_encoder(run: Run, encoder: Path, model: ModelConfig, register: RegisterConfig) -> str:
    """Register the weights in `encoder`, which `run` wrote; returns the URI with the alias.

    Called again for the same run and weights it only moves the alias.
    """
    mlflow.set_tracking_uri(run.uri)  # by which MLflow resolves `models:/`, whatever its client was given
    client, name = run.client, register.model_name(model.variant)
    digest = sha256_file(encoder)
    _ensure_model(client, name)
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'")
    version = next((entry for entry in known if entry.tags.get("encoder.sha256") == digest), None)
    version = version or _new_version(run, name, encoder, model, digest)
    client.set_registered_model_alias(name, register.alias, str(version.version))
    return f"{URI}{name}@{register.alias}"


def find_version(uri: str) -> ModelVersion:
    """The registered version that `models:/<name>@<alias>` or `models:/<name>/<version>` names.

    Raises:
        UserError: the registry has none of that name.
    """
    client, rest = MlflowClient(tracking_uri=tracking_uri()), uri.removeprefix(URI)
    name, at, alias = rest.partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, number = rest.rpartition("/")
        return client.get_model_version(name, number)
    except MlflowException:
        raise UserError(
            f"'{uri}' is not in the registry of {tracking_uri()}. "
            "Write models:/NAME@ALIAS or models:/NAME/VERSION."
        ) from None


def fetch(version: ModelVersion, folder: Path) -> Path | None:
    """The file of a registered version, copied into `folder`; None where its artifact is gone."""
    try:
        copied = mlflow.artifacts.download_artifacts(
            str(version.source), dst_path=str(folder), tracking_uri=tracking_uri()
        )
    except (MlflowException, OSError):
        return None
    file = Path(copied) / REGISTERED_FILE
    return file if file.is_file() else None


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, description="SAM image encoders pretrained by samssl")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by an earlier run, or one at the same moment
            raise


def _new_version(run: Run, name: str, encoder: Path, model: ModelConfig, digest: str) -> ModelVersion:
    client = run.client
    experiment = client.get_run(run.run_id).info.experiment_id
    settings = {
        "variant": model.variant,
        "image_size": str(model.image_size),
        "normalisation": str(model.normalisation),
    }
    logged = client.create_logged_model(
        experiment, name=name, source_run_id=run.run_id, params=settings, model_type="encoder"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / REGISTERED_FILE
        save_tensors(read_weights(encoder), file, {NORMALISATION_KEY: str(model.normalisation)})
        client.log_model_artifacts(logged.model_id, folder)
        tags = {**settings, "encoder.sha256": digest, "file.sha256": sha256_file(file)}
    client.finalize_logged_model(logged.model_id, "READY")
    return client.create_model_version(
        name, f"{URI}{logged.model_id}", run_id=run.run_id, tags=tags, model_id=logged.model_id
    )
