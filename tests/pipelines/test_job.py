"""Jobs on a cluster that `ray start` has made here, with tokens: they stop, go on, succeed and fail."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from mlflow.tracking import MlflowClient
from pipelines_support import StudyFolder, make_study

from samssl.config import read_yaml

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]  # whole studies, on machines that may be busy
ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
STEPS, SAVED_EVERY = 80, 10
LONG = tuple(
    f"pretrain.optim.{name}={value}"
    for name, value in {
        **{"steps": STEPS, "save_every": SAVED_EVERY, "validate_every": 40, "batch_size": 16}
    }.items()
)
"""Pretraining that lasts until it is stopped."""


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and the environment of somebody who has its token."""

    address: str
    token: str
    environment: dict[str, str]

    def start(self, log: Path, *command: str) -> subprocess.Popen[bytes]:
        """A command in the project's folder; what it prints goes to `log`."""
        program, *arguments = command
        line = [str(PROGRAMS / program), *arguments]
        with log.open("wb") as out:
            return subprocess.Popen(
                line, cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )

    def asks(self, path: str) -> bytes:
        """What the cluster's dashboard answers."""
        request = Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urlopen(request, timeout=30) as answer:
            return answer.read()

    def run(self, log: Path, *command: str) -> tuple[int, str]:
        """Exit code and output of a command."""
        code = self.start(log, *command).wait()
        output = log.read_text()
        assert self.token not in output
        return code, output


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with its own home, token and ports; ended by its process id."""
    root = tmp_path_factory.mktemp("head")
    token = secrets.token_hex(32)
    gcs, dashboard, *others = free_ports(7)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    names += ("ray-client-server-port", "node-manager-port")
    unset = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {
        "HOME": str(root),
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # or a busy machine kills a job before it has said its last word
    }
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        options = [f"--{name}={port}" for name, port in zip(names, others, strict=True)]
        options += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={short}", "--num-cpus=2"]
        with (root / "head.log").open("w") as log:
            process = subprocess.Popen(
                [str(PROGRAMS / "ray"), "start", "--head", "--block", *options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_for_jobs_to_be_taken(address, token, process)
            yield Head(address, token, environment)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def wait_for_jobs_to_be_taken(address: str, token: str, process: subprocess.Popen[bytes]) -> None:
    request = Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    for _ in range(120):
        assert process.poll() is None, "the head has ended"
        try:
            with urlopen(request, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the head takes no jobs")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> StudyFolder:
    """The settings of the small study, in a folder that does not travel with a job."""
    root = tmp_path_factory.mktemp("job_study")
    return make_study(root, make_scans(root / "scans", cases=8))


def submitted(head: Head, study: StudyFolder) -> list[str]:
    """The command that submits the study."""
    options = ["--address", head.address, "--runtime-env", "ray_configs/jobs/cpu.yaml"]
    return ["samssl", "submit", "study", *options, "--config", str(study.root / "study.yaml"), *LONG]


def logged_steps(head: Head, run_id: str) -> list[int]:
    """Steps whose training loss MLflow has, each as often as it was logged."""
    client = MlflowClient(tracking_uri=head.environment["MLFLOW_TRACKING_URI"])
    return [metric.step for metric in client.get_metric_history(run_id, "train/loss")]


def saved(state: Path) -> int:
    """The step of a saved state; 0 where there is none."""
    return torch.load(state, weights_only=True)["progress"]["step"] if state.exists() else 0


@dataclass(frozen=True)
class Stopped:
    """A study after `ray job stop` has ended its pretraining."""

    code: int
    output: str
    run_id: str
    """Of pretraining, in MLflow."""
    saved_step: int
    log: str
    """What the job itself has said to its end, which `output` may leave before."""


@pytest.fixture(scope="module")
def stopped(head: Head, study: StudyFolder) -> Stopped:
    log = study.root / "first.log"
    process = head.start(log, *submitted(head, study))
    state = study.out / "pretrain/seed0/ray/state.pt"
    while saved(state) < SAVED_EVERY:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    streamed = log.read_text()
    assert "prepare: 8 cases" in streamed
    job = re.search(r"samssl-study-\w{8}", streamed)
    assert job
    code, output = head.run(study.root / "stop.log", "ray", "job", "stop", "--address", head.address, job[0])
    assert code == 0, output
    code, run_id = process.wait(), study.json("pretrain/seed0/run.json")["run_id"]
    saved_step = saved(state)
    assert saved_step < STEPS
    logs = json.loads(head.asks(f"/api/jobs/{job[0]}/logs"))["logs"]
    return Stopped(code, log.read_text(), run_id, saved_step, logs)


def test_the_command_is_printed_and_a_stopped_job_is_no_success(head: Head, stopped: Stopped) -> None:
    assert stopped.code == 1
    assert stopped.output.startswith(f"ray job submit --address {head.address} --submission-id samssl-study-")
    assert head.token not in stopped.output
    assert "was stopped. The same command goes on from what is finished." in stopped.output
    assert "Interrupted. What is finished is kept" in stopped.log


def test_the_same_command_goes_on_to_the_report(head: Head, study: StudyFolder, stopped: Stopped) -> None:
    code, output = head.run(study.root / "second.log", *submitted(head, study))
    assert code == 0, output[-3000:]
    assert "prepare: wrote 0 cases" in output
    assert study.json("pretrain/seed0/run.json")["run_id"] == stopped.run_id
    steps = logged_steps(head, stopped.run_id)
    assert set(steps) == set(range(1, STEPS + 1))
    assert all(steps.count(step) == 1 for step in range(1, stopped.saved_step + 1)), "it began anew"
    assert (study.out / "report.html").is_file()
    assert set(study.json("summary.json")["arms"]) == {"ssl", "no_ssl"}


def test_rays_own_command_runs_the_study_too(head: Head, study: StudyFolder, stopped: Stopped) -> None:
    """After the test above: there is nothing left to do but the report."""
    (study.out / "report.html").unlink()
    environment = read_yaml(ROOT / "ray_configs/jobs/cpu.yaml")
    environment["env_vars"]["MLFLOW_TRACKING_URI"] = head.environment["MLFLOW_TRACKING_URI"]
    command = ["ray", "job", "submit", "--address", head.address]
    command += ["--runtime-env-json", json.dumps(environment), "--", "python", "pipelines/study.py"]
    log = study.root / "third.log"
    code, output = head.run(log, *command, "--config", str(study.root / "study.yaml"), *LONG)
    assert code == 0, output[-3000:]
    assert output.count("nothing to do") == 5  # pretrain, and two stages of two arms
    assert (study.out / "report.html").is_file()


def test_a_mistake_of_the_user_fails_the_job_with_its_sentence(head: Head, tmp_path: Path) -> None:
    options = ["--address", head.address, "--runtime-env", "ray_configs/jobs/cpu.yaml"]
    arguments = ["finetune", *options, f"out={tmp_path / 'out'}", f"data.store={tmp_path / 'none'}"]
    code, output = head.run(tmp_path / "log", "samssl", "submit", *arguments)
    assert code == 1
    assert re.search(r"^samssl: .*none.* is no complete slice store", output, re.MULTILINE)
    assert "Traceback" not in output


def test_a_wrong_token_is_told_as_such(head: Head, study: StudyFolder, tmp_path: Path) -> None:
    other = Head(head.address, "0" * 64, head.environment | {"RAY_AUTH_TOKEN": "0" * 64})
    code, output = other.run(tmp_path / "log", *submitted(head, study))
    assert code == 1
    assert f"The cluster at {head.address} does not take jobs" in output
    assert "RAY_AUTH_TOKEN" in output
