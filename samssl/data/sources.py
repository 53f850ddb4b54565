"""Finding the scans of a data set: which image, which mask, whose.

The layouts of public data sets are recognised (`samssl.data.layouts`); a CSV or Parquet file of pairs fits
anything, and comes before all of them.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from samssl.config import Count, PositiveInt, UserError, config, is_url
from samssl.data.entries import Entry, Names, known_modality, relative_name, source_name
from samssl.data.layouts.acdc import find_acdc, is_acdc
from samssl.data.layouts.bids import find_bids
from samssl.data.layouts.busi import find_busi, is_busi
from samssl.data.layouts.by_recipe import find_by_recipe
from samssl.data.layouts.dicom_tree import find_dicom, has_dicom, series_files
from samssl.data.layouts.folders import find_folders
from samssl.data.layouts.listing import Item, Listing, Tree, stem
from samssl.data.layouts.msd import find_msd
from samssl.data.layouts.nnunet_raw import find_nnunet, is_nnunet
from samssl.data.layouts.tables import TABLE_SUFFIXES, find_in_table
from samssl.data.pseudonyms import Key, open_key
from samssl.data.readers.files import IMAGE_SUFFIXES, VOLUME_SUFFIXES
from samssl.data.readers.masks import MaskRules
from samssl.data.recipe import read_recipe
from samssl.data.remote import listed
from samssl.data.scans import Axis, Modality

Layout = Literal["auto", "csv", "msd", "nnunet", "bids", "acdc", "busi", "dicom", "folders", "recipe"]
_MR_WORDS = ("MR", "T1", "T2", "FLAIR", "ADC", "DWI", "PD")


@config
class DataSource:
    """Where the scans lie and how to understand their names."""

    root: Path
    """Folder of the data set, or its URL for fsspec, as s3://bucket/set; for the csv layout, the CSV or
    Parquet file itself or its folder."""
    recipe: str = ""
    """Name of a public data set, as `samssl datasets` lists them: gives whatever is not set here."""
    variant: str = ""
    """Which kind of image, where the recipe knows several, as flair; empty: its first."""
    layout: Layout = "auto"
    """`auto`: csv if one is named, that of the recipe if one is, else what the folder looks like; it is
    printed."""
    csv: str = ""
    """Name of the CSV or Parquet file below `root`, with columns image and, if you like, mask and patient."""
    images: str = ""
    """Only scans whose path below `root` fits this pattern, as in '*_T2w.nii.gz'; empty: all."""
    subgroups: tuple[str, ...] = ()
    """Columns of the CSV by which scores are also given apart, as [site, sex]. Their values become public."""
    modality: Modality | None = None
    """MR, CT, XR (radiograph), US (ultrasound) or PT (PET); null: as the data set says."""
    labels: dict[int, str] | None = None
    """Names of the mask values, as {1: liver, 2: tumour}; null: as the data set says. Structures of DICOM
    SEG and RTSTRUCT are found by these names, and others are left out."""
    mask_values: dict[int, int] | None = None
    """Values in the mask files to ids in `labels`, as {500: 1, 600: 2}; null: they are the ids."""
    patient_pattern: str = ""
    """Regular expression searched in each image's file name; its first group is the patient."""
    cases_per_patient: PositiveInt = 1
    """2: images numbered 2k-1 and 2k are one person (number = the last digits of the file name)."""
    axis: Axis = "auto"
    """Axis across which volumes are cut into slices; auto: the one of clearly largest spacing, else axial."""
    window_hu: tuple[float, float] = (-160.0, 240.0)
    """Intensity window of CT, in HU."""
    volume: Count | None = None
    """Which one, from 0, of several: volumes of a 4D file or series, channels of nnU-Net, pages of a TIFF."""
    mask_threshold: float | None = None
    """Soft masks of one label: values from this one on are the label (DICOM SEG: fractions, 0 to 1)."""
    mask_colours: dict[str, int] = field(default_factory=dict)
    """Colours of 2D masks to label ids, as {'#ff0000': 1}; black is background."""
    resample_masks: bool = False
    """True: a mask on another grid that overlaps its scan is taken by nearest voxels; false: refused."""
    outside: bool = False
    """True: links and rows of a CSV may lead out of `root`."""
    public_names: bool = False
    """True: file and patient names may be shown; false: pseudonyms stand for them everywhere."""
    key_file: Path | None = None
    """The key of pseudonyms; null: SAMSSL_KEY_FILE, else ~/.samssl/pseudonyms.key, made on first use."""

    def __post_init__(self) -> None:
        """Check what involves several fields."""
        if self.labels is not None and not all(0 <= label < 1 << 16 for label in self.labels):
            raise ValueError("labels: mask values must lie between 0 and 65535.")
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu: the lower end must lie below the upper end.")
        if self.mask_values and self.labels and not set(self.mask_values.values()) <= {0, *self.labels}:
            raise ValueError("mask_values: values may only become ids that are in labels.")
        if self.patient_pattern and self.cases_per_patient > 1:
            raise ValueError("set patient_pattern or cases_per_patient, not both.")
        if self.patient_pattern and _num_groups(self.patient_pattern) < 1:
            raise ValueError(r"patient_pattern needs a group around the patient, as in '^(sub-\d+)_'.")
        if bad := [name for name in self.subgroups if not re.fullmatch(r"[A-Za-z]\w*", name)]:
            raise ValueError(f"subgroups: '{bad[0]}' is no name of letters, digits and underscores.")
        if told := [name for name in self.subgroups if name in ("image", "mask", "patient")]:
            raise ValueError(
                f"subgroups: '{told[0]}' says whose or which scan it is, not what group it is of."
            )
        if bad := [name for name in self.mask_colours if not re.fullmatch("#[0-9a-fA-F]{6}", name)]:
            raise ValueError(f"mask_colours: '{bad[0]}' is no colour as '#ff0000'.")
        if not all(0 <= label < 1 << 16 for label in self.mask_colours.values()):
            raise ValueError("mask_colours: label ids must lie between 0 and 65535.")

    def mask_rules(self) -> MaskRules:
        """How masks are to be read."""
        return MaskRules(self.mask_threshold, self.mask_colours, self.resample_masks, self.volume)


@dataclass(frozen=True)
class Found:
    """Everything a data set offers."""

    entries: list[Entry]
    labels: dict[int, str]
    """Names of the mask values, 0: background among them."""
    modality: Modality
    rejected: list[tuple[str, str]]
    """(source, reason) of the files that belong to no entry."""
    layout: str
    """Which one it was taken for."""
    notes: list[str]
    """What a user should know; without names of files or patients."""
    files: dict[str, list[str]]
    """Files relative to the data root behind each pseudonym of a source; empty with public names."""
    key: Key | None
    """What pseudonyms were made with."""

    def summary(self) -> str:
        """What was found, in a line."""
        masks = sum(entry.mask is not None for entry in self.entries)
        patients = len({entry.patient for entry in self.entries})
        names = ", ".join(name for label, name in self.labels.items() if label) or "none"
        kinds = Counter(entry.modality or self.modality for entry in self.entries)
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return (
            f"layout {self.layout}: {listed} scans of {patients} patients, {masks} with masks, "
            f"labels: {names}; {len(self.rejected)} other files"
        )


def find_sources(source: DataSource, name: str) -> Found:
    """List the scans of a data set; `name` begins the pseudonyms of its cases.

    Raises:
        UserError: the data set is not laid out as told, or two scans would get the same case id.
    """
    if is_url(source.root):
        with listed(source.root) as tree:
            found = find_sources(replace(source, root=tree.folder), name)
            return replace(found, entries=[tree.entry(entry) for entry in found.entries])
    root = source.root.expanduser().absolute()
    if not root.exists():
        raise UserError(f"data.root: there is no {root}.")
    folder = root if root.is_dir() else root.parent
    listing = _listing(source, root, Tree(folder, source.outside))
    items = [item for item in listing.items if _fits(item, folder, source.images)]
    if not items:
        raise UserError(
            f"There are no scans in {root} (layout {listing.layout}): no DICOM, and no files named "
            f"{_suffix_list()} where the layout expects them."
            + (
                f" {len(listing.rejected)} files cannot be used; {_first(listing)}"
                if listing.rejected
                else ""
            )
        )
    items = sorted((_with_files(item) for item in items), key=lambda item: (str(item.image), item.series))
    names = Names(folder, name, None if source.public_names else open_key(source.key_file))
    patients = _patients(items, listing.layout, folder, source)
    entries = [names.entry(item, patient) for item, patient in zip(items, patients, strict=True)]
    _refuse_duplicates(entries, source.public_names)
    labels = _labels(source, listing, any(item.mask for item in items))
    rejected = [(names.of(path), names.hidden(reason, path)) for path, reason in listing.rejected]
    modality = _modality(source, listing)
    notes = [*listing.notes, *_notes(entries, modality)]
    return Found(entries, labels, modality, rejected, listing.layout, notes, names.files, names.key)


def _listing(source: DataSource, root: Path, tree: Tree) -> Listing:
    layout = _layout(source, root)
    if source.subgroups and layout != "csv":
        raise UserError(f"data.subgroups are columns of a CSV, but the layout of {root} is {layout}.")
    if layout == "csv":
        return find_in_table(root if root.is_file() else root / source.csv, tree, source.subgroups)
    if layout == "recipe":
        return find_by_recipe(tree, source.recipe, source.variant)
    if layout == "nnunet":
        return find_nnunet(tree, source.volume)
    if layout == "dicom":
        return find_dicom(tree, source.modality or "")
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder.")
    if layout == "bids":
        return find_bids(tree, source.images)
    find = {"msd": find_msd, "acdc": find_acdc, "busi": find_busi, "folders": find_folders}
    return find[layout](tree)


def _layout(source: DataSource, root: Path) -> str:
    if source.layout != "auto":
        return source.layout
    if source.csv or root.suffix.lower() in TABLE_SUFFIXES:
        return "csv"
    if source.recipe:
        return "msd" if read_recipe(source.recipe).layout == "msd" else "recipe"
    if (root / "dataset.json").is_file():
        return "nnunet" if is_nnunet(root) else "msd"
    if (root / "dataset_description.json").is_file():
        return "bids"
    recognise = {"acdc": is_acdc, "busi": is_busi, "dicom": has_dicom}
    return next((layout for layout, fits in recognise.items() if fits(root)), "folders")


def _first(listing: Listing) -> str:
    path, reason = listing.rejected[0]
    return f"the first: {reason.replace(str(path), 'it')}"


def _fits(item: Item, root: Path, pattern: str) -> bool:
    return not pattern or fnmatch.fnmatchcase(relative_name(item.image, root), pattern)


def _with_files(item: Item) -> Item:
    """An item of a CSV that names the folder of a DICOM series, with the series' files."""
    if item.files or not item.image.is_dir():
        return item
    found = series_files(item.image)
    if len(found) != 1:
        raise UserError(
            f"A row of the CSV names a folder of {len(found)} DICOM series. Name a folder of one."
        )
    [(series, files)] = found.items()
    return Item(**vars(item) | {"files": files, "series": series})


def _patients(items: list[Item], layout: str, root: Path, source: DataSource) -> list[str]:
    """Whose each scan is: as a CSV says, as the settings say, as the layout says, else each its own.

    Raises:
        UserError: the settings find no patient in a file name.
    """
    set_here = source.patient_pattern or source.cases_per_patient > 1
    found = []
    for number, item in enumerate(items, start=1):
        if item.patient and (layout == "csv" or not set_here):
            found.append(item.patient)
        elif set_here:
            ordinal = f"the file name that is number {number} of {len(items)} in order of names"
            shown = f"'{item.image.name}'" if source.public_names else ordinal
            found.append(_patient_of(item.image.name, shown, source))
        else:
            found.append((item.name or stem(item.image)) if source.public_names else source_name(item, root))
    return found


def _patient_of(file_name: str, shown: str, source: DataSource) -> str:
    """The patient a file name tells."""
    if source.patient_pattern:
        match = re.search(source.patient_pattern, file_name)
        if match is None or not match.group(1):
            raise UserError(f"data.patient_pattern '{source.patient_pattern}' finds no patient in {shown}.")
        return match.group(1)
    numbers = re.findall(r"\d+", stem(Path(file_name)))
    if not numbers:
        raise UserError(f"data.cases_per_patient needs a number in every file name; {shown} has none.")
    return f"person-{-(-int(numbers[-1]) // source.cases_per_patient):04d}"


def _refuse_duplicates(entries: list[Entry], public_names: bool) -> None:
    counts = Counter(entry.case for entry in entries)
    case, count = counts.most_common(1)[0]
    if count > 1:
        sources = [entry.source for entry in entries if entry.case == case]
        advice = "Rename them, or set data.public_names=false." if public_names else "List each scan once."
        raise UserError(
            f"{count} scans would have the same case id '{case}': {', '.join(sources[:4])}. {advice}"
        )


def _labels(source: DataSource, listing: Listing, has_masks: bool) -> dict[int, str]:
    given: Mapping[int, str] = source.labels if source.labels is not None else listing.labels
    names = {label: text for label, text in given.items() if label != 0}
    if has_masks and not names:
        raise UserError(
            "There are masks, but nothing says what they show: set data.labels, as in {1: liver}."
        )
    if len(set(names.values())) < len(names):
        raise UserError(f"Two mask values have the same name in the labels {names}. Give each its own.")
    if not all(0 <= label < 1 << 16 for label in given):
        raise UserError("The data set names mask values that are not between 0 and 65535.")
    return {0: given.get(0, "background"), **dict(sorted(names.items()))}


def _modality(source: DataSource, listing: Listing) -> Modality:
    if source.modality:
        return source.modality
    own = known_modality(listing.items[0].modality)
    told = listing.modality.upper()
    if own or told in ("US", "XR"):
        return own or known_modality(told) or "US"
    if "CT" in told:
        return "CT"
    if any(word in told for word in _MR_WORDS):
        return "MR"
    raise UserError("Nothing says what modality the scans are of: set data.modality to MR, CT, XR, US or PT.")


def _notes(entries: list[Entry], modality: Modality) -> list[str]:
    shown = sum((entry.modality or modality) in ("US", "XR") for entry in entries)
    if not shown:
        return []
    return [
        f"Names and dates are often burnt into ultrasound and X-ray images, and pixels are kept as they are: "
        f"look at the {shown} of them before you share a store, a report or a model."
    ]


def _num_groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"patient_pattern is not a regular expression: {error}.") from None


def _suffix_list() -> str:
    return ", ".join(f"*{suffix}" for suffix in VOLUME_SUFFIXES + IMAGE_SUFFIXES)
