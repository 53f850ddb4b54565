"""Dice by label on volumes small enough to count by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from jaxtyping import TypeCheckError

from samssl.metrics import case_dice, dice_per_label


def volume(*voxels: int) -> np.ndarray:
    return np.array(voxels, dtype=np.uint8).reshape(2, 1, -1)


def test_dice_and_voxels_by_hand() -> None:
    rows = dice_per_label(volume(0, 1, 1, 2, 2, 2), volume(0, 1, 2, 2, 2, 0), num_labels=3)
    assert rows == [
        {"label_id": 1, "dice": pytest.approx(2 * 1 / 3), "reference_voxels": 1, "predicted_voxels": 2},
        {"label_id": 2, "dice": pytest.approx(2 * 2 / 6), "reference_voxels": 3, "predicted_voxels": 3},
    ]


def test_label_absent_from_the_reference_has_no_dice_whatever_is_predicted() -> None:
    false_positive, absent = dice_per_label(volume(1, 0, 0, 0), volume(0, 0, 0, 0), num_labels=3)
    assert math.isnan(false_positive["dice"])
    assert math.isnan(absent["dice"])
    assert (false_positive["predicted_voxels"], absent["predicted_voxels"]) == (1, 0)


def test_label_that_is_missed_scores_zero() -> None:
    (row,) = dice_per_label(volume(0, 0), volume(1, 0), num_labels=2)
    assert row["dice"] == 0.0


def test_shapes_must_agree() -> None:
    # In tests the annotations are checked too, and first; NumPy alone would broadcast one over the other.
    with pytest.raises((ValueError, TypeCheckError)):
        dice_per_label(volume(0, 0), volume(0, 0, 0, 0), num_labels=2)


@pytest.mark.parametrize(
    ("prediction", "reference", "named"), [((3, 0), (0, 0), "prediction"), ((0, 0), (0, 3), "ref")]
)
def test_label_ids_outside_the_label_map_are_refused(
    prediction: tuple[int, ...], reference: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=f"{named}.* outside 0 .. 2"):
        dice_per_label(volume(*prediction), volume(*reference), num_labels=3)


def test_case_dice_is_the_mean_over_the_labels_present() -> None:
    table = pd.DataFrame(
        [("b", 0.4), ("b", 0.8), ("a", 0.5), ("a", math.nan), ("empty", math.nan)], columns=["case", "dice"]
    )
    assert case_dice(table).to_dict() == pytest.approx({"a": 0.5, "b": 0.6})
