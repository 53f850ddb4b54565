"""DICOM segmentations (SEG) on the grid of their scan, through pydicom (PS3.3 A.51).

Segments are told apart by their names (SegmentLabel): numbers are each file's own.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float, Integer, Shaped
from pydicom.dataset import Dataset

from samssl.config import UserError
from samssl.data.readers.codestream import decoded
from samssl.data.readers.dicom import read_header
from samssl.data.readers.files import check_voxels, naming
from samssl.data.readers.geometry import LPS_TO_RAS, SAME_GRID_VOXELS

SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Segmentation Storage, and its label map form."""
SEG_TAGS = (
    *("SOPClassUID", "SeriesInstanceUID", "Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored"),
    *("HighBit", "SamplesPerPixel", "PixelRepresentation", "PhotometricInterpretation"),
    *("SegmentationType", "MaximumFractionalValue", "SegmentSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ReferencedSeriesSequence"),
)


def segment_names(path: Path) -> dict[int, str]:
    """Names of the segments by their numbers.

    Raises:
        UserError: the file is no segmentation, or damaged.
    """
    with naming(path):
        header = read_header(path, SEG_TAGS)
        return {
            int(item.SegmentNumber): str(item.get("SegmentLabel", "")).strip()
            for item in header.SegmentSequence
        }


def read_seg(
    path: Path,
    shape: tuple[int, ...],
    affine: Float[np.ndarray, "4 4"],
    labels: Mapping[int, str],
    threshold: float | None = None,
) -> Integer[np.ndarray, "Z H W"]:
    """Label ids on the grid of a scan of `shape`, whose `affine` goes from its index to RAS mm.

    Segments whose names are not among `labels` (case aside) are left out.

    Raises:
        UserError: damaged, not on the scan's grid, no segment of these names, or two share a voxel.
    """
    ids = _ids_of_names(segment_names(path), labels, path)
    with naming(path):
        dataset, frames = _frames(path, threshold)
        mask = np.zeros(shape, np.uint16)
        for number, plane in enumerate(frames):
            segment, place = _of_frame(dataset, number)
            for value, label in ids.items() if segment is None else [(None, ids.get(segment))]:
                drawn = plane > 0 if value is None else plane == value
                if label is not None and drawn.any():
                    _draw(mask, drawn, np.linalg.inv(affine) @ place, label, path)
    return mask.astype(np.uint8 if mask.max() < 256 else np.uint16)


def _ids_of_names(names: Mapping[int, str], labels: Mapping[int, str], path: Path) -> dict[int, int]:
    """Segment number to label id."""
    wanted = {name.casefold(): label for label, name in labels.items() if label != 0}
    found = {number: wanted[name.casefold()] for number, name in names.items() if name.casefold() in wanted}
    if not found:
        raise UserError(
            f"None of the {len(names)} structures in {path} is called as one of the labels: "
            f"{', '.join(wanted)}. Give data.labels the names that the file has."
        )
    return found


def _frames(path: Path, threshold: float | None) -> tuple[Dataset, Shaped[np.ndarray, "frames H W"]]:
    header = read_header(path, SEG_TAGS)
    rows, columns, count = int(header.Rows), int(header.Columns), int(header.get("NumberOfFrames") or 1)
    check_voxels((count, rows, columns), 1, path)
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count:
        raise UserError(f"{path} is damaged: it has {count} frames and describes {len(groups)}.")
    dataset = pydicom.dcmread(path, specific_tags=[*SEG_TAGS, "PixelData"])
    frames = decoded(dataset, path).reshape(count, rows, columns)
    if header.get("SegmentationType") == "FRACTIONAL":
        if threshold is None:
            raise UserError(f"{path} holds fractions (a soft mask): set data.mask_threshold, 0 to 1.")
        return dataset, frames >= threshold * float(header.get("MaximumFractionalValue") or 255)
    return dataset, frames


def _of_frame(dataset: Dataset, number: int) -> tuple[int | None, Float[np.ndarray, "4 4"]]:
    """The segment of a frame (None: values are its numbers), and from (row, column) to RAS mm."""
    own, shared = dataset.PerFrameFunctionalGroupsSequence[number], dataset.SharedFunctionalGroupsSequence[0]

    def group(name: str) -> Dataset:
        return (own.get(name) or shared[name].value)[0]

    between, along = map(float, group("PixelMeasuresSequence").PixelSpacing)
    orientation = np.array(group("PlaneOrientationSequence").ImageOrientationPatient, float)
    row, column = orientation[:3], orientation[3:]
    place = np.eye(4)
    position = np.array(group("PlanePositionSequence").ImagePositionPatient, float)
    place[:3] = np.stack([column * between, row * along, np.cross(row, column), position], axis=1)
    if dataset.get("SegmentationType") == "LABELMAP":
        return None, LPS_TO_RAS @ place
    return int(group("SegmentIdentificationSequence").ReferencedSegmentNumber), LPS_TO_RAS @ place


def _draw(mask: np.ndarray, drawn: np.ndarray, to_scan: np.ndarray, label: int, path: Path) -> None:
    """Set the drawn pixels of one frame in the scan's grid."""
    corners = np.array(
        [[row, column, 0, 1] for row in (0, drawn.shape[0] - 1) for column in (0, drawn.shape[1] - 1)]
    )
    placed = (corners @ to_scan.T)[:, :3]
    steps = to_scan[:3, :2]
    if max(np.abs(placed - np.rint(placed)).max(), np.abs(steps - np.rint(steps)).max()) > SAME_GRID_VOXELS:
        raise UserError(f"The segmentation {path} is not on the grid of its scan. Resample it to that grid.")
    pixels = np.argwhere(drawn)
    voxels = np.rint(np.column_stack([pixels, np.zeros(len(pixels)), np.ones(len(pixels))]) @ to_scan.T)[
        :, :3
    ]
    voxels = voxels.astype(np.int64)
    if (voxels < 0).any() or (voxels >= mask.shape).any():
        raise UserError(f"The segmentation {path} reaches beyond its scan, so they are not of one scan.")
    index = tuple(voxels.T)
    if ((mask[index] != 0) & (mask[index] != label)).any():
        raise UserError(
            f"Segments of {path} overlap, and a voxel has one label here. Leave some out of data.labels."
        )
    mask[index] = label
