"""Voxels that nobody has labelled and that are not background: the label named `ignore`, as nnU-Net has it.

They are kept in a store as they are in the mask file. Losses and scores leave them out.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from samssl.config import UserError

IGNORE = "ignore"
"""Name, in any letter case, of the label that is none."""
IGNORED = -1
"""What stands for it among class numbers."""

Volume = TypeVar("Volume", bound=np.ndarray)


def ignored_label(labels: Mapping[int, str]) -> int | None:
    """The id of voxels to be ignored; None if there are none.

    Raises:
        UserError: it is the id of the background.
    """
    found = [label for label, name in labels.items() if name.lower() == IGNORE]
    if 0 in found:
        raise UserError("The label 0 is background, and cannot be named ignore. Name it background.")
    return min(found, default=None)


def told_apart(labels: Mapping[int, str]) -> dict[int, str]:
    """The labels without the one that is to be ignored."""
    return {label: name for label, name in labels.items() if name.lower() != IGNORE}


def without(values: Volume, ignored: np.ndarray | None) -> Volume:
    """`values` with background, 0, where `ignored` is True; further axes may come before its own."""
    return values if ignored is None else np.where(ignored, values.dtype.type(0), values)  # pyright: ignore[reportReturnType]
