"""What nnU-Net (version 2) expects: documentation/dataset_format.md and manual_data_splits.md there."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samssl.data.nnunet import export_nnunet, read_nnunet_prediction
from samssl.data.slices import SliceStore


@pytest.fixture
def store(tmp_path: Path, prepare_boxes: Callable[..., SliceStore]) -> SliceStore:
    return prepare_boxes(tmp_path, train=2, val=1, test=2)


def export(store: SliceStore, root: Path) -> Path:
    parts = {split: store.cases(split) for split in ("train", "val", "test")}
    return export_nnunet(store, root, train=parts["train"], val=parts["val"], test=parts["test"])


def test_the_tree_is_nnunets(store: SliceStore, tmp_path: Path) -> None:
    folder = export(store, tmp_path / "raw")
    train, val, test = (store.cases(split) for split in ("train", "val", "test"))
    assert folder == tmp_path / "raw" / "Dataset001_samssl"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "dataset.json",
        "splits_final.json",
        *(f"imagesTr/{case}_0000.nii.gz" for case in [*train, *val]),
        *(f"labelsTr/{case}.nii.gz" for case in [*train, *val]),
        *(f"imagesTs/{case}_0000.nii.gz" for case in test),
    }
    assert json.loads((folder / "splits_final.json").read_text()) == [{"train": train, "val": val}]
    assert json.loads((folder / "dataset.json").read_text()) == {
        "channel_names": {"0": "image"},
        "labels": {"background": 0, "shell": 1, "core": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }


def test_voxels_and_spacing_are_the_stores(store: SliceStore, tmp_path: Path) -> None:
    folder = export(store, tmp_path)
    case = store.cases("train")[0]
    image = nib.load(folder / f"imagesTr/{case}_0000.nii.gz")
    labels = nib.load(folder / f"labelsTr/{case}.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, store.image(case))  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(np.asarray(labels.dataobj).T, store.mask(case))  # pyright: ignore[reportAttributeAccessIssue]
    info = store.info(case)
    assert image.header.get_zooms() == tuple(info[f"spacing_{axis}_mm"] for axis in "xyz")  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(image.affine, labels.affine)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_prediction_comes_back_as_label_ids(store: SliceStore, tmp_path: Path) -> None:
    store.labels = {0: "background", 4: "shell", 300: "core"}
    numbers = np.random.default_rng(0).integers(0, 3, (5, 4, 3)).astype(np.uint8)
    nib.save(nib.Nifti1Image(numbers, np.eye(4)), tmp_path / "case.nii.gz")
    found = read_nnunet_prediction(store, tmp_path / "case.nii.gz")
    np.testing.assert_array_equal(found, np.array([0, 4, 300])[numbers.T])
