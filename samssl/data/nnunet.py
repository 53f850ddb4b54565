"""A slice store as nnU-Net's raw data set (its version 2), with our splits, and its predictions read back.

    <root>/Dataset001_samssl/dataset.json, splits_final.json
    <root>/Dataset001_samssl/imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz    training and validation cases
    <root>/Dataset001_samssl/imagesTs/CASE_0000.nii.gz                          test cases

Labels are class numbers there, which have to be consecutive: the ranks of the label ids.
"""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Integer, Shaped

from samssl.data.ignoring import IGNORE
from samssl.data.slices import SliceStore
from samssl.files import write_json, written_aside

DATASET = "Dataset001_samssl"
SPLITS_FILE = "splits_final.json"


def export_nnunet(
    store: SliceStore, root: Path, *, train: Sequence[str], val: Sequence[str], test: Sequence[str]
) -> Path:
    """Write the cases below `root`, whole or not at all; returns the data set's folder."""
    with written_aside(root / DATASET) as folder:
        for case in (*train, *val):
            _write_case(store, case, folder / "imagesTr")
            _write_labels(store, case, folder / "labelsTr")
        for case in test:
            _write_case(store, case, folder / "imagesTs")
        write_json(folder / "dataset.json", _description(store, len(train) + len(val)))
        write_json(folder / SPLITS_FILE, [{"train": [*train], "val": [*val]}])
    return root / DATASET


def read_nnunet_prediction(store: SliceStore, path: Path) -> Integer[np.ndarray, "Z H W"]:
    """The label ids in a mask that nnU-Net wrote for a case of the store."""
    numbers = np.asarray(nib.load(path).dataobj).T.astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]
    ids = np.array(sorted(store.labels))
    return ids[numbers].astype(np.uint8 if ids.max() < 256 else np.int32)


def _description(store: SliceStore, num_training: int) -> dict[str, object]:
    """nnU-Net scales a channel named CT by the training cases' values, and any other case by case."""
    names = [store.labels[label] for label in sorted(store.labels)]
    return {
        "channel_names": {"0": "CT" if store.rows.modalities() == {"CT"} else "image"},
        "labels": {"background": 0}
        | {name: number for number, name in enumerate(names) if number}
        | ({} if store.ignored is None else {IGNORE: len(names)}),
        "numTraining": num_training,
        "file_ending": ".nii.gz",
    }


def _write_case(store: SliceStore, case: str, folder: Path) -> None:
    _save(store, case, store.image(case), folder / f"{case}_0000.nii.gz")


def _write_labels(store: SliceStore, case: str, folder: Path) -> None:
    mask = store.stored_mask(case)
    assert mask is not None, f"case {case} has no mask"
    numbers = np.searchsorted(sorted(store.labels), mask)
    if store.ignored is not None:
        numbers[mask == store.ignored] = len(store.labels)  # the highest, as nnU-Net wants it
    _save(
        store,
        case,
        numbers.astype(np.uint8 if len(store.labels) < 255 else np.uint16),
        folder / f"{case}.nii.gz",
    )


def _save(store: SliceStore, case: str, voxels: Shaped[np.ndarray, "Z H W"], path: Path) -> None:
    """NIfTI axes run x, y, z. The patient's orientation is left out, as nothing here depends on it."""
    info = store.info(case)
    spacing_mm = [float(info[f"spacing_{axis}_mm"]) for axis in "xyz"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.T, np.diag([*spacing_mm, 1.0])), path)
