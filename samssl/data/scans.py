"""Reading scans and their masks, in one orientation, with nothing resampled.

Voxels are indexed (z, y, x) as a radiologist looks at a slice. An axial volume runs from feet to head
(z), front to back (y) and the patient's right to left (x); in coronal and sagittal volumes rows run
from head to feet. A 2D image is a volume of one slice.
"""

import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float, Integer, Shaped
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image, ImageOps

from samssl.config import UserError

Modality = Literal["MR", "CT", "XR", "US"]
Axis = Literal["auto", "axial", "coronal", "sagittal"]

MAX_SCAN_BYTES = 4 << 30
"""The most voxel data that one scan may hold, and so the most that a lying header can claim."""

VOLUME_SUFFIXES = (".nii", ".nii.gz")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

_ORIENTATIONS = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
# A 2D image has no place in the patient: unit spacing, rows from front to back, columns from right to left.
_IMAGE_AFFINE = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)


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


@dataclass(frozen=True)
class _Grid:
    """An array with the affine from its own index to RAS mm."""

    array: np.ndarray
    affine: np.ndarray


def read_scan(path: Path, modality: Modality, axis: Axis = "auto") -> Scan:
    """Read NIfTI, PNG or JPEG; `axis` is the axis across which a volume is cut into slices.

    `auto` is the axis along which the volume is one voxel thin or its spacing is more than 1.5 times
    that of both others, else axial.

    Raises:
        UserError: the file cannot be read, or holds something other than one finite, varied scan.
    """
    if _is_image(path):
        grid = _Grid(_grey(path)[None], _IMAGE_AFFINE)
    else:
        volume = _read_nifti(path)
        grid = _orient(volume, _ORIENTATIONS[_slicing_axis(volume, axis)])
    voxels = _plain_voxels(grid.array, path)
    return Scan(voxels, _spacing_mm(grid.affine), grid.affine, modality)


def read_mask(path: Path, scan: Scan, labels: Mapping[int, str]) -> Integer[np.ndarray, "Z H W"]:
    """Read the label ids drawn on `scan`, on the scan's grid; `labels` are the ids that may occur.

    An image whose only values are 0 and 255 (or 1 bit) stands for the single foreground label.

    Raises:
        UserError: the mask lies on another grid, or holds values that are not ids in `labels`.
    """
    if _is_image(path):
        grid = _Grid(_image_ids(path, labels)[None], _IMAGE_AFFINE)
    else:
        codes = "".join(nib.orientations.aff2axcodes(scan.affine))
        grid = _orient(_read_nifti(path), codes)
    _check_same_grid(grid, scan, path)
    return _label_ids(grid.array, labels, path)


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    if not name.endswith(VOLUME_SUFFIXES + IMAGE_SUFFIXES):
        raise UserError(
            f"{path} is of no kind that is read here: convert it to NIfTI (.nii, .nii.gz), PNG or JPEG."
        )
    return name.endswith(IMAGE_SUFFIXES)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a reading library raises on a broken file into a sentence that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        SyntaxError,
        OverflowError,
        MemoryError,
    ) as error:
        raise UserError(f"{path} is damaged or cannot be read: {error or type(error).__name__}") from None
    except (
        zlib.error,
        ImageFileError,
        HeaderDataError,
    ) as error:
        raise UserError(f"{path} is damaged or not what its name says: {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} is too large an image to read: {error}") from None


def _grey(path: Path) -> np.ndarray:
    """A 2D image as grey values: colour becomes luminance, transparency is left out."""
    with _naming(path), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            return np.asarray(image)
        if image.mode == "P":
            image = image.convert("RGB")
        return np.asarray(image.convert("L"))


def _image_ids(path: Path, labels: Mapping[int, str]) -> np.ndarray:
    """The values of a 2D mask; palette images stand for their indices."""
    with _naming(path), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        ids = np.asarray(image.convert("RGB") if image.mode == "RGBA" else image)
        if image.mode == "LA":
            ids = ids[..., 0]
    if ids.ndim == 3:
        if (ids != ids[..., :1]).any():
            raise UserError(f"The mask {path} is in colour. Save it as grey label ids (0, 1, 2, ...).")
        ids = ids[..., 0]
    ids = ids.astype(np.uint8) if ids.dtype == bool else ids
    only_foreground = [label for label in labels if label != 0] == [1]
    if only_foreground and set(np.unique(ids)) <= {0, 255}:
        return (ids == 255).astype(np.uint8)
    return ids


def _read_nifti(path: Path) -> _Grid:
    """A NIfTI volume in its stored order, scaled as its header says."""
    with _naming(path):
        content = _whole_content(path)
        image = _nifti_class(content, path).from_bytes(content)
        _check_header(image.header, len(content), path)
        array = np.asanyarray(image.dataobj)
        affine = np.asarray(image.affine, dtype=float)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise UserError(
            f"{path} holds {array.ndim}D data of shape {array.shape}. "
            "Choose one volume of it first (one time point or one contrast) and save that as a 3D file."
        )
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"The header of {path} does not place its voxels in space (singular affine).")
    return _Grid(array, affine)


def _whole_content(path: Path) -> bytes:
    """Every byte of a file, decompressed to its very end: gzip's checksum stands there."""
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        content = file.read(MAX_SCAN_BYTES + 1)
    if len(content) > MAX_SCAN_BYTES:
        raise UserError(
            f"{path} holds more than {MAX_SCAN_BYTES >> 30} GiB, more than one scan may. Crop or split it."
        )
    return content


def _nifti_class(content: bytes, path: Path) -> type[nib.Nifti1Image]:
    sizes = {int.from_bytes(content[:4], order) for order in ("little", "big")}
    if 348 in sizes and content[344:347] == b"n+1":
        return nib.Nifti1Image
    if 540 in sizes and content[4:7] == b"n+2":
        return nib.Nifti2Image
    raise UserError(f"{path} is not a NIfTI file of one piece, whatever its name says.")


def _check_header(header: Any, content_bytes: int, path: Path) -> None:
    shape = tuple(int(size) for size in header.get_data_shape())
    if not shape or min(shape) <= 0:
        raise UserError(f"{path} holds no voxels: its shape is {shape}.")
    if header.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path} holds {header.get_data_dtype()} values. Save it as grey numbers first.")
    # Python integers: a lying header must not overflow its way past this check.
    promised = header.get_data_dtype().itemsize * int(np.prod([int(size) for size in shape], dtype=object))
    if promised > content_bytes:
        raise UserError(
            f"{path} is damaged: its header promises {promised} bytes of voxels, it holds {content_bytes}."
        )


def _slicing_axis(volume: _Grid, axis: Axis) -> str:
    if axis != "auto":
        return axis
    oriented = _orient(volume, "SPL")
    names = ("axial", "coronal", "sagittal")
    thin = [name for name, size in zip(names, oriented.array.shape, strict=True) if size == 1]
    if thin:
        return thin[0]
    spacing = _spacing_mm(oriented.affine)
    *others, widest = sorted(range(3), key=lambda index: spacing[index])
    return names[widest] if spacing[widest] > 1.5 * spacing[others[-1]] else "axial"


def _orient(grid: _Grid, codes: str) -> _Grid:
    """Flip and permute axes so that they run towards `codes`, as in SPL: superior, posterior, left."""
    orientations = nib.orientations
    change = orientations.ornt_transform(
        orientations.io_orientation(grid.affine), orientations.axcodes2ornt(codes)
    )
    affine = grid.affine @ orientations.inv_ornt_aff(change, grid.array.shape)
    return _Grid(orientations.apply_orientation(grid.array, change), affine)


def _spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    z, y, x = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return z, y, x


def _plain_voxels(array: np.ndarray, path: Path) -> np.ndarray:
    """Contiguous voxels of native byte order, integer as stored or float32; refuse useless ones."""
    kind = array.dtype.newbyteorder("=") if array.dtype.kind in "iu" else np.dtype(np.float32)
    with np.errstate(over="ignore"):
        voxels = np.ascontiguousarray(array, dtype=kind)
    if not np.isfinite(voxels).all():
        raise UserError(
            f"{path} holds values that are not finite numbers (NaN or infinity). Repair or leave it out."
        )
    if voxels.min() == voxels.max():
        raise UserError(
            f"{path} holds the single value {voxels.flat[0]} everywhere, so there is nothing to see in it."
        )
    return voxels


def _check_same_grid(mask: _Grid, scan: Scan, path: Path) -> None:
    """Refuse a mask whose shape differs, or whose corners lie more than 5 % of a voxel off the scan's."""
    if mask.array.shape != scan.voxels.shape:
        raise UserError(
            f"The mask {path} is of shape {mask.array.shape}, its scan of {scan.voxels.shape} (z, y, x). "
            "A mask must lie on the grid of its scan."
        )
    corners = np.array([[*corner, 1] for corner in product(*[(0, size - 1) for size in scan.voxels.shape])])
    distance_mm = np.linalg.norm(corners @ (mask.affine - scan.affine)[:3].T, axis=1).max()
    if distance_mm > 0.05 * min(scan.spacing_mm):
        raise UserError(
            f"The mask {path} lies elsewhere than its scan: by their headers (origin, spacing, direction) "
            f"their corners are {distance_mm:.2f} mm apart. Resample the mask to the scan's grid."
        )


def _label_ids(values: np.ndarray, labels: Mapping[int, str], path: Path) -> np.ndarray:
    rounded = np.rint(values)
    # Headers with a scale factor make 0.99999997 of a stored 1.
    if not np.isfinite(values).all() or np.abs(values - rounded).max() > 1e-3:
        raise UserError(
            f"The mask {path} holds fractions, so it is no mask of label ids. Threshold it first."
        )
    found = np.unique(rounded).astype(np.int64).tolist()
    unknown = [label for label in found if label != 0 and label not in labels]
    if unknown:
        raise UserError(
            f"The mask {path} holds the label ids {_few(unknown)}, which are not among the labels "
            f"{dict(labels)}. Add them to data.labels or correct the mask."
        )
    return np.ascontiguousarray(rounded, dtype=np.uint8 if max(found) < 256 else np.uint16)


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
