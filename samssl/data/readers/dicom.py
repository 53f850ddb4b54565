"""DICOM images through pydicom: which series there are, and the volume that a series is.

Of a header only what `TAGS` lists is looked at, and only grey values and their place are kept.
Slices are put in order by where they lie along the normal of their plane (PS3.3 C.7.6.2.1.1), whatever
their files are called. What is no regular volume is refused by name: several orientations, a tilted gantry,
slices that are missing, twice there, or unevenly spaced.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from jaxtyping import Float, Shaped
from PIL import Image
from pydicom.config import IGNORE, settings
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian

from samssl.config import UserError
from samssl.data.readers.codestream import decoded
from samssl.data.readers.files import MAX_SCAN_BYTES, check_voxels, naming, too_large
from samssl.data.readers.geometry import IMAGE_AFFINE, LPS_TO_RAS, Grid, placed

# What pydicom warns of and logs may quote a header; values are judged where they matter.
settings.reading_validation_mode = IGNORE
logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False

TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation", "ImagePositionPatient"),
    *("ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SpacingBetweenSlices"),
    *("SliceThickness", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "InstanceNumber"),
    *("AcquisitionNumber", "TemporalPositionIdentifier", "EchoNumbers", "BurnedInAnnotation"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor"),
    *("BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
)
"""All that is read of the header of an image; of it only geometry and values go into a store."""

MODALITIES = {
    **{"CT": "CT", "MR": "MR", "PT": "PT", "US": "US", "IVUS": "US"},
    **dict.fromkeys(("CR", "DX", "RG", "XA", "RF", "MG", "PX", "IO"), "XR"),
}
"""DICOM's modality (0008,0060) to that of a store."""

_COUNTS = {"Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated"}
_MAX_TILT_DEG = 0.5
_MAX_UNEVEN = 0.1
"""How far, as a share of the spacing, a slice may lie off its place in an even stack."""


@dataclass(frozen=True)
class _Frame:
    """One 2D image of a series, and where it lies."""

    header: Dataset
    number: int
    """Which frame of its file."""
    place: Float[np.ndarray, "4 4"] | None
    """From (column, row, 0) to LPS mm; None where the file does not say."""
    slope: float
    intercept: float


def read_header(path: Path, tags: Sequence[str] = TAGS) -> Dataset:
    """The elements `tags` of a DICOM file, without its pixels.

    Raises:
        UserError: it is not DICOM, damaged, larger than a scan may be, or deflated as a whole.
    """
    with naming(path):
        if path.stat().st_size > MAX_SCAN_BYTES:
            raise too_large(path, f"has {path.stat().st_size} bytes")
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise UserError(f"{path} is deflated as a whole, which is not read here. Save it uncompressed.")
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
        # pydicom decodes a value when it is first asked for: here, where that may fail.
        values = {name: header.get(name) for name in tags}
        for name in _COUNTS & set(tags):
            if values[name] is not None:
                setattr(header, name, int(values[name]))
    header.filename = str(path)
    return header


def is_volume_slice(header: Dataset) -> bool:
    """Whether a file is one slice of a series, and not a projection or a file of frames."""
    single = int(header.get("NumberOfFrames") or 1) == 1
    return single and bool(header.get("ImagePositionPatient") and header.get("ImageOrientationPatient"))


def read_dicom(files: Sequence[Path], named: Path, volume: int | None = None, invert: bool = True) -> Grid:
    """The volume of one series, in HU for CT, indexed (column, row, slice).

    `named` is what errors call it. `volume` chooses one of a series that has several at the same places.
    With `invert` grey values that the file says are to be shown with low ones bright (MONOCHROME1) are
    turned round.

    Raises:
        UserError: a file is damaged, or the series is no regular volume.
    """
    frames = _in_order(files, named, volume)
    with naming(named):
        affine = _affine(frames, named)
    arrays = _pixels(frames, named, invert)
    return placed(arrays.transpose(2, 1, 0), affine, named)


def slice_sources(files: Sequence[Path], named: Path, volume: int | None = None) -> list[tuple[Path, int]]:
    """File and number of the frame behind each slice of the volume that `read_dicom` gives.

    Raises:
        UserError: as there.
    """
    return [(Path(str(frame.header.filename)), frame.number) for frame in _in_order(files, named, volume)]


def _in_order(files: Sequence[Path], named: Path, volume: int | None) -> list[_Frame]:
    headers = [read_header(path) for path in files]
    with naming(named):
        _check_sizes(headers, named)
        frames = [frame for header in headers for frame in _frames(header, named)]
        return _one_volume(frames, volume, named)


def _check_sizes(headers: Sequence[Dataset], named: Path) -> None:
    shapes = {(header.get("Rows"), header.get("Columns")) for header in headers}
    if len(shapes) > 1:
        raise UserError(f"{named} has slices of different sizes, so it is not one volume.")
    rows, columns = shapes.pop()
    frames = sum(int(header.get("NumberOfFrames") or 1) for header in headers)
    depth = max(int(header.get("BitsAllocated") or 8) // 8 or 1 for header in headers)
    samples = max(int(header.get("SamplesPerPixel") or 1) for header in headers)
    check_voxels((frames, rows or 0, columns or 0, samples), depth, named)


def _frames(header: Dataset, named: Path) -> list[_Frame]:
    if header.get("ModalityLUTSequence"):
        raise UserError(f"{named} keeps its units in a table (modality LUT), which is not read here.")
    count = int(header.get("NumberOfFrames") or 1)
    shared = _first(header, "SharedFunctionalGroupsSequence")
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if groups and len(groups) != count:
        raise UserError(f"{named} is damaged: it has {count} frames and describes {len(groups)}.")
    return [
        _frame(header, number, shared, groups[number] if groups else Dataset()) for number in range(count)
    ]


def _frame(header: Dataset, number: int, shared: Dataset, own: Dataset) -> _Frame:
    def group(name: str) -> Dataset:
        return _first(own, name) or _first(shared, name) or header

    measures = group("PixelMeasuresSequence")
    position = group("PlanePositionSequence").get("ImagePositionPatient")
    orientation = group("PlaneOrientationSequence").get("ImageOrientationPatient")
    spacing = measures.get("PixelSpacing")
    place = None
    if position is not None and orientation is not None and len(position) == 3 and len(orientation) == 6:
        row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
        between, along = map(float, spacing or (1, 1))
        thickness = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 1
        place = np.eye(4)
        place[:3] = np.stack(
            [
                row * along,
                column * between,
                np.cross(row, column) * abs(float(thickness)),
                np.array(position, float),
            ],
            axis=1,
        )
    values = group("PixelValueTransformationSequence")
    return _Frame(
        header,
        number,
        place,
        float(values.get("RescaleSlope") or 1),
        float(values.get("RescaleIntercept") or 0),
    )


def _first(dataset: Dataset, name: str) -> Dataset:
    """The only item of a sequence, or an empty one."""
    items = dataset.get(name)
    return items[0] if items else Dataset()


def _one_volume(frames: list[_Frame], volume: int | None, named: Path) -> list[_Frame]:
    """The frames of one volume, in the order of their places."""
    if any(frame.place is None for frame in frames):
        return _unplaced(frames, volume, named)
    normal = _normal(frames, named)
    along = np.array([frame.place[:3, 3] @ normal for frame in frames if frame.place is not None])
    order = sorted(range(len(frames)), key=lambda index: (round(along[index], 2), *_moment(frames[index])))
    _, counts = np.unique(np.round(along[order], 2), return_counts=True)
    if counts.max() > 1:
        return _of_several(frames, order, counts, volume, named)
    _check_even(along[order], named)
    return [frames[index] for index in order]


def _unplaced(frames: list[_Frame], volume: int | None, named: Path) -> list[_Frame]:
    """A projection or a film: one frame, which lies nowhere in particular."""
    count = len(frames)
    if count > 1 and (volume is None or volume >= count):
        raise UserError(
            f"{named} has {count} frames and does not say where they lie (a film, or damaged). Choose one "
            f"with data.volume, 0 to {count - 1}."
        )
    return [frames[0 if count == 1 else volume or 0]]


def _normal(frames: list[_Frame], named: Path) -> np.ndarray:
    """The direction in which slices follow each other: the normal of the first frame."""
    steps = np.array([frame.place[:3, :3] for frame in frames if frame.place is not None])
    if not np.isfinite(steps).all() or (np.abs(np.linalg.det(steps)) < 1e-9).any():
        raise UserError(
            f"{named} does not place its slices in space (their directions or spacings are void)."
        )
    units = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    if np.abs(units - units[0]).max() > 1e-2:
        raise UserError(f"{named} has slices of different orientations, so it is not one volume.")
    if np.abs(steps[:, :, :2] - steps[0, :, :2]).max() > 1e-3 * np.abs(steps[0, :, :2]).max():
        raise UserError(f"{named} has slices of different pixel spacings, so it is not one volume.")
    return units[0][:, 2]


def _moment(frame: _Frame) -> tuple[float, ...]:
    """What tells apart slices at one place: time, acquisition, echo, number."""
    names = ("TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber")
    return (*(float(frame.header.get(name) or 0) for name in names), float(frame.number))


def _of_several(
    frames: list[_Frame], order: list[int], counts: np.ndarray, volume: int | None, named: Path
) -> list[_Frame]:
    """One volume of a series with several slices at each place, as of times, contrasts or weightings."""
    several = int(counts[0])
    uids = [
        (str(frame.header.SOPInstanceUID), frame.number)
        for frame in frames
        if frame.header.get("SOPInstanceUID")
    ]
    copies = len(set(uids)) < len(uids)
    if (counts != several).any() or copies:
        raise UserError(
            f"{named} has duplicate slices: {int((counts > 1).sum())} of its {len(counts)} places have more "
            "than one. Remove the copies."
        )
    if volume is None or volume >= several:
        raise UserError(
            f"{named} has {several} slices at each of its {len(counts)} places (times, contrasts or "
            f"weightings). Choose one volume with data.volume, 0 to {several - 1}."
        )
    return _one_volume([frames[index] for index in order[volume::several]], None, named)


def _check_even(along_mm: np.ndarray, named: Path) -> None:
    gaps = np.diff(along_mm)
    if not len(gaps):
        return
    usual = float(np.median(gaps))
    wide = gaps > 1.5 * usual
    if wide.any():
        missing = int(np.rint(gaps[wide] / usual - 1).sum())
        raise UserError(
            f"{named} has missing slices, about {missing}: slices are {usual:.2f} mm apart, with gaps of up "
            f"to {gaps.max():.2f} mm."
        )
    even = np.linspace(along_mm[0], along_mm[-1], len(along_mm))
    if np.abs(along_mm - even).max() > _MAX_UNEVEN * usual:
        raise UserError(
            f"{named} has uneven slice spacing, {gaps.min():.2f} to {gaps.max():.2f} mm. Resample it first."
        )


def _affine(frames: list[_Frame], named: Path) -> np.ndarray:
    """From (column, row, slice) to RAS mm."""
    first, last = frames[0].place, frames[-1].place
    if first is None or last is None:
        return _image_affine(frames[0].header)
    affine = first.copy()
    if len(frames) > 1:
        step = (last[:3, 3] - first[:3, 3]) / (len(frames) - 1)
        normal = first[:3, 2] / np.linalg.norm(first[:3, 2])
        tilt = np.degrees(np.arccos(np.clip(abs(step @ normal) / np.linalg.norm(step), 0, 1)))
        if tilt > _MAX_TILT_DEG:
            raise UserError(
                f"{named} was taken with a tilted gantry or is sheared: slices are shifted by {tilt:.1f} "
                "degrees against each other. Resample it to a straight grid first."
            )
        affine[:3, 2] = step
    return LPS_TO_RAS @ affine


def _image_affine(header: Dataset) -> np.ndarray:
    """Of an image that lies nowhere in particular, from (column, row, slice), with its pixel spacing."""
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing") or (1, 1)
    rows_mm, columns_mm = (float(step) if float(step) > 0 else 1.0 for step in spacing)
    return IMAGE_AFFINE @ np.eye(4)[[2, 1, 0, 3]] @ np.diag([columns_mm, rows_mm, 1, 1])


def _pixels(frames: list[_Frame], named: Path, invert: bool) -> Shaped[np.ndarray, "Z H W"]:
    """The values of the frames, in whole numbers where they are."""
    whole = all(frame.slope == 1 and frame.intercept == int(frame.intercept) for frame in frames)
    kind = np.int32 if whole else np.float32
    planes, opened = [], {}
    for frame in frames:
        path = Path(str(frame.header.filename))
        if path not in opened:
            opened = {path: _decoded(path, named)}  # one file at a time: frames of a file follow each other
        plane = opened[path][frame.number]
        plane = _inverted(plane, frame.header) if invert and _is_inverted(frame.header) else plane
        if frame.slope != 1 or frame.intercept != 0:
            plane = plane.astype(np.float64) * frame.slope + frame.intercept
        planes.append(plane.astype(kind))
    return _narrow(np.stack(planes)) if whole else np.stack(planes)


def _decoded(path: Path, named: Path) -> Shaped[np.ndarray, "frames H W"]:
    with naming(path):
        dataset = pydicom.dcmread(path, specific_tags=[*TAGS, "PixelData"])
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        array = decoded(dataset, path)
        if int(dataset.get("SamplesPerPixel") or 1) == 3:
            array = np.stack([_luminance(image) for image in array.reshape(-1, rows, columns, 3)])
        elif str(dataset.PhotometricInterpretation) == "PALETTE COLOR":
            coloured = apply_color_lut(array, dataset)
            scaled = (coloured >> 8 if coloured.dtype.itemsize > 1 else coloured).astype(np.uint8)
            array = np.stack(
                [_luminance(image) for image in scaled.reshape(-1, rows, columns, scaled.shape[-1])]
            )
        return array.reshape(-1, rows, columns)


def _luminance(image: Shaped[np.ndarray, "H W C"]) -> Shaped[np.ndarray, "H W"]:
    eight = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    return np.asarray(Image.fromarray(np.ascontiguousarray(eight[..., :3])).convert("L"))


def _is_inverted(header: Dataset) -> bool:
    """MONOCHROME1: low values are bright. Where values are physical units, they stay what they are."""
    return header.get("PhotometricInterpretation") == "MONOCHROME1" and header.get("Modality") not in (
        "CT",
        "PT",
    )


def _inverted(plane: np.ndarray, header: Dataset) -> np.ndarray:
    bits = int(header.get("BitsStored") or 8)
    highest = -1 if int(header.get("PixelRepresentation") or 0) else (1 << bits) - 1
    return highest - plane.astype(np.int64)


def _narrow(values: Shaped[np.ndarray, "Z H W"]) -> Shaped[np.ndarray, "Z H W"]:
    """The same whole numbers in 16 bits, where they fit, or 8."""
    low, high = int(values.min()), int(values.max())
    kinds = (np.uint8, np.int16, np.uint16)
    return next(
        (values.astype(kind) for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max),
        values,
    )


def read_modality(header: Dataset) -> Any:
    """What kind of scan a file holds, as a store has it; None for what is no scan."""
    return MODALITIES.get(str(header.get("Modality", "")))
