"""Voxels to be ignored, from the mask file to the scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import zarr
from training_support import write_tuned

from samssl.bundle import read_bundle
from samssl.config import UserError
from samssl.data.datasets import AugmentConfig, LabelledSlices
from samssl.data.ignoring import IGNORED, ignored_label
from samssl.data.inspection import InspectConfig, inspect
from samssl.data.nnunet import export_nnunet
from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.slices import SliceStore, verify_store
from samssl.data.splits import SplitConfig
from samssl.evaluate import EvaluateConfig, evaluate
from samssl.losses import LossConfig, segmentation_loss
from samssl.models.sam import ModelConfig
from samssl.train.context import LocalContext
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig, finetune


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Path:
    """A folder with the boxes of `make_scans`, half of each not looked at, and their store."""
    root = tmp_path_factory.mktemp("ignore")
    scans = make_scans(root / "scans", cases=4)
    for path in (scans / "labelsTr").iterdir():
        mask: Any = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
        ids = np.asarray(mask.dataobj).copy()
        ids[12:] = 255
        nib.save(nib.Nifti1Image(ids, mask.affine), path)  # pyright: ignore[reportPrivateImportUsage]
    facts = json.loads((scans / "dataset.json").read_text())
    facts["labels"]["255"] = "Ignore"
    (scans / "dataset.json").write_text(json.dumps(facts))
    split = SplitConfig(train=2.0, val=1.0, test=1.0)
    source = DataSource(root=scans)
    prepare(PrepareConfig(name="half", out=root / "store", data=source, split=split, workers=1))
    return root


@pytest.fixture(scope="module")
def store(root: Path) -> SliceStore:
    return SliceStore(root / "store")


def config_of(root: Path, **more: Any) -> FinetuneConfig:
    return FinetuneConfig(
        out=root / "run",
        data=FinetuneDataConfig(store=root / "store"),
        model=ModelConfig(variant="micro", image_size=32),
        optim=FinetuneFitConfig(steps=20, batch_size=2, warmup_steps=1, validate_every=20, lr=0.01),
        **more,
    )


def test_a_store_keeps_them_and_counts_them_nowhere(store: SliceStore) -> None:
    assert (store.labels, store.ignored) == ({0: "background", 1: "shell", 2: "core"}, 255)
    assert verify_store(store.root) == []
    for case in store.index["case"].unique():
        stored, mask = store.stored_mask(case), store.mask(case)
        assert stored is not None
        assert mask is not None
        assert set(np.unique(stored)) == {0, 1, 2, 255}
        np.testing.assert_array_equal(mask, np.where(stored == 255, 0, stored))
        rows = store.index[store.index["case"] == case]
        assert rows["foreground_fraction"].to_numpy() == pytest.approx((mask > 0).mean(axis=(1, 2)))
        assert 255 not in set().union(*rows["labels"])
        for z in range(len(mask)):
            np.testing.assert_array_equal(store.ignored_slice(case, z), stored[z] == 255)


def test_another_name_for_a_label_is_another_case(root: Path, store: SliceStore, tmp_path: Path) -> None:
    """Ids are what they were, but what is counted is not."""
    source = DataSource(root=root / "scans", labels={1: "shell", 2: "core", 255: "rest"})
    split = SplitConfig(train=2.0, val=1.0, test=1.0)
    config = PrepareConfig(name="half", out=tmp_path / "store", data=source, split=split, workers=1)
    assert prepare(config).digest != store.digest
    named = SliceStore(tmp_path / "store")
    assert 255 in named.labels
    ids = {
        json.loads((path / "case.json").read_bytes())["settings_sha256"]
        for folder in (root, tmp_path)
        for path in (folder / "store/cases").iterdir()
    }
    assert len(ids) == 2


def test_training_slices_have_them_apart(store: SliceStore) -> None:
    still = AugmentConfig(degrees=0.0, translate=0.0, scale=0.0, intensity=0.0, noise=0.0)
    slices = LabelledSlices(store, store.rows.rows(["train"]), 48, still, keep_small=True)
    found = slices[2, 0]["labels"]
    assert set(found.unique().tolist()) == {IGNORED, 0, 1, 2}
    case, z = store.describe(int(slices.rows[2])).split("/")
    ignored = store.ignored_slice(case, int(z))
    assert ignored is not None
    assert float((found == IGNORED).float().sum()) == pytest.approx(ignored.sum() * 4, rel=0.1)


GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 3, 8, 16, generator=GENERATOR)
TARGETS = {
    "classes": torch.randint(0, 3, (2, 8, 16), generator=GENERATOR),
    "regions": torch.rand(2, 3, 8, 16, generator=GENERATOR) > 0.6,
}
RIGHT = torch.zeros(2, 8, 16, dtype=torch.bool)
RIGHT[..., 8:] = True


@pytest.mark.parametrize("terms", ["dice_ce", "dice_focal", "tversky"])
@pytest.mark.parametrize("kind", TARGETS)
def test_the_loss_is_that_of_what_is_left(kind: str, terms: Any) -> None:
    loss, targets = LossConfig(terms=terms), TARGETS[kind]
    logits = LOGITS.clone().requires_grad_()
    found = segmentation_loss(logits, targets, loss, RIGHT)
    torch.testing.assert_close(found, segmentation_loss(LOGITS[..., :8], targets[..., :8], loss))
    found.backward()
    assert logits.grad is not None
    assert (logits.grad[..., :8] != 0).any()
    assert (logits.grad[..., 8:] == 0).all()


@pytest.mark.parametrize("kind", TARGETS)
def test_boundaries_there_count_for_nothing_and_all_may_be_ignored(kind: str) -> None:
    loss, targets = LossConfig(boundary_weight=0.5, resolution=16), TARGETS[kind]
    worse = torch.where(RIGHT[:, None], -LOGITS, LOGITS)
    full = torch.ones(2, 16, 16, dtype=torch.bool)
    halves = torch.cat([RIGHT, RIGHT], dim=1)
    assert segmentation_loss(worse, targets, loss, RIGHT).isfinite()
    square = torch.cat([worse, worse], dim=2), torch.cat([LOGITS, LOGITS], dim=2)
    wanted = torch.cat([targets, targets], dim=-2)
    one, other = (segmentation_loss(logits, wanted, loss, halves) for logits in square)
    torch.testing.assert_close(one, other)
    assert segmentation_loss(square[0], wanted, loss, full).isfinite()


def test_scores_are_of_the_other_voxels(root: Path, store: SliceStore, tmp_path: Path) -> None:
    write_tuned(root / "bundle", config_of(root), store)
    assert read_bundle(root / "bundle").labels == store.labels
    found = evaluate(EvaluateConfig(out=tmp_path, bundle=root / "bundle", store=root / "store"))
    (case,) = store.cases("test")
    prediction = np.asarray(zarr.open_array(tmp_path / "predictions.zarr" / case, mode="r")[:])
    stored = store.stored_mask(case)
    assert stored is not None
    seen = stored != 255
    assert (prediction[~seen] > 0).any(), "something has to be predicted there"
    for row in found.table.to_dict("records"):
        ours, theirs = (mask[seen] == row["label_id"] for mask in (prediction, stored))
        assert (row["predicted_voxels"], row["reference_voxels"]) == (ours.sum(), theirs.sum())
        assert row["dice"] == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))


def test_prompts_are_refused(root: Path) -> None:
    from samssl.models.strategies import StrategyConfig

    settings = {"mode": "promptable", "strategy": StrategyConfig(head="sam")}
    with pytest.raises(UserError, match=r"voxels to be ignored \(label 255\), and mode=promptable"):
        finetune(config_of(root, **settings), LocalContext())


def test_nnunet_gets_them_as_its_highest_label(store: SliceStore, tmp_path: Path) -> None:
    (case, _), val, test = store.cases("train"), store.cases("val"), store.cases("test")
    folder = export_nnunet(store, tmp_path, train=[case], val=val, test=test)
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "shell": 1, "core": 2, "ignore": 3}
    written: Any = nib.load(folder / f"labelsTr/{case}.nii.gz")  # pyright: ignore[reportPrivateImportUsage]
    stored = store.stored_mask(case)
    assert stored is not None
    np.testing.assert_array_equal(np.asarray(written.dataobj).T, np.where(stored == 255, 3, stored))


def test_inspecting_scans_and_store_takes_them_for_background(root: Path) -> None:
    data = DataSource(root=root / "scans")
    of_scans = inspect(InspectConfig(source=root / "scans", data=data, workers=1))
    of_store = inspect(InspectConfig(source=root / "store", workers=1))
    for seen in (of_scans, of_store):
        assert set(seen.labels) == {0, 1, 2}
        assert {label for case in seen.cases for label in case.labels} == {1, 2}
        _, mask = seen.read(seen.cases[0].case)
        assert mask is not None
        assert mask.max() == 2


def test_background_is_not_ignored() -> None:
    with pytest.raises(UserError, match="label 0 is background"):
        ignored_label({0: "ignore", 1: "liver"})
