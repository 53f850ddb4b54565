"""Surfaces and lesions on masks small enough to draw."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samssl.shapes import compare_shapes


def cube(shape: tuple[int, int, int], *boxes: tuple[slice, slice, slice]) -> np.ndarray:
    mask = np.zeros(shape, np.bool_)
    for box in boxes:
        mask[box] = True
    return mask


def test_shifted_cube_by_hand() -> None:
    reference = cube((12, 12, 12), np.s_[3:9, 3:9, 2:8])
    prediction = cube((12, 12, 12), np.s_[3:9, 3:9, 3:9])
    scores = compare_shapes(prediction, reference, (1.0, 1.0, 2.0), tolerance_mm=2.0)
    # Along x, where voxels are 2 mm long, the faces lie one voxel apart; nothing lies farther.
    assert scores["hd95_mm"] == pytest.approx(2.0)
    assert scores["nsd"] == 1.0
    assert compare_shapes(prediction, reference, (1.0, 1.0, 2.0), 1.9)["nsd"] < 1
    assert 0 < scores["assd_mm"] < 2


def test_distances_are_in_mm_of_each_axis() -> None:
    one, other = cube((9, 3, 3), np.s_[1:3, :, :]), cube((9, 3, 3), np.s_[5:7, :, :])
    near, far = (compare_shapes(other, one, (step, 1.0, 1.0), 0.5) for step in (1.0, 3.0))
    assert (near["hd95_mm"], far["hd95_mm"]) == (pytest.approx(4.0), pytest.approx(12.0))


def test_same_masks_agree_exactly() -> None:
    mask = cube((4, 6, 6), np.s_[1:3, 2:5, 1:4], np.s_[0:1, 0:1, 5:6])
    scores = compare_shapes(mask, mask, (2.5, 0.7, 0.7), 0.1)
    assert (scores["nsd"], scores["hd95_mm"], scores["assd_mm"]) == (1.0, 0.0, 0.0)
    assert scores["detected_lesions"] == scores["reference_lesions"] == scores["predicted_lesions"] == 2


def test_missed_structure_is_as_far_as_the_image_reaches() -> None:
    reference = cube((3, 4, 5), np.s_[1:2, 1:3, 1:3])
    scores = compare_shapes(np.zeros_like(reference), reference, (4.0, 1.0, 2.0), 1.0)
    diagonal = math.sqrt(12**2 + 4**2 + 10**2)
    assert (scores["nsd"], scores["hd95_mm"], scores["assd_mm"]) == (0.0, diagonal, diagonal)
    assert (scores["reference_lesions"], scores["detected_lesions"]) == (1, 0)


@pytest.mark.parametrize("predicted", [False, True])
def test_without_a_reference_there_is_no_surface_to_compare_with(predicted: bool) -> None:
    nothing = np.zeros((2, 3, 3), np.bool_)
    scores = compare_shapes(np.full_like(nothing, predicted), nothing, (1.0, 1.0, 1.0), 1.0)
    assert all(math.isnan(scores[name]) for name in ("nsd", "hd95_mm", "assd_mm"))
    assert (scores["reference_lesions"], scores["predicted_lesions"]) == (0, int(predicted))


def test_single_slice_has_a_contour() -> None:
    reference, prediction = cube((1, 9, 9), np.s_[:, 2:4, 2:7]), cube((1, 9, 9), np.s_[:, 5:7, 2:7])
    assert compare_shapes(prediction, reference, (1.0, 1.0, 1.0), 1.0)["hd95_mm"] == pytest.approx(3.0)


def lesions(prediction: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    scores = compare_shapes(prediction, reference, (1.0, 1.0, 1.0), 1.0)
    return scores["reference_lesions"], scores["predicted_lesions"], scores["detected_lesions"]


def test_lesions_are_paired_one_to_one() -> None:
    shape = (1, 6, 20)
    two = cube(shape, np.s_[:, 1:5, 1:5], np.s_[:, 1:5, 6:10])
    bridge = cube(shape, np.s_[:, 1:5, 1:10])
    assert lesions(bridge, two) == (2, 1, 1)  # one answer that covers two lesions finds one of them
    assert lesions(two, bridge) == (1, 2, 1)
    elsewhere = cube(shape, np.s_[:, 1:5, 1:5], np.s_[:, 1:5, 15:19])
    assert lesions(elsewhere, two) == (2, 2, 1)


def test_overlap_below_a_tenth_is_not_a_detection() -> None:
    reference = cube((1, 1, 40), np.s_[:, :, 0:10])
    assert lesions(cube(reference.shape, np.s_[:, :, 8:20]), reference) == (1, 1, 1)  # IoU 2 / 20
    assert lesions(cube(reference.shape, np.s_[:, :, 8:21]), reference) == (1, 1, 0)  # IoU 2 / 21


def test_voxels_that_touch_at_a_corner_are_one_lesion() -> None:
    reference = np.zeros((2, 2, 2), np.bool_)
    reference[0, 0, 0] = reference[1, 1, 1] = True
    assert lesions(reference, reference) == (1, 1, 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_masks_may_be_exchanged_and_moved(seed: int) -> None:
    rng = np.random.default_rng(seed)
    small = [rng.random((3, 5, 5)) > 0.6 for _ in range(2)]
    first, second = (np.pad(mask, ((2, 1), (0, 3), (4, 2))) for mask in small)
    spacing_mm = (3.0, 0.8, 0.7)
    one = compare_shapes(small[0], small[1], spacing_mm, 1.0)
    other = compare_shapes(second, first, spacing_mm, 1.0)
    for name in ("nsd", "hd95_mm", "assd_mm", "detected_lesions"):
        assert one[name] == pytest.approx(other[name])
    assert one["reference_lesions"] == other["predicted_lesions"]
