"""Prompts as a user would give them, simulated from reference masks.

Masks are True inside the object. Points are (x, y) and boxes (left, top, right, bottom), in pixels of the
mask, whole numbers being centres of pixels; a box runs through the first and the last pixel of its
object. What is random comes from the generator that is given, and from nothing else.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from jaxtyping import Bool, Float, Float32, Int, Int64, Integer
from torch import Tensor

from samssl.config import Count, NonNegative, PositiveInt, config

Kind = Literal["point", "box", "mask"]
KINDS: tuple[Kind, ...] = ("point", "box", "mask")
"""How an object can be pointed out at first; datasets number kinds in this order."""
INSIDE, OUTSIDE, NO_POINT = 1, 0, -1
"""Labels of points, as SAM numbers them."""

Mask = Bool[np.ndarray, "H W"]
Place = Callable[[Mask], Float32[np.ndarray, "2"]]
"""Picks a point of a mask that is not empty."""


@config
class PromptConfig:
    """How objects are pointed out, and what is asked for, where `mode` is promptable."""

    point: NonNegative = 0.5
    """Weight of a point as the first prompt of an object, against `box` and `mask`."""
    box: NonNegative = 0.4
    """Weight of a box as the first prompt."""
    mask: NonNegative = 0.1
    """Weight of a rough mask as the first prompt: the object, stretched into a box with jitter."""
    box_jitter: Annotated[float, Interval(ge=0, le=0.5)] = 0.1
    """Largest shift of each side of a box, as a share of the object's width or height."""
    clicks: Literal["random", "interior"] = "random"
    """Where points of training lie in an object or an error: anywhere, or at the most interior pixel, as
    in evaluation always."""
    corrections: Count = 2
    """Corrective clicks after the first prompt in each training step: into the largest error, each with
    the last answer as a further prompt."""
    objects: Literal["labels", "components"] = "labels"
    """An object of a slice is all of one label in it, or each connected part of that."""
    largest: Count = 0
    """So many of a slice's objects are learnt from, the largest; 0: all of them."""
    objects_per_slice: PositiveInt = 4
    """Objects drawn of each slice in a batch; where there are fewer, the same with other prompts."""
    focal_weight: NonNegative = 20.0
    """Weight of the focal loss; that of Dice, and of the squared error of the predicted IoU, is 1."""
    validation_clicks: PositiveInt = 8
    """Most clicks on an object at validations, whose score is the mean Dice over 1, 2, ... clicks."""

    def __post_init__(self) -> None:
        if not self.point + self.box + self.mask:
            raise ValueError("point, box and mask are all 0; give one of them a weight")

    def place(self, generator: np.random.Generator) -> Place:
        """How points are picked in training."""
        return interior_point if self.clicks == "interior" else partial(random_point, generator=generator)


def objects_in(
    labels: Integer[np.ndarray, "H W"], objects: Literal["labels", "components"], largest: int = 0
) -> list[Mask]:
    """Masks of the objects in a slice of class numbers (0: background), the largest first.

    Parts of a label that touch at a corner are one. `largest` keeps so many; 0 keeps all.
    """
    masks = [labels == label for label in np.unique(labels) if label]
    if objects == "components":
        masks = [part for mask in masks for part in _parts(mask)]
    masks.sort(key=lambda mask: -int(mask.sum()))
    return masks[:largest] if largest else masks


def interior_point(mask: Mask) -> Float32[np.ndarray, "2"]:
    """The pixel of `mask` that is farthest from all that is outside; beyond the border is outside."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = _extent(mask)
    depth = distance_transform_edt(np.pad(mask[rows, columns], 1))
    assert isinstance(depth, np.ndarray)
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return np.array([columns.start + x - 1, rows.start + y - 1], np.float32)


def random_point(mask: Mask, generator: np.random.Generator) -> Float32[np.ndarray, "2"]:
    """Any pixel of `mask`."""
    y, x = np.nonzero(mask)
    chosen = generator.integers(len(x))
    return np.array([x[chosen], y[chosen]], np.float32)


def box_around(mask: Mask) -> Float32[np.ndarray, "4"]:
    """The box of `mask`, through its outermost pixels."""
    rows, columns = _extent(mask)
    return np.array([columns.start, rows.start, columns.stop - 1, rows.stop - 1], np.float32)


def jittered(
    box: Float32[np.ndarray, "4"], jitter: float, shape: tuple[int, int], generator: np.random.Generator
) -> Float32[np.ndarray, "4"]:
    """`box` with each side moved by at most `jitter` of its width or height, inside a slice of `shape`."""
    sides = np.tile(box[2:] - box[:2], 2)
    moved = box + jitter * sides * generator.uniform(-1, 1, 4)
    last = np.array([shape[1] - 1, shape[0] - 1] * 2)
    return moved.clip(0, last).astype(np.float32)


def corrective_click(predicted: Mask, reference: Mask, place: Place) -> tuple[Float32[np.ndarray, "2"], int]:
    """A point in the largest connected error, and its label: INSIDE where the object was missed.

    NO_POINT where nothing is wrong.
    """
    errors = [(reference & ~predicted, INSIDE), (predicted & ~reference, OUTSIDE)]
    parts = [(_largest_part(error), label) for error, label in errors if error.any()]
    if not parts:
        return np.zeros(2, np.float32), NO_POINT
    largest, label = max(parts, key=lambda part: int(part[0].sum()))
    return place(largest), label


def corrective_clicks(
    predicted: Bool[np.ndarray, "N H W"], reference: Bool[np.ndarray, "N H W"], places: list[Place]
) -> tuple[Float32[np.ndarray, "N 2"], Int64[np.ndarray, " N"]]:
    """`corrective_click` for each object."""
    clicks = [corrective_click(*each) for each in zip(predicted, reference, places, strict=True)]
    return np.stack([point for point, _ in clicks]), np.array([label for _, label in clicks], np.int64)


def stretched(
    masks: Bool[Tensor, "N H W"], boxes: Float[Tensor, "N 4"], into: Float[Tensor, "N 4"]
) -> Bool[Tensor, "N H W"]:
    """Masks with the contents of each of `boxes` stretched to fill `into`."""
    (height, width), half = masks.shape[1:], 0.5
    grids = []
    for axis, length in ((0, width), (1, height)):
        first, last = boxes[:, axis, None] - half, boxes[:, axis + 2, None] + half
        new_first, new_last = into[:, axis, None] - half, into[:, axis + 2, None] + half
        share = (torch.arange(length, device=masks.device) - new_first) / (new_last - new_first)
        grids.append((2 * (first + share * (last - first)) + 1) / length - 1)
    x, y = grids
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    moved = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
    return moved[:, 0] > half


def rescaled(points: Float[np.ndarray, "*N 2"], scale: tuple[float, float]) -> Float32[np.ndarray, "*N 2"]:
    """Points of one pixel grid on another, whose pixels are `scale` (x, y) times as many."""
    return ((points + 0.5) * np.array(scale) - 0.5).astype(np.float32)


def _extent(mask: Mask) -> tuple[slice, slice]:
    """Rows and columns of what is in `mask`."""
    assert mask.any(), "an empty mask has no place"
    spans = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    rows, columns = (slice(int(span[0]), int(span[-1]) + 1) for span in spans)
    return rows, columns


def _parts(mask: Mask) -> list[Mask]:
    numbers = _numbered(mask)
    return [numbers == number for number in range(1, int(numbers.max()) + 1)]


def _largest_part(mask: Mask) -> Mask:
    numbers = _numbered(mask)
    return numbers == 1 + np.bincount(numbers.ravel())[1:].argmax()


def _numbered(mask: Mask) -> Int[np.ndarray, "H W"]:
    """The connected parts of `mask` as 1, 2, ...; pixels that touch at a corner are connected."""
    from scipy.ndimage import label

    numbers, _ = label(mask, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    return numbers
