"""Servers that are not there, databases that are locked or new."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_support import free_port
from mlflow.tracking import MlflowClient

from samssl.cluster import server
from samssl.cluster.server import shown
from samssl.cluster.stage import Place, stage
from samssl.cluster.tracking import find_runs, open_run
from samssl.config import UserError, config


@config
class Settings:
    """A stage that only writes a folder."""

    out: Path
    """Folder."""


def test_a_server_that_is_not_there_is_named_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://name:secret@127.0.0.1:{free_port()}")
    start = time.monotonic()
    with (
        pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as refused,
        stage("finetune", Settings(out=tmp_path / "run"), {}, Place()),
    ):
        raise AssertionError("the stage must not start")
    assert time.monotonic() - start < 15
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "run/run.json").exists()


def test_a_file_that_is_no_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_text("no database at all, and long enough to be read as one " * 4)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match="holds no MLflow database"):
        find_runs({"a": "b"})


def test_a_password_is_not_shown() -> None:
    assert shown("http://name:secret@host:5000/mlflow") == "http://host:5000/mlflow"
    assert shown("postgresql://me:hunter2@db:5432/x") == "postgresql://db:5432/x"
    assert shown("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"


def test_a_locked_database_gets_everything_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with stage("finetune", Settings(out=tmp_path / "run"), {}, Place()) as work:
        lock = sqlite3.connect(database, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        for step in range(5):
            work.run.log_metrics({"loss": step / 10}, step)
        assert len(list((tmp_path / "run/outbox").glob("*.json"))) == 5
        lock.rollback()
        lock.close()
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    assert [entry.step for entry in client.get_metric_history(work.run.run_id, "loss")] == list(range(5))
    assert client.get_run(work.run.run_id).info.status == "FINISHED"
    assert not (tmp_path / "run/outbox").exists()


def test_four_processes_make_one_database_and_one_experiment(tmp_path: Path) -> None:
    program = """
from samssl.cluster.tracking import open_run
run = open_run("study", "part", {"stage": "part"})
run.log_metrics({"loss": 1.0}, 1)
run.end("FINISHED")
"""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'new/mlflow.db'}"}
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'new/mlflow.db'}")
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert [run.data.metrics for run in runs] == [{"loss": 1.0}] * 4


def test_a_part_of_a_running_study_is_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(server, "FIRST_PATIENCE_S", 0.0)
    monkeypatch.setattr(server, "PATIENCE_S", 3.0)
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached"):
        open_run("study", "part", {"mlflow.parentRunId": "a"})
    assert time.monotonic() - start >= 3
