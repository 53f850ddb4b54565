"""What `samssl submit` sends; tests/pipelines/test_job.py sends it."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from pipelines_support import samssl

from samssl.cli import main
from samssl.cluster.study import StudyConfig
from samssl.cluster.submit import Submission, job_command
from samssl.config import ConfigError, UserError, load_config, parse_overrides
from samssl.train.pretrain import PretrainConfig

ROOT = Path(__file__).parents[2]
GPU = ROOT / "ray_configs/jobs/gpu.yaml"
DEMO = ROOT / "ray_configs/studies/demo.yaml"


def study(config: Path, *overrides: str, runtime_env: Path = GPU, wait: bool = True) -> Submission:
    return Submission("study", StudyConfig, config, overrides, "http://head:8265", runtime_env, wait)


def parts(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `ray job submit`, and the job's own command."""
    assert command[:3] == ["ray", "job", "submit"]
    split = command.index("--")
    return list(command[3:split]), list(command[split + 1 :])


def option(command: Sequence[str], name: str) -> str:
    return command[command.index(name) + 1]


def variables(command: Sequence[str]) -> dict[str, str]:
    return json.loads(option(command, "--runtime-env-json"))["env_vars"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("MLFLOW_TRACKING_URI", "SAMSSL_CHECKPOINTS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_a_file_that_travels_is_named_and_its_paths_are_made_absolute() -> None:
    command = job_command(study(DEMO, "seeds=[0, 1]", "pretrain.optim.lr=3e-4"), "one")
    options, job = parts(command)
    assert option(options, "--address") == "http://head:8265"
    assert option(options, "--submission-id") == "one"
    assert option(options, "--working-dir") == str(ROOT)
    assert "--no-wait" not in options
    assert job[:4] == ["python", "pipelines/study.py", "--config", "ray_configs/studies/demo.yaml"]
    assert job[4:] == [f"out={ROOT}/runs/demo", "seeds=[0, 1]", "pretrain.optim.lr=3e-4"]


def test_without_waiting_rays_command_does_not_wait() -> None:
    assert "--no-wait" in job_command(study(DEMO, wait=False), "one")


def test_a_file_that_does_not_travel_is_said_on_the_command_line(tmp_path: Path) -> None:
    settings = yaml.safe_load(DEMO.read_text())
    settings["prepare"]["data"] |= {"labels": {1: "grey, matter"}, "patient_pattern": r"^(\d+)_'\""}
    settings["arms"] = {
        "with-ssl": {"init": "ssl", "set": {"strategy.method": "adapter", "optim.lr": 1e-3}},
        "v1.5": {"init": "base"},
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    _, job = parts(job_command(study(file, "seeds=[3]"), "one"))
    assert "--config" not in job
    arguments = job[2:]
    assert load_config(StudyConfig, None, parse_overrides(arguments)) == load_config(
        StudyConfig, file, {"seeds": [3]}
    )


def test_what_no_command_line_can_say_is_refused(tmp_path: Path) -> None:
    settings = yaml.safe_load(DEMO.read_text())
    settings["prepare"]["data"]["patient_pattern"] = "[A-Z]+_([0-9]+)"  # reads as a YAML list
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"mine\.yaml cannot be said on a command line"):
        job_command(study(file), "one")


def test_names_and_addresses_stay_and_lists_of_paths_are_made_absolute() -> None:
    given = ["out=fine", "data.store=s3://bucket/store", "data.more_stores=[a, s3://bucket/b]"]
    submission = Submission(
        *("pretrain", PretrainConfig, None, [*given, "model.checkpoint=mae"], "http://head:8265", GPU, True)
    )
    _, job = parts(job_command(submission, "one"))
    assert job[:2] == ["python", "pipelines/pretrain.py"]
    assert job[2:] == [
        f"out={ROOT}/fine",
        "data.store=s3://bucket/store",
        f'data.more_stores=["{ROOT}/a", "s3://bucket/b"]',
        "model.checkpoint=mae",
    ]


def test_where_no_scripts_travel_the_nodes_package_runs_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("env_vars: {A: 1}")
    monkeypatch.chdir(tmp_path)
    command = job_command(study(DEMO, "out=x", runtime_env=file), "one")
    _, job = parts(command)
    assert job[:2] == ["samssl", "study"]
    assert f"out={tmp_path}/x" in job
    assert variables(command)["A"] == "1"


def test_tracking_and_checkpoints_go_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MLFLOW_TRACKING_URI" not in variables(job_command(study(DEMO), "one"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mine.db")
    monkeypatch.setenv("SAMSSL_CHECKPOINTS", "weights")
    sent = variables(job_command(study(DEMO), "one"))
    assert sent["MLFLOW_TRACKING_URI"] == f"sqlite:///{ROOT}/runs/mine.db"
    assert sent["SAMSSL_CHECKPOINTS"] == f"{ROOT}/weights"
    assert sent["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


def test_secrets_are_not_sent_and_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    assert "hunter2" not in " ".join(job_command(study(DEMO), "one"))
    file = tmp_path / "job.yaml"
    file.write_text("env_vars: {AWS_SECRET_ACCESS_KEY: hunter2}")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY holds a secret") as caught:
        job_command(study(DEMO, runtime_env=file), "one")
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@db/mlflow")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI holds a secret") as caught:
        job_command(study(DEMO), "one")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seedz=[1]"], "seedz: there is no such field; the nearest is 'seeds'"),
        (["--runtime-env", "none.yaml"], "There is no runtime environment none.yaml"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", "study", "--config", str(DEMO), *arguments])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "ray job submit" not in printed.out


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # for another process: Ray keeps the first that it sees
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = samssl(ROOT, "submit", "study", "--config", str(DEMO), "--address", address, check=False)
    assert done.returncode == 1
    assert f"The cluster at {address} does not take jobs: Failed to connect" in done.stderr
    assert "ray job submit" not in done.stdout
