"""Tiny data sets that several tests of the data side read."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samssl.data.prepare import PrepareConfig
from samssl.data.sources import DataSource
from samssl.data.splits import SplitConfig

LABELS = {0: "background", 1: "liver", 2: "tumour"}

WriteNifti = Callable[..., Path]


@pytest.fixture
def write_nifti(tmp_path: Path) -> WriteNifti:
    """Write an array as NIfTI below the test's folder; RAS, 1 mm unless told otherwise."""

    def write(name: str, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def decathlon(tmp_path: Path, write_nifti: WriteNifti) -> Path:
    """Six labelled scans (numbers 1 to 6) and one without a mask, in the Decathlon layout."""
    generator = np.random.default_rng(0)
    for number in range(1, 8):
        voxels = generator.integers(0, 900, (6, 5, 4), dtype=np.int16)
        write_nifti(f"set/images{'Tr' if number < 7 else 'Ts'}/liver_{number}.nii.gz", voxels)
        if number < 7:
            mask = np.zeros((6, 5, 4), np.uint8)
            mask[1:4, 1:3, 1:3] = 1
            mask[2, 2, 2] = 2
            write_nifti(f"set/labelsTr/liver_{number}.nii.gz", mask)
    facts = {"modality": {"0": "CT"}, "labels": {str(label): name for label, name in LABELS.items()}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(facts))
    return tmp_path / "set"


@pytest.fixture
def prepare_config(tmp_path: Path, decathlon: Path) -> Callable[..., PrepareConfig]:
    """The configuration that prepares `decathlon` into the test's folder `store`."""

    def make(store: str = "store", workers: int = 1, **data: object) -> PrepareConfig:
        source = DataSource(root=decathlon, **data)  # pyright: ignore[reportArgumentType]
        split = SplitConfig(train=2.0, val=1.0, test=2.0)
        return PrepareConfig(name="tiny", out=tmp_path / store, data=source, split=split, workers=workers)

    return make
