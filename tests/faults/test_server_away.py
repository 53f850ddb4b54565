"""The tracking server is killed and comes back: training goes on, and what was logged arrives whole."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cluster_support import tracking_server
from faults_support import make_store, pretrain, random_step, start, wait_for_step
from mlflow.tracking import MlflowClient

from samssl.cluster import server as tracking
from samssl.cluster.stage import Place, stage
from samssl.config import config

pytestmark = pytest.mark.ray


@config
class Settings:
    """A stage that only writes a folder."""

    out: Path
    """Folder."""


def test_a_stage_goes_on_and_delivers_when_the_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "PAUSE_S", 1.0)
    with tracking_server(tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        settings = Settings(out=tmp_path / "run")
        with stage("finetune", settings, {}, Place()) as work:
            work.run.log_metrics({"loss": 0.0}, 0)
            server.kill()
            for step in range(1, 6):
                work.run.log_metrics({"loss": step / 8}, step)
            work.run.log_params({"late": "yes"})
            work.run.log_picture("pictures/step_1.png", np.zeros((4, 4, 3), np.uint8))
            (tmp_path / "notes.txt").write_text("a file")
            work.run.log_file(tmp_path / "notes.txt")
            server.start()
            work.run.log_metrics({"loss": 1.0}, 6)
            work.wrote("bundle", "0" * 64, tmp_path)
        client, run_id = MlflowClient(tracking_uri=server.uri), work.run.run_id
        history = client.get_metric_history(run_id, "loss")
        assert [(entry.step, entry.value) for entry in history] == [
            *((step, step / 8) for step in range(6)),
            (6, 1.0),
        ]
        assert [entry.timestamp for entry in history] == sorted(entry.timestamp for entry in history)
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params["late"] == "yes"
        assert run.data.tags["output.bundle"] == "0" * 64
        names = {
            entry.path for folder in (None, "pictures") for entry in client.list_artifacts(run_id, folder)
        }
        assert names == {"notes.txt", "pictures", "pictures/step_1.png"}
        assert (tmp_path / "run/pictures/step_1.png").is_file()
        assert not (tmp_path / "run/outbox").exists()
    assert capsys.readouterr().out.count("cannot be reached") == 1


def test_training_ends_without_the_server_and_a_rerun_delivers(
    tmp_path: Path, make_scans: Callable[..., Path]
) -> None:
    make_store(tmp_path, make_scans)
    with tracking_server(tmp_path) as server:
        driver = start(tmp_path, *pretrain(tmp_path, "alone"), MLFLOW_TRACKING_URI=server.uri)
        wait_for_step(driver, random_step())
        server.kill()
        assert driver.wait(timeout=300) == 0
        record = json.loads((tmp_path / "alone/run.json").read_text())
        assert record["status"] == "finished"
        assert list((tmp_path / "alone/outbox").glob("*.json"))
        server.start()
        again = start(tmp_path, *pretrain(tmp_path, "alone"), MLFLOW_TRACKING_URI=server.uri)
        said, errors = again.communicate(timeout=300)
        assert again.returncode == 0, errors
        assert "delivered" in said
        assert "nothing to do" in said
        check_delivered(MlflowClient(tracking_uri=server.uri), record, tmp_path / "alone")


def check_delivered(client: MlflowClient, record: dict, out: Path) -> None:
    """Everything in `history.csv` once, and what the end of the run logs."""
    run_id = record["run_id"]
    with (out / "history.csv").open() as file:
        rows = [(row["metric"], int(row["step"]), float(row["value"])) for row in csv.DictReader(file)]
    for name in {metric for metric, _, _ in rows}:
        wanted = [(step, value) for metric, step, value in rows if metric == name]
        found = [(entry.step, entry.value) for entry in client.get_metric_history(run_id, name)]
        assert found == wanted, name
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["output.encoder"] == record["outputs"]["encoder"]
    pictures = client.list_artifacts(run_id, "reconstructions")
    assert len(pictures) == len(list((out / "reconstructions").iterdir()))
    version = client.get_model_version_by_alias("samssl-micro-encoder", "newest")
    assert version.run_id == run_id
    assert version.tags["encoder.sha256"] == record["outputs"]["encoder"]
    assert not (out / "outbox").exists()
