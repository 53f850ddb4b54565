"""DICOM structure sets (RTSTRUCT): contours filled on the grid of their scan (PS3.3 A.19).

A voxel belongs to a structure if its centre lies within the contours, by the even-odd rule, so that inner
contours are holes.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Integer
from pydicom.dataset import Dataset

from samssl.config import UserError
from samssl.data.readers.dicom import read_header
from samssl.data.readers.files import naming

RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
RTSTRUCT_TAGS = (
    *("SOPClassUID", "SeriesInstanceUID", "StructureSetROISequence", "ROIContourSequence"),
    "ReferencedFrameOfReferenceSequence",
)
_MAX_CROSSINGS = 1 << 26
"""Rows that all edges of a structure may cross: a lying file must not take hours."""


def structure_names(path: Path) -> dict[int, str]:
    """Names of the structures by their numbers.

    Raises:
        UserError: the file is no structure set, or damaged.
    """
    with naming(path):
        return _names(read_header(path, RTSTRUCT_TAGS))


def read_rtstruct(
    path: Path, shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"], labels: Mapping[int, str]
) -> Integer[np.ndarray, "Z H W"]:
    """Label ids on the grid of a scan of `shape`, whose `affine` goes from its index to RAS mm.

    Structures whose names are not among `labels` (case aside) are left out.

    Raises:
        UserError: damaged, beyond the scan, no structure of these names, or two share a voxel.
    """
    with naming(path):
        header = read_header(path, RTSTRUCT_TAGS)
        wanted = {name.casefold(): label for label, name in labels.items() if label != 0}
        names = _names(header)
        ids = {number: wanted[name.casefold()] for number, name in names.items() if name.casefold() in wanted}
        if not ids:
            raise UserError(
                f"None of the {len(names)} structures in {path} is called as one of the labels: "
                f"{', '.join(wanted)}. Give data.labels the names that the file has."
            )
        mask = np.zeros(shape, np.uint16)
        for item in header.ROIContourSequence:
            label = ids.get(int(item.ReferencedROINumber))
            if label is not None and item.get("ContourSequence"):
                _fill(mask, _contours(item, affine, path), label, path)
    return mask.astype(np.uint8 if mask.max() < 256 else np.uint16)


def _names(header: Dataset) -> dict[int, str]:
    return {
        int(item.ROINumber): str(item.get("ROIName", "")).strip() for item in header.StructureSetROISequence
    }


def _contours(item: Dataset, affine: np.ndarray, path: Path) -> list[Float[np.ndarray, "points 3"]]:
    """Closed contours in the scan's index."""
    to_index = np.linalg.inv(affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    contours = []
    for contour in item.ContourSequence:
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        if contour.get("ContourGeometricType") == "CLOSED_PLANAR" and len(points) >= 3:
            if not np.isfinite(points).all():
                raise UserError(f"{path} is damaged: it has contours at no place.")
            contours.append(points @ to_index[:3, :3].T + to_index[:3, 3])
    return contours


def _fill(mask: np.ndarray, contours: list[np.ndarray], label: int, path: Path) -> None:
    """Set the voxels inside a structure's contours."""
    by_slice: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for points in contours:
        axis = int(np.argmin(np.ptp(points, axis=0)))
        if np.ptp(points[:, axis]) > 0.5:
            raise UserError(f"{path} has contours that do not lie in slices of its scan.")
        index = int(np.rint(points[:, axis].mean()))
        if not 0 <= index < mask.shape[axis]:
            raise UserError(f"The structures of {path} reach beyond its scan, so they are not of one scan.")
        by_slice[axis, index].append(np.delete(points, axis, axis=1))
    _check_extent(by_slice, path)
    for (axis, index), outlines in by_slice.items():
        place = tuple(index if other == axis else slice(None) for other in range(3))
        plane = mask[place]
        inside = filled(outlines, plane.shape)
        if ((plane != 0) & (plane != label) & inside).any():
            raise UserError(
                f"Structures of {path} overlap, and a voxel has one label here. Leave some out of "
                "data.labels."
            )
        plane[inside] = label


def _check_extent(by_slice: Mapping[tuple[int, int], list[np.ndarray]], path: Path) -> None:
    crossed = sum(
        float(np.abs(np.diff(points[:, 0], append=points[:1, 0])).sum())
        for group in by_slice.values()
        for points in group
    )
    if crossed > _MAX_CROSSINGS:
        raise UserError(f"{path} has contours of absurd length ({crossed:.0f} rows), so it is damaged.")


def filled(outlines: list[Float[np.ndarray, "points 2"]], shape: tuple[int, ...]) -> Bool[np.ndarray, "H W"]:
    """Pixels whose centres lie within closed outlines (row, column), by the even-odd rule."""
    flips = np.zeros((shape[0], shape[1] + 1), np.int64)
    for points in outlines:
        ends = np.roll(points, -1, axis=0)
        for (row, column), (to_row, to_column) in zip(points, ends, strict=True):
            low, high = sorted((row, to_row))
            rows = np.arange(max(0, int(np.ceil(low))), min(shape[0] - 1, int(np.ceil(high)) - 1) + 1)
            if row == to_row or not len(rows):
                continue
            crossing = column + (rows - row) * (to_column - column) / (to_row - row)
            at = np.clip(np.ceil(crossing), 0, shape[1]).astype(int)
            np.add.at(flips, (rows, at), 1)
    return np.cumsum(flips[:, :-1], axis=1) % 2 == 1
