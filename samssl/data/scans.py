"""Reading scans and their masks, in one orientation, with nothing resampled unless that is asked for.

Voxels are indexed (z, y, x) as a radiologist looks at a slice. An axial volume runs from feet to head
(z), front to back (y) and the patient's right to left (x); in coronal and sagittal volumes rows run
from head to feet. A 2D image is a volume of one slice. The formats are in `samssl.data.readers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Integer, Shaped

from samssl.config import UserError
from samssl.data.readers import dicom, dicom_seg, geometry, images, metaimage, nifti, nrrd, rtstruct
from samssl.data.readers.files import (
    IMAGE_SUFFIXES,
    METAIMAGE_SUFFIXES,
    NIFTI_SUFFIXES,
    NRRD_SUFFIXES,
    VOLUME_SUFFIXES,
    is_dicom,
)
from samssl.data.readers.geometry import Grid
from samssl.data.readers.masks import MaskRules, label_ids, only_label

Modality = Literal["MR", "CT", "XR", "US", "PT"]
Axis = Literal["auto", "axial", "coronal", "sagittal"]


@dataclass(frozen=True)
class Scan:
    """One volume or 2D image as acquired, in physical units (HU for CT)."""

    voxels: Shaped[np.ndarray, "Z H W"]
    """Integers as stored, or float32."""
    spacing_mm: tuple[float, float, float]
    """(z, y, x); 1 mm where the file does not say."""
    affine: Float[np.ndarray, "4 4"]
    """From the (z, y, x) index to RAS mm."""
    modality: Modality


def read_scan(
    path: Path,
    modality: Modality,
    axis: Axis = "auto",
    *,
    files: Sequence[Path] = (),
    volume: int | None = None,
) -> Scan:
    """Read a scan; `axis` is the axis across which a volume is cut into slices.

    `auto` is the axis along which the volume is one voxel thin or its spacing is more than 1.5 times
    that of both others, else axial. `files` are those of a DICOM series, which `path` names. `volume`
    chooses one of a file or series that holds several.

    Raises:
        UserError: the file cannot be read, or holds something other than one finite, varied scan.
    """
    return scan_of(read_grid(path, files=files, volume=volume), modality, path, axis)


def read_grid(path: Path, *, files: Sequence[Path] = (), volume: int | None = None) -> Grid:
    """The voxels as the file orders them.

    That is (i, j, k) of NIfTI and its like, (column, row, slice) of DICOM, (0, row, column) of a 2D image.

    Raises:
        UserError: the file cannot be read, or holds several volumes without `volume` to choose one.
    """
    if files or is_dicom(path):
        return dicom.read_dicom(files or (path,), path, volume)
    if is_image(path):
        return images.read_grey(path, volume)
    return _read_volume(path, volume)


def scan_of(grid: Grid, modality: Modality, path: Path, axis: Axis = "auto") -> Scan:
    """What `read_grid` read from `path`, cut into slices as `read_scan` does it."""
    if is_image(path) and not is_dicom(path):
        return _scan(grid, modality, path)
    codes = geometry.ORIENTATIONS[geometry.slicing_axis(grid, axis)]
    return _scan(geometry.orient(grid, codes), modality, path)


def is_image(path: Path) -> bool:
    """Whether a file is named as a 2D image."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def read_mask(
    path: Path, scan: Scan, labels: Mapping[int, str], rules: MaskRules = MaskRules()
) -> Integer[np.ndarray, "Z H W"]:
    """Read the label ids drawn on `scan`, on the scan's grid; `labels` are the ids that may occur.

    An image whose only values are 0 and 255 (or 1 bit) stands for the single foreground label. DICOM SEG and
    RTSTRUCT hold structures by name, which are those of `labels`.

    Raises:
        UserError: the mask lies elsewhere or on another grid, or holds values that are not ids in `labels`.
    """
    shape = scan.voxels.shape
    if is_dicom(path):
        kind = str(dicom.read_header(path, ("SOPClassUID",)).get("SOPClassUID", ""))
        if kind in dicom_seg.SEG_CLASSES:
            return dicom_seg.read_seg(path, shape, scan.affine, labels, rules.threshold)
        if kind == rtstruct.RTSTRUCT_CLASS:
            return rtstruct.read_rtstruct(path, shape, scan.affine, labels)
        grid = dicom.read_dicom((path,), path, rules.volume, invert=False)
    elif _kind(path) in IMAGE_SUFFIXES:
        grid = images.read_values(path, rules.colours)
        if rules.threshold is None and not rules.colours:
            grid = _black_and_white(grid, labels)
    else:
        grid = _read_volume(path, rules.volume)
    values = geometry.onto_scan(grid, shape, scan.affine, path, rules.resample)
    return label_ids(values, labels, path, rules.threshold)


def _kind(path: Path) -> str:
    name = path.name.lower()
    found = next((suffix for suffix in VOLUME_SUFFIXES + IMAGE_SUFFIXES if name.endswith(suffix)), None)
    if found is None:
        raise UserError(
            f"{path} is of no kind that is read here: convert it to NIfTI (.nii, .nii.gz), NRRD, MetaImage, "
            "DICOM, PNG, TIFF or JPEG."
        )
    return found


def _read_volume(path: Path, volume: int | None) -> Grid:
    readers = {
        **dict.fromkeys(NIFTI_SUFFIXES, nifti.read_nifti),
        **dict.fromkeys(NRRD_SUFFIXES, nrrd.read_nrrd),
        **dict.fromkeys(METAIMAGE_SUFFIXES, metaimage.read_metaimage),
    }
    return readers[_kind(path)](path, volume)


def _scan(grid: Grid, modality: Modality, path: Path) -> Scan:
    return Scan(_plain_voxels(grid.array, path), geometry.spacing_mm(grid.affine), grid.affine, modality)


def _black_and_white(grid: Grid, labels: Mapping[int, str]) -> Grid:
    """0 and 255 as background and the only label, where there is only one."""
    label = only_label(labels)
    if label is None or not set(np.unique(grid.array)) <= {0, 255}:
        return grid
    return Grid(np.where(grid.array == 255, label, 0), grid.affine)


def _plain_voxels(array: np.ndarray, path: Path) -> np.ndarray:
    """Contiguous voxels of native byte order, integer as stored or float32; refuse useless ones."""
    kind = array.dtype.newbyteorder("=") if array.dtype.kind in "iu" else np.dtype(np.float32)
    with np.errstate(over="ignore"):
        voxels = np.ascontiguousarray(array, dtype=kind)
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise UserError(
            f"{path} holds values that are not finite numbers (NaN or infinity). Repair or leave it out."
        )
    if voxels.min() == voxels.max():
        raise UserError(
            f"{path} holds the single value {voxels.flat[0]} everywhere, so there is nothing to see in it."
        )
    return voxels
