"""The label ids of a scan, from one mask file, from several, or from a file for each label."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from samssl.config import UserError
from samssl.data.readers.masks import MaskRules, united
from samssl.data.scans import Scan, read_mask

Ids = Integer[np.ndarray, "Z H W"]

_PART_VALUES = {1: "part", 255: "part"}
"""What a file that shows one label may hold besides 0."""


def read_labels(
    files: Sequence[Path],
    scan: Scan,
    labels: Mapping[int, str],
    rules: MaskRules,
    *,
    values: Mapping[int, int] | None = None,
    part_labels: Sequence[int] = (),
) -> Ids | None:
    """Label ids on the grid of `scan`; None without a file.

    `values` says which id a value of the files stands for, where it is not the id itself. With
    `part_labels` each file shows the label of its place, wherever it is not 0; later files are painted
    over earlier ones.

    Raises:
        UserError: a mask lies on another grid, holds values that stand for no label, or contradicts
            another.
    """
    if not files:
        return None
    if part_labels:
        return _painted(files, scan, labels, rules, part_labels)
    known = labels if values is None else {value: labels.get(id_, "") for value, id_ in values.items()}
    masks = [_renamed(read_mask(path, scan, known, rules), values) for path in files]
    return masks[0] if len(masks) == 1 else united(masks, list(files))


def _painted(
    files: Sequence[Path],
    scan: Scan,
    labels: Mapping[int, str],
    rules: MaskRules,
    part_labels: Sequence[int],
) -> Ids:
    if missing := sorted(set(part_labels) - set(labels)):
        raise UserError(f"There are masks of the label {missing[0]}, which is not in data.labels. Add it.")
    painted = np.zeros(scan.voxels.shape, np.uint8 if max(labels) < 256 else np.uint16)
    for path, label in zip(files, part_labels, strict=True):
        painted[read_mask(path, scan, _PART_VALUES, rules) != 0] = label
    return painted


def _renamed(stored: Ids, values: Mapping[int, int] | None) -> Ids:
    """Ids instead of stored values; `read_mask` has seen to it that there are no other values."""
    if not values:
        return stored
    table = np.zeros(
        max(int(stored.max()), *values) + 1, np.uint8 if max(values.values()) < 256 else np.uint16
    )
    for value, label in values.items():
        table[value] = label
    return table[stored]
