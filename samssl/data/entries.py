"""The scans of a data set as they are prepared, and what stands for their files and patients."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samssl.data.layouts.dicom_tree import series_files
from samssl.data.layouts.listing import Item, stem
from samssl.data.pseudonyms import Key
from samssl.data.scans import Modality

_SERIES = "::"
"""Between folder and UID of a DICOM series in `Entry.source`."""
_JOINT = " + "
"""Between the files of several masks of one scan in `Entry.mask_source`."""


@dataclass(frozen=True)
class Remote:
    """Where the files of a scan are fetched from."""

    url: str
    """Of the data root."""
    files: tuple[str, ...]
    """Relative to it, sorted."""
    sizes: tuple[int, ...]
    """In bytes."""
    version: str
    """Digest of what the filesystem tells changed files by, as their ETags."""


@dataclass(frozen=True)
class Entry:
    """One scan to prepare."""

    case: str
    patient: str
    image: Path
    """A file, or the folder of a DICOM series."""
    mask: Path | None
    source: str
    """`image` relative to the data root, `FOLDER::UID` for a DICOM series; or what stands for it."""
    mask_source: str
    """`mask` relative to the data root, or what stands for it; empty without a mask."""
    files: tuple[Path, ...] = ()
    """Of a DICOM series."""
    further_masks: tuple[Path, ...] = ()
    """Masks of the same scan besides `mask`."""
    part_labels: tuple[int, ...] = ()
    """Of masks that are a file for each label: which one each file shows, wherever it is not 0."""
    split: str = ""
    """The split that the data set itself puts the scan into: val or test; empty: any."""
    modality: Modality | None = None
    """Where each file says it; null: that of the data set."""
    subgroups: Mapping[str, str] = field(default_factory=dict)
    """Kind of subgroup, as site, to the one that the scan belongs to; never who it is."""
    remote: Remote | None = None
    """Of a data set behind a URL, whose paths here then are not those of files on this machine."""

    @property
    def image_files(self) -> tuple[Path, ...]:
        """Every file of the scan."""
        return self.files or (self.image,)

    @property
    def mask_files(self) -> tuple[Path, ...]:
        """Every file of its masks."""
        return (self.mask, *self.further_masks) if self.mask else ()

    def sizes(self) -> list[tuple[str, int]]:
        """Name and bytes of each file; without those that are not there."""
        if self.remote:
            return list(zip(self.remote.files, self.remote.sizes, strict=True))
        files = [path for path in (*self.image_files, *self.mask_files) if path.is_file()]
        return [(path.name, path.stat().st_size) for path in files]


def source_files(root: Path, source: str) -> list[Path]:
    """The files behind `Entry.source` or `Entry.mask_source` where names are public."""
    first, *further = source.split(_JOINT)
    folder, series, uid = first.partition(_SERIES)
    if series:
        return list(series_files(root / folder).get(uid, ()))
    return [root / first, *(root / name for name in further)]


class Names:
    """What stands for files and patients: their names, or with a key pseudonyms."""

    def __init__(self, root: Path, name: str, key: Key | None) -> None:
        self.root, self.name, self.key = root, name, key
        self.files: dict[str, list[str]] = {}

    def of(self, path: Path, *further: Path, series: str = "", files: tuple[Path, ...] = ()) -> str:
        """The name or pseudonym of a source."""
        plain = _JOINT.join(relative_name(each, self.root) for each in (path, *further))
        plain += f"{_SERIES}{series}" if series else ""
        if self.key is None:
            return plain
        pseudonym = self.key.pseudonym(self.name, "source", plain)
        self.files[pseudonym] = [relative_name(each, self.root) for each in files or (path, *further)]
        return pseudonym

    def entry(self, item: Item, patient: str) -> Entry:
        """A scan under its name or pseudonym."""
        source = self.of(item.image, series=item.series, files=item.files)
        plain = source_name(item, self.root)
        if self.key is None:
            case, patient = plain_name(item.name or stem(item.image)), plain_name(patient)
        else:
            case = self.key.pseudonym(self.name, "case", plain)
            patient = self.key.pseudonym(self.name, "patient", patient)
        return Entry(
            case=case,
            patient=patient,
            image=item.image,
            mask=item.mask,
            source=source,
            mask_source=self.of(item.mask, *item.further_masks) if item.mask else "",
            files=item.files,
            further_masks=item.further_masks,
            part_labels=item.part_labels,
            split=item.split,
            modality=known_modality(item.modality),
            subgroups=item.subgroups,
        )

    def hidden(self, reason: str, path: Path) -> str:
        """A reason without the name of the file that it is about."""
        return reason if self.key is None else reason.replace(str(path), self.of(path))


def without_names(reason: str, entry: Entry) -> str:
    """A reason in which pseudonyms stand for the paths of an entry."""
    paths = [(path, entry.mask_source) for path in entry.mask_files]
    paths += [(path, entry.source) for path in (*entry.image_files, entry.image)]
    for path, pseudonym in sorted(paths, key=lambda pair: -len(str(pair[0]))):
        reason = reason.replace(str(path), pseudonym)
    return reason


def plain_name(text: str) -> str:
    """`text` as it can stand in a file name and a URL."""
    return re.sub(r"[^\w.\-]+", "-", text).strip("-.") or "unnamed"


def relative_name(path: Path, root: Path) -> str:
    """Where a file lies below `root`; its whole path if it lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def known_modality(text: str) -> Modality | None:
    """`text` if it is a modality of ours."""
    known: dict[str, Modality] = {"MR": "MR", "CT": "CT", "XR": "XR", "US": "US", "PT": "PT"}
    return known.get(text)


def source_name(item: Item, root: Path) -> str:
    """What tells a scan from all others below `root`."""
    return relative_name(item.image, root) + (f"{_SERIES}{item.series}" if item.series else "")
