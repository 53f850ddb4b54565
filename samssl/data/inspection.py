"""Inspecting a data set before anything is trained: fingerprints of its cases, and what they show."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Integer

from samssl.config import Count, UserError, config, derive, flatten
from samssl.data.cases import CASE_FILE, case_folder
from samssl.data.entries import Entry, without_names
from samssl.data.fingerprint import CaseFingerprint, fingerprint
from samssl.data.ignoring import told_apart
from samssl.data.parallel import Run, local_map, with_progress
from samssl.data.reading import read_known
from samssl.data.recipe import fill_from_recipe
from samssl.data.scans import Modality, Scan
from samssl.data.sealed import seal, unseal
from samssl.data.slices import MANIFEST_FILE, REJECTED_FILE, SliceStore
from samssl.data.sources import DataSource, find_sources
from samssl.files import write_bytes

FINGERPRINT_FILE = "fingerprint.json"
_FORMAT = 1
_NOT_KEPT = ("tiny", "foreground")
"""Voxels: what is kept beside a store is about them."""


@config
class InspectConfig:
    """A folder of scans, or a slice store."""

    source: Path
    """Folder or CSV of scans, as `prepare` reads it, or a slice store."""
    data: DataSource | None = None
    """How scans are to be read, as in `prepare`; not used for a store."""
    name: str = "inspected"
    """Begins the pseudonyms of cases, as in `prepare`."""
    out: Path = Path("runs/inspect")
    """Folder of inspect.html, fingerprint.json and the recommended settings."""
    examples: Count = 12
    """Cases that are shown as pictures."""
    workers: Count = 0
    """Processes that read cases; 0: one for each CPU."""

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Scans are read from `source`, and what a recipe knows of them is filled in."""
        source = Path(str(tree.get("source") or ""))
        if not tree.get("source") or is_store(source):
            return
        data = tree["data"] = {**(tree.get("data") or {}), "root": str(source)}
        fill_from_recipe({"data": data})


def is_store(place: Path) -> bool:
    """Whether `place` is the folder of a slice store."""
    return (place / MANIFEST_FILE).is_file()


@dataclass(frozen=True)
class Inspection:
    """What was seen of a data set."""

    name: str
    source: Path
    labels: dict[int, str]
    """Without the one to be ignored, which counts as background here."""
    cases: list[CaseFingerprint]
    rejected: list[tuple[str, str]]
    """(source, reason), without names unless they are public."""
    notes: list[str]
    public_names: bool
    store: SliceStore | None
    entries: Mapping[str, Entry]
    """The scan behind each case; empty for a store."""
    data: DataSource | None
    """None for a store."""
    given: Mapping[int, str]
    """All names of label ids."""

    def read(self, case: str) -> tuple[Scan, Integer[np.ndarray, "Z H W"] | None]:
        """A case again, with its label ids."""
        if self.store:
            return stored_scan(self.store, case), self.store.mask(case)
        assert self.data is not None, "what is no store was read by these settings"
        entry = self.entries[case]
        modality = next(seen.modality for seen in self.cases if seen.case == case)
        return read_known(entry, self.data, self.given, modality)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _ScanTask:
    """Fingerprints the scan of an entry, in whatever process."""

    source: DataSource
    labels: Mapping[int, str]
    modality: Modality

    def __call__(self, entry: Entry) -> tuple[str, CaseFingerprint | str]:
        """The source with its fingerprint, or with why it cannot be used."""
        try:
            scan, mask = read_known(entry, self.source, self.labels, entry.modality or self.modality)
        except UserError as error:
            return entry.source, str(error) if self.source.public_names else without_names(str(error), entry)
        made = fingerprint(scan, mask, case=entry.case, patient=entry.patient, split=entry.split)
        return entry.source, made


@dataclass(frozen=True)
class _StoreTask:
    """Fingerprints a case of a store, in whatever process."""

    root: str

    def __call__(self, case: str) -> tuple[str, CaseFingerprint | str]:
        """The case with its fingerprint, or with why it cannot be read."""
        store = SliceStore(self.root)
        try:
            scan, mask = stored_scan(store, case), store.mask(case)
        except UserError as error:
            return case, str(error)
        info = store.info(case)
        return case, fingerprint(
            scan, mask, case=case, patient=str(info["patient"]), split=str(info["split"])
        )


def stored_scan(store: SliceStore, case: str) -> Scan:
    """A case of a store on this machine as a scan."""
    facts = json.loads((case_folder(Path(store.root), case) / CASE_FILE).read_bytes())
    spacing_mm, affine = tuple(facts["spacing_mm"]), np.array(facts["affine"], dtype=float)
    return Scan(store.image(case), spacing_mm, affine, facts["modality"])


def inspect(settings: InspectConfig, run: Run | None = None) -> Inspection:
    """Fingerprint every case of a data set.

    `run` maps a function over items in whatever processes; by default in local ones.

    Raises:
        UserError: the source cannot be understood, or none of its scans can be read.
    """
    run = run or local_map(settings.workers)
    seen = _inspect_store(settings, run) if is_store(settings.source) else _inspect_scans(settings, run)
    if not seen.cases:
        first = seen.rejected[0][1] if seen.rejected else "there are none."
        raise UserError(f"None of the scans can be read. The first one: {first}")
    return seen


def _inspect_scans(settings: InspectConfig, run: Run) -> Inspection:
    source = settings.data
    assert source is not None, "`fill` gives scans their settings"
    found = find_sources(source, settings.name)
    task = _ScanTask(source, found.labels, found.modality)
    done = dict(with_progress(run(task, found.entries), len(found.entries), "inspect", "case"))
    return Inspection(
        name=settings.name,
        source=settings.source,
        labels=told_apart(found.labels),
        cases=_fingerprints(done),
        rejected=[*found.rejected, *_reasons(done)],
        notes=[found.summary(), *found.notes],
        public_names=source.public_names,
        store=None,
        entries={entry.case: entry for entry in found.entries},
        data=source,
        given=found.labels,
    )


def _inspect_store(settings: InspectConfig, run: Run) -> Inspection:
    store = SliceStore(settings.source)
    cases = sorted(store.index["case"].unique())
    done = dict(with_progress(run(_StoreTask(store.root), cases), len(cases), "inspect", "case"))
    rejected = Path(store.root) / REJECTED_FILE
    listed = pd.read_csv(rejected, dtype=str).to_numpy().tolist() if rejected.is_file() else []
    fingerprints = _fingerprints(done)
    return Inspection(
        name=store.name,
        source=settings.source,
        labels=store.labels,
        cases=fingerprints,
        rejected=[*((str(source), str(reason)) for source, reason in listed), *_reasons(done)],
        notes=[],
        # What stands in a store is what its owner let into it.
        public_names=True,
        store=store,
        entries={},
        data=None,
        given=store.labels,
    )


def _fingerprints(done: Mapping[str, CaseFingerprint | str]) -> list[CaseFingerprint]:
    made = [result for result in done.values() if isinstance(result, CaseFingerprint)]
    return sorted(made, key=lambda entry: entry.case)


def _reasons(done: Mapping[str, CaseFingerprint | str]) -> list[tuple[str, str]]:
    return [(source, result) for source, result in sorted(done.items()) if isinstance(result, str)]


def write_fingerprint(seen: Inspection, folder: Path, more: Mapping[str, Any]) -> Path:
    """Write the fingerprint of the data set, sealed, into a folder; returns its path.

    Beside a store it says which one by its digest, and is no part of that digest.
    """
    content = {
        "format": _FORMAT,
        "name": seen.name,
        "digest": seen.store.digest if seen.store else "",
        "labels": {str(label): name for label, name in seen.labels.items()},
        "cases": [
            {name: value for name, value in asdict(entry).items() if name not in _NOT_KEPT}
            for entry in seen.cases
        ],
        **more,
    }
    write_bytes(folder / FINGERPRINT_FILE, seal(content))
    return folder / FINGERPRINT_FILE


def read_fingerprint(store: SliceStore) -> dict[str, Any] | None:
    """The fingerprint kept with a store on this machine; None where there is none for what it now holds.

    Raises:
        UserError: it is damaged.
    """
    path = Path(store.root) / FINGERPRINT_FILE
    if not path.is_file():
        return None
    try:
        content = unseal(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Run `samssl inspect` on the store again.") from None
    return content if content.get("digest") == store.digest else None


def fill_from_fingerprint(tree: dict[str, Any], stage: str) -> None:
    """Set in the settings `tree` of a training stage what its store's fingerprint recommends and nobody gave.

    Says what that was. Nothing without a fingerprint, which `samssl inspect` writes, or with several stores.
    """
    data = tree.get("data")
    place = Path(str(data.get("store") or "")) if isinstance(data, dict) else Path()
    given = flatten(tree)
    if not (place / FINGERPRINT_FILE).is_file() or not is_store(place) or given.get("data.more_stores"):
        return
    content = read_fingerprint(SliceStore(place)) or {}
    advice = {entry["field"]: entry["value"] for entry in content.get("recommendations", [])}
    # What is null was given, too: settings that are written out whole stay what they are.
    taken = {name: advice[name] for name in advice if name not in given and _fits(name, stage, given)}
    for name, value in taken.items():
        derive(tree, name, value)
    if taken:
        listed = ", ".join(f"{name}={value}" for name, value in taken.items())
        print(f"{stage}: from the store's fingerprint: {listed}", flush=True)


def _fits(name: str, stage: str, given: Mapping[str, Any]) -> bool:
    """Whether a recommended setting has a meaning beside those that are given."""
    if name == "model.image_size":  # an encoder goes on at the size that it was trained at
        checkpoint = str(given.get("model.checkpoint") or "")
        return not given.get("continue_from") and not (checkpoint and Path(checkpoint).exists())
    if stage != "finetune" or given.get("mode") == "promptable":
        return False
    if name.startswith("data.sampling."):  # counted by label, over whole volumes
        return not any(field.startswith("data.classes") for field in given) and (
            given.get("data.shot_unit") != "slices"
        )
    return name == "loss.keep_small"
