"""`samssl submit`: a stage as a job of a Ray cluster, sent by Ray's own `ray job submit`.

What travels is the working directory, without what `.gitignore` and the runtime environment exclude. The job
runs in a copy of it that is thrown away, so that every path is made absolute before it is sent.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from samssl.cluster.server import tracking_uri
from samssl.config import ConfigError, UserError, as_url, load_config, parse_overrides, read_yaml

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
PLAIN_NAME = re.compile(r"[\w -]+")
SECRET_NAMES = ("TOKEN", "PASSWORD", "SECRET", "KEY")
"""Words in the name of a variable that holds a secret."""


@dataclass(frozen=True)
class Submission:
    """What is sent, and where to."""

    stage: str
    config_class: type
    config: Path | None
    overrides: Sequence[str]
    address: str
    """Of the cluster's dashboard, as in http://HEAD:8265."""
    runtime_env: Path
    """YAML file with Ray's runtime environment; its `working_dir` is relative to where this is run."""
    wait: bool
    """Stream the job's output until it ends."""


def submit(submission: Submission) -> int:
    """Print the `ray job submit` of a stage and run it; returns its exit code, 1 for a job that failed.

    Raises:
        UserError: the settings cannot be used, no cluster answers, or the job was stopped.
    """
    job = f"samssl-{submission.stage}-{uuid.uuid4().hex[:8]}"
    command = job_command(submission, job)
    os.environ[ADDRESS_VARIABLE] = submission.address  # which Ray prefers to what it is told otherwise
    client = _connect(submission.address)
    print(shlex.join(command), flush=True)
    ray = str(Path(sys.executable).with_name("ray"))
    try:
        code = subprocess.run([ray, *command[1:]]).returncode
    except KeyboardInterrupt:
        print(f"The job goes on. `ray job logs --follow {job}` shows it, `ray job stop {job}` ends it.")
        return 130
    if code == 0 and submission.wait and client.get_job_status(job) == JobStatus.STOPPED:
        raise UserError(f"The job {job} was stopped. The same command goes on from what is finished.")
    return code


def job_command(submission: Submission, job: str) -> list[str]:
    """The `ray job submit` that sends a stage under the name `job`.

    Raises:
        UserError: the settings or the runtime environment cannot be used.
    """
    environment = _runtime_env(submission.runtime_env)
    working_dir = str(environment.pop("working_dir"))
    options = ["--address", submission.address, "--submission-id", job, "--working-dir", working_dir]
    options += ["--runtime-env-json", json.dumps(environment)]
    options += [] if submission.wait else ["--no-wait"]
    return ["ray", "job", "submit", *options, "--", *_entrypoint(submission, working_dir)]


def _runtime_env(file: Path) -> dict[str, Any]:
    """The runtime environment in `file`, with the variables that a stage reads from this process."""
    if not file.is_file():
        raise UserError(
            f"There is no runtime environment {file}. Give one with --runtime-env, "
            "or run this in the project's folder, where ray_configs/jobs has them."
        )
    environment = read_yaml(file)
    variables = environment.get("env_vars") or {}
    environment["env_vars"] = _without_secrets(variables | _passed_on())
    working_dir = _without_secrets({"working_dir": environment.get("working_dir", ".")})["working_dir"]
    environment["working_dir"] = working_dir if "://" in working_dir else str(Path(working_dir).resolve())
    return environment


def _passed_on() -> dict[str, str]:
    """Variables of this process that the job has to have too."""
    passed = {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
    if os.environ.get("MLFLOW_TRACKING_URI"):
        passed["MLFLOW_TRACKING_URI"] = tracking_uri()
    if os.environ.get("SAMSSL_CHECKPOINTS"):
        passed["SAMSSL_CHECKPOINTS"] = str(Path(os.environ["SAMSSL_CHECKPOINTS"]).expanduser().absolute())
    return passed


def _without_secrets(variables: Mapping[str, Any]) -> dict[str, str]:
    """`variables` as text.

    Raises:
        UserError: one of them holds a secret: Ray writes runtime environments into its logs.
    """
    texts = {name: str(value) for name, value in variables.items()}
    for name, text in texts.items():
        if any(word in name.upper() for word in SECRET_NAMES) or urlsplit(text).password:
            raise UserError(
                f"{name} holds a secret, which Ray would show in its dashboard and keep in its logs. "
                "Set it on the nodes of the cluster instead, and not here."
            )
    return texts


def _entrypoint(submission: Submission, working_dir: str) -> list[str]:
    """The command of the job: the stage with its file, if that travels, and its settings."""
    overrides = parse_overrides(submission.overrides)
    loaded = load_config(submission.config_class, submission.config, overrides)
    file, from_file = None, dict(_fields(read_yaml(submission.config))) if submission.config else {}
    settings = {name: _absolute(value, _lookup(loaded, name)) for name, value in from_file.items()}
    if submission.config and submission.config.resolve().is_relative_to(working_dir):
        file = submission.config.resolve().relative_to(working_dir)
        settings = {name: value for name, value in settings.items() if value != from_file[name]}
    for name, value in overrides.items():
        settings[name] = _absolute(value, _lookup(loaded, name))
    arguments = [f"{name}={_text(value)}" for name, value in settings.items()]
    try:
        same = load_config(submission.config_class, file and working_dir / file, parse_overrides(arguments))
    except ConfigError:
        same = None
    if same != loaded:
        raise ConfigError(
            f"A setting of {submission.config} cannot be said on a command line. Put the file into "
            f"{working_dir}, so that it travels with the job."
        )
    return [*_program(submission.stage, working_dir), *(["--config", str(file)] if file else []), *arguments]


def _fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; a mapping with keys that would not fit into a dotted name stays whole."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value and all(PLAIN_NAME.fullmatch(str(key)) for key in value):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _program(stage: str, working_dir: str) -> list[str]:
    """What runs a stage on the cluster: the script that travels, or else the package of the nodes."""
    script = Path("pipelines") / f"{stage}.py"
    return ["python", str(script)] if (working_dir / script).is_file() else ["samssl", stage]


def _lookup(loaded: Any, name: str) -> Any:
    """The value of a dotted name in a loaded config; None where it has none."""
    for part in name.split("."):
        loaded = loaded.get(part) if isinstance(loaded, Mapping) else getattr(loaded, part, None)
    return loaded


def _absolute(given: Any, loaded: Any) -> Any:
    """`given`, as YAML has it, with what was loaded as a path replaced by that path, which is absolute."""
    if isinstance(loaded, Path):
        return as_url(loaded)
    if isinstance(given, Mapping):
        return {name: _absolute(value, _lookup(loaded, str(name))) for name, value in given.items()}
    if isinstance(given, list) and isinstance(loaded, tuple):
        return [_absolute(*pair) for pair in zip(given, loaded, strict=False)]
    return given


def _text(value: Any) -> str:
    """A value of YAML as `parse_overrides` reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str) if isinstance(value, (Mapping, list)) else str(value)


def _connect(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"The cluster at {address} does not take jobs: {reason} Check --address, the dashboard's "
            "(port 8265), and RAY_AUTH_TOKEN. A cluster without tokens needs RAY_AUTH_MODE=disabled."
        ) from None
