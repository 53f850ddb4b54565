"""The whole study as a user runs it: `samssl study`, then everything that is promised about its result."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from privacy_support import NAME, found_in
from safetensors.torch import load_file
from segment_anything.modeling import Sam

from samssl.bundle import load_segmenter
from samssl.cli import main
from samssl.data.slices import SliceStore
from samssl.models.encoder import encode_images
from samssl.models.sam import build_micro
from samssl.predict import Predictor

pytestmark = pytest.mark.ray
ARMS = ("ssl", "no_ssl")


def client(study: Any) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{study.root / 'mlflow.db'}")


def test_summary_mlflow_and_page_agree(finished: Any) -> None:
    summary, page = finished.json("summary.json"), (finished.out / "report.html").read_text()
    for arm in ARMS:
        entry = summary["arms"][arm]
        run = client(finished).get_run(entry["run_id"])
        assert run.data.metrics["test/dice"] == pytest.approx(entry["test/dice"], abs=1e-12)
        assert [run.data.metrics[f"test/dice_ci95_{end}"] for end in ("low", "high")] == pytest.approx(
            entry["ci95"]
        )
        assert run.data.metrics["test/cases"] == entry["cases"] == 3
        assert run.data.tags["arm"] == arm
        table = pd.read_parquet(finished.out / f"arms/{arm}/seed0/evaluate/cases.parquet")
        assert table.groupby("case")["dice"].mean().mean() == pytest.approx(entry["test/dice"])
        assert f"{entry['test/dice']:.3f}" in page
        assert entry["run_id"] in page
    assert {"mean_difference", "ci95", "wilcoxon_p"} <= summary["paired"].keys()


def test_both_arms_differ_in_their_initial_weights_alone(finished: Any) -> None:
    runs = [
        client(finished).get_run(finished.json(f"arms/{arm}/seed0/finetune/run.json")["run_id"])
        for arm in ARMS
    ]
    ssl, no_ssl = (run.data.params for run in runs)
    differing = {name for name in ssl if ssl[name] != no_ssl[name]}
    assert differing == {"out", "model.checkpoint"}
    assert ssl["strategy.lora.rank"] == "4"


def test_curves_and_pictures_are_in_mlflow(finished: Any) -> None:
    run_id = finished.json("pretrain/seed0/run.json")["run_id"]
    losses = client(finished).get_metric_history(run_id, "train/loss")
    assert [entry.step for entry in losses] == [1, 2, 3, 4]
    pictures = [artifact.path for artifact in client(finished).list_artifacts(run_id, "reconstructions")]
    assert pictures == [f"reconstructions/step_{step:06}.png" for step in (0, 2, 4)]


@torch.no_grad()
def test_the_encoder_is_a_sam_checkpoint_and_gives_the_same_embedding(finished: Any) -> None:
    official: Sam = build_micro().eval()
    weights = torch.load(finished.out / "pretrain/seed0/encoder.pth", weights_only=True)
    official.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 64, 64)
    wanted = official.image_encoder(images)
    ours = encode_images(official.image_encoder, images)
    assert ((ours - wanted).norm() / wanted.norm()).item() < 1e-5


def test_a_bundle_loads_and_predicts_what_was_evaluated(finished: Any) -> None:
    import zarr

    folder = finished.out / "arms/ssl/seed0"
    store = SliceStore(finished.out / "store")
    segmenter = load_segmenter(folder / "finetune/bundle")
    last, best = (
        load_file(folder / "finetune" / name) for name in ("last.safetensors", "bundle/tuned.safetensors")
    )
    assert last.keys() == best.keys()
    for case in store.cases("test"):
        prediction = Predictor(segmenter, store, 32, torch.device("cpu")).segment_case(case)
        assert (prediction == zarr.open_array(folder / "evaluate/predictions.zarr" / case)[:]).all()


def test_what_is_planted_in_the_scans_is_in_nothing_that_was_made_of_them(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished.root / 'mlflow.db'}")
    monkeypatch.chdir(finished.root)
    made = tmp_path / "made"
    pretrained, bundle = finished.out / "pretrain/seed0", finished.out / "arms/ssl/seed0/finetune/bundle"
    main(["export", f"run={pretrained}", f"out={made / 'encoder'}"])
    main(["export-runs", "experiment=tiny", f"out={made / 'runs'}"])
    scan = sorted((finished.root / "scans/imagesTr").iterdir())[0]
    shutil.copy2(scan, tmp_path / "new.nii.gz")
    main(["predict", str(bundle), str(tmp_path / "new.nii.gz"), "--out", str(made / "masks"), "entropy=true"])
    printed = capfd.readouterr()
    assert NAME not in printed.out + printed.err
    searched = [path for path in finished.root.iterdir() if path.name != "scans"]
    assert {"study", "mlflow.db", "mlartifacts", "ray_logs", "printed.txt"} <= {
        path.name for path in searched
    }
    assert found_in(made, *searched) == []
    assert len(found_in(finished.root / "scans")) == 33  # each file by content and by name, and dataset.json


def test_nothing_that_is_finished_is_done_again(finished: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*.pth")}
    tables = finished.json("summary.json")["arms"]
    done = finished.study()
    assert done.stdout.count("nothing to do") == 5  # pretrain, and finetune and evaluate of each arm
    assert {path: path.stat().st_mtime_ns for path in finished.out.rglob("*.pth")} == before
    assert finished.json("summary.json")["arms"] == tables


def test_another_configuration_never_overwrites_a_run(finished: Any) -> None:
    done = finished.study("finetune.optim.lr=0.5", check=False)
    assert done.returncode == 1
    assert "differs in optim.lr" in done.stderr
    assert "delete that folder" in done.stderr


def test_lineage_is_unbroken_until_a_byte_changes(finished: Any, tmp_path: Path) -> None:
    bundle = finished.out / "arms/ssl/seed0/finetune/bundle"
    text = finished.samssl("lineage", str(bundle)).stdout
    assert "Unbroken: 5 links verified. Not checked: 1" in text, text  # weights were drawn from a seed
    roles = ["cases", "bundle", "encoder", "manifest", "16 source files"]
    positions = [text.index(role) for role in roles]
    assert positions == sorted(positions)
    assert finished.json("pretrain/seed0/run.json")["run_id"] in text

    shard = next(path for path in (finished.out / "store/cases").rglob("c/0/0/0") if "image" in str(path))
    kept = tmp_path / "kept"
    shutil.copy2(shard, kept)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    broken = finished.samssl("lineage", str(bundle), check=False)
    shutil.copy2(kept, shard)
    assert broken.returncode == 1
    assert "BROKEN at: manifest (prepare)" in broken.stdout
    assert shard.relative_to(finished.out / "store").parts[1].removesuffix(".zarr") in broken.stdout


def test_lineage_names_a_changed_bundle_and_an_unknown_start(finished: Any) -> None:
    bundle = finished.out / "arms/no_ssl/seed0/finetune/bundle"
    path = bundle / "bundle.json"
    content = path.read_text()
    path.write_text(content.replace("core", "cope"))
    broken = finished.samssl("lineage", str(bundle), check=False)
    path.write_text(content)
    assert "BROKEN at: bundle (finetune)" in broken.stdout
    unknown = finished.samssl("lineage", "no-such-run", check=False)
    assert unknown.returncode == 1
    assert "neither a path nor a run" in unknown.stderr


def test_two_workers_learn_what_one_learns(finished: Any) -> None:
    """The same global batches: losses differ by rounding, as each worker takes its own means first."""
    out = finished.out.with_name("two_workers")
    config = finished.out / "pretrain/seed0/config.yaml"
    finished.samssl("pretrain", "--config", str(config), f"out={out}", "resources.workers=2")
    history = [pd.read_csv(folder / "history.csv") for folder in (finished.out / "pretrain/seed0", out)]
    one, two = (table[table["metric"].isin(["val/loss", "train/loss"])]["value"] for table in history)
    assert one.to_numpy() == pytest.approx(two.to_numpy(), rel=1e-4)
    assert not one.equals(two)  # sums over two workers round otherwise
