"""Encoders and bundles in MLflow's model registry: a version for each run, and aliases that move on.

A version has the tags `<role>.sha256` (of what the run wrote, an encoder or a bundle) and `file.sha256` (of
what the registry keeps), and names its run, so that its lineage can be followed like a file's. Encoders are
kept as safetensors, bundles as they are: nothing is pickled.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import mlflow
import mlflow.artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from samssl.bundle import Bundle
from samssl.cluster.server import ask, client_of, is_away, tracking_uri
from samssl.config import UserError
from samssl.files import sha256_file, sha256_tree
from samssl.models.checkpoints import read_weights, save_tensors
from samssl.models.initial import NORMALISATION_KEY
from samssl.models.sam import ModelConfig
from samssl.train.registering import RegisterConfig

Role = Literal["encoder", "bundle"]
KEPT: dict[Role, str] = {"encoder": "encoder.safetensors", "bundle": "bundle"}
"""Under what name the registry keeps it."""
DESCRIPTIONS: dict[Role, str] = {
    "encoder": "SAM image encoders pretrained by samssl",
    "bundle": "Models fine-tuned by samssl",
}
URI = "models:/"
ATTEMPTS = 6
Changed = TypeVar("Changed")


@dataclass(frozen=True)
class Registration:
    """Something that a run wrote, and what it is called in the registry."""

    role: Role
    path: Path
    digest: str
    name: str
    alias: str
    settings: dict[str, str]
    """Shown with the model: variant, image size and the like."""

    @property
    def uri(self) -> str:
        """The URI with the alias."""
        return f"{URI}{self.name}@{self.alias}"

    def to_tree(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"path": str(self.path)}

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> "Registration":
        """From `to_tree`."""
        return Registration(**{**tree, "path": Path(tree["path"])})


def encoder_registration(encoder: Path, model: ModelConfig, register: RegisterConfig) -> Registration:
    """The weights in `encoder`, which a run of pretrain wrote."""
    name = register.model_name(model.variant, "encoder")
    digest = sha256_file(encoder)
    return Registration("encoder", encoder, digest, name, register.alias, _settings(model))


def bundle_registration(path: Path, bundle: Bundle, register: RegisterConfig) -> Registration:
    """The bundle in the folder `path`, which a run of finetune wrote."""
    strategy = bundle.strategy
    network = bundle.model.variant if strategy.network == "sam" else strategy.network
    settings = {
        **_settings(bundle.model),
        "network": strategy.network,
        "strategy": f"{strategy.scope}/{strategy.method}",
        "mode": bundle.mode,
    }
    name = register.model_name(network, "bundle")
    return Registration("bundle", path, sha256_tree(path), name, register.alias, settings)


def register(uri: str, run_id: str, registration: Registration) -> ModelVersion:
    """Register what the run wrote, and move the alias to it; the second time the alias is moved only."""
    mlflow.set_tracking_uri(uri)  # by which MLflow resolves `models:/`, whatever its client was given
    client, name = client_of(uri), registration.name
    _ensure_model(client, name, registration.role)
    version = registered(client, run_id, registration.role, registration.digest)
    version = version or _new_version(client, run_id, registration)
    move_alias(client, name, registration.alias, str(version.version))
    return version


def move_alias(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Point the alias to a version; of two runs that make it at the same moment the later one has it."""
    _despite_others(lambda: client.set_registered_model_alias(name, alias, version))


def registered(client: MlflowClient, run_id: str, role: Role, digest: str) -> ModelVersion | None:
    """The version of what a run wrote with this digest; the newest, should there be several."""
    known = client.search_model_versions(f"run_id = '{run_id}'")
    fitting = [entry for entry in known if entry.tags.get(f"{role}.sha256") == digest]
    return max(fitting, key=lambda entry: int(entry.version), default=None)


def find_version(uri: str) -> ModelVersion:
    """The registered version that `models:/<name>@<alias>` or `models:/<name>/<version>` names.

    Raises:
        UserError: the registry has none of that name.
    """
    name, at, alias = uri.removeprefix(URI).partition("@")
    try:
        if at:
            return ask(tracking_uri(), lambda client: client.get_model_version_by_alias(name, alias))
        name, _, number = name.rpartition("/")
        return ask(tracking_uri(), lambda client: client.get_model_version(name, number))
    except MlflowException:
        raise UserError(
            f"'{uri}' is not in the registry of {tracking_uri()}. "
            "Write models:/NAME@ALIAS or models:/NAME/VERSION."
        ) from None


def role_of(version: ModelVersion) -> Role:
    """What a registered version is."""
    return next((role for role in get_args(Role) if f"{role}.sha256" in version.tags), "encoder")


def fetch(version: ModelVersion, folder: Path) -> Path | None:
    """What the registry keeps of a version, copied into `folder`; None where it is gone."""
    try:
        copied = mlflow.artifacts.download_artifacts(
            str(version.source), dst_path=str(folder), tracking_uri=tracking_uri()
        )
    except (MlflowException, OSError):
        return None
    kept = Path(copied) / KEPT[role_of(version)]
    return kept if kept.exists() else None


def _settings(model: ModelConfig) -> dict[str, str]:
    return {
        "variant": model.variant,
        "image_size": str(model.image_size),
        "normalisation": str(model.normalisation),
    }


def _ensure_model(client: MlflowClient, name: str, role: Role) -> None:
    try:
        client.create_registered_model(name, description=DESCRIPTIONS[role])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by an earlier run, or one at the same moment
            raise


def _new_version(client: MlflowClient, run_id: str, registration: Registration) -> ModelVersion:
    role, name = registration.role, registration.name
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=name,
        source_run_id=run_id,
        params=registration.settings,
        model_type=role,
    )
    with tempfile.TemporaryDirectory() as folder:
        digest = _copy(registration, Path(folder) / KEPT[role])
        client.log_model_artifacts(logged.model_id, folder)
    client.finalize_logged_model(logged.model_id, "READY")
    _link(client, run_id, role, logged)
    tags = {**registration.settings, f"{role}.sha256": registration.digest, "file.sha256": digest}
    return _despite_others(
        lambda: client.create_model_version(
            name, f"{URI}{logged.model_id}", run_id=run_id, tags=tags, model_id=logged.model_id
        )
    )


def _despite_others(change: Callable[[], Changed]) -> Changed:
    """Make a change of the registry, again where another process made the same at the same moment."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return change()
        except MlflowException as error:  # MLflow has no code of its own for this
            if is_away(error) or attempt == ATTEMPTS:
                raise
            time.sleep(random.uniform(0, 0.1 * attempt))
    raise AssertionError("the last attempt returns or raises")


def _copy(registration: Registration, to: Path) -> str:
    """Write what the registry keeps; returns its digest."""
    if registration.role == "bundle":
        shutil.copytree(registration.path, to)
        return sha256_tree(to)
    header = {NORMALISATION_KEY: registration.settings["normalisation"]}
    save_tensors(read_weights(registration.path), to, header)
    return sha256_file(to)


def _link(client: MlflowClient, run_id: str, role: Role, logged: LoggedModel) -> None:
    """Show the model among the outputs of its run, whose tag `model.<role>` is its id."""
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.log_batch(run_id, tags=[RunTag(f"model.{role}", logged.model_id)])
