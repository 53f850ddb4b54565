"""Arrays with a place in the patient: orientation, spacing, and whether two of them are on one grid.

Affines go from an array's own index to RAS mm (x to the patient's right... towards: right, anterior,
superior). DICOM, NRRD and MetaImage say LPS; their readers turn that round.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped
from scipy import ndimage

from samssl.config import UserError

ORIENTATIONS = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# A 2D image has no place in the patient: unit spacing, rows from front to back, columns from right to left.
IMAGE_AFFINE = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)

SAME_GRID_VOXELS = 0.05
"""How far, as a share of a voxel, a mask's corners may lie off its scan's."""


@dataclass(frozen=True)
class Grid:
    """An array with the affine from its own index to RAS mm."""

    array: Shaped[np.ndarray, "I J K"]
    affine: Float[np.ndarray, "4 4"]
    cropped: bool = False
    """Whether the file's kind keeps only the part of the scan's grid in which something is drawn."""


def placed(array: np.ndarray, affine: np.ndarray, path: Path) -> Grid:
    """`array` at `affine`, if that places it in space.

    Raises:
        UserError: the affine is singular or not finite.
    """
    if not _places(affine[:3, :3]) or not np.isfinite(affine).all():
        raise UserError(f"The header of {path} does not place its voxels in space (singular affine).")
    return Grid(array, affine)


def _places(steps: Float[np.ndarray, "3 3"]) -> bool:
    """Whether the columns are steps of a thinkable length (1 nm to 1 km) that span space."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(steps, axis=0)
        volume = abs(np.linalg.det(steps / lengths))
    return bool(np.isfinite(lengths).all() and lengths.min() > 1e-6 and lengths.max() < 1e6 and volume > 1e-3)


def orient(grid: Grid, codes: str) -> Grid:
    """Flip and permute axes so that they run towards `codes`, as in SPL: superior, posterior, left."""
    orientations = nib.orientations
    change = orientations.ornt_transform(
        orientations.io_orientation(grid.affine), orientations.axcodes2ornt(codes)
    )
    return _turned(grid, change)


def slicing_axis(grid: Grid, axis: str) -> str:
    """`axis`, or for `auto` the axis of one voxel or of clearly the largest spacing, else axial."""
    if axis != "auto":
        return axis
    oriented = orient(grid, "SPL")
    names = ("axial", "coronal", "sagittal")
    thin = [name for name, size in zip(names, oriented.array.shape, strict=True) if size == 1]
    if thin:
        return thin[0]
    spacing = spacing_mm(oriented.affine)
    *others, widest = sorted(range(3), key=lambda index: spacing[index])
    return names[widest] if spacing[widest] > 1.5 * spacing[others[-1]] else "axial"


def axis_of(affine: np.ndarray) -> str:
    """Across which axis a (z, y, x) volume is cut: axial, coronal or sagittal, the nearest of them."""
    towards = str(nib.orientations.aff2axcodes(affine)[0])
    return {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal"}.get(towards, "sagittal")


def turned_onto(
    array: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: Float[np.ndarray, "4 4"]
) -> np.ndarray:
    """The values of `array` in the order of the same grid's axes that has `shape` and the affine `target`."""
    change = nib.orientations.io_orientation(np.linalg.inv(target) @ affine)
    turned = _turned(Grid(array, affine), change)
    assert turned.array.shape == shape
    assert np.allclose(turned.affine, target, atol=1e-3)
    return np.ascontiguousarray(turned.array)


def spacing_mm(affine: np.ndarray) -> tuple[float, float, float]:
    """Length of a step along each axis of the array."""
    z, y, x = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return z, y, x


def onto_scan(
    mask: Grid, shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"], path: Path, resample: bool
) -> np.ndarray:
    """The values of `mask` on the grid of a scan of `shape` at `affine`.

    Another order of the same grid's axes is turned. Nearest values are taken where `resample` asks for it.

    Raises:
        UserError: it lies elsewhere, or on another grid without `resample`.
    """
    relative = np.linalg.inv(affine) @ mask.affine
    turned = _turned(mask, nib.orientations.io_orientation(relative))
    if mask.cropped and _on_lattice(turned.affine, affine):
        return _pasted(turned, shape, affine, path)
    problem = _difference(turned, shape, affine, path)
    if not problem:
        return turned.array
    share = _overlap(turned, shape, affine)
    if share <= 0:
        raise UserError(f"{problem} They do not overlap at all, so they are not of one scan.")
    if not resample:
        raise UserError(
            f"{problem} They share {100 * share:.0f} % of the scan's volume. A mask must lie on the grid of "
            "its scan: correct it, or set data.resample_masks=true to take the nearest values."
        )
    return _nearest(turned, shape, affine)


def _turned(grid: Grid, change: np.ndarray) -> Grid:
    if np.isnan(change).any():  # an axis that nothing tells apart: the grids are not comparable
        return grid
    affine = grid.affine @ nib.orientations.inv_ornt_aff(change, grid.array.shape)
    return Grid(nib.orientations.apply_orientation(grid.array, change), affine, grid.cropped)


def _corners(shape: tuple[int, ...]) -> np.ndarray:
    return np.array([[*corner, 1] for corner in product(*[(0, size - 1) for size in shape])])


def _difference(mask: Grid, shape: tuple[int, ...], affine: np.ndarray, path: Path) -> str:
    """What tells the grids apart, in words; nothing where they are one."""
    if mask.array.shape != shape:
        return f"The mask {path} is of shape {mask.array.shape}, its scan of {shape} (z, y, x)."
    distance_mm = np.linalg.norm(_corners(shape) @ (mask.affine - affine)[:3].T, axis=1).max()
    if distance_mm > SAME_GRID_VOXELS * min(spacing_mm(affine)):
        return (
            f"The mask {path} lies elsewhere than its scan: by their headers (origin, spacing, direction) "
            f"their corners are {distance_mm:.2f} mm apart."
        )
    return ""


def _overlap(mask: Grid, shape: tuple[int, ...], affine: np.ndarray) -> float:
    """Share of the scan's box that the mask's box covers, both along the scan's axes."""
    sizes = np.array(mask.array.shape)
    outer = np.array([[*corner, 1] for corner in product(*[(-0.5, size - 0.5) for size in sizes])])
    found = (outer @ (np.linalg.inv(affine) @ mask.affine).T)[:, :3]
    low = np.maximum(found.min(axis=0), -0.5)
    high = np.minimum(found.max(axis=0), np.array(shape) - 0.5)
    return float(np.prod(np.clip(high - low, 0, None)) / np.prod(shape))


def _on_lattice(mask_affine: np.ndarray, affine: np.ndarray) -> bool:
    """Whether steps of both grids are the same and their voxels coincide where they overlap."""
    relative = np.linalg.inv(affine) @ mask_affine
    return bool(np.abs(relative - np.rint(relative)).max() < SAME_GRID_VOXELS) and np.array_equal(
        np.rint(relative[:3, :3]), np.eye(3)
    )


def _pasted(mask: Grid, shape: tuple[int, ...], affine: np.ndarray, path: Path) -> np.ndarray:
    """A cropped mask in a scan's empty grid; what lies beyond the scan has to be empty."""
    start = np.rint(np.linalg.inv(affine) @ mask.affine)[:3, 3].astype(int)
    stop = start + mask.array.shape
    inside = tuple(
        slice(max(0, -int(a)), max(0, size - max(0, int(b) - full)))
        for a, b, size, full in zip(start, stop, mask.array.shape, shape, strict=True)
    )
    target = tuple(
        slice(max(0, int(a)), max(0, min(int(b), full)))
        for a, b, full in zip(start, stop, shape, strict=True)
    )
    values = np.zeros(shape, mask.array.dtype)
    values[target] = mask.array[inside]
    if np.count_nonzero(values) != np.count_nonzero(mask.array):
        raise UserError(f"The mask {path} reaches beyond its scan, so they are not of one scan.")
    return values


def _nearest(mask: Grid, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Nearest values of the mask at the scan's voxels; 0 outside of the mask."""
    step = np.linalg.inv(mask.affine) @ affine
    return ndimage.affine_transform(
        mask.array,
        step[:3, :3],
        step[:3, 3].tolist(),
        output_shape=shape,
        order=0,
        mode="grid-constant",
        cval=0,
    )
