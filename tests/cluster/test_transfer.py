"""Runs that move from one MLflow into another, through a folder."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from samssl.cluster import transfer
from samssl.cluster.lineage import describe_lineage
from samssl.cluster.outbox import Letter
from samssl.cluster.stage import Input, Place, stage
from samssl.cluster.tracking import find_runs, send
from samssl.cluster.transfer import ExportRunsConfig, ImportRunsConfig, run_export_runs, run_import_runs
from samssl.config import UserError, config
from samssl.files import sha256_tree


@config
class Settings:
    """A stage that only writes a folder."""

    out: Path
    """Folder."""
    rate: float = 0.5
    """A setting."""


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small study in a database of its own: a parent, a run that wrote a bundle, and its evaluation."""
    use(tmp_path, "here", monkeypatch)
    path = tmp_path / "study/finetune/bundle"
    with stage("study", Settings(out=tmp_path / "study"), {}, Place(experiment="cohort")) as parent:
        about = {"dataset": "boxes", "arm": "ssl", "shots": 5, "seed": 0}
        place = Place("cohort", parent_run_id=parent.run.run_id, **about)
        data = {"manifest": Input("d" * 64, None)}
        with stage("finetune", Settings(out=path.parent), data, place) as work:
            path.mkdir()
            (path / "bundle.json").write_text("{}")
            for first in (0, 600):
                steps = [
                    Metric("train/loss", 1 / (step + 1), 1000 + step, step)
                    for step in range(first, first + 600)
                ]
                work.run.client.log_batch(work.run.run_id, steps)
            work.run.log_file(path / "bundle.json")
            work.wrote("bundle", sha256_tree(path), path)
        read = {"bundle": Input(sha256_tree(path), path)}
        with stage("evaluate", Settings(out=tmp_path / "study/evaluate"), read, place) as evaluation:
            evaluation.metrics = {"test/dice": 0.75}
            table = tmp_path / "study/evaluate/cases.parquet"
            table.write_bytes(b"scores")
            evaluation.run.log_file(table)
    return path


def use(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    uri = f"sqlite:///{tmp_path / name / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(tracking_uri=uri)


def runs(client: MlflowClient) -> dict[str, MlflowRun]:
    experiment = client.get_experiment_by_name("cohort")
    assert experiment is not None
    return {run.data.tags["stage"]: run for run in client.search_runs([experiment.experiment_id])}


def facts(client: MlflowClient, run: MlflowRun) -> dict:
    """All that has to arrive, but for ids."""
    info, data = run.info, run.data
    ids = ("run.", "mlflow.parentRunId", "imported")
    return {
        "info": (info.run_name, info.status, info.start_time, info.end_time),
        "params": data.params,
        "tags": {name: value for name, value in data.tags.items() if not name.startswith(ids)},
        "metrics": {
            name: [(entry.step, entry.value, entry.timestamp) for entry in history(client, run, name)]
            for name in data.metrics
        },
        "datasets": [entry.to_dictionary() for entry in (run.inputs.dataset_inputs if run.inputs else [])],
        "artifacts": [entry.path for entry in client.list_artifacts(info.run_id)],
    }


def history(client: MlflowClient, run: MlflowRun, name: str) -> list:
    return client.get_metric_history(run.info.run_id, name)


def test_a_study_arrives_whole_and_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = use(tmp_path, "here", monkeypatch)
    run_export_runs(ExportRunsConfig(out=tmp_path / "folder", experiment="cohort"))
    shutil.rmtree(tmp_path / "here/mlartifacts")  # the folder stands alone
    there = use(tmp_path, "there", monkeypatch)
    ids = run_import_runs(ImportRunsConfig(folder=tmp_path / "folder"))
    before, after = runs(here), runs(there)
    assert before.keys() == after.keys() == {"study", "finetune", "evaluate"}
    for name in before:
        wanted, found = facts(here, before[name]), facts(there, after[name])
        wanted.pop("artifacts")
        found_artifacts = found.pop("artifacts")
        assert found == wanted
        assert found_artifacts == {"finetune": ["bundle.json"], "evaluate": ["cases.parquet"]}.get(name, [])
        assert ids[before[name].info.run_id] == after[name].info.run_id
    parent = after["study"].info.run_id
    assert [after[name].data.tags["mlflow.parentRunId"] for name in ("finetune", "evaluate")] == [parent] * 2
    assert after["evaluate"].data.tags["run.bundle"] == after["finetune"].info.run_id
    text, _ = describe_lineage(str(bundle))
    assert after["finetune"].info.run_id in text

    assert run_import_runs(ImportRunsConfig(folder=tmp_path / "folder")) == ids
    assert {name: run.info.run_id for name, run in runs(there).items()} == {
        name: run.info.run_id for name, run in after.items()
    }
    assert len(find_runs({"stage": "finetune"})) == 1


def test_an_import_that_was_cut_short_is_finished(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = use(tmp_path, "here", monkeypatch)
    run_export_runs(ExportRunsConfig(out=tmp_path / "folder", experiment="cohort"))
    there = use(tmp_path, "there", monkeypatch)
    sent: list[Letter] = []

    def cut_off(uri: str, letter: Letter) -> None:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(letter)
        send(uri, letter)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "send", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_import_runs(ImportRunsConfig(folder=tmp_path / "folder"))
    run_import_runs(ImportRunsConfig(folder=tmp_path / "folder"))
    for name, run in runs(here).items():
        assert facts(there, runs(there)[name]) == facts(here, run)
    assert len(find_runs({"stage": "finetune"})) == 1


def test_one_run_brings_its_children_and_where_they_come_from(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = runs(use(tmp_path, "here", monkeypatch))
    for name, number in (("study", 3), ("evaluate", 3), ("finetune", 2)):  # the parent goes with it
        out = tmp_path / f"{name} runs"
        run_export_runs(ExportRunsConfig(out=out, run=here[name].info.run_id))
        assert len(json.loads((out / "runs.json").read_text())["runs"]) == number


def test_runs_are_not_imported_where_they_were_made(bundle: Path, tmp_path: Path) -> None:
    run_export_runs(ExportRunsConfig(out=tmp_path / "folder", experiment="cohort"))
    ids = run_import_runs(ImportRunsConfig(folder=tmp_path / "folder"))
    assert all(old == new for old, new in ids.items())


def test_what_cannot_be_moved_is_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no runs of nothing"):
        run_export_runs(ExportRunsConfig(out=tmp_path / "folder", experiment="nothing"))
    with pytest.raises(UserError, match="has no runs of abc"):
        run_export_runs(ExportRunsConfig(out=tmp_path / "folder", run="abc"))
    with pytest.raises(UserError, match="something else"):
        run_export_runs(ExportRunsConfig(out=tmp_path / "study", experiment="cohort"))
    with pytest.raises(UserError, match="holds no runs"):
        run_import_runs(ImportRunsConfig(folder=tmp_path / "study"))
    with pytest.raises(ValueError, match="either experiment=NAME or run=ID"):
        ExportRunsConfig(out=tmp_path, experiment="a", run="b")
