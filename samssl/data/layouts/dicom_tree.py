"""A tree of DICOM files, named and nested anyhow, with or without a DICOMDIR.

Slices are put together by their SeriesInstanceUID, or by their folder where that was blanked; a projection
or a file of frames is a scan of its own.
SEG and RTSTRUCT files are the masks of the series that they refer to.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from samssl.config import UserError
from samssl.data.layouts.listing import Item, Listing, Rejected, Tree
from samssl.data.readers.dicom import is_volume_slice, read_header, read_modality
from samssl.data.readers.dicom_seg import SEG_CLASSES
from samssl.data.readers.files import is_dicom, naming
from samssl.data.readers.rtstruct import RTSTRUCT_CLASS

_TAGS = (
    *(
        "SOPClassUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "PatientID",
        "Modality",
        "Rows",
    ),
    *("NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "BurnedInAnnotation"),
    *("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
)
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_UNNAMED = "unnamed"
"""Stands for the UID of a series that has none."""
_UNTOLD = ("", "OT", "SC")
"""Modalities that say nothing: such files can be what data.modality says."""
_LOOKED_AT = 2000
"""Files that are looked into before a folder is held to have no DICOM in it."""


def has_dicom(root: Path) -> bool:
    """Whether there are DICOM files below `root`, among the first of its files."""
    if not root.is_dir():
        return False
    return any(is_dicom(path) for path in islice(Tree(root).all_files(), _LOOKED_AT))


def find_dicom(tree: Tree, modality: str = "") -> Listing:
    """Every series below a folder; with `modality`, those of it and of none that is known here."""
    headers, rejected = _headers(tree)
    images = [header for header in headers if header.get("Rows") and not _is_mask(header)]
    masks = [header for header in headers if _is_mask(header)]
    rejected += [
        (_path(header), "Holds no image.")
        for header in headers
        if not header.get("Rows") and not _is_mask(header)
    ]
    wanted, unwanted = _of_modality(images, modality)
    groups = _groups(wanted)
    of_group, unmatched = _matched(masks, groups)
    items = [_item(group, of_group[number], modality) for number, group in enumerate(groups)]
    items = _named(items, tree.root)
    burnt = sum(any(header.get("BurnedInAnnotation") == "YES" for header in group) for group in groups)
    notes = [f"{burnt} scans say that text is burnt into them (BurnedInAnnotation)."] if burnt else []
    return Listing("dicom", items, {}, "", [*rejected, *unwanted, *unmatched, *tree.rejected], notes)


def series_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each series below a folder, by UID; files of frames and projections by their own path."""
    headers, _ = _headers(Tree(folder, outside=True))
    groups = _groups(header for header in headers if header.get("Rows") and not _is_mask(header))
    items = [_item(group, [], "") for group in groups]
    return {item.series or str(item.image): item.files or (item.image,) for item in items}


def _headers(tree: Tree) -> tuple[list[Dataset], Rejected]:
    headers, rejected = [], []
    for path in tree.all_files():
        if not is_dicom(path):
            continue
        try:
            header = read_header(path, _TAGS)
            with naming(path):
                if header.get("SOPClassUID") == _DIRECTORY_CLASS or path.name.upper() == "DICOMDIR":
                    rejected += _missing(path, tree)
                else:
                    headers.append(header)
        except UserError as error:
            rejected.append((path, str(error)))
    return headers, rejected


def _missing(directory: Path, tree: Tree) -> Rejected:
    """What a DICOMDIR lists that is not there, or not in the tree."""
    records = pydicom.dcmread(directory).get("DirectoryRecordSequence") or []
    parts = [record.get("ReferencedFileID") for record in records if record.get("ReferencedFileID")]
    listed = [Path(part) if isinstance(part, str) else Path(*map(str, part)) for part in parts]
    paths = [Path(os.path.normpath(directory.parent / path)) for path in listed]
    return [
        (path, "Is listed in a DICOMDIR and not there.")
        for path in paths
        if not path.is_relative_to(tree.root) or not path.exists()
    ]


def _series(header: Dataset) -> str:
    return str(header.get("SeriesInstanceUID") or "")


def _path(header: Dataset) -> Path:
    return Path(str(header.filename))


def _is_mask(header: Dataset) -> bool:
    return str(header.get("SOPClassUID", "")) in (*SEG_CLASSES, RTSTRUCT_CLASS)


def _of_modality(images: list[Dataset], modality: str) -> tuple[list[Dataset], Rejected]:
    """Images that can be taken as `modality`, or whose own is known; and the others."""
    wanted, unwanted = [], []
    for header in images:
        own = read_modality(header)
        if own is None and str(header.get("Modality") or "") not in _UNTOLD:
            unwanted.append((_path(header), "Is of a modality that is not read here."))
        elif own is None and not modality:
            unwanted.append((_path(header), "Does not say of what modality it is: set data.modality."))
        elif own and modality and own != modality:
            unwanted.append((_path(header), f"Is {own}, and data.modality asks for {modality}."))
        else:
            wanted.append(header)
    return wanted, unwanted


def _groups(images: Iterable[Dataset]) -> list[list[Dataset]]:
    """The headers of each scan. Copies of a series in several folders are scans of their own."""
    series: dict[str, list[Dataset]] = defaultdict(list)
    alone = []
    for header in images:
        if is_volume_slice(header):
            series[_series(header) or str(_path(header).parent)].append(header)
        else:
            alone.append([header])
    return [*(part for group in series.values() for part in _copies(group)), *alone]


def _copies(group: list[Dataset]) -> list[list[Dataset]]:
    """A series by folders if slices of it are in several, else as one."""
    uids = [str(header.SOPInstanceUID) for header in group if header.get("SOPInstanceUID")]
    if len(set(uids)) == len(uids):
        return [group]
    by_folder: dict[Path, list[Dataset]] = defaultdict(list)
    for header in group:
        by_folder[_path(header).parent].append(header)
    return list(by_folder.values())


def _item(group: list[Dataset], masks: list[Path], modality: str) -> Item:
    first = group[0]
    files = tuple(sorted(_path(header) for header in group))
    folder = Path(os.path.commonpath([path.parent for path in files]))
    told = first.get("PatientID") or first.get("StudyInstanceUID") or _series(first)
    single = not is_volume_slice(first)
    return Item(
        image=files[0] if single else folder,
        mask=masks[0] if masks else None,
        further_masks=tuple(masks[1:]),
        patient=str(told).strip(),
        files=() if single else files,
        series="" if single else _series(first) or _UNNAMED,
        modality=read_modality(first) or modality,
    )


def _named(items: list[Item], root: Path) -> list[Item]:
    """Series called as their folders, and numbered by UID where a folder has several."""
    of_folder: dict[Path, list[str]] = defaultdict(list)
    for item in items:
        if item.series:
            of_folder[item.image].append(item.series)
    named = []
    for item in items:
        if item.series:
            parts = item.image.relative_to(root).parts or (root.name,)
            among = sorted(of_folder[item.image])
            number = f"-{among.index(item.series) + 1}" if len(among) > 1 else ""
            item = replace(item, name="-".join(parts) + number)
        named.append(item)
    return named


def _matched(masks: list[Dataset], groups: list[list[Dataset]]) -> tuple[list[list[Path]], Rejected]:
    """The masks of each group, by the series that they refer to, else by their study if that has one scan."""
    of_group: list[list[Path]] = [[] for _ in groups]
    unmatched: Rejected = []
    for mask in masks:
        try:
            with naming(_path(mask)):
                referred = set(_referred(mask))
        except UserError as error:
            unmatched.append((_path(mask), str(error)))
            continue
        fitting = [
            number
            for number, group in enumerate(groups)
            if (_series(group[0]) in referred if referred else _same_study(mask, group[0]))
        ]
        if len(fitting) == 1:
            of_group[fitting[0]].append(_path(mask))
        else:
            unmatched.append((_path(mask), f"Is a mask of a series of which {len(fitting)} scans are here."))
    return of_group, unmatched


def _same_study(mask: Dataset, image: Dataset) -> bool:
    return bool(mask.get("StudyInstanceUID")) and mask.get("StudyInstanceUID") == image.get(
        "StudyInstanceUID"
    )


def _referred(mask: Dataset) -> Iterator[str]:
    """UIDs of the series that a SEG or RTSTRUCT refers to."""
    for item in mask.get("ReferencedSeriesSequence") or []:
        yield str(item.SeriesInstanceUID)
    for frame in mask.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                yield str(series.SeriesInstanceUID)
