"""How far two masks of one class are apart: distances between their surfaces, and lesions found and missed.

Surfaces are those of Nikolov et al. (arXiv:1809.04430) and their package surface-distance: between the
voxels of each 2 x 2 x 2 neighbourhood that is neither full nor empty lies one surface element, whose area
depends on the voxel spacing. Every distance is weighted by area, so that thick slices and oblique surfaces
count as much as they should. A single slice has a contour with lengths in place of a surface with areas.
What is reported, and why, follows Metrics Reloaded (Maier-Hein et al., Nature Methods 21, 2024).
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer

SURFACE_TOLERANCE_MM = 2.0
"""Where nothing is set."""
PERCENTILE = 95
"""Of the surface distances; the largest of all hangs on a single voxel."""
LESION_IOU = 0.1
"""From this overlap on, a predicted lesion is one of the reference."""
_ROUNDING_MM = 1e-6
"""Distances that exceed the tolerance by no more than this are the tolerance itself."""


class ShapeScores(TypedDict):
    """What `compare_shapes` finds. Without a reference all but the counts of lesions are NaN."""

    nsd: float
    """Normalised surface Dice: share of both surfaces within the tolerance of the other; 0 where missed."""
    hd95_mm: float
    """95th percentile of the surface distances, the worse of both directions; if missed the diagonal."""
    assd_mm: float
    """Average surface distance over both surfaces; where missed the diagonal of the image."""
    reference_lesions: int
    predicted_lesions: int
    detected_lesions: int
    """Reference lesions of which each has a predicted one of its own."""


@dataclass(frozen=True)
class _Surface:
    """The elements of a surface (or contour)."""

    places_mm: Float64[np.ndarray, "elements axes"]
    areas: Float64[np.ndarray, " elements"]


def compare_shapes(
    prediction: Bool[np.ndarray, "Z H W"],
    reference: Bool[np.ndarray, "Z H W"],
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
) -> ShapeScores:
    """Surfaces and lesions of two masks, True inside; `spacing_mm` is (z, y, x)."""
    diagonal_mm = math.hypot(*(size * step for size, step in zip(reference.shape, spacing_mm, strict=True)))
    window = _bounds(prediction | reference)
    found, wanted = prediction[window], reference[window]
    pairs = _lesions(found, wanted)
    if not reference.any():
        return ShapeScores(nsd=math.nan, hd95_mm=math.nan, assd_mm=math.nan, **pairs)
    if not prediction.any():
        return ShapeScores(nsd=0.0, hd95_mm=diagonal_mm, assd_mm=diagonal_mm, **pairs)
    # One slice has no surface above and below it: those would lie within the other's by themselves.
    flat = len(reference) == 1
    steps = spacing_mm[1:] if flat else spacing_mm
    surfaces = [_surface(mask[0] if flat else mask, steps) for mask in (found, wanted)]
    return ShapeScores(**_surface_scores(surfaces[0], surfaces[1], tolerance_mm), **pairs)


def _bounds(mask: Bool[np.ndarray, "Z H W"]) -> tuple[slice, ...]:
    """The smallest box around what is True; empty where nothing is."""
    occupied = (np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return tuple(slice(places[0], places[-1] + 1) if len(places) else slice(0, 0) for places in occupied)


def _surface(mask: Bool[np.ndarray, "*axes"], steps_mm: tuple[float, ...]) -> _Surface:
    """The surface elements of a mask, beyond whose array nothing is True."""
    areas, weights = _element_areas(steps_mm)
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros([size + 1 for size in mask.shape], np.uint8)
    halves = slice(None, -1), slice(1, None)
    for corner, weight in zip(itertools.product(halves, repeat=mask.ndim), weights, strict=True):
        codes += padded[corner] * weight
    places = np.nonzero((codes > 0) & (codes < weights.sum()))
    return _Surface(np.stack(places, axis=1) * np.array(steps_mm), areas[codes[places]])


@lru_cache(maxsize=64)
def _element_areas(
    steps_mm: tuple[float, ...],
) -> tuple[Float64[np.ndarray, " codes"], Integer[np.ndarray, " corners"]]:
    """Area by neighbourhood code, and by how much each corner adds to the code."""
    from monai.metrics.utils import get_code_to_measure_table  # seconds to import

    areas, weights = get_code_to_measure_table(steps_mm)
    return areas.numpy().astype(np.float64), weights.numpy().ravel().astype(np.uint8)


def _surface_scores(found: _Surface, wanted: _Surface, tolerance_mm: float) -> dict[str, float]:
    from scipy.spatial import KDTree

    distances = [
        KDTree(other.places_mm).query(own.places_mm)[0] for own, other in ((found, wanted), (wanted, found))
    ]
    both, areas = np.concatenate(distances), np.concatenate([found.areas, wanted.areas])
    means = [
        np.average(far, weights=side.areas) for far, side in zip(distances, (found, wanted), strict=True)
    ]
    return {
        "nsd": float(areas[both <= tolerance_mm + _ROUNDING_MM].sum() / areas.sum()),
        "hd95_mm": max(_percentile(distances[0], found.areas), _percentile(distances[1], wanted.areas)),
        "assd_mm": float(np.mean(means)),
    }


def _percentile(distances: Float[np.ndarray, " elements"], areas: Float[np.ndarray, " elements"]) -> float:
    """The distance that `PERCENTILE` percent of the area do not exceed."""
    order = np.argsort(distances)
    covered = np.cumsum(areas[order]) / areas.sum()
    place = min(int(np.searchsorted(covered, PERCENTILE / 100)), len(order) - 1)
    return float(distances[order[place]])


def _lesions(found: Bool[np.ndarray, "Z H W"], wanted: Bool[np.ndarray, "Z H W"]) -> dict[str, int]:
    """How many lesions there are, and how many of the reference's are found.

    A lesion is a connected component, over corners too. Lesions are paired one to one so that the sum of
    their IoU is largest; pairs below `LESION_IOU` do not count.
    """
    from scipy import ndimage
    from scipy.optimize import linear_sum_assignment

    everywhere = np.ones((3, 3, 3), np.bool_)
    labelled: list[Any] = [ndimage.label(mask, everywhere) for mask in (found, wanted)]
    (in_found, num_found), (in_wanted, num_wanted) = labelled
    shared, overlaps = np.unique(
        np.stack([in_wanted, in_found])[:, found & wanted], axis=1, return_counts=True
    )
    sizes = [np.bincount(labels.ravel()) for labels in (in_wanted, in_found)]
    unions = sizes[0][shared[0]] + sizes[1][shared[1]] - overlaps
    close = overlaps >= LESION_IOU * unions
    rows, columns = (np.unique(side[close], return_inverse=True) for side in shared)
    ious = np.zeros((len(rows[0]), len(columns[0])))
    ious[rows[1], columns[1]] = (overlaps / unions)[close]
    paired = linear_sum_assignment(ious, maximize=True)
    detected = int((ious[paired] > 0).sum())
    return {"reference_lesions": num_wanted, "predicted_lesions": num_found, "detected_lesions": detected}
