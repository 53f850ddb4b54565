from functools import partial

import numpy as np
import pytest
import torch

from samssl.config import ConfigError, build_config
from samssl.prompts import (
    INSIDE,
    NO_POINT,
    OUTSIDE,
    PromptConfig,
    box_around,
    corrective_click,
    corrective_clicks,
    interior_point,
    jittered,
    objects_in,
    random_point,
    rescaled,
    stretched,
)


def mask_of(*rows: str) -> np.ndarray:
    """`#` is inside."""
    return np.array([[character == "#" for character in row] for row in rows])


SHAPES = {
    "in the middle": (mask_of(".....", ".###.", ".###.", ".###.", "....."), [2, 2]),
    "one pixel": (mask_of("....", "...#", "...."), [3, 1]),
    "along the border": (mask_of("###..", "###..", "###.."), [1, 1]),
    "everything": (mask_of("#####", "#####", "#####", "#####", "#####"), [2, 2]),
    "a thick part and a thin": (mask_of("###....", "#######", "###...."), [1, 1]),
}


@pytest.mark.parametrize(("mask", "point"), SHAPES.values(), ids=SHAPES)
def test_the_most_interior_point_as_x_and_y(mask: np.ndarray, point: list[int]) -> None:
    assert interior_point(mask).tolist() == point


def test_random_points_are_inside_everywhere_and_repeat_with_the_seed() -> None:
    mask = mask_of("#..#", ".##.")
    points = {tuple(random_point(mask, np.random.default_rng(seed)).tolist()) for seed in range(40)}
    assert points == {(0, 0), (3, 0), (1, 1), (2, 1)}
    again = [random_point(mask, np.random.default_rng(7)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_an_empty_mask_has_no_point() -> None:
    with pytest.raises(AssertionError, match="empty"):
        interior_point(mask_of("..", ".."))


def test_boxes_run_through_the_outermost_pixels() -> None:
    assert box_around(mask_of("....", "..#.", ".##.")).tolist() == [1, 1, 2, 2]
    assert box_around(mask_of("...#")).tolist() == [3, 0, 3, 0]


def test_jitter_moves_each_side_by_a_tenth_at_most_and_not_out_of_the_slice() -> None:
    box = np.array([10, 0, 30, 19], np.float32)
    moved = np.stack([jittered(box, 0.1, (20, 40), np.random.default_rng(seed)) for seed in range(200)])
    shift = np.abs(moved - box)
    assert (shift <= np.array([2, 1.9, 2, 1.9]) + 1e-5).all()
    assert (shift.max(axis=0) > np.array([1.9, 1.8, 1.9, 1.8])).all()
    assert moved.min() >= 0
    assert moved[:, 3].max() <= 19
    one_pixel = np.array([3, 3, 3, 3], np.float32)
    assert jittered(one_pixel, 0.1, (5, 5), np.random.default_rng(0)).tolist() == one_pixel.tolist()


def test_objects_are_labels_or_their_parts_the_largest_first() -> None:
    labels = np.array([[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 0, 2], [1, 0, 0, 2]])
    assert [int(mask.sum()) for mask in objects_in(labels, "labels")] == [4, 3]
    assert [int(mask.sum()) for mask in objects_in(labels, "components")] == [4, 2, 1]
    (largest,) = objects_in(labels, "components", largest=1)
    assert (largest == (labels == 2)).all()
    assert objects_in(np.zeros((4, 4), int), "labels") == []


def test_the_correction_is_inside_the_largest_error() -> None:
    reference = mask_of(".......", "###....", "###....", "###....", "......#")
    nothing = np.zeros_like(reference)
    point, label = corrective_click(nothing, reference, interior_point)
    assert (point.tolist(), label) == ([1, 2], INSIDE)
    too_much = reference | mask_of("...####", "...####", "...####", "...####", ".......")
    point, label = corrective_click(too_much, reference, interior_point)
    assert label == OUTSIDE
    assert 3 < point[0] < 6
    assert corrective_click(reference, reference, interior_point)[1] == NO_POINT


def test_each_object_has_a_correction_of_its_own() -> None:
    reference = np.stack([mask_of("##.", "##."), mask_of("..#", "...")])
    predicted = np.stack([mask_of("##.", "##."), mask_of("...", "...")])
    place = partial(random_point, generator=np.random.default_rng(0))
    points, labels = corrective_clicks(predicted, reference, [place, place])
    assert labels.tolist() == [NO_POINT, INSIDE]
    assert points.tolist() == [[0, 0], [2, 0]]


def test_a_mask_is_stretched_from_box_to_box() -> None:
    masks = torch.zeros(2, 8, 10, dtype=torch.bool)
    masks[:, 2:4, 3:5] = True
    boxes = torch.tensor([[3.0, 2, 4, 3]] * 2)
    into = torch.tensor([[3.0, 2, 4, 3], [1, 1, 6, 4]])
    same, larger = stretched(masks, boxes, into)
    assert torch.equal(same, masks[0])
    wanted = torch.zeros(8, 10, dtype=torch.bool)
    wanted[1:5, 1:7] = True
    assert torch.equal(larger, wanted)


def test_points_keep_their_place_on_another_grid() -> None:
    """The centre of a pixel that becomes 4 x 2 pixels lies between those in the middle."""
    assert rescaled(np.array([[0.0, 0], [2, 3]]), (4.0, 2.0)).tolist() == [[1.5, 0.5], [9.5, 6.5]]


def test_some_kind_of_prompt_is_needed() -> None:
    with pytest.raises(ConfigError, match="give one of them a weight"):
        build_config(PromptConfig, {"point": 0, "box": 0, "mask": 0}, source="test")
