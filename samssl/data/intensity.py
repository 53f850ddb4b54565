"""Voxel values in their own units to intensities in [0, 1]."""

import numpy as np
from jaxtyping import Float, Num


def to_unit(pixels: Num[np.ndarray, "*shape"], low: float, high: float) -> Float[np.ndarray, "*shape"]:
    """`low` becomes 0 and `high` becomes 1; values beyond are clipped. Units are the scan's own (CT: HU)."""
    scaled = (pixels.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))
    return scaled.clip(0, 1)
