"""How many small objects training never sees, because no pixel of theirs is sampled in a smaller slice."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, Integer

from samssl.data.classes import Classes
from samssl.data.resize import fitted_shape
from samssl.data.sampling import evenly
from samssl.data.slices import SliceStore

SLICES = 500
"""At most so many slices are looked at, spread evenly over all."""


@dataclass(frozen=True)
class Vanishing:
    """The objects of one class: its connected parts, slice by slice."""

    name: str
    objects: int
    at_input: int
    """How many of them are gone at the model's input size."""
    at_loss: int
    """How many are gone at the resolution of the loss."""


def count_vanishing(
    store: SliceStore, rows: Int[np.ndarray, " rows"], classes: Classes, input_side: int, loss_side: int
) -> list[Vanishing]:
    """What vanishes of each class in a sample of the labelled `rows`, where labels are resized plainly."""
    counts = {class_id: np.zeros(3, np.int64) for class_id in classes.names}
    for row in rows[evenly(len(rows), SLICES)].tolist():
        mask = store.mask_slice(store.rows.case_name(row), int(store.rows.z[row]))
        assert mask is not None, "only labelled slices are learnt from"
        present = set(np.unique(mask).tolist())
        for class_id, members in classes.members.items():
            if present.intersection(members):
                counts[class_id] += vanishing_objects(np.isin(mask, members), input_side, loss_side)
    return [Vanishing(name, *counts[class_id].tolist()) for class_id, name in classes.names.items()]


def say_vanishing(found: Sequence[Vanishing], input_side: int, loss_side: int) -> str:
    """The warning, a line a class that loses objects; empty where none does."""
    lines = [
        f"  {entry.name}: {entry.at_loss} of {entry.objects} ({entry.at_input} at {input_side} px already)"
        for entry in found
        if entry.at_loss
    ]
    if not lines:
        return ""
    first = (
        f"WARNING: small objects of these classes vanish at the {loss_side} px at which the loss sees them. "
        "loss.keep_small=true keeps them; a higher loss.resolution or model.image_size loses fewer."
    )
    return "\n".join([first, *lines])


def vanishing_objects(inside: np.ndarray, input_side: int, loss_side: int) -> Int[np.ndarray, "3"]:
    """Objects in a mask of one class [H, W], and how many of them vanish at the two sizes."""
    from scipy import ndimage

    numbered, objects = ndimage.label(inside)  # pyright: ignore[reportGeneralTypeIssues]
    (rows, rows_of_loss), (columns, columns_of_loss) = (
        _sampled(length, *inside.shape, input_side, loss_side) for length in inside.shape
    )
    seen = (_seen(numbered, rows, columns), _seen(numbered, rows_of_loss, columns_of_loss))
    return np.array([objects, objects - seen[0], objects - seen[1]], np.int64)


def _seen(numbered: Integer[np.ndarray, "H W"], rows: np.ndarray, columns: np.ndarray) -> int:
    """Objects of which a pixel lies in these rows and columns."""
    return int(np.count_nonzero(np.bincount(numbered[np.ix_(rows, columns)].ravel(), minlength=1)[1:]))


@cache
def _sampled(
    length: int, height: int, width: int, input_side: int, loss_side: int
) -> tuple[Int[np.ndarray, " at_input"], Int[np.ndarray, " at_loss"]]:
    """Which of `length` rows or columns of a slice are sampled for the input, and which of them for the loss.

    They are resized as `fit_labels` and `downsample_labels` resize, padding included.
    """
    fitted = fitted_shape(height, width, input_side)[0 if length == height else 1]
    places = torch.arange(length).float()[None, None]
    at_input = F.interpolate(places, fitted, mode="nearest-exact")
    padded = F.pad(at_input, (0, input_side - fitted), value=-1)
    at_loss = F.interpolate(padded, loss_side, mode="nearest-exact")
    return at_input.unique().long().numpy(), at_loss[at_loss >= 0].unique().long().numpy()
