"""Scores of a promptable SAM: Dice of whole volumes after 1, 2, ... clicks, and from a box.

Every label of every slice is one object. The first click is at its most interior pixel, each further one
at the most interior pixel of the largest error so far; the box is exact. All of them are read off the
reference, so that a slice without the label gets no prompt and cannot hold a false positive: these scores
are not to be compared with those of automatic segmentation. Clicks are placed, and answers are judged, at
the native resolution of the slice.

A user's own prompts are asked in the same way (`pointed_answers`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float32, Int64, Integer
from torch import Tensor

from samssl.config import UserError
from samssl.data.inputs import InputConfig, square_images
from samssl.data.pointed import PointedObject
from samssl.data.resize import fitted_shape, unfit_square
from samssl.data.single import ScanSlices
from samssl.data.slices import SliceStore
from samssl.metrics import case_dice
from samssl.models.promptable import Prompts, best_masks
from samssl.prompts import box_around, corrective_clicks, interior_point, rescaled

SLICES_AT_ONCE, OBJECTS_AT_ONCE = 8, 32
"""What is encoded, and what is decoded, together."""


@dataclass(frozen=True)
class Asking:
    """How a promptable model is asked about the slices of a store."""

    image_size: int
    inputs: InputConfig
    clicks: int
    """The most clicks on one object."""
    device: torch.device


@dataclass(frozen=True)
class Answer:
    """What came of N objects of one case, after so many clicks or from a box; all in native pixels."""

    prompt: Literal["clicks", "box"]
    clicks: int
    logits: Float[Tensor, "N H W"]
    points: Float32[np.ndarray, "N P 2"]
    labels: Int64[np.ndarray, "N P"]
    """Of the points, as in `samssl.prompts`."""
    boxes: Float32[np.ndarray, "N 4"] | None = None

    @property
    def masks(self) -> Bool[np.ndarray, "N H W"]:
        """True inside the answer."""
        return (self.logits > 0).cpu().numpy()


@dataclass(frozen=True)
class PromptedCase:
    """One case as it came out."""

    prediction: Integer[np.ndarray, "Z H W"]
    """Label ids after the last click; where answers overlap, the one that is surest."""
    table: pd.DataFrame
    """`samssl.predict.score_case`, and `prompt` (clicks or box) and `clicks`: a row a label and prompt."""


def refuse_ignored(store: SliceStore) -> None:
    """Objects are pointed out in whole slices.

    Raises:
        UserError: masks of the store have voxels to be ignored.
    """
    if store.ignored is not None:
        raise UserError(
            f"Masks of the store {store.root} have voxels to be ignored (label {store.ignored}), and "
            "mode=promptable cannot leave voxels out: clicks are placed by what is wrong in whole slices. "
            "Use mode=automatic, or prepare again with these voxels as background: data.labels without "
            f"ignore, and data.mask_values with {store.ignored}: 0."
        )


def prompted_cases(
    segmenter: Any, store: SliceStore, cases: Iterable[str], asking: Asking
) -> Iterator[tuple[str, PromptedCase]]:
    """Every case with its answers and their scores, with the segmenter in evaluation mode."""
    refuse_ignored(store)
    segmenter.eval()
    for case in cases:
        yield case, prompted_case(segmenter, store, case, asking)


@torch.no_grad()
def prompted_case(segmenter: Any, store: SliceStore, case: str, asking: Asking) -> PromptedCase:
    """Point out every label in every slice of a case; clicks are simulated from its reference mask."""
    reference = store.mask(case)
    assert reference is not None, f"case {case} has no reference mask"
    prediction = np.zeros(reference.shape, reference.dtype)
    surest = np.zeros(reference.shape, np.float32)
    counted: list[dict[str, Any]] = []
    for objects, answer in case_answers(segmenter, store, case, reference, asking):
        for (z, label), mask, logits in zip(objects, answer.masks, answer.logits.cpu().numpy(), strict=True):
            overlap = int((mask & (reference[z] == label)).sum())
            key = {"prompt": answer.prompt, "clicks": answer.clicks, "label_id": label}
            counted.append(key | {"overlap": overlap, "predicted_voxels": int(mask.sum())})
            if answer.clicks == asking.clicks:
                better = mask & (logits > surest[z])
                prediction[z][better], surest[z][better] = label, logits[better]
    return PromptedCase(prediction, _score(store, case, reference, pd.DataFrame(counted), asking))


def case_answers(
    segmenter: Any, store: SliceStore, case: str, reference: Integer[np.ndarray, "Z H W"], asking: Asking
) -> Iterator[tuple[list[tuple[int, int]], Answer]]:
    """The objects (z, label id) that are asked about together, and each answer to them."""
    occupied = np.flatnonzero(reference.any(axis=(1, 2))).tolist()
    for first in range(0, len(occupied), SLICES_AT_ONCE):
        planes = occupied[first : first + SLICES_AT_ONCE]
        rows = [store.first_row(case) + z for z in planes]
        images = square_images(store, rows, asking.image_size, asking.inputs, asking.device)
        embeddings = segmenter.embed(images)
        objects = [(z, label) for z in planes for label in np.unique(reference[z]).tolist() if label]
        for start in range(0, len(objects), OBJECTS_AT_ONCE):
            together = objects[start : start + OBJECTS_AT_ONCE]
            masks = np.stack([reference[z] == label for z, label in together])
            image = torch.tensor([planes.index(z) for z, _ in together], device=asking.device)
            for answer in answers(segmenter, embeddings, image, masks, asking):
                yield together, answer


def answers(
    segmenter: Any,
    embeddings: Float[Tensor, "B C h w"],
    image: Integer[Tensor, " N"],
    masks: Bool[np.ndarray, "N H W"],
    asking: Asking,
) -> Iterator[Answer]:
    """What the model says of N objects of the embedded images: from their box, then click by click.

    To the first click SAM gives three answers, of which it chooses one; later ones are single, and see
    the answer before.
    """
    height, width = masks.shape[1:]
    frame = _Frame(height, width, asking)
    boxes = np.stack([box_around(mask) for mask in masks])
    corners = frame.to_input(boxes.reshape(-1, 2, 2)).flatten(1)
    filled = _ask(segmenter, embeddings, Prompts(image, boxes=corners))
    none = np.zeros((len(masks), 0, 2), np.float32), np.zeros((len(masks), 0), np.int64)
    yield Answer("box", 0, frame.to_slice(filled), *none, boxes)

    points, labels = none
    prompts, found = Prompts(image), np.zeros_like(masks)
    for number in range(1, asking.clicks + 1):
        new, label = corrective_clicks(found, masks, [interior_point] * len(masks))
        points = np.concatenate([points, new[:, None]], axis=1)
        labels = np.concatenate([labels, label[:, None]], axis=1)
        prompts = prompts.clicked(frame.to_input(new), torch.from_numpy(label).to(asking.device))
        chosen = _ask(segmenter, embeddings, prompts)
        answer = Answer("clicks", number, frame.to_slice(chosen), points, labels)
        yield answer
        prompts, found = prompts.answered(chosen), answer.masks


@torch.no_grad()
def pointed_answers(
    segmenter: Any, scan: ScanSlices, objects: Sequence[PointedObject], asking: Asking
) -> Iterator[tuple[PointedObject, Float[Tensor, "H W"]]]:
    """Logits, in native pixels, of each object that a user points out: as `answers` to the same prompts.

    The box comes first, then click by click, each of which sees the answer before.
    """
    segmenter.eval()
    _, height, width = scan.scan.voxels.shape
    frame = _Frame(height, width, asking)
    planes = sorted({each.z for each in objects})
    for first in range(0, len(planes), SLICES_AT_ONCE):
        shown = planes[first : first + SLICES_AT_ONCE]
        embeddings = segmenter.embed(
            square_images(scan, shown, asking.image_size, asking.inputs, asking.device)
        )
        for together in _alike([each for each in objects if each.z in shown]):
            image = torch.tensor([shown.index(each.z) for each in together], device=asking.device)
            yield from zip(together, _told(segmenter, embeddings, image, together, frame), strict=True)


def _alike(objects: Sequence[PointedObject]) -> Iterator[list[PointedObject]]:
    """Objects with as many prompts of the same kinds, so many as are decoded together."""
    groups: dict[tuple[bool, int], list[PointedObject]] = {}
    for each in objects:
        groups.setdefault((each.box is not None, len(each.points)), []).append(each)
    for group in groups.values():
        for start in range(0, len(group), OBJECTS_AT_ONCE):
            yield group[start : start + OBJECTS_AT_ONCE]


def _told(
    segmenter: Any,
    embeddings: Float[Tensor, "B C h w"],
    image: Integer[Tensor, " N"],
    objects: Sequence[PointedObject],
    frame: "_Frame",
) -> Float[Tensor, "N H W"]:
    prompts, chosen = Prompts(image), None
    boxes = [each.box for each in objects if each.box is not None]
    if boxes:
        prompts = Prompts(image, boxes=frame.to_input(np.stack(boxes).reshape(-1, 2, 2)).flatten(1))
        chosen = _ask(segmenter, embeddings, prompts)
    points, labels = (np.stack(part) for part in zip(*((o.points, o.labels) for o in objects), strict=True))
    for number in range(points.shape[1]):
        if chosen is not None:
            prompts = prompts.answered(chosen)
        label = torch.from_numpy(labels[:, number]).to(image.device)
        prompts = prompts.clicked(frame.to_input(points[:, number]), label)
        chosen = _ask(segmenter, embeddings, prompts)
    assert chosen is not None, "an object without any prompt"
    return frame.to_slice(chosen)


def _ask(segmenter: Any, embeddings: Float[Tensor, "B C h w"], prompts: Prompts) -> Float[Tensor, "N H W"]:
    """The answer that SAM holds to be the best of three to a single point, else the only one."""
    return best_masks(*segmenter.decode(embeddings, prompts, multimask=prompts.ambiguous))


@dataclass(frozen=True)
class _Frame:
    """A slice of so many native pixels on the model's input."""

    height: int
    width: int
    asking: Asking

    def to_input(self, points: Float32[np.ndarray, "*N 2"]) -> Float[Tensor, "*N 2"]:
        rows, columns = fitted_shape(self.height, self.width, self.asking.image_size)
        moved = rescaled(points, (columns / self.width, rows / self.height))
        return torch.from_numpy(moved).to(self.asking.device)

    def to_slice(self, logits: Float[Tensor, "N h w"]) -> Float[Tensor, "N H W"]:
        native = unfit_square(logits[:, None].float(), self.height, self.width, self.asking.image_size)
        return native[:, 0]


def _score(
    store: SliceStore,
    case: str,
    reference: Integer[np.ndarray, "Z H W"],
    counted: pd.DataFrame,
    asking: Asking,
) -> pd.DataFrame:
    """A row for each label of the store and each prompt; Dice is NaN where the reference lacks the label."""
    prompts = [("box", 0), *(("clicks", number) for number in range(1, asking.clicks + 1))]
    keys = ["prompt", "clicks", "label_id"]
    every = pd.DataFrame(
        [(*prompt, label) for prompt in prompts for label in sorted(store.labels) if label], columns=keys
    )
    if len(counted):
        every = every.merge(counted.groupby(keys, as_index=False).sum(), on=keys, how="left").fillna(0)
    else:
        every = every.assign(overlap=0, predicted_voxels=0)
    ids, voxels = np.unique(reference, return_counts=True)
    in_reference = every["label_id"].map(dict(zip(ids.tolist(), voxels.tolist(), strict=True))).fillna(0)
    dice = 2 * every.pop("overlap") / (in_reference + every["predicted_voxels"]).clip(lower=1)
    return every.assign(
        case=case,
        patient=str(store.info(case)["patient"]),
        label=every["label_id"].map(store.labels),
        dice=dice.where(in_reference > 0),
        reference_voxels=in_reference.astype(np.int64),
        predicted_voxels=every["predicted_voxels"].astype(np.int64),
    )


def click_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows by which a model is judged: of a promptable one those of clicks, else all."""
    return table[table["prompt"] == "clicks"] if "prompt" in table else table


def prompt_dice(table: pd.DataFrame, prefix: str) -> dict[str, float]:
    """Mean Dice over cases from a box (`_box`) and after each number of clicks (`_clicks_3`)."""
    if "prompt" not in table:
        return {}
    means = {}
    for key, rows in table.groupby(["prompt", "clicks"], sort=False):
        prompt, clicks = tuple(key)  # pyright: ignore[reportArgumentType]
        name = "box" if prompt == "box" else f"clicks_{clicks}"
        means[f"{prefix}_{name}"] = float(case_dice(rows).mean())
    return means
