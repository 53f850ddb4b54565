"""Raw scans to a slice store, one task a case, resumable."""

import csv
import io
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from samssl.config import Count, NonNegative, UserError, as_url, config, config_digest, is_url
from samssl.data.cases import CaseFacts, Origin, files_of, reusable_case, unfetched_case, write_case
from samssl.data.entries import Entry, without_names
from samssl.data.ignoring import ignored_label
from samssl.data.index import INDEX_COLUMNS, STATISTICS
from samssl.data.parallel import Run, local_map, with_progress
from samssl.data.pseudonyms import write_listing
from samssl.data.reading import read_entry
from samssl.data.recipe import fill_from_recipe
from samssl.data.remote import at_hand
from samssl.data.scans import Modality
from samssl.data.slices import MANIFEST_FILE, REJECTED_FILE, write_index
from samssl.data.sources import DataSource, Found, find_sources
from samssl.data.splits import SplitConfig, official_splits, one_patient_per_image, split_patients
from samssl.files import AnyPath, remove_folder, sha256_file, sha256_files, sha256_together, write_bytes
from samssl.scores import SUBGROUP

_FURTHER_SETTINGS = ("volume", "mask_values", "mask_threshold", "mask_colours", "resample_masks")

COMPRESSED = (".gz", ".png", ".jpg", ".jpeg")
"""Endings of files that are much larger in memory."""

# Raised when the same source and settings would give other voxels or facts than before.
_CASE_FORMAT = 2


@config
class PrepareConfig:
    """One data set to one slice store."""

    name: str
    """Short name of the data set; begins every pseudonym, so other names give other case ids."""
    out: Path
    """Folder of the slice store, and of the run's records."""
    store: Path | None = None
    """URL of the slice store, as s3://bucket/store, where it shall not lie in `out`; fsspec writes it."""
    data: DataSource
    """The scans."""
    split: SplitConfig = SplitConfig()
    """Who is learned from and who is tested on."""
    workers: Count = 0
    """Cases that are read and written at the same time; 0: one for each CPU, of all nodes with Ray."""
    memory_gib: NonNegative = 0.0
    """What Ray keeps free for a case, so that no node takes too many; 0: by the sizes of its files."""

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Take from the recipe what is not given, and say what that was."""
        filled = fill_from_recipe(tree)
        if filled and filled.fields:
            taken = ", ".join(f"{name}={_brief(value)}" for name, value in filled.fields.items())
            print(f"prepare: from the recipe {filled.recipe}: {taken}", flush=True)

    def __post_init__(self) -> None:
        """The name becomes part of file names; scans and store lie in folders."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ValueError("name: use letters, digits, dots, dashes and underscores, as in acdc-2017.")
        if is_url(self.out):
            raise ValueError("out: name a folder, for the run's records, and give the URL as `store`.")
        if self.store and not is_url(self.store):
            raise ValueError("store: this is for a URL, as s3://bucket/store. Name a folder as `out`.")

    def memory_of(self, entry: Entry) -> int:
        """Bytes that a case may need while it is prepared, with much to spare.

        Measured: 14 (CT) to 24 (float32) a voxel, and the libraries. That is up to 12 times a plain file,
        and some 30 times one that is compressed.
        """
        if self.memory_gib:
            return int(self.memory_gib * (1 << 30))
        parts = ((40 if name.lower().endswith(COMPRESSED) else 12) * size for name, size in entry.sizes())
        return (1 << 28) + sum(parts)

    @property
    def root(self) -> AnyPath:
        """Where the slice store is written."""
        if self.store is None:
            return self.out.expanduser().absolute()
        from upath import UPath

        return UPath(as_url(self.store))


def _brief(value: Any) -> str:
    """A setting as it stands on one line; of long mappings, how many entries."""
    return f"{{{len(value)} entries}}" if isinstance(value, dict) and len(value) > 8 else str(value)


@dataclass(frozen=True)
class PrepareSummary:
    """What a store holds, and what was done to it."""

    digest: str
    cases: int
    slices: int
    rejected: int
    """Files that could not be used; rejected.csv in the store says why."""
    wrote: int
    """Cases written by this call; 0 with an unchanged digest: there was nothing to do."""
    removed: int
    """Cases of an earlier call that are not in the source any more."""
    key_fingerprint: str = ""
    """Of the key of pseudonyms; empty with public names."""
    private_list: Path | None = None
    """Which file each pseudonym of a source stands for; not part of the store."""


@dataclass(frozen=True)
class CaseResult:
    """What became of one scan."""

    entry: Entry
    facts: CaseFacts | None
    """None for a scan that cannot be used."""
    reason: str
    """Why it cannot be used."""
    wrote: bool


@dataclass(frozen=True)
class _CaseTask:
    """Everything that a process needs to prepare a case, besides the case."""

    out: AnyPath
    source: DataSource
    labels: Mapping[int, str]
    modality: Modality

    def settings_sha256(self, modality: Modality, parts: Mapping[int, str]) -> str:
        """Digest of what voxels and facts of a case depend on besides its files.

        `parts` are the digests of masks that are a file for each label: which shows which is not in theirs.
        """
        settings = {"format": _CASE_FORMAT, "modality": modality, "ids": sorted(self.labels)}
        settings |= {"axis": self.source.axis, "window_hu": self.source.window_hu}
        # Named only where they are set, so that earlier stores stay what they are.
        further = {name: getattr(self.source, name) for name in _FURTHER_SETTINGS} | {"parts": parts}
        further["ignored"] = ignored_label(self.labels)
        settings |= {name: value for name, value in further.items() if value not in (None, False, {})}
        return config_digest(settings)

    def __call__(self, entry: Entry) -> CaseResult:
        """Read, check and write one scan and its mask, or reuse what is stored of them."""
        modality = entry.modality or self.modality
        version = self._remote_version(entry, modality)
        try:
            if version and (facts := unfetched_case(self.out, entry.case, version)):
                return CaseResult(entry, facts, "", wrote=False)
            with at_hand(entry) as here:
                origin = self._origin(here, modality, version)
                # Of another version nothing is reused, whatever its content.
                if not version and (facts := reusable_case(self.out, entry.case, origin)):
                    return CaseResult(entry, facts, "", wrote=False)
                scan, mask = read_entry(here, self.source, self.labels, modality)
        except UserError as error:
            reason = str(error) if self.source.public_names else without_names(str(error), entry)
            return CaseResult(entry, None, reason, wrote=False)
        # From the first changed case until its manifest is written again, this is no complete store.
        (self.out / MANIFEST_FILE).unlink(missing_ok=True)
        settings = {"window_hu": self.source.window_hu, "ignored": ignored_label(self.labels)}
        facts = write_case(self.out, entry.case, scan, mask, origin=origin, **settings)
        return CaseResult(entry, facts, "", wrote=True)

    def _remote_version(self, entry: Entry, modality: Modality) -> str:
        """Of what is not on this machine: the versions of its files, and the settings."""
        if entry.remote is None:
            return ""
        parts = dict(zip(entry.part_labels, map(str, entry.mask_files), strict=False))
        return sha256_together([entry.remote.version, self.settings_sha256(modality, parts)])

    def _origin(self, entry: Entry, modality: Modality, version: str) -> Origin:
        try:
            masks = [sha256_file(path) for path in entry.mask_files]
            parts = dict(zip(entry.part_labels, masks, strict=False))  # no labels where a file has many
            return Origin(
                sha256_files(entry.image_files),
                sha256_together(masks) if masks else "",
                self.settings_sha256(modality, parts),
                version,
            )
        except FileNotFoundError as error:
            raise UserError(f"There is no file {error.filename}.") from None
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None


def prepare(settings: PrepareConfig, run: Run | None = None) -> PrepareSummary:
    """Write the slice store, or bring the one in `settings.out` up to date.

    `run` maps a function over items in whatever processes; by default in local ones.

    Raises:
        UserError: the source cannot be understood, no scan of it is usable, or a split stays empty.
    """
    out = settings.root
    found = find_sources(settings.data, settings.name)
    private_list = _tell(found, settings.name)
    # Splits that cannot be filled even if every scan is usable are refused before hours of reading.
    official = official_splits((entry.patient, entry.split) for entry in found.entries)
    split_patients((entry.patient for entry in found.entries if entry.mask), settings.split, official)
    task = _CaseTask(out, settings.data, found.labels, found.modality)
    results = _in_order_of_cases(run or local_map(settings.workers), task, found.entries)
    prepared = [(result.entry, result.facts) for result in results if result.facts]
    rejected = [
        *found.rejected,
        *((result.entry.source, result.reason) for result in results if not result.facts),
    ]
    if not prepared:
        raise UserError(
            f"None of the {len(results)} scans can be used. The first one: {rejected[0][1]}"
            + (f" Which file that is, {private_list} tells." if private_list else "")
        )
    splits, left_out = _split_cases(prepared, settings.split)
    rejected += left_out
    index = _index(prepared, splits)
    removed = _remove_stale(out, {facts.case for _, facts in prepared})
    files = {name: digest for _, facts in prepared for name, digest in files_of(out, facts).items()}
    files |= _write_rejected(out, rejected)
    digest = write_index(out, settings.name, found.labels, index, files)
    wrote = sum(result.wrote for result in results)
    fingerprint = found.key.fingerprint if found.key else ""
    counts = (len(splits), len(index), len(rejected), wrote, removed)
    return PrepareSummary(digest, *counts, fingerprint, private_list)


def _tell(found: Found, name: str) -> Path | None:
    """Say what was found, and note for the user alone which files pseudonyms stand for."""
    print(f"prepare: {found.summary()}", flush=True)
    for note in found.notes:
        print(f"prepare: {note}", flush=True)
    return write_listing(found.key, name, found.files) if found.key else None


def _in_order_of_cases(run: Run, task: _CaseTask, entries: list[Entry]) -> list[CaseResult]:
    """Results arrive in any order; sorted, nothing downstream depends on the number of workers."""
    results = with_progress(run(task, entries), len(entries), "prepare", "case")
    return sorted(results, key=lambda result: result.entry.case)


_Prepared = list[tuple[Entry, CaseFacts]]


def _split_cases(
    prepared: _Prepared, settings: SplitConfig
) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]]]:
    """(patient, split) of each case, and the (source, reason) of those that may be in none.

    Unlabelled scans belong to the pool. Those of a patient in another split are left out: what is
    tested on must not be pretrained on, and a patient is in one split only.
    """
    images = {facts.case: facts.image_sha256 for _, facts in prepared}
    patients = one_patient_per_image({entry.case: entry.patient for entry, _ in prepared}, images)
    official = official_splits((patients[entry.case], entry.split) for entry, _ in prepared)
    by_patient = split_patients(
        (patients[entry.case] for entry, _ in prepared if entry.mask), settings, official
    )
    splits, left_out = {}, []
    for entry, _ in prepared:
        patient = patients[entry.case]
        split = by_patient.get(patient, "pool")
        if entry.mask or split == "pool":
            splits[entry.case] = (patient, split)
        else:
            left_out.append((entry.source, f"Has no mask, and its patient is in the split {split}."))
    return splits, left_out


def _index(prepared: _Prepared, splits: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    rows = [row for entry, facts in prepared if facts.case in splits for row in _rows(entry, facts, splits)]
    subgroups = [name for name in rows[0] if name.startswith(SUBGROUP)]
    index = pd.DataFrame(rows, columns=[*INDEX_COLUMNS, *subgroups])
    return index.astype({"foreground_fraction": float}).sort_values(by=["case", "z"], ignore_index=True)


def _rows(entry: Entry, facts: CaseFacts, splits: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    patient, split = splits[facts.case]
    of_case = {
        "case": facts.case,
        "patient": patient,
        "split": split,
        "modality": facts.modality,
        **dict(zip(("num_slices", "height", "width"), facts.shape, strict=True)),
        **dict(zip(("spacing_z_mm", "spacing_y_mm", "spacing_x_mm"), facts.spacing_mm, strict=True)),
        **dict(zip(("intensity_low", "intensity_high"), facts.intensity, strict=True)),
        **dict(zip(STATISTICS, facts.statistics, strict=True)),
        "source": entry.source,
        "source_sha256": facts.source_sha256,
        "mask_source": entry.mask_source,
        "mask_source_sha256": facts.mask_source_sha256,
        "image_sha256": facts.image_sha256,
        "mask_sha256": facts.mask_sha256,
        **{f"{SUBGROUP}{name}": value for name, value in entry.subgroups.items()},
    }
    of_slices = zip(facts.content_fraction, facts.foreground_fraction, facts.labels, strict=True)
    for z, (content, foreground, labels) in enumerate(of_slices):
        of_slice = {"z": z, "content_fraction": content, "foreground_fraction": foreground, "labels": labels}
        yield of_case | of_slice


def _remove_stale(out: AnyPath, cases: set[str]) -> int:
    """Delete cases that the source has no more, and what killed calls left half-written."""
    found = list((out / "cases").glob("*.zarr"))
    stale = [folder for folder in found if folder.name.removesuffix(".zarr") not in cases]
    for folder in stale:
        (out / MANIFEST_FILE).unlink(missing_ok=True)
        remove_folder(folder)
    if isinstance(out, Path):  # behind a URL nothing is written aside
        for folder in (out / "cases").glob(".*.zarr.*.partial"):
            shutil.rmtree(folder, ignore_errors=True)
    return len(stale)


def _write_rejected(out: AnyPath, rejected: list[tuple[str, str]]) -> dict[str, str]:
    """List the unusable files in rejected.csv, if there are any; returns its digest by its name."""
    path = out / REJECTED_FILE
    if not rejected:
        path.unlink(missing_ok=True)
        return {}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("source", "reason"), *sorted(rejected)])
    content = text.getvalue().encode()
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)
    return {REJECTED_FILE: sha256_file(path)}
