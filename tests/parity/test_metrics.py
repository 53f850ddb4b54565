"""Our Dice against MONAI's, empty labels included."""

import numpy as np
import pytest
import torch

from samssl.metrics import dice_per_label


def monai_dice(prediction: np.ndarray, reference: np.ndarray, num_labels: int) -> np.ndarray:
    from monai.metrics.meandice import compute_dice

    def one_hot(volume: np.ndarray) -> torch.Tensor:
        labels = np.arange(num_labels).reshape(-1, 1, 1, 1)
        return torch.from_numpy((volume[None] == labels)[None])

    # With `ignore_empty` a label that the reference lacks is NaN, which is our rule.
    inputs = one_hot(prediction), one_hot(reference)
    scores = compute_dice(*inputs, include_background=False, ignore_empty=True)
    return scores[0].numpy()


@pytest.mark.parametrize("seed", range(8))
def test_dice_equals_monai(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_labels = int(rng.integers(2, 6))
    shape = tuple(rng.integers(1, 9, size=3))
    # Drawing ids below a bound that may be lower than `num_labels` leaves some labels empty.
    bounds = rng.integers(1, num_labels + 1, size=2)
    prediction, reference = (rng.integers(0, bound, shape, dtype=np.uint8) for bound in bounds)
    ours = [row["dice"] for row in dice_per_label(prediction, reference, num_labels)]
    np.testing.assert_allclose(ours, monai_dice(prediction, reference, num_labels), rtol=1e-6)


@pytest.mark.parametrize("predicted", [0, 1])
def test_empty_reference_equals_monai(predicted: int) -> None:
    reference = np.zeros((2, 3, 4), dtype=np.uint8)
    prediction = np.full_like(reference, predicted)
    (row,) = dice_per_label(prediction, reference, num_labels=2)
    np.testing.assert_equal(row["dice"], monai_dice(prediction, reference, 2)[0])
