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
from pipelines_support import StudyFolder, make_study

from samssl.config import read_yaml

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
STEPS, SAVED_EVERY = 150, 5
LONG = tuple(
    f"pretrain.optim.{name}={value}"
    for name, value in {"steps": STEPS, "save_every": SAVED_EVERY, "validate_every": 100}.items()
)
"""Pretraining that lasts until it is stopped."""


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and the environment of somebody who has its token."""

    address: str
    token: str
    environment: dict[str, str]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command in the project's folder; what it prints is read from its stdout."""
        program, *arguments = command
        return subprocess.Popen(
            [str(PROGRAMS / program), *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> tuple[int, str]:
        """Exit code and output of a command."""
        process = self.start(*command)
        output, _ = process.communicate()
        assert self.token not in output
        return process.returncode, output


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


def wait_for_step(process: subprocess.Popen[str], step: int) -> str:
    """Until pretraining says in the job's streamed output that it has done `step`; returns the output."""
    assert process.stdout
    seen = ""
    for line in process.stdout:
        seen += line
        told = re.search(rf"step (\d+)/{STEPS}:", line)
        if told and int(told[1]) >= step:
            return seen
    raise AssertionError(f"the job ended before step {step}:\n{seen[-3000:]}")


def steps(output: str) -> list[int]:
    """Steps of pretraining that a job has told of."""
    return [int(step) for step in re.findall(rf"step (\d+)/{STEPS}:", output)]


@pytest.fixture(scope="module")
def stopped(head: Head, study: StudyFolder) -> tuple[int, str, str]:
    """The study stopped by `ray job stop` while it pretrains: exit code, output, its MLflow run."""
    process = head.start(*submitted(head, study))
    seen = wait_for_step(process, 2 * SAVED_EVERY + 2)
    job = re.search(r"samssl-study-\w{8}", seen)
    assert job
    code, output = head.run("ray", "job", "stop", "--address", head.address, job[0])
    assert code == 0, output
    assert process.stdout
    seen += process.stdout.read()
    return process.wait(), seen, study.json("pretrain/seed0/run.json")["run_id"]


def test_the_command_is_printed_and_a_stopped_job_is_no_success(
    head: Head, stopped: tuple[int, str, str]
) -> None:
    code, output, _ = stopped
    assert code == 1
    assert output.startswith(f"ray job submit --address {head.address} --submission-id samssl-study-")
    assert head.token not in output
    assert "was stopped. The same command goes on from what is finished." in output
    assert "Interrupted. What is finished is kept" in output  # said by the job itself


def test_the_same_command_goes_on_to_the_report(
    head: Head, study: StudyFolder, stopped: tuple[int, str, str]
) -> None:
    code, output = head.run(*submitted(head, study))
    assert code == 0, output[-3000:]
    assert "prepare: wrote 0 cases" in output
    assert steps(output)[0] > SAVED_EVERY, "pretraining began anew"
    assert steps(output)[-1] == STEPS
    assert study.json("pretrain/seed0/run.json")["run_id"] == stopped[2]
    curve = [line.split(",") for line in (study.out / "pretrain/seed0/history.csv").read_text().splitlines()]
    assert [int(step) for step, metric, _ in curve[1:] if metric == "train/loss"] == list(range(1, STEPS + 1))
    assert (study.out / "report.html").is_file()
    assert set(study.json("summary.json")["arms"]) == {"ssl", "no_ssl"}


def test_rays_own_command_runs_the_study_too(
    head: Head, study: StudyFolder, stopped: tuple[int, str, str]
) -> None:
    """After the test above: there is nothing left to do but the report."""
    (study.out / "report.html").unlink()
    environment = read_yaml(ROOT / "ray_configs/jobs/cpu.yaml")
    environment["env_vars"]["MLFLOW_TRACKING_URI"] = head.environment["MLFLOW_TRACKING_URI"]
    command = ["ray", "job", "submit", "--address", head.address]
    command += ["--runtime-env-json", json.dumps(environment), "--", "python", "pipelines/study.py"]
    code, output = head.run(*command, "--config", str(study.root / "study.yaml"), *LONG)
    assert code == 0, output[-3000:]
    assert output.count("nothing to do") == 5  # pretrain, and two stages of two arms
    assert (study.out / "report.html").is_file()


def test_a_mistake_of_the_user_fails_the_job_with_its_sentence(head: Head, tmp_path: Path) -> None:
    options = ["--address", head.address, "--runtime-env", "ray_configs/jobs/cpu.yaml"]
    arguments = ["finetune", *options, f"out={tmp_path / 'out'}", f"data.store={tmp_path / 'none'}"]
    code, output = head.run("samssl", "submit", *arguments)
    assert code == 1
    assert re.search(r"^samssl: .*none.* is no complete slice store", output, re.MULTILINE)
    assert "Traceback" not in output


def test_a_wrong_token_is_told_as_such(head: Head, study: StudyFolder) -> None:
    other = Head(head.address, "0" * 64, head.environment | {"RAY_AUTH_TOKEN": "0" * 64})
    code, output = other.run(*submitted(head, study))
    assert code == 1
    assert f"The cluster at {head.address} does not take jobs" in output
    assert "RAY_AUTH_TOKEN" in output
