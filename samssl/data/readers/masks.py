"""From the values of a mask to label ids."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Integer, Num

from samssl.config import UserError


@dataclass(frozen=True)
class MaskRules:
    """How the masks of a data set are to be read; see the settings of the same names."""

    threshold: float | None = None
    colours: Mapping[str, int] = field(default_factory=dict)
    resample: bool = False
    volume: int | None = None


def label_ids(
    values: Num[np.ndarray, "Z H W"], labels: Mapping[int, str], path: Path, threshold: float | None = None
) -> Integer[np.ndarray, "Z H W"]:
    """Values that are ids but for rounding; with `threshold`, the one label where they reach it.

    Raises:
        UserError: they are no ids of `labels`.
    """
    if not np.isfinite(values).all():
        raise UserError(f"The mask {path} holds values that are not finite numbers (NaN or infinity).")
    if threshold is not None:
        return _at_least(values, labels, threshold)
    rounded = np.rint(values)
    # Headers with a scale factor make 0.99999997 of a stored 1.
    if np.abs(values - rounded).max() > 1e-3:
        raise UserError(
            f"The mask {path} holds fractions, so it is no mask of label ids. If it is a soft mask of one "
            "label, set data.mask_threshold."
        )
    found = [int(value) for value in np.unique(rounded)]
    unknown = [label for label in found if label != 0 and label not in labels]
    if unknown:
        raise UserError(
            f"The mask {path} holds the label ids {_few(unknown)}, which are not among the labels "
            f"{dict(labels)}. Add them to data.labels or correct the mask. Voxels that are neither labelled "
            "nor background get the label ignore, as in {255: ignore}: losses and scores leave them out."
        )
    return np.ascontiguousarray(rounded, dtype=np.uint8 if max(found) < 256 else np.uint16)


def only_label(labels: Mapping[int, str]) -> int | None:
    """The label where there is just one besides background."""
    foreground = [label for label in labels if label != 0]
    return foreground[0] if len(foreground) == 1 else None


def united(masks: list[Integer[np.ndarray, "Z H W"]], paths: list[Path]) -> Integer[np.ndarray, "Z H W"]:
    """Several masks of one scan as one, as where each lesion has its own file.

    Raises:
        UserError: two of them put different labels on one voxel.
    """
    whole = masks[0].astype(np.uint16)
    for mask, path in zip(masks[1:], paths[1:], strict=True):
        clash = (whole != 0) & (mask != 0) & (whole != mask)
        if clash.any():
            raise UserError(
                f"The mask {path} puts another label on {int(clash.sum())} voxels that a mask of the same "
                "scan has labelled already, and a voxel has one label here."
            )
        whole = np.where(mask != 0, mask, whole)
    return whole.astype(np.uint8 if whole.max() < 256 else np.uint16)


def _at_least(values: np.ndarray, labels: Mapping[int, str], threshold: float) -> np.ndarray:
    label = only_label(labels)
    if label is None:
        raise UserError(
            "data.mask_threshold makes masks of one label; data.labels has to name just that one."
        )
    return np.where(values >= threshold, label, 0).astype(np.uint8 if label < 256 else np.uint16)


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
