"""Volume-level Dice by label. Background (label 0) is never scored.

The voxels of a case are counted once into a label-by-label table, so that every label's Dice and voxel
counts come from one pass in little memory; `monai.metrics` needs one full-size mask a label.
tests/parity/test_metrics.py holds the two equal.
"""

import math
import re
from typing import TypedDict

import numpy as np
import pandas as pd
from jaxtyping import Int, Integer


class LabelDice(TypedDict):
    """One row of `cases.parquet`, without the names of case and label."""

    label_id: int
    dice: float
    reference_voxels: int
    predicted_voxels: int


def dice_per_label(
    prediction: Integer[np.ndarray, "Z H W"], reference: Integer[np.ndarray, "Z H W"], num_labels: int
) -> list[LabelDice]:
    """Dice of every label 1 .. `num_labels` - 1; `num_labels` counts the background, label 0.

    Dice is NaN where the reference lacks the label, whatever was predicted: such a label is left out of
    means, and its predicted voxels are reported as a false positive instead.

    Raises:
        ValueError: when the shapes differ or a label id lies outside the label map.
    """
    overlap = _overlap_counts(prediction, reference, num_labels)
    reference_voxels, predicted_voxels = overlap.sum(axis=1), overlap.sum(axis=0)
    rows: list[LabelDice] = []
    for label in range(1, num_labels):
        total = reference_voxels[label] + predicted_voxels[label]
        rows.append(
            LabelDice(
                label_id=label,
                dice=float(2 * overlap[label, label] / total) if reference_voxels[label] else math.nan,
                reference_voxels=int(reference_voxels[label]),
                predicted_voxels=int(predicted_voxels[label]),
            )
        )
    return rows


def case_dice(table: pd.DataFrame) -> pd.Series:
    """Dice by case: the mean over the labels present in that case's reference.

    A case whose reference holds no label at all has no Dice and is absent from the result.
    """
    return table.groupby("case")["dice"].mean().dropna()


def pooled_dice(table: pd.DataFrame) -> float:
    """Dice by label over the voxels of all cases together, and the mean of that over labels that are there.

    Unlike `case_dice` it is the same however the slices are shared out over cases; NaN without any label.
    """
    voxels = table["reference_voxels"] + table["predicted_voxels"]
    counted = table.assign(overlap=table["dice"].fillna(0.0) * voxels, voxels=voxels)
    sums = counted.groupby("label")[["overlap", "voxels", "reference_voxels"]].sum()
    present = sums[sums["reference_voxels"] > 0]
    return float((present["overlap"] / present["voxels"]).mean())


def label_dice(table: pd.DataFrame, prefix: str) -> dict[str, float]:
    """Mean Dice over cases by label, named `{prefix}_{label}` with what MLflow allows in a name."""
    means: pd.Series = table.groupby("label")["dice"].mean()
    names = {label: re.sub(r"[^\w.-]", "_", str(label)) for label in means.index}
    return {f"{prefix}_{names[label]}": float(dice) for label, dice in means.items()}


def _overlap_counts(
    prediction: Integer[np.ndarray, "Z H W"], reference: Integer[np.ndarray, "Z H W"], num_labels: int
) -> Int[np.ndarray, "reference_label predicted_label"]:
    """How many voxels hold each pair (reference label, predicted label)."""
    if prediction.shape != reference.shape:
        raise ValueError(f"The prediction has shape {prediction.shape} but the reference {reference.shape}.")
    counts = np.zeros(num_labels * num_labels, dtype=np.int64)
    # Slice by slice, because the pair index needs eight bytes a voxel.
    for predicted_slice, reference_slice in zip(prediction, reference, strict=True):
        for name, labels in (("prediction", predicted_slice), ("reference", reference_slice)):
            if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
                raise ValueError(f"The {name} holds a label id outside 0 .. {num_labels - 1}.")
        pairs = reference_slice.astype(np.int64) * num_labels + predicted_slice
        counts += np.bincount(pairs.ravel(), minlength=counts.size)
    return counts.reshape(num_labels, num_labels)
