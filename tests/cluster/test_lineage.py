"""Chains of real MLflow runs over real files, without training anything."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from cluster_support import free_port
from dicom_support import save, series

from samssl.cluster import server
from samssl.cluster.lineage import _sources, describe_lineage
from samssl.cluster.stage import TRAINING, Input, Place, stage
from samssl.config import UserError, config
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.pseudonyms import KEY_VARIABLE
from samssl.data.slices import SliceStore
from samssl.data.sources import DataSource
from samssl.data.splits import SplitConfig
from samssl.files import read_json, sha256_file, sha256_tree, write_json


@config
class Settings:
    """A stage that only writes a folder."""

    out: Path
    """Folder."""
    bundle: Path = Path("unused")
    """A path: not compared."""
    rate: float = 1.0
    """A setting: compared."""


@pytest.fixture(autouse=True)
def own_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # relative, as MLflow's docs write it


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that a run wrote from a checkpoint file that came from outside."""
    checkpoint = tmp_path / "sam.pth"
    checkpoint.write_bytes(b"published weights")
    folder = tmp_path / "run/bundle"
    with stage("finetune", Settings(out=tmp_path / "run"), {"encoder": source(checkpoint)}, Place()) as work:
        folder.mkdir()
        (folder / "bundle.json").write_text("{}")
        work.wrote("bundle", sha256_tree(folder), folder)
    return folder


def source(checkpoint: Path) -> Input:
    return Input(sha256_file(checkpoint), checkpoint)


def test_a_chain_that_starts_at_a_file_from_outside_holds(bundle: Path) -> None:
    text, unbroken = describe_lineage(str(bundle))
    assert unbroken, text
    assert "Unbroken: 2 links verified." in text


def test_a_changed_file_from_outside_is_found(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "sam.pth").write_bytes(b"other weights")
    text, unbroken = describe_lineage(str(bundle))
    assert not unbroken
    assert "BROKEN at: encoder (from outside)" in text


def test_a_moved_bundle_is_still_the_bundle(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle, tmp_path / "elsewhere")
    text, unbroken = describe_lineage(str(tmp_path / "elsewhere"))
    assert unbroken, text


def test_a_changed_copy_is_not_taken_for_the_original(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "copy/bundle/bundle.json").write_text("{ }")
    text, unbroken = describe_lineage(str(tmp_path / "copy/bundle"))
    assert not unbroken
    assert "BROKEN at: bundle (finetune)" in text


def test_a_stage_that_came_to_nothing_may_have_other_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError), stage("finetune", Settings(out=tmp_path / "run"), {}, Place()) as first:
        raise UserError("no training was begun")
    with stage("finetune", Settings(out=tmp_path / "run", rate=2.0), {}, Place()) as second:
        assert second.run.run_id != first.run.run_id


def test_an_interrupted_stage_goes_on_in_its_run_and_another_setting_is_refused(tmp_path: Path) -> None:
    settings = Settings(out=tmp_path / "run")
    (settings.out / TRAINING).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), stage("finetune", settings, {}, Place()) as first:
        raise KeyboardInterrupt
    assert first.run.client.get_run(first.run.run_id).info.status == "KILLED"
    with (
        pytest.raises(UserError, match="differs in rate"),
        stage("finetune", Settings(out=tmp_path / "run", rate=2.0), {}, Place()),
    ):
        raise AssertionError("the stage must not start")
    moved = Settings(out=tmp_path / "run", bundle=tmp_path / "elsewhere")
    with stage("finetune", moved, {}, Place()) as second:
        assert not second.done
    assert second.run.run_id == first.run.run_id
    with stage("finetune", settings, {}, Place()) as third:
        assert third.done
    with (
        pytest.raises(UserError, match="its stage, which is finetune"),
        stage("prepare", settings, {}, Place(), always=True),
    ):
        raise AssertionError("the stage must not start")


def without_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere.db'}")


def test_without_the_server_the_folders_are_followed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"bundle": Input(sha256_tree(bundle), bundle)}
    with stage("evaluate", Settings(out=tmp_path / "evaluate"), read, Place()) as work:
        table = tmp_path / "evaluate/cases.parquet"
        table.write_bytes(b"scores")
        work.wrote("cases", sha256_file(table), table)
    without_server(monkeypatch, tmp_path)
    for start in (bundle, bundle.parent, table):
        text, unbroken = describe_lineage(str(start))
        assert unbroken, text
        assert "is not there" in text
        assert "Not checked: whether that is what MLflow recorded" in text
        assert "bundle" in text
        assert "encoder" in text
    assert "cases" in text
    assert not (tmp_path / "elsewhere.db").exists()  # asking makes no database


def test_without_the_server_a_changed_file_is_found(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_server(monkeypatch, tmp_path)
    (tmp_path / "sam.pth").write_bytes(b"other weights")
    text, unbroken = describe_lineage(str(bundle))
    assert not unbroken
    assert "BROKEN at: encoder (from outside)" in text
    (bundle / "bundle.json").write_text("{ }")
    assert "BROKEN at: bundle (finetune)" in describe_lineage(str(bundle))[0]


def test_without_the_server_records_of_earlier_versions_and_moved_folders_do(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_server(monkeypatch, tmp_path)
    record = read_json(tmp_path / "run/run.json")
    del record["tags"]
    write_json(tmp_path / "run/run.json", record)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    text, unbroken = describe_lineage(str(tmp_path / "moved/bundle"))
    assert unbroken, text
    assert "no folder says where it lies" in text


def test_without_the_server_a_run_id_is_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(server, "FIRST_PATIENCE_S", 0.0)
    with pytest.raises(UserError, match="cannot be reached"):
        describe_lineage("0123456789abcdef")


@pytest.mark.parametrize("public_names", [True, False])
def test_source_files_are_found_behind_their_names(tmp_path, public_names, monkeypatch):
    root, out = tmp_path / "scans", tmp_path / "store"
    voxels = np.arange(48, dtype=np.int16).reshape(3, 4, 4)
    files = save(series(voxels, Modality="MR"), root / "series")
    save(series(voxels + 1, Modality="MR", PatientID="id-2"), root / "other")
    data = DataSource(root=root, public_names=public_names)
    prepare(PrepareConfig(name="x", out=out, data=data, split=SplitConfig(train=0, val=0, test=0), workers=1))
    link = _sources(SliceStore(out), root, 0)
    assert (link.problems, link.unchecked, link.role) == ([], "", "2 source files")
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"\7")
    [problem] = _sources(SliceStore(out), root, 0).problems
    assert "has changed" in problem
    assert ("series" in problem) == public_names
    files[1].unlink()
    assert _sources(SliceStore(out), root, 0).problems
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "elsewhere" / "key"))
    unchecked = _sources(SliceStore(out), root, 0).unchecked
    assert unchecked == (
        "" if public_names else "the private list of what 2 pseudonyms stand for is not here"
    )
