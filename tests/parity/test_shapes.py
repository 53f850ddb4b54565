"""Our surface scores against the package surface-distance, whose definition they follow, and MONAI."""

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from samssl.shapes import compare_shapes

SPACINGS = st.tuples(*[st.floats(0.3, 6.0)] * 3)


def blobs(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Smooth random shapes, which may touch the border and fall into pieces."""
    smooth = gaussian_filter(rng.normal(size=shape), rng.uniform(0.5, 1.5))
    return smooth > np.quantile(smooth, rng.uniform(0.5, 0.95))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package, about SciPy's older names
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), spacing_mm=SPACINGS, tolerance_mm=st.floats(0.1, 8.0), flat=st.booleans()
)
def test_surface_scores_equal_surface_distance(
    seed: int, spacing_mm: tuple[float, float, float], tolerance_mm: float, flat: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (1 if flat else int(rng.integers(2, 9)), *rng.integers(5, 14, size=2).tolist())
    prediction, reference = blobs(rng, shape), blobs(rng, shape)
    assume(prediction.any() and reference.any())
    ours = compare_shapes(prediction, reference, spacing_mm, tolerance_mm)
    masks = (reference[0], prediction[0]) if flat else (reference, prediction)
    theirs = surface_distance.compute_surface_distances(*masks, spacing_mm[1:] if flat else spacing_mm)
    assert ours["hd95_mm"] == pytest.approx(surface_distance.compute_robust_hausdorff(theirs, 95))
    assert ours["nsd"] == pytest.approx(
        surface_distance.compute_surface_dice_at_tolerance(theirs, tolerance_mm)
    )
    both = surface_distance.compute_average_surface_distance(theirs)
    assert ours["assd_mm"] == pytest.approx(np.mean(both))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of MONAI, about an argument of its own
@pytest.mark.parametrize("seed", range(3))
def test_surface_dice_equals_monai(seed: int) -> None:
    from monai.metrics.surface_dice import compute_surface_dice

    rng = np.random.default_rng(seed)
    prediction, reference = blobs(rng, (6, 12, 10)), blobs(rng, (6, 12, 10))
    spacing_mm, tolerance_mm = (3.0, 0.9, 0.8), 1.7
    found, wanted = (torch.from_numpy(np.stack([~mask, mask])[None]) for mask in (prediction, reference))
    theirs = compute_surface_dice(found, wanted, [tolerance_mm], spacing=spacing_mm, use_subvoxels=True)
    ours = compare_shapes(prediction, reference, spacing_mm, tolerance_mm)["nsd"]
    assert ours == pytest.approx(float(theirs), abs=1e-6)
