"""Voxel values in their own units to intensities in [0, 1]: which values become black and which white.

CT windows are named by what they show and written [low, high] in HU. Radiologists give a level L (the
middle) and a width W instead: low = L - W / 2, high = L + W / 2. There is no standard; the values here are
those of teaching pages (Radiopaedia, "Windowing (CT)"), and for soft tissue W 400 L 40, as MedSAM
(doi:10.1038/s41467-024-44824-z) and `prepare` have it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Num

from samssl.config import UserError

WindowName = Literal["soft_tissue", "lung", "bone", "brain", "liver", "mediastinum"]
Window = WindowName | tuple[float, float]
"""A CT window: its name, or [low, high] in HU."""

WINDOWS_HU: dict[str, tuple[float, float]] = {
    "soft_tissue": (-160.0, 240.0),  # W 400, L 40
    "lung": (-1350.0, 150.0),  # W 1500, L -600
    "bone": (-500.0, 1300.0),  # W 1800, L 400
    "brain": (0.0, 80.0),  # W 80, L 40
    "liver": (-45.0, 105.0),  # W 150, L 30
    "mediastinum": (-125.0, 225.0),  # W 350, L 50
}

Rule = Literal["percentiles", "zscore", "full"]
"""Values that become 0 and 1 where there is no physical unit: `percentiles`: the 0.5 and 99.5 percentiles
of the volume above its background, as the store keeps them; `zscore`: mean -+ `zscore_clip` standard
deviations above the background; `full`: the lowest and the highest value of the volume."""


@dataclass(frozen=True)
class CaseIntensity:
    """What the store knows of the values of one case, in their own units (CT: HU)."""

    modality: str
    low: float
    """The range kept by `prepare`: CT its window, else the 0.5 and 99.5 percentiles above the background."""
    high: float
    mean: float
    """Above the background, as the standard deviation; NaN in stores of format 1."""
    std: float
    lowest: float
    """Over the whole volume, as the highest; NaN in stores of format 1."""
    highest: float


def window_hu(window: Window) -> tuple[float, float]:
    """The low and high end in HU of a named or given window."""
    return WINDOWS_HU[window] if isinstance(window, str) else (float(window[0]), float(window[1]))


def range_by_rule(values: CaseIntensity, rule: Rule, zscore_clip: float) -> tuple[float, float]:
    """The values that become 0 and 1 by `rule`.

    Raises:
        UserError: the store does not know what the rule needs.
    """
    if rule == "percentiles":
        return values.low, values.high
    spread = zscore_clip * values.std
    low, high = (
        (values.mean - spread, values.mean + spread) if rule == "zscore" else (values.lowest, values.highest)
    )
    if np.isnan(low):
        raise UserError(
            f"The rule '{rule}' needs facts that this slice store, written by an older version, does not "
            "hold. Run prepare again with its old command, or use the rule 'percentiles'."
        )
    return low, high


def to_unit(pixels: Num[np.ndarray, "*shape"], low: float, high: float) -> Float[np.ndarray, "*shape"]:
    """`low` becomes 0 and `high` becomes 1; values beyond are clipped. Units are the scan's own (CT: HU)."""
    scaled = (pixels.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))
    return scaled.clip(0, 1)
