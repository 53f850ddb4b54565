"""What training data looked like, to tell when a new scan looks unlike it.

Only ranges over many scans are kept: spacing, size in mm and intensities; nothing of a single patient.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from samssl.data.intensity import CaseIntensity
from samssl.data.readers.geometry import axis_of
from samssl.data.sampling import evenly
from samssl.data.scans import Scan
from samssl.data.slices import SliceStore

SPACING = ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")
SIZE = ("height_mm", "width_mm")
INTENSITY = ("intensity_mean", "intensity_std")
_LOOKED_AT = 32
"""Cases whose orientation is read, each from a file of its own."""
FACTOR = 1.5
"""Spacing and size are unlike where they lie beyond the range seen in training by more than this factor."""


@dataclass(frozen=True)
class Fingerprint:
    """Ranges over the cases of the split `train`."""

    cases: int
    modalities: tuple[str, ...]
    """From the most frequent to the least."""
    axis: str
    """Across which most volumes were cut: axial, coronal or sagittal."""
    window_hu: tuple[float, float] | None
    """The CT window of `prepare`; None without CT."""
    ranges: dict[str, tuple[float, float]]
    """Lowest and highest of `SPACING`, `SIZE` (mm) and `INTENSITY` (units of the scan)."""


def take_fingerprint(store: SliceStore) -> Fingerprint:
    """That of the training cases of a store."""
    cases = store.cases("train")
    rows = [store.first_row(case) for case in cases]
    index = store.rows.columns([name for name in _COLUMNS if name in store.rows.names]).iloc[rows]
    chosen = [cases[place] for place in evenly(len(cases), min(len(cases), _LOOKED_AT))]
    axes = Counter(axis_of(np.array(store.affine(case))) for case in chosen)
    ct = index[index["modality"] == "CT"]
    window = None if ct.empty else (float(ct["intensity_low"].iloc[0]), float(ct["intensity_high"].iloc[0]))
    facts = _facts(index)
    ranges = {str(name): (float(facts[name].min()), float(facts[name].max())) for name in facts}
    modalities = tuple(str(name) for name in index["modality"].value_counts().index)
    return Fingerprint(len(cases), modalities, axes.most_common(1)[0][0], window, ranges)


_COLUMNS = ("modality", "height", "width", *SPACING, "intensity_low", "intensity_high", *INTENSITY)


def _facts(index: pd.DataFrame) -> pd.DataFrame:
    sizes = {
        "height_mm": index["height"] * index["spacing_y_mm"],
        "width_mm": index["width"] * index["spacing_x_mm"],
    }
    known = [name for name in (*SPACING, *INTENSITY) if name in index and index[name].notna().all()]
    return index[known].assign(**sizes)


def read_fingerprint(tree: Mapping[str, Any] | None) -> Fingerprint | None:
    """What a bundle's JSON says."""
    if tree is None:
        return None
    window = tree["window_hu"]
    return Fingerprint(
        cases=int(tree["cases"]),
        modalities=tuple(tree["modalities"]),
        axis=str(tree["axis"]),
        window_hu=None if window is None else (float(window[0]), float(window[1])),
        ranges={str(name): (float(low), float(high)) for name, (low, high) in tree["ranges"].items()},
    )


def unlike(known: Fingerprint, scan: Scan, values: CaseIntensity) -> list[str]:
    """A sentence for each way in which a scan looks unlike the training data.

    Spacing and size are unlike beyond `FACTOR` times the range that was seen. Mean and standard deviation
    above the background are unlike where they lie beyond it by more than its width or the largest standard
    deviation, whichever is more.
    """
    found = []
    if scan.modality not in known.modalities:
        found.append(f"It is {scan.modality}, the training data were {', '.join(known.modalities)}.")
    axis = axis_of(scan.affine)
    if axis != known.axis:
        found.append(f"It is cut into {axis} slices, the training data were {known.axis}.")
    spread = known.ranges.get("intensity_std", (0.0, 0.0))[1]
    for name, value in _facts_of(scan, values).items():
        if name not in known.ranges:
            continue
        low, high = known.ranges[name]
        room = max(high - low, spread)
        least, most = (low - room, high + room) if name in INTENSITY else (low / FACTOR, high * FACTOR)
        if not least <= value <= most:
            what = name.removesuffix("_mm").replace("_", " ")
            unit = " mm" if name.endswith("_mm") else ""
            found.append(f"Its {what} is {value:.4g}{unit}, in the training data {low:.4g} to {high:.4g}.")
    return found


def _facts_of(scan: Scan, values: CaseIntensity) -> dict[str, float]:
    _, height, width = scan.voxels.shape
    spacing: Float[np.ndarray, 3] = np.array(scan.spacing_mm)
    return {
        **dict(zip(SPACING, spacing.tolist(), strict=True)),
        **dict(zip(SIZE, (spacing[1:] * (height, width)).tolist(), strict=True)),
        **dict(zip(INTENSITY, (values.mean, values.std), strict=True)),
    }
