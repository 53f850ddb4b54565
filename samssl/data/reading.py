"""One scan of a data set with its mask, read as the data set's settings say."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Integer

from samssl.data.entries import Entry
from samssl.data.ignoring import ignored_label, without
from samssl.data.masks import read_labels
from samssl.data.remote import at_hand
from samssl.data.scans import Modality, Scan, read_scan
from samssl.data.sources import DataSource


def read_entry(
    entry: Entry, source: DataSource, labels: Mapping[int, str], modality: Modality
) -> tuple[Scan, Integer[np.ndarray, "Z H W"] | None]:
    """The scan, and its label ids on the scan's grid; None without a mask.

    Raises:
        UserError: either cannot be read, or they do not belong together.
    """
    with at_hand(entry) as here:
        scan = read_scan(here.image, modality, source.axis, files=here.files, volume=source.volume)
        mask = read_labels(
            here.mask_files,
            scan,
            labels,
            source.mask_rules(),
            values=source.mask_values,
            part_labels=here.part_labels,
        )
    return scan, mask


def read_known(
    entry: Entry, source: DataSource, labels: Mapping[int, str], modality: Modality
) -> tuple[Scan, Integer[np.ndarray, "Z H W"] | None]:
    """As `read_entry`, with background where the mask is to be ignored."""
    scan, mask = read_entry(entry, source, labels, modality)
    ignored = ignored_label(labels)
    return scan, mask if mask is None or ignored is None else without(mask, mask == ignored)
