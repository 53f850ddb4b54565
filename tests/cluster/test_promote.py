"""Bundles in the registry, and the alias that moves between them."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from samssl.bundle import read_bundle
from samssl.cluster.lineage import describe_lineage
from samssl.cluster.promote import promote
from samssl.cluster.registry import bundle_registration
from samssl.cluster.stage import Input, Place, stage
from samssl.config import UserError, config
from samssl.files import read_json, sha256_file, sha256_tree
from samssl.train.registering import RegisterConfig


@config
class Settings:
    """A stage that only writes a folder."""

    out: Path
    """Folder."""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(tracking_uri=uri)


def fine_tuned(folder: Path, seed: int, *, register: bool) -> str:
    """A run that wrote `folder`/bundle; returns its id."""
    checkpoint = folder.parent / "sam.pth"
    checkpoint.write_bytes(b"published weights")
    bundle = folder / "bundle"
    read = {"encoder": Input(sha256_file(checkpoint), checkpoint)}
    with stage("finetune", Settings(out=folder), read, Place()) as work:
        bundle.mkdir()
        described = {"format": 3, "model": {"variant": "micro"}, "strategy": {}, "labels": {"0": "nothing"}}
        (bundle / "bundle.json").write_text(json.dumps(described | {"seed": seed, "base_sha256": "0" * 64}))
        work.wrote("bundle", sha256_tree(bundle), bundle)
        if register:
            work.run.register(bundle_registration(bundle, read_bundle(bundle), RegisterConfig()))
    return work.run.run_id


def test_a_registered_bundle_has_a_lineage(client: MlflowClient, tmp_path: Path) -> None:
    run_id = fine_tuned(tmp_path / "run", 0, register=True)
    version = client.get_model_version_by_alias("samssl-micro-bundle", "newest")
    assert version.run_id == run_id
    assert version.tags["strategy"] == "encoder_decoder/lora"
    assert version.tags["bundle.sha256"] == sha256_tree(tmp_path / "run/bundle")
    text, unbroken = describe_lineage("models:/samssl-micro-bundle@newest")
    assert unbroken, text
    assert text.startswith("samssl-micro-bundle version 1")
    assert "Unbroken: 3 links verified." in text  # the registry's copy, the bundle, the weights
    (kept,) = (tmp_path / "mlartifacts").rglob("bundle/bundle.json")
    kept.write_text("{}")
    text, unbroken = describe_lineage("models:/samssl-micro-bundle@newest")
    assert not unbroken
    assert "BROKEN at: samssl-micro-bundle version 1 (registry)" in text


def test_the_alias_moves_and_says_from_where(client: MlflowClient, tmp_path: Path) -> None:
    first = fine_tuned(tmp_path / "first", 0, register=True)
    second = fine_tuned(tmp_path / "second", 1, register=False)
    said = promote(first, "champion")
    assert said == f"models:/samssl-micro-bundle@champion: nothing -> version 1 (run {first})"
    said = promote(str(tmp_path / "second/bundle"), "champion")  # registers it first
    wanted = f"version 1 (run {first}) -> version 2 (run {second})"
    assert said == f"models:/samssl-micro-bundle@champion: {wanted}"
    assert client.get_model_version_by_alias("samssl-micro-bundle", "champion").run_id == second
    promote(str(tmp_path / "second"), "champion")  # the same by its folder: nothing is registered again
    assert len(client.search_model_versions("name = 'samssl-micro-bundle'")) == 2
    promote("models:/samssl-micro-bundle/1", "champion")
    assert client.get_model_version_by_alias("samssl-micro-bundle", "champion").run_id == first


def test_what_cannot_be_promoted_is_named(client: MlflowClient, tmp_path: Path) -> None:
    run_id = fine_tuned(tmp_path / "run", 0, register=False)
    with stage("evaluate", Settings(out=tmp_path / "evaluate"), {}, Place()):
        pass
    with pytest.raises(UserError, match="wrote no bundle and no encoder"):
        promote(read_json(tmp_path / "evaluate/run.json")["run_id"], "champion")
    with pytest.raises(UserError, match="neither a path nor a run"):
        promote("0123", "champion")
    with pytest.raises(UserError, match="keeps for itself"):
        promote(run_id, "latest")
    (tmp_path / "run/bundle/bundle.json").write_text("{}")
    with pytest.raises(UserError, match="as it is now"):
        promote(str(tmp_path / "run/bundle"), "champion")
