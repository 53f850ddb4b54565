"""Slices of a case to classes on the case's own voxels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from samssl.data.classes import Classes, ClassMap, run_classes
from samssl.data.inputs import InputConfig, square_images
from samssl.data.resize import unfit_square
from samssl.data.slices import SliceStore
from samssl.metrics import LabelDice, dice_per_label

BATCH_SIZE = 16
UPSAMPLED_BYTES = 1 << 30
"""Of logits at the model's input size that are held at once."""

LogitsOfRows = Callable[[Sequence[int]], Tensor]
"""`low_res_logits` [B, classes, h, w] of slices by their rows in the store, where they need not be computed
from the images."""


@dataclass(frozen=True)
class Predictor:
    """A segmenter on the slices of a store, in evaluation mode."""

    segmenter: nn.Module
    store: SliceStore
    image_size: int
    device: torch.device
    inputs: InputConfig = InputConfig()
    classes: Classes | None = None
    """What the segmenter tells apart; None: every label of the store is a class."""
    logits_of: LogitsOfRows | None = None

    @cached_property
    def _classes(self) -> Classes:
        return self.classes or run_classes(self.store.labels)

    @torch.no_grad()
    def segment_rows(self, rows: Sequence[int]) -> ClassMap:
        """The classes in slices of one case, by the rows of the index; logits, not classes, are resized."""
        self.segmenter.eval()
        _, height, width = self.store.shape(self.store.rows.case_name(rows[0]))
        logits_of = self.logits_of or self._compute_logits
        native = native_logits(logits_of, rows, (height, width), self.image_size, self._classes.num_outputs)
        found = np.concatenate([self._classes.decide(part).cpu().numpy() for part in native])
        return found.swapaxes(0, 1) if self._classes.overlapping else found

    def _compute_logits(self, rows: Sequence[int]) -> Float[Tensor, "B outputs h w"]:
        """`low_res_logits` of some slices."""
        return self.segmenter(square_images(self.store, rows, self.image_size, self.inputs, self.device))

    def segment_case(self, case: str) -> ClassMap:
        """`segment_rows` of every slice of a case."""
        start = self.store.first_row(case)
        return self.segment_rows(range(start, start + self.store.rows.num_slices(start)))

    def score_cases(self, cases: Iterable[str]) -> pd.DataFrame:
        """The rows of `score_case` for every case."""
        tables = [score_case(self.store, case, self.segment_case(case), self._classes) for case in cases]
        return pd.concat(tables, ignore_index=True)

    def score_slices(self, rows: Integer[np.ndarray, " rows"]) -> pd.DataFrame:
        """As `score_cases`, of single slices of labelled cases: those of one case are scored together."""
        tables = []
        for number in np.unique(self.store.rows.case_numbers[rows]):
            own = np.sort(rows[self.store.rows.case_numbers[rows] == number]).tolist()
            case = self.store.rows.case_name(own[0])
            planes = self.store.rows.z[own].tolist()
            masks = [self.store.mask_slice(case, z) for z in planes]
            reference = np.stack([mask for mask in masks if mask is not None])
            judged = self.store.judged(case, self.segment_rows(own), planes)
            tables.append(score_rows(self.store, case, judged, reference, self._classes))
        return pd.concat(tables, ignore_index=True)


def native_logits(
    logits_of: LogitsOfRows, rows: Sequence[int], shape: tuple[int, int], image_size: int, num_outputs: int
) -> Iterator[Float[Tensor, "B outputs H W"]]:
    """Logits on the pixels of slices of this `shape` (rows, columns), a few slices at a time."""
    at_once = max(1, UPSAMPLED_BYTES // (4 * num_outputs * image_size**2))
    for first in range(0, len(rows), BATCH_SIZE):
        for part in logits_of(rows[first : first + BATCH_SIZE]).float().split(at_once):
            yield unfit_square(part, *shape, image_size)


def score_case(
    store: SliceStore, case: str, prediction: ClassMap, classes: Classes | None = None
) -> pd.DataFrame:
    """One row a class: case, patient, label, label_id, dice, reference_voxels, predicted_voxels.

    `label` and `label_id` are those of the class; Dice is NaN where the reference lacks it. Voxels that
    the reference ignores are not counted.
    """
    reference = store.mask(case)
    assert reference is not None, f"case {case} has no reference mask"
    return score_rows(store, case, store.judged(case, prediction), reference, classes)


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
