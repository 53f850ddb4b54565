"""What a user gets wrong is one sentence that says what and what to do, and leaves nothing half-written."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samssl import cli
from samssl.models.checkpoints import save_weights
from samssl.models.sam import build_micro

SPLIT = ["split.pool=1", "split.train=2", "split.val=1", "split.test=1"]


@pytest.fixture
def store(tmp_path: Path, make_scans: Callable[..., Path]) -> Path:
    from samssl.data.prepare import DataSource, PrepareConfig, SplitConfig, prepare

    scans = make_scans(tmp_path / "scans", cases=5)
    split = SplitConfig(pool=1, train=2, val=1, test=1)
    prepare(
        PrepareConfig(
            name="tiny", out=tmp_path / "store", data=DataSource(root=scans), split=split, workers=1
        )
    )
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def own_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that has to fail."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code not in (0, None)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_a_missing_store_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "pretrain", f"out={tmp_path / 'run'}", f"data.store={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in message
    assert not (tmp_path / "run").exists()


def test_a_missing_checkpoint_is_named(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "sam_vit_b_01ec64.pth"
    message = refused(
        capsys, "pretrain", f"out={tmp_path / 'run'}", f"data.store={store}", f"model.checkpoint={checkpoint}"
    )
    assert f"There is no checkpoint {checkpoint}" in message


def test_a_checkpoint_of_another_variant_is_refused_key_by_key(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    weights = build_micro().state_dict()
    weights["image_encoder.pos_embed"] = torch.zeros(1, 64, 64, 768)
    torch.save(weights, tmp_path / "sam.pth")
    message = refused(
        capsys,
        *(
            "pretrain",
            f"out={tmp_path / 'run'}",
            f"data.store={store}",
            f"model.checkpoint={tmp_path / 'sam.pth'}",
        ),
        *("model.variant=micro", "model.image_size=64"),
    )
    assert "image_encoder.pos_embed is 1x64x64x768, needs 1x16x16x128" in message
    assert "check model.variant" in message
    assert not (tmp_path / "run").exists()


def test_an_image_size_that_patches_do_not_divide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(
        capsys, "pretrain", "out=x", "data.store=y", "model.variant=vit_b", "model.image_size=1000"
    )
    assert "1000 is not a multiple of the patch size of vit_b, which is 16" in message


def test_pretraining_on_test_cases_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "pretrain", "out=x", "data.store=y", "data.splits=[pool, test]")
    assert "splits must not hold test" in message


def test_an_empty_split_says_how_many_patients_there_are(
    capsys: pytest.CaptureFixture[str], make_scans: Callable[..., Path], tmp_path: Path
) -> None:
    scans = make_scans(tmp_path / "scans", cases=3)
    message = refused(
        capsys, "prepare", "name=tiny", f"out={tmp_path / 'store'}", f"data.root={scans}", *SPLIT
    )
    assert "3" in message
    assert "split" in message
    assert not (tmp_path / "store/manifest.json").exists()


def test_evaluating_another_label_map_is_refused(store: Path, tmp_path: Path) -> None:
    from samssl.bundle import write_bundle
    from samssl.config import UserError, build_config
    from samssl.data.slices import SliceStore
    from samssl.evaluate import EvaluateConfig, evaluate
    from samssl.train.finetune import FinetuneConfig

    tree = {"out": "x", "data": {"store": str(store)}, "model": {"variant": "micro", "image_size": 64}}
    config = build_config(FinetuneConfig, tree, source="the test")
    write_bundle(tmp_path / "bundle", config, SliceStore(store), {"x": torch.zeros(1)})
    description = json.loads((tmp_path / "bundle/bundle.json").read_text())
    description["labels"]["3"] = "ghost"
    (tmp_path / "bundle/bundle.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="ghost"):
        evaluate(EvaluateConfig(out=tmp_path / "out", bundle=tmp_path / "bundle", store=store))


@pytest.mark.parametrize("name", ["encoder.pth", "encoder.safetensors"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    """A limit on file size stands in for a full disk: both fail inside `write` with an OSError."""
    (tmp_path / name).write_text("old")
    code = f"""
import resource, signal
from pathlib import Path
from samssl.models.checkpoints import save_weights
from samssl.models.sam import build_micro
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sam = build_micro()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
save_weights(sam, Path({str(tmp_path / name)!r}))
"""
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode != 0
    assert "OSError" in failed.stderr.splitlines()[-1]  # which the command line turns into one sentence
    assert name in failed.stderr.splitlines()[-1]
    assert [
        path.name for path in tmp_path.iterdir() if path.suffix in (".pth", ".safetensors", ".partial")
    ] == [name]
    assert (tmp_path / name).read_text() == "old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # ours was not limited
    save_weights(build_micro(), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 100_000
