"""The fingerprint of a case: what its voxels and labels are like, without the voxels.

After the data set fingerprint of nnU-Net (doi:10.1038/s41592-020-01008-z): sizes, spacings, and intensities
inside the labels. Added are what shows mistakes: objects that vanish when slices are made smaller, masks that
cannot be meant, and a picture of 32 x 32 pixels by which copies of an image are found.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer, Num, Shaped

from samssl.data.cases import content_digest
from samssl.data.readers.geometry import axis_of
from samssl.data.sampling import evenly
from samssl.data.scans import Scan
from samssl.data.vanishing import vanishing_objects

SIDES_PX = (256, 512, 1024)
"""Sizes of a model's input at which objects are counted; the loss sees a quarter of each."""
RANGE_HU = (-1000.0, 1000.0)
"""Of the histograms of CT; of other modalities each case has its own range."""
BINS = 40
_SAMPLES = 400
_SLICES = 12
"""Objects are counted in at most so many slices of a case, spread evenly over those with labels."""
_SPECK_PX = 2
_TINY_PX = 32


@dataclass(frozen=True)
class LabelFacts:
    """One label of one case."""

    voxels: int
    slices: int
    """Slices that show it."""
    objects: int
    """Connected parts in the slices that were looked at."""
    specks: int
    """How many of them have one or two pixels."""
    vanish: dict[str, int]
    """Side of the model's input to the objects that are gone there at the loss."""
    touches_all_borders: int
    """Slices in which it touches all four borders."""


@dataclass(frozen=True)
class CaseFingerprint:
    """What is known of one case; sizes are (z, y, x)."""

    case: str
    patient: str
    split: str
    """Empty where the cases are not split yet."""
    modality: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    plane: str
    """axial, coronal, sagittal; image where the file places nothing in the patient."""
    tilt_degrees: float
    """Of the slices against that plane."""
    percentiles: tuple[float, float, float]
    """0.5, 50 and 99.5 above the background."""
    lowest: float
    highest: float
    histogram: list[int]
    """Voxels above the background in `BINS` equal parts of RANGE_HU (CT) or of the outer percentiles."""
    labelled: bool
    mask_is_constant: bool
    """The whole mask has one value that is not background."""
    labels: dict[int, LabelFacts]
    foreground: list[float]
    """Values at some voxels with a label, spread evenly over all."""
    image_sha256: str
    tiny: list[int]
    """The middle slice in 32 x 32 greys, 0 to 255."""


def fingerprint(
    scan: Scan,
    mask: Integer[np.ndarray, "Z H W"] | None,
    *,
    case: str,
    patient: str,
    split: str = "",
) -> CaseFingerprint:
    """Measure a case."""
    voxels = scan.voxels
    above = voxels[voxels > voxels.min()]
    low, middle, high = np.percentile(above, [0.5, 50, 99.5]).tolist()
    bounds = RANGE_HU if scan.modality == "CT" else (low, max(high, low + 1e-6))
    plane, tilt = _plane(scan)
    values = np.unique(mask).tolist() if mask is not None else []
    return CaseFingerprint(
        case=case,
        patient=patient,
        split=split,
        modality=scan.modality,
        shape=voxels.shape,
        spacing_mm=scan.spacing_mm,
        plane=plane,
        tilt_degrees=tilt,
        percentiles=(low, middle, high),
        lowest=float(voxels.min()),
        highest=float(voxels.max()),
        histogram=np.histogram(above, BINS, bounds)[0].tolist(),
        labelled=mask is not None,
        mask_is_constant=len(values) == 1 and values != [0],
        labels={label: _label_facts(mask == label) for label in values if label and mask is not None},
        foreground=_foreground(voxels, mask),
        image_sha256=content_digest(voxels),
        tiny=_tiny(voxels[len(voxels) // 2]).ravel().tolist(),
    )


def _plane(scan: Scan) -> tuple[str, float]:
    """The plane of the slices, and by how many degrees they are tilted against it."""
    if len(scan.voxels) == 1 and scan.spacing_mm == (1.0, 1.0, 1.0):
        return "image", 0.0
    normal = scan.affine[:3, 0] / np.linalg.norm(scan.affine[:3, 0])
    axis = int(np.abs(normal).argmax())
    tilt = float(np.degrees(np.arccos(np.clip(abs(normal[axis]), 0, 1))))
    return axis_of(scan.affine), tilt


def _label_facts(inside: np.ndarray) -> LabelFacts:
    from scipy import ndimage

    shown = np.flatnonzero(inside.any(axis=(1, 2)))
    counts = np.zeros((len(SIDES_PX), 3), np.int64)
    specks = 0
    for z in shown[evenly(len(shown), _SLICES)]:
        numbered, objects = ndimage.label(inside[z])  # pyright: ignore[reportGeneralTypeIssues]
        specks += int((np.bincount(numbered.ravel(), minlength=objects + 1)[1:] <= _SPECK_PX).sum())
        counts += [vanishing_objects(inside[z], side, side // 4) for side in SIDES_PX]
    edges = (inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1])
    touching = np.all([edge.any(axis=1) for edge in edges], axis=0)
    return LabelFacts(
        voxels=int(inside.sum()),
        slices=len(shown),
        objects=int(counts[0, 0]),
        specks=specks,
        vanish={str(side): int(count) for side, count in zip(SIDES_PX, counts[:, 2], strict=True)},
        touches_all_borders=int(touching.sum()),
    )


def _foreground(voxels: Num[np.ndarray, "Z H W"], mask: np.ndarray | None) -> list[float]:
    if mask is None:
        return []
    values = voxels[mask > 0]
    return values[evenly(len(values), _SAMPLES)].astype(float).tolist()


def _tiny(plane: Shaped[np.ndarray, "H W"]) -> Integer[np.ndarray, "32 32"]:
    """A slice in few greys, each the mean of what it covers, stretched to all of 0 to 255."""
    rows, columns = (np.linspace(0, length, _TINY_PX + 1).astype(int) for length in plane.shape)
    sums = np.pad(plane.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    top, bottom = rows[:-1], np.maximum(rows[1:], rows[:-1] + 1).clip(max=plane.shape[0])
    left, right = columns[:-1], np.maximum(columns[1:], columns[:-1] + 1).clip(max=plane.shape[1])
    top, left = np.minimum(top, bottom - 1), np.minimum(left, right - 1)
    boxes = sums[np.ix_(bottom, right)] - sums[np.ix_(top, right)] - sums[np.ix_(bottom, left)]
    means = (boxes + sums[np.ix_(top, left)]) / np.outer(bottom - top, right - left)
    low, high = np.percentile(means, [1, 99])
    return ((means - low) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8)


def label_totals(cases: Iterable[CaseFingerprint]) -> dict[int, LabelFacts]:
    """The facts of each label summed over cases."""
    totals: dict[int, LabelFacts] = {}
    for entry in cases:
        for label, facts in entry.labels.items():
            totals[label] = _sum(totals[label], facts) if label in totals else facts
    return dict(sorted(totals.items()))


def _sum(one: LabelFacts, other: LabelFacts) -> LabelFacts:
    return LabelFacts(
        one.voxels + other.voxels,
        one.slices + other.slices,
        one.objects + other.objects,
        one.specks + other.specks,
        {side: count + other.vanish[side] for side, count in one.vanish.items()},
        one.touches_all_borders + other.touches_all_borders,
    )
