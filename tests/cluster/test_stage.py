"""What a person sees of a stage in MLflow: its name, its tags, its data sets and its models."""

from pathlib import Path

import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from samssl.cluster.registry import Registration, find_version
from samssl.cluster.stage import Input, Place, StageRun, stage
from samssl.config import config
from samssl.files import read_json, sha256_file, sha256_tree
from samssl.models.checkpoints import save_weights
from samssl.models.sam import build_micro

STORE = "d" * 64


@config
class Settings:
    """A stage that only writes a folder."""

    out: Path
    """Folder."""


@pytest.fixture(autouse=True)
def own_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")


def run(name: str, folder: Path, inputs: dict[str, Input], place: Place = Place()) -> StageRun:
    with stage(name, Settings(out=folder), inputs, place) as work:
        return work


def logged(work: StageRun) -> MlflowRun:
    return work.run.client.get_run(work.run.run_id)


def models(work: StageRun) -> list[str]:
    """Ids of the logged models that the run is shown to start from."""
    inputs = logged(work).inputs
    return [entry.model_id for entry in inputs.model_inputs] if inputs else []


def pretrained(folder: Path, *, register: bool) -> Path:
    """An encoder that a run of pretrain wrote."""
    encoder = folder / "encoder.pth"
    with stage("pretrain", Settings(out=folder), {"manifest": Input(STORE, None)}, Place()) as work:
        save_weights(build_micro(), encoder)
        work.wrote("encoder", sha256_file(encoder), encoder)
        if register:
            settings = {"normalisation": "sam"}
            registration = Registration(
                "encoder", encoder, sha256_file(encoder), "shared", "newest", settings
            )
            work.run.register(registration)
    return encoder


def encoder_input(path: Path) -> dict[str, Input]:
    return {"encoder": Input(sha256_file(path), path)}


def test_a_run_is_named_by_its_place(tmp_path: Path) -> None:
    place = Place(dataset="hippocampus", arm="ssl", shots=5, seed=0)
    work = run("finetune", tmp_path / "a", {"manifest": Input(STORE, None)}, place)
    found = logged(work)
    assert found.info.run_name == "finetune hippocampus ssl 5-shot seed0"
    wanted = {"arm": "ssl", "seed": "0", "shots": "5", "dataset": "hippocampus", "stage": "finetune"}
    assert wanted.items() <= found.data.tags.items()
    assert found.inputs is not None
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("hippocampus", STORE[:36])
    assert [tag.value for tag in data.tags] == ["training"]
    record = read_json(tmp_path / "a/run.json")
    assert (record["dataset"], record["shots"]) == ("hippocampus", 5)
    named = run("finetune", tmp_path / "b", {}, Place(name="trial 3", arm="ssl"))
    assert logged(named).info.run_name == "finetune trial 3"


@pytest.mark.parametrize(
    ("file", "init"), [("sam_vit_b_01ec64.pth", "sam"), ("medsam_vit_b.pth", "medsam"), ("mine.pth", "file")]
)
def test_init_is_the_name_of_published_weights(file: str, init: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"weights")
    work = run("finetune", tmp_path / "run", encoder_input(tmp_path / file))
    assert work.run.tags()["init"] == init
    assert "ssl_run_id" not in work.run.tags()


def test_random_weights_are_called_so(tmp_path: Path) -> None:
    work = run("finetune", tmp_path / "run", {"encoder": Input("random-micro-0", None)})
    assert work.run.tags()["init"] == "random"


def test_what_starts_from_ssl_is_linked_with_it_down_to_the_evaluation(tmp_path: Path) -> None:
    encoder = pretrained(tmp_path / "pretrain", register=True)
    ssl_run = read_json(tmp_path / "pretrain/run.json")["run_id"]
    model_id = str(find_version("models:/shared@newest").source).removeprefix("models:/")
    bundle = tmp_path / "finetune/bundle"
    place = Place(arm="ssl", seed=3, shots=5)
    with stage("finetune", Settings(out=bundle.parent), encoder_input(encoder), place) as work:
        bundle.mkdir()
        (bundle / "bundle.json").write_text("{}")
        work.wrote("bundle", sha256_tree(bundle), bundle)
    evaluation = run("evaluate", tmp_path / "evaluate", {"bundle": Input(sha256_tree(bundle), bundle)})
    for tags in (work.run.tags(), evaluation.run.tags()):
        assert tags["init"] == "ssl"
        assert tags["ssl_run_id"] == ssl_run
        assert (tags["arm"], tags["seed"], tags["shots"]) == ("ssl", "3", "5")
    assert models(work) == [model_id]
    pretraining = MlflowClient(tracking_uri=work.run.uri).get_run(ssl_run)
    assert pretraining.outputs is not None
    assert [entry.model_id for entry in pretraining.outputs.model_outputs] == [model_id]
    run("finetune", bundle.parent, encoder_input(encoder), place)  # nothing is linked once more
    assert models(work) == [model_id]


def test_what_was_not_registered_is_linked_by_its_run_alone(tmp_path: Path) -> None:
    encoder = pretrained(tmp_path / "pretrain", register=False)
    work = run("finetune", tmp_path / "finetune", encoder_input(encoder))
    assert work.run.tags()["init"] == "ssl"
    assert models(work) == []
