import numpy as np
import pytest
import torch
from scipy import ndimage

from samssl.data.resize import downsample_labels, fit_labels, fit_square

LABELS = torch.zeros(1, 16, 16, dtype=torch.int64)
LABELS[0, 4:14, 4:14] = 1  # an organ,
LABELS[0, 5, 5] = 2  # a lesion in it of one pixel,
LABELS[0, 0, 13] = 3  # and one beside it
CENTRES = LABELS[0, 2::4, 2::4]


def test_a_cell_has_what_lies_at_its_centre() -> None:
    assert torch.equal(downsample_labels(LABELS, (4, 4))[0], CENTRES)
    assert CENTRES.unique().tolist() == [0, 1]


def test_small_objects_are_put_back_and_nothing_else_changes() -> None:
    wanted = CENTRES.clone()
    wanted[1, 1], wanted[0, 3] = 2, 3
    assert torch.equal(downsample_labels(LABELS, (4, 4), keep_small=True)[0], wanted)
    regions = LABELS[:, None] == torch.tensor([1, 2, 3]).view(1, 3, 1, 1)
    kept = downsample_labels(regions, (4, 4), keep_small=True)
    assert kept.dtype == torch.bool
    assert torch.equal(kept[0], torch.stack([CENTRES == 1, wanted == 2, wanted == 3]))
    assert not downsample_labels(regions, (4, 4))[0, 1:].any()


def test_the_class_that_fills_most_of_a_cell_wins_it() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 0, 0:3] = 2
    labels[0, 1, 0:2] = 5
    assert downsample_labels(labels, (2, 2), keep_small=True)[0].tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize("shape", [(16, 16), (23, 40), (10, 7)])
def test_no_object_vanishes_whatever_the_two_sizes_are(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    labels = torch.from_numpy((generator.random((3, 61, 47)) > 0.995).astype(np.int64))
    small = downsample_labels(labels, shape, keep_small=True)
    for plane, cells in zip(labels, small, strict=True):
        numbered, count = ndimage.label(plane.numpy())  # pyright: ignore[reportGeneralTypeIssues]
        for number in range(1, count + 1):
            middle = np.argwhere(numbered == number).mean(axis=0) / plane.shape
            row, column = (middle * shape).astype(int)
            near = cells[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert near.any()


@pytest.mark.parametrize("side", [8, 20, 64])
def test_labels_are_fitted_as_images_are(side: int) -> None:
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (2, 30, 17)))
    wanted = fit_square(labels[:, None].float(), side, mode="nearest-exact")[:, 0].long()
    assert torch.equal(fit_labels(labels, side), wanted)


def test_labels_that_grow_stay_as_they_are() -> None:
    assert torch.equal(fit_labels(LABELS, 48, keep_small=True), fit_labels(LABELS, 48))
