"""What a layout finds: scans with their masks, what they show, and files that belong to no scan."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samssl.config import UserError
from samssl.data.readers.files import IMAGE_SUFFIXES, VOLUME_SUFFIXES

_MAX_JSON_BYTES = 64 << 20
_MASK_ENDINGS = ("_mask", "_masks", "_seg", "_segmentation", "_gt", "_label", "_labels", "-mask", "-seg")

Rejected = list[tuple[Path, str]]


@dataclass(frozen=True)
class Item:
    """One scan as its layout lists it."""

    image: Path
    """A file, or the folder of a DICOM series."""
    mask: Path | None = None
    patient: str = ""
    """Whose it is, where the layout says so."""
    name: str = ""
    """What the layout calls the scan; by default the stem of its file."""
    files: tuple[Path, ...] = ()
    """Of a DICOM series."""
    series: str = ""
    """UID of a DICOM series."""
    further_masks: tuple[Path, ...] = ()
    """Masks of the same scan besides `mask`, as where each lesion has its own."""
    part_labels: tuple[int, ...] = ()
    """Of masks that are a file for each label: which one each file shows, wherever it is not 0."""
    split: str = ""
    """The split that the data set itself puts the scan into: val or test; empty: any."""
    modality: str = ""
    """Where each file says it."""
    subgroups: Mapping[str, str] = field(default_factory=dict)
    """Column of the table to the scan's value, by which scores are told apart."""


@dataclass(frozen=True)
class Listing:
    """Everything that a layout lists."""

    layout: str
    items: list[Item]
    labels: Mapping[int, str] = field(default_factory=dict)
    """As far as the layout says what mask values mean."""
    modality: str = ""
    """In the data set's own words."""
    rejected: Rejected = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a user should know; without names of files or patients."""


class Tree:
    """The files below a folder; links out of it are refused unless `outside`."""

    def __init__(self, root: Path, outside: bool = False) -> None:
        self.root = root
        self.outside = outside
        self.rejected: Rejected = []
        self._real = root.resolve()

    def all_files(self, folder: Path | None = None) -> Iterator[Path]:
        """Every file below `folder`, in order of names, without hidden ones (`._*` of archives)."""
        for place, folders, names in os.walk(folder or self.root, followlinks=self.outside):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(place) / name
                if not name.startswith(".") and path.is_file() and self.holds(path):
                    yield path

    def scans(self, folder: Path | None = None) -> Iterator[Path]:
        """Every file below `folder` whose name is that of a scan or mask; DICOM aside."""
        return (path for path in self.all_files(folder) if is_scan_name(path.name))

    def holds(self, path: Path) -> bool:
        """Whether `path` lies in the tree, links followed; what does not is noted as rejected."""
        if self.outside or path.resolve().is_relative_to(self._real):
            return True
        self.rejected.append((path, "Leads out of data.root (set data.outside=true if that is meant)."))
        return False


def is_scan_name(name: str) -> bool:
    """Whether a file's name ends as those of scans do."""
    return name.lower().endswith(VOLUME_SUFFIXES + IMAGE_SUFFIXES)


def stem(path: Path) -> str:
    """The name of a file without its suffix, which may be `.nii.gz`."""
    name = path.name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else path.stem


def relative_stem(path: Path, folder: Path) -> str:
    """Where a file lies below `folder`, without its suffix."""
    return (path.relative_to(folder).parent / stem(path)).as_posix()


def without_mask_ending(name: str) -> str:
    """`lung_3` for `lung_3_mask` and its like."""
    return next((name[: -len(end)] for end in _MASK_ENDINGS if name.lower().endswith(end)), name)


def orphans(masks: Iterable[Path], items: Iterable[Item]) -> Rejected:
    """The masks that belong to no scan."""
    used = {mask for item in items for mask in (item.mask, *item.further_masks)}
    return [(path, "There is no image of this mask's name.") for path in masks if path not in used]


def read_facts(path: Path, kind: str) -> dict[str, Any]:
    """The object in a JSON file that comes with a data set.

    Raises:
        UserError: there is none.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path} is far too large to be a {kind}.")
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no {path}, so this is no {kind}; set data.layout.") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not a {kind}: it is no JSON that can be read.") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} is not a {kind}: it holds no JSON object.")
    return facts
