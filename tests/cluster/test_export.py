"""Pretrain runs as a user starts them, on real Ray and MLflow: continued, registered, exported."""

import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from mlflow.tracking import MlflowClient
from pipelines_support import samssl
from safetensors import safe_open
from safetensors.torch import load_file

from samssl.cluster.lineage import describe_lineage
from samssl.cluster.registry import Registration, encoder_registration, find_version
from samssl.cluster.stages import run_pretrain
from samssl.cluster.tracking import Run, open_run
from samssl.config import UserError, load_config, parse_overrides
from samssl.data.slices import SliceStore
from samssl.files import sha256_file
from samssl.models.checkpoints import save_weights, weights_digest
from samssl.models.sam import ModelConfig, build_micro
from samssl.train.pretrain import PretrainConfig
from samssl.train.registering import RegisterConfig

SETTINGS = {
    "model": {"variant": "micro", "image_size": 32, "normalisation": "unit"},
    "mae": {"decoder_depth": 1, "decoder_dim": 32, "decoder_heads": 2},
    "optim": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "validate_every": 2, "log_every": 1},
}
PATIENT = "scan_000"
"""How a source file is called, and so what nothing published may say."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> Path:
    """A store, and a run of four steps."""
    root = tmp_path_factory.mktemp("export")
    prepare_boxes(root, "tiny", pool=2, train=1, val=1, test=1)
    (root / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": {"store": str(root / "store")}}))
    pretrain(root, "first")
    return root


@pytest.fixture(autouse=True)
def tracking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in this process uses the database that the commands use."""
    folder = request.getfixturevalue("root" if "root" in request.fixturenames else "tmp_path")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")


def pretrain(root: Path, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    return samssl(root, "pretrain", "--config", str(root / "run.yaml"), f"out={root / name}", *settings)


def refusal(root: Path, *settings: str) -> str:
    """Why the run is not started; nothing of it is written."""
    given = parse_overrides([f"out={root / 'other'}", f"continue_from={root / 'first'}", *settings])
    with pytest.raises(UserError) as caught:
        run_pretrain(load_config(PretrainConfig, root / "run.yaml", given))
    assert not (root / "other").exists()
    return str(caught.value)


def client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


@pytest.mark.ray
def test_a_run_goes_on_where_an_earlier_one_ended(root: Path) -> None:
    assert "mae.decoder_depth (1 there, 2 here)" in refusal(root, "mae.decoder_depth=2")
    assert "model.normalisation (unit there, sam here)" in refusal(root, "model.normalisation=sam")
    assert "is at step 4 already" in refusal(root)
    done = pretrain(
        root, "more", f"continue_from={root / 'first'}", "optim.steps=6", "register.enabled=false"
    )
    assert "from step 4; new: optim.steps" in done.stdout
    state = torch.load(root / "more/state.pt", weights_only=True)
    steps = [entry["step"] for entry in state["optimizer"]["state"].values()]
    assert {int(step) for step in steps} == {6}
    losses = [step for step, metric, _ in state["progress"]["history"] if metric == "train/loss"]
    assert losses == [1, 2, 3, 4, 5, 6]
    first, more = (json.loads((root / name / "run.json").read_text()) for name in ("first", "more"))
    assert more["inputs"]["encoder"] == first["outputs"]["encoder"] == sha256_file(root / "first/encoder.pth")
    assert more["inputs"]["state"] == first["outputs"]["state"] == sha256_file(root / "first/state.pt")
    text, whole = describe_lineage(str(root / "more/encoder.pth"))
    assert whole, text
    assert f"state {first['outputs']['state'][:16]}  verified" in text
    (root / "first/state.pt").rename(root / "kept.pt")
    text, _ = describe_lineage(str(root / "more/encoder.pth"))
    assert "BROKEN at: state (pretrain)" in text
    assert describe_lineage(str(root / "first/encoder.pth"))[1]  # its own state may be deleted
    (root / "kept.pt").rename(root / "first/state.pt")


@pytest.mark.ray
def test_what_was_loaded_is_said_and_kept(root: Path) -> None:
    run_id = json.loads((root / "first/run.json").read_text())["run_id"]
    tags = client(root).get_run(run_id).data.tags
    assert tags["weights.loaded"] == "0"
    assert int(tags["weights.new"]) == len(build_micro().state_dict())
    assert "weights.txt" in [artifact.path for artifact in client(root).list_artifacts(run_id)]
    assert "drawn at random from init_seed 0" in (root / "first/weights.txt").read_text()


@pytest.mark.ray
def test_the_encoder_is_registered_and_its_lineage_followed(root: Path) -> None:
    version = client(root).get_model_version_by_alias("samssl-micro-encoder", "newest")
    assert version.run_id == json.loads((root / "first/run.json").read_text())["run_id"]
    text = samssl(root, "lineage", "models:/samssl-micro-encoder@newest").stdout
    assert "samssl-micro-encoder version 1" in text
    assert "Unbroken" in text
    (file,) = (root / "mlartifacts").rglob("encoder.safetensors")
    kept = torch.load(root / "first/encoder.pth", weights_only=True)
    assert weights_digest(load_file(file)) == weights_digest(kept)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    text, whole = describe_lineage("models:/samssl-micro-encoder/1")
    file.write_bytes(content)
    assert not whole
    assert "BROKEN at: samssl-micro-encoder version 1" in text
    with pytest.raises(UserError, match="is not in the registry"):
        describe_lineage("models:/samssl-micro-encoder@champion")


@pytest.mark.ray
def test_an_export_is_sams_format_with_a_card_that_names_no_one(root: Path, tmp_path: Path) -> None:
    out = root / "export"
    done = samssl(root, "export", f"run={root / 'first'}", f"out={out}", "onnx=true")
    model = out / "model"
    for name in ("image_encoder.onnx", "mask_decoder.onnx"):
        assert f"export: {name} differs from torch by at most" in done.stdout
        assert (model / name).is_file()
    official = build_micro()
    weights = torch.load(model / "encoder.pth", weights_only=True)
    official.load_state_dict(weights, strict=True)
    assert weights_digest(load_file(model / "encoder.safetensors")) == weights_digest(weights)
    with safe_open(model / "encoder.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"samssl.normalisation": "unit"}
    card = (model / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    record = json.loads((root / "first/run.json").read_text())
    assert ModelCard(card).data.to_dict() == matter
    assert matter["library_name"] == "samssl"
    assert matter["license"] == "other"
    assert matter["license_name"] == "unknown"
    assert matter["datasets"] == [f"sha256-{record['inputs']['manifest']}"]
    for needed in (record["outputs"]["encoder"], "random-micro-0", record["run_id"], "Not for clinical use"):
        assert needed in card
    assert "decoder_depth: 1" in card
    assert f"| val/loss | {first_and_last(root / 'first')} | 4 |" in card
    for path in model.glob("*"):
        assert PATIENT.encode() not in path.read_bytes()
        assert str(root).encode() not in path.read_bytes(), path
    for start in (model, model / "encoder.safetensors", model / "encoder.pth", out):
        text, whole = describe_lineage(str(start))
        assert whole, text
    shutil.copytree(model, tmp_path / "moved")
    (tmp_path / "moved/encoder.pth").unlink()
    with pytest.raises(UserError, match="No run in"):
        describe_lineage(str(tmp_path / "moved"))


def first_and_last(run: Path) -> str:
    rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    values = [float(value) for _, metric, value in rows if metric == "val/loss"]
    return f"{values[0]:.4g} | {values[-1]:.4g}"


def registered_as(run: Run, registration: Registration) -> str:
    run.register(registration)
    return registration.uri


def test_runs_that_end_at_once_each_get_a_version(tmp_path: Path) -> None:
    encoders = []
    for seed in range(8):
        torch.manual_seed(seed)
        encoders.append(tmp_path / f"{seed}.pth")
        save_weights(build_micro(), encoders[-1])
    runs = [open_run("samssl", "pretrain", {}) for _ in encoders]
    model, register = ModelConfig(variant="micro", image_size=32), RegisterConfig(name="shared", alias="best")
    with ThreadPoolExecutor(8) as pool:
        uris = set(
            pool.map(registered_as, runs, [encoder_registration(file, model, register) for file in encoders])
        )
    assert uris == {"models:/shared@best"}
    server = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    versions = server.search_model_versions("name = 'shared'")
    assert {version.run_id: version.tags["encoder.sha256"] for version in versions} == {
        run.run_id: sha256_file(encoder) for run, encoder in zip(runs, encoders, strict=True)
    }
    registered_as(runs[0], encoder_registration(encoders[0], model, register))  # as after an interruption
    assert len(server.search_model_versions("name = 'shared'")) == 8
    assert server.get_model_version_by_alias("shared", "best").run_id == runs[0].run_id


def test_names_that_the_registry_refuses_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"register\.name 'a/b'"):
        RegisterConfig(name="a/b")
    with pytest.raises(ValueError, match=r"register\.alias 'a\.b'"):
        RegisterConfig(alias="a.b")
    with pytest.raises(ValueError, match="keeps for itself"):
        RegisterConfig(alias="latest")


def test_registering_needs_no_tracking_uri_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    save_weights(build_micro(), tmp_path / "encoder.pth")
    model = ModelConfig(variant="micro", image_size=64)
    run = open_run("samssl", "pretrain", {"stage": "pretrain"})
    uri = registered_as(run, encoder_registration(tmp_path / "encoder.pth", model, RegisterConfig()))
    assert find_version(uri).run_id == run.run_id
    assert not (tmp_path / "mlflow.db").exists()  # MLflow's own default, which is not ours
