"""Slices of a case to classes on the case's own voxels."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Integer
from torch import Tensor, nn

from samssl.data.classes import Classes, ClassMap, run_classes
from samssl.data.inputs import InputConfig, input_slice, scaled
from samssl.data.resize import fit_square, unfit_square
from samssl.data.slices import SliceStore
from samssl.metrics import LabelDice, dice_per_label

BATCH_SIZE = 16
UPSAMPLED_BYTES = 1 << 30
"""Of logits at the model's input size that are held at once."""

LogitsOfRows = Callable[[Sequence[int]], Tensor]
"""`low_res_logits` [B, classes, h, w] of slices by their rows in the store, where they need not be computed
from the images."""


@torch.no_grad()
def segment_rows(
    segmenter: nn.Module,
    store: SliceStore,
    rows: Sequence[int],
    image_size: int,
    device: torch.device,
    inputs: InputConfig = InputConfig(),
    classes: Classes | None = None,
    logits_of: LogitsOfRows | None = None,
) -> ClassMap:
    """The classes in slices of one case, by the rows of the index; logits, not classes, are resized.

    Without `classes` every label of the store is one.
    """
    classes = classes or run_classes(store.labels)
    at_once = max(1, UPSAMPLED_BYTES // (4 * classes.num_outputs * image_size**2))
    slices = []
    for first in range(0, len(rows), BATCH_SIZE):
        some = rows[first : first + BATCH_SIZE]
        pairs = [input_slice(store, row, inputs) for row in some]
        images, ranges = (torch.stack(column).to(device) for column in zip(*pairs, strict=True))
        height, width = images.shape[-2:]
        logits = logits_of(some) if logits_of else segmenter(scaled(fit_square(images, image_size), ranges))
        for part in logits.float().split(at_once):
            slices.append(classes.decide(unfit_square(part, height, width, image_size)).cpu().numpy())
    found = np.concatenate(slices)
    return found.swapaxes(0, 1) if classes.overlapping else found


def segment_case(
    segmenter: nn.Module,
    store: SliceStore,
    case: str,
    image_size: int,
    device: torch.device,
    inputs: InputConfig = InputConfig(),
    classes: Classes | None = None,
    logits_of: LogitsOfRows | None = None,
) -> ClassMap:
    """`segment_rows` of every slice of a case."""
    start = store.first_row(case)
    rows = range(start, start + store.rows.num_slices(start))
    return segment_rows(segmenter, store, rows, image_size, device, inputs, classes, logits_of)


def segment_cases(
    segmenter: nn.Module,
    store: SliceStore,
    cases: Iterable[str],
    image_size: int,
    device: torch.device,
    inputs: InputConfig = InputConfig(),
    classes: Classes | None = None,
    logits_of: LogitsOfRows | None = None,
) -> Iterator[tuple[str, ClassMap]]:
    """`segment_case` for each case, with the segmenter in evaluation mode."""
    segmenter.eval()
    for case in cases:
        yield case, segment_case(segmenter, store, case, image_size, device, inputs, classes, logits_of)


def score_cases(
    segmenter: nn.Module,
    store: SliceStore,
    cases: Iterable[str],
    image_size: int,
    device: torch.device,
    inputs: InputConfig = InputConfig(),
    classes: Classes | None = None,
    logits_of: LogitsOfRows | None = None,
) -> pd.DataFrame:
    """The rows of `score_case` for every case."""
    scored = segment_cases(segmenter, store, cases, image_size, device, inputs, classes, logits_of)
    tables = [score_case(store, case, prediction, classes) for case, prediction in scored]
    return pd.concat(tables, ignore_index=True)


def score_slices(
    segmenter: nn.Module,
    store: SliceStore,
    rows: Integer[np.ndarray, " rows"],
    image_size: int,
    device: torch.device,
    inputs: InputConfig = InputConfig(),
    classes: Classes | None = None,
) -> pd.DataFrame:
    """As `score_cases`, of single slices of labelled cases: those of one case are scored together."""
    segmenter.eval()
    tables = []
    for number in np.unique(store.rows.case_numbers[rows]):
        own = np.sort(rows[store.rows.case_numbers[rows] == number]).tolist()
        case = store.rows.case_name(own[0])
        found = segment_rows(segmenter, store, own, image_size, device, inputs, classes)
        masks = [store.mask_slice(case, int(store.rows.z[row])) for row in own]
        tables.append(score_rows(store, case, found, np.stack([m for m in masks if m is not None]), classes))
    return pd.concat(tables, ignore_index=True)


def score_case(
    store: SliceStore, case: str, prediction: ClassMap, classes: Classes | None = None
) -> pd.DataFrame:
    """One row a class: case, patient, label, label_id, dice, reference_voxels, predicted_voxels.

    `label` and `label_id` are those of the class; Dice is NaN where the reference lacks it.
    """
    reference = store.mask(case)
    assert reference is not None, f"case {case} has no reference mask"
    return score_rows(store, case, prediction, reference, classes)


def score_rows(
    store: SliceStore,
    case: str,
    prediction: ClassMap,
    labels: Integer[np.ndarray, "Z H W"],
    classes: Classes | None = None,
) -> pd.DataFrame:
    """The rows of `score_case` for slices of a case, of which `labels` are the reference's label ids."""
    classes = classes or run_classes(store.labels)
    rows = pd.DataFrame(_dice_per_class(prediction, classes.reference(labels), classes))
    names = rows["label_id"].map(classes.names)
    patient = str(store.info(case)["patient"])
    return rows.assign(case=case, patient=patient, label=names)


def _dice_per_class(prediction: ClassMap, reference: ClassMap, classes: Classes) -> list[LabelDice]:
    if not classes.overlapping:
        scores = dice_per_label(prediction, reference, max(classes.names) + 1)
        return [row for row in scores if row["label_id"] in classes.names]
    scores = []
    for class_id, found, wanted in zip(classes.names, prediction, reference, strict=True):
        (score,) = dice_per_label(found.astype(np.uint8), wanted.astype(np.uint8), 2)
        scores.append(LabelDice(**{**score, "label_id": class_id}))
    return scores
