"""Moving an alias of the model registry to what a run wrote, a bundle or an encoder."""

from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from samssl.bundle import read_bundle
from samssl.cluster.ledger import ServerLedger
from samssl.cluster.registry import (
    KEPT,
    URI,
    Registration,
    Role,
    bundle_registration,
    encoder_registration,
    find_version,
    move_alias,
    register,
    registered,
)
from samssl.cluster.server import ask, tracking_uri
from samssl.cluster.tracking import Run
from samssl.config import UserError, build_config, read_yaml
from samssl.files import read_json, sha256_file, sha256_tree
from samssl.models.initial import RUN_CONFIG
from samssl.models.sam import ModelConfig
from samssl.train.registering import RegisterConfig


def promote(target: str, alias: str) -> str:
    """Point `alias` to a run's bundle or encoder, registering it first where it is not; says what changed.

    `target` is the path of a bundle, an encoder or a stage's folder, a run id, or models:/NAME/VERSION.

    Raises:
        UserError: it is none of these, or it changed since its run wrote it.
    """
    try:
        RegisterConfig(alias=alias)
    except ValueError as error:
        raise UserError(str(error)) from None
    uri = tracking_uri()
    version = find_version(target) if target.startswith(URI) else _version_of(uri, target)
    before = ask(uri, lambda client: _holder(client, version.name, alias))
    ask(uri, lambda client: move_alias(client, version.name, alias, str(version.version)))
    return f"{URI}{version.name}@{alias}: {_described(before)} -> {_described(version)}"


def _version_of(uri: str, target: str) -> ModelVersion:
    """The version of what lies at a path or was written by a run."""
    ledger, given = ServerLedger(uri), Path(target)
    if given.exists() and not (given / "run.json").is_file():
        run, role, path = _writer_of(given, ledger), _role_of(given), given
    else:
        run = ledger.by_id(read_json(given / "run.json")["run_id"] if given.exists() else target)
        role = _role_written(run)
        path = Path(run.tags()[f"path.{role}"])
    digest = run.tags()[f"output.{role}"]
    known = ask(uri, lambda client: registered(client, run.run_id, role, digest))
    return known or register(uri, run.run_id, _registration(role, path, digest))


def _role_written(run: Run) -> Role:
    """What a run is promoted by: its bundle, or else its encoder."""
    for role in reversed(KEPT):
        if f"output.{role}" in run.tags():
            return role
    raise UserError(
        f"Run {run.run_id} wrote no bundle and no encoder that could be promoted. Give a run of pretrain or "
        "finetune that has finished."
    )


def _role_of(path: Path) -> Role:
    return "bundle" if path.is_dir() else "encoder"


def _writer_of(path: Path, ledger: ServerLedger) -> Run:
    digest = sha256_tree(path) if path.is_dir() else sha256_file(path)
    runs = ledger.find({f"output.{_role_of(path)}": digest})
    if not runs:
        raise UserError(f"No run wrote {path} as it is now. Promote what a known run wrote.")
    return runs[0]


def _registration(role: Role, path: Path, digest: str) -> Registration:
    if not path.exists():
        raise UserError(
            f"{path} is not there any more, and was not registered by its run. Put it back, or promote "
            "another one."
        )
    names = RegisterConfig()
    if role == "bundle":
        registration = bundle_registration(path, read_bundle(path), names)
    else:
        model = read_yaml(path.parent / RUN_CONFIG)["model"]
        settings = build_config(ModelConfig, model, source=str(path.parent))
        registration = encoder_registration(path, settings, names)
    if registration.digest != digest:
        raise UserError(
            f"{path} has changed since its run wrote it: it is not registered. Put the original back, or run "
            "its stage again."
        )
    return registration


def _holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException:
        return None


def _described(version: ModelVersion | None) -> str:
    return f"version {version.version} (run {version.run_id})" if version else "nothing"
