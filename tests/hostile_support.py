"""A small valid file of every format that is read, to be broken in every way."""

import gzip
import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from dicom_support import enhanced, segmentation, series, structures
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels.utils import compress
from pydicom.uid import JPEG2000Lossless, RLELossless

from samssl.config import UserError
from samssl.data.scans import Scan, read_mask, read_scan

VOXELS = np.random.default_rng(0).integers(0, 200, (3, 4, 5), dtype=np.int16)
LABELS = {0: "background", 1: "liver"}


def valid_files() -> dict[str, bytes]:
    """File name to content."""
    files = {f"scan.{kind}": _picture(kind) for kind in ("png", "jpg", "tif", "bmp")}
    nifti = nib.Nifti1Image(VOXELS, np.eye(4))
    files["scan.nii"] = nifti.to_bytes()
    files["scan.nii.gz"] = gzip.compress(nifti.to_bytes())
    files["nifti2.nii"] = nib.Nifti2Image(VOXELS, np.eye(4)).to_bytes()
    header = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 3 4 5\n"
    header += "space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\n"
    for encoding in ("raw", "gzip"):
        content = VOXELS.tobytes() if encoding == "raw" else gzip.compress(VOXELS.tobytes())
        files[f"{encoding}.nrrd"] = (
            f"{header}encoding: {encoding}\nspace origin: (0,0,0)\n\n".encode() + content
        )
    mha = "ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementSpacing = 1 1 2\nElementType = MET_SHORT\n"
    files["scan.mha"] = mha.encode() + b"ElementDataFile = LOCAL\n" + VOXELS.tobytes()
    return files | {name: _content(dataset) for name, dataset in _dicom().items()}


def _dicom() -> dict[str, Dataset]:
    first = series(VOXELS)[0]
    wide = np.tile(VOXELS, (1, 9, 9))
    packed, run_length = series(wide)[0], series(wide)[0]
    compress(packed, JPEG2000Lossless, encoding_plugin="pylibjpeg")
    compress(run_length, RLELossless)
    outline = np.array(first.ImagePositionPatient) + np.array([[0, 0, 0], [2, 0, 0], [2, 4, 0]])
    return {
        "slice.dcm": first,
        "frames.dcm": enhanced(series(VOXELS), (0, 1, 2)),
        "jpeg2000.dcm": packed,
        "rle.dcm": run_length,
        "structures.dcm": structures(first, {"liver": [outline]}),
    }


def dicom_masks() -> tuple[list[Dataset], dict[str, bytes]]:
    """A series, and masks of it by what they are: each form of SEG, packed and plain, and a structure set."""
    slices = series(VOXELS)
    first, drawn = slices[0], np.zeros((*VOXELS.shape, 1), np.uint8)
    drawn[1:, 1:3, 2:4] = 1
    corner = np.array(first.ImagePositionPatient)
    outline = corner + np.array([[0.5, 1, 0], [2.5, 1, 0], [2.5, 5, 0], [0.5, 5, 0]])
    names: Any = {"names": ["liver"]}
    masks = {
        "binary": segmentation(slices, drawn, **names),
        "labelmap": segmentation(slices, drawn, "LABELMAP", **names),
        "fractional": segmentation(slices, drawn * 0.8, "FRACTIONAL", **names),
        "packed": segmentation(slices, drawn, "LABELMAP", transfer_syntax_uid=RLELossless, **names),
        "structures": structures(first, {"liver": [outline]}),
    }
    return slices, {name: _content(dataset) for name, dataset in masks.items()}


def _content(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (7, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(file, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
    return file.getvalue()


def read_either_way(path: Path) -> None:
    """Read a file as a scan and as a mask: each gives what it should or a `UserError`, nothing else."""
    on = Scan(np.zeros((3, 4, 5), np.int16), (1.0, 1.0, 1.0), np.eye(4), "MR")
    with suppress(UserError):
        on = read_scan(path, "MR")
    assert on.voxels.ndim == 3
    assert np.isfinite(on.voxels).all()
    assert np.isfinite(on.affine).all()
    with suppress(UserError):
        mask = read_mask(path, on, LABELS)
        assert mask.shape == on.voxels.shape
        assert set(np.unique(mask)) <= set(LABELS)
