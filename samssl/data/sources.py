"""Finding the scans of a data set: which image, which mask, whose.

Three layouts are known: `msd` (Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr, imagesTs),
`folders` (images and masks of the same name, or any folder of unlabelled images) and `csv`.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from samssl.config import PositiveInt, UserError, config
from samssl.data.scans import IMAGE_SUFFIXES, VOLUME_SUFFIXES, Axis, Modality

_MR_WORDS = ("MR", "T1", "T2", "FLAIR", "ADC", "DWI", "PD")


@config
class DataSource:
    """Where the scans lie and how to understand their names."""

    root: Path
    """Folder of the data set; for the csv layout, the CSV file itself or its folder."""
    layout: Literal["auto", "msd", "folders", "csv"] = "auto"
    """`auto`: csv if a CSV is named, msd if there is a dataset.json, else folders."""
    csv: str = ""
    """Name of the CSV file below `root`, with columns image and, if you like, mask and patient."""
    modality: Modality | None = None
    """MR, CT, XR (radiograph) or US (ultrasound); null: as dataset.json says."""
    labels: dict[int, str] | None = None
    """Names of the mask values, as {1: liver, 2: tumour}; null: as dataset.json says."""
    patient_pattern: str = ""
    """Regular expression searched in each image's file name; its first group is the patient."""
    cases_per_patient: PositiveInt = 1
    """2: images numbered 2k-1 and 2k are one person (number = the last digits of the file name)."""
    axis: Axis = "auto"
    """Axis across which volumes are cut into slices; auto: the one of clearly largest spacing, else axial."""
    window_hu: tuple[float, float] = (-160.0, 240.0)
    """Intensity window of CT, in HU."""
    public_names: bool = False
    """True: file and patient names may be shown; false: they are replaced by digests everywhere but in
    the index's `source` columns and in rejected.csv."""

    def __post_init__(self) -> None:
        """Check what involves several fields."""
        if self.labels is not None and not all(0 <= label < 1 << 16 for label in self.labels):
            raise ValueError("labels: mask values must lie between 0 and 65535.")
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu: the lower end must lie below the upper end.")
        if self.patient_pattern and self.cases_per_patient > 1:
            raise ValueError("set patient_pattern or cases_per_patient, not both.")
        if self.patient_pattern and _num_groups(self.patient_pattern) < 1:
            raise ValueError(r"patient_pattern needs a group around the patient, as in '^(sub-\d+)_'.")


@dataclass(frozen=True)
class Entry:
    """One scan to prepare."""

    case: str
    patient: str
    image: Path
    mask: Path | None
    source: str
    """`image` relative to the data root."""
    mask_source: str
    """`mask` relative to the data root; empty without a mask."""


@dataclass(frozen=True)
class Found:
    """Everything a data set offers."""

    entries: list[Entry]
    labels: dict[int, str]
    """Names of the mask values, 0: background among them."""
    modality: Modality
    rejected: list[tuple[str, str]]
    """(source, reason) of the files that belong to no entry."""


@dataclass(frozen=True)
class _Item:
    """One scan as its layout lists it; an empty `patient` is yet to be read off the file name."""

    image: Path
    mask: Path | None
    patient: str = ""


def find_sources(source: DataSource, name: str) -> Found:
    """List the scans of a data set; `name` begins the pseudonyms of its cases.

    Raises:
        UserError: the data set is not laid out as told, or two scans would get the same case id.
    """
    root = source.root.expanduser().absolute()
    if not root.exists():
        raise UserError(f"data.root: there is no {root}.")
    find = {"msd": _find_msd, "folders": _find_folders, "csv": _find_csv}[_layout(source, root)]
    items, facts, rejected = find(root, source)
    if not items:
        raise UserError(
            f"There are no scans in {root}: no files named {_suffix_list()} where the layout expects them."
        )
    folder = root if root.is_dir() else root.parent
    entries = [_entry(item, folder, name, source) for item in sorted(items, key=lambda item: str(item.image))]
    _refuse_duplicates(entries, source.public_names)
    labels = _labels(source, facts, any(item.mask for item in items))
    return Found(entries, labels, _modality(source, facts), rejected)


_Listing = tuple[list[_Item], Mapping[str, Any], list[tuple[str, str]]]


def _layout(source: DataSource, root: Path) -> str:
    if source.layout != "auto":
        return source.layout
    if source.csv or root.suffix == ".csv":
        return "csv"
    return "msd" if (root / "dataset.json").is_file() else "folders"


def _find_msd(root: Path, source: DataSource) -> _Listing:
    facts = _read_dataset_json(root / "dataset.json")
    masks = {path.name: path for path in _scans_in(root / "labelsTr")}
    items = {path: _Item(path, masks.get(path.name)) for path in _scans_in(root / "imagesTr")}
    # Files that dataset.json lists but that are not there become entries too, to be reported as missing.
    for listed in facts.get("training", []):
        image = root / str(listed["image"]).removeprefix("./")
        items.setdefault(image, _Item(image, root / str(listed["label"]).removeprefix("./")))
    unlabelled = [_Item(path, None) for path in _scans_in(root / "imagesTs")]
    return [*items.values(), *unlabelled], facts, _orphans(masks.values(), items.values(), root)


def _read_dataset_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
        labels = {int(label): str(name) for label, name in facts.get("labels", {}).items()}
        listed = facts.get("training", [])
        assert all({"image", "label"} <= set(entry) for entry in listed)
    except FileNotFoundError:
        raise UserError(f"There is no {path}, so this is no Decathlon data set; set data.layout.") from None
    except (OSError, ValueError, AttributeError, TypeError, AssertionError):
        raise UserError(
            f"{path} is not a Decathlon dataset.json: "
            "it needs labels {id: name} and training [{image, label}]."
        ) from None
    return {**facts, "labels": labels}


def _find_folders(root: Path, source: DataSource) -> _Listing:
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder.")
    if not (root / "images").is_dir():
        return [_Item(path, None) for path in _scans_in(root)], {}, []
    masks = {_relative_stem(path, root / "masks"): path for path in _scans_in(root / "masks")}
    items = [
        _Item(path, masks.get(_relative_stem(path, root / "images"))) for path in _scans_in(root / "images")
    ]
    return items, {}, _orphans(masks.values(), items, root)


def _find_csv(root: Path, source: DataSource) -> _Listing:
    table = root if root.is_file() else root / source.csv
    if not table.is_file():
        raise UserError(
            f"There is no CSV file {table}: make data.root the file, or data.csv its name below data.root."
        )
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if "image" not in (rows.fieldnames or ()):
                raise UserError(
                    f"{table} has no column 'image'; its columns are {list(rows.fieldnames or ())}."
                )
            items = [_csv_item(row, table.parent) for row in rows if row["image"]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a CSV file: {error}.") from None
    return items, {}, []


def _csv_item(row: Mapping[str, str | None], folder: Path) -> _Item:
    mask = (row.get("mask") or "").strip()
    return _Item(
        folder / str(row["image"]).strip(),
        folder / mask if mask else None,
        (row.get("patient") or "").strip(),
    )


def _scans_in(folder: Path) -> Iterator[Path]:
    """Every scan file below `folder`, without the `._*` shadows and hidden folders that archives bring."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.name.lower().endswith(VOLUME_SUFFIXES + IMAGE_SUFFIXES) and path.is_file():
            yield path


def _orphans(masks: Iterable[Path], items: Iterable[_Item], root: Path) -> list[tuple[str, str]]:
    used = {item.mask for item in items}
    return [
        (path.relative_to(root).as_posix(), "There is no image of this mask's name.")
        for path in masks
        if path not in used
    ]


def _entry(item: _Item, root: Path, name: str, source: DataSource) -> Entry:
    image_source = _relative(item.image, root)
    patient = item.patient or _patient_of(item.image.name, image_source, source)
    case = _stem(item.image)
    if source.public_names:
        case, patient = _plain(case), _plain(patient)
    else:
        case, patient = _pseudonym(name, "case", image_source), _pseudonym(name, "patient", patient)
    return Entry(
        case, patient, item.image, item.mask, image_source, _relative(item.mask, root) if item.mask else ""
    )


def _patient_of(file_name: str, image_source: str, source: DataSource) -> str:
    """The patient a file name tells; each file its own patient where nothing is set."""
    if source.patient_pattern:
        match = re.search(source.patient_pattern, file_name)
        if match is None or not match.group(1):
            raise UserError(
                f"data.patient_pattern '{source.patient_pattern}' finds no patient in '{file_name}'."
            )
        return match.group(1)
    if source.cases_per_patient == 1:
        return _stem(Path(image_source)) if source.public_names else image_source
    numbers = re.findall(r"\d+", _stem(Path(file_name)))
    if not numbers:
        raise UserError(f"data.cases_per_patient needs a number in every file name; '{file_name}' has none.")
    return f"person-{-(-int(numbers[-1]) // source.cases_per_patient):04d}"


def _pseudonym(name: str, what: str, secret: str) -> str:
    """12 hex digits: two among 100 000 cases meet with a chance of 2 in 100 000."""
    return f"{name}-{hashlib.sha256(f'{name}/{what}/{secret}'.encode()).hexdigest()[:12]}"


def _plain(text: str) -> str:
    """`text` as it can stand in a file name and a URL."""
    return re.sub(r"[^\w.\-]+", "-", text).strip("-.") or "unnamed"


def _stem(path: Path) -> str:
    name = path.name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else path.stem


def _relative_stem(path: Path, root: Path) -> str:
    return (path.relative_to(root).parent / _stem(path)).as_posix()


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _refuse_duplicates(entries: list[Entry], public_names: bool) -> None:
    counts = Counter(entry.case for entry in entries)
    case, count = counts.most_common(1)[0]
    if count > 1:
        sources = [entry.source for entry in entries if entry.case == case]
        advice = "Rename them, or set data.public_names=false." if public_names else "List each scan once."
        raise UserError(
            f"{count} scans would have the same case id '{case}': {', '.join(sources[:4])}. {advice}"
        )


def _labels(source: DataSource, facts: Mapping[str, Any], has_masks: bool) -> dict[int, str]:
    given = source.labels if source.labels is not None else facts.get("labels", {})
    names = {label: text for label, text in given.items() if label != 0}
    if has_masks and not names:
        raise UserError(
            "There are masks, but nothing says what they show: set data.labels, as in {1: liver}."
        )
    if len(set(names.values())) < len(names):
        raise UserError(f"Two mask values have the same name in the labels {names}. Give each its own.")
    return {0: given.get(0, "background"), **dict(sorted(names.items()))}


def _modality(source: DataSource, facts: Mapping[str, Any]) -> Modality:
    if source.modality:
        return source.modality
    told = str(facts.get("modality", "")).upper()
    if "CT" in told:
        return "CT"
    if any(word in told for word in _MR_WORDS):
        return "MR"
    raise UserError("Nothing says what modality the scans are of: set data.modality to MR, CT, XR or US.")


def _num_groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"patient_pattern is not a regular expression: {error}.") from None


def _suffix_list() -> str:
    return ", ".join(f"*{suffix}" for suffix in VOLUME_SUFFIXES + IMAGE_SUFFIXES)
