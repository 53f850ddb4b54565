"""Splitting by patient, and drawing the few labelled examples.

Both order by SHA-256 of the seed and the id, so they are the same on every machine and with every
version of every library, and a patient more or less moves few others.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import floor
from typing import Literal

import pandas as pd

from samssl.config import Count, NonNegative, PositiveInt, UserError, config

SPLITS = ("pool", "train", "val", "test")


@config
class SplitConfig:
    """How many labelled patients each split gets: below 1 a share, from 1 a whole number of patients."""

    pool: NonNegative = 0.0
    """At least so many for pretraining, masks unused; whoever the other splits leave joins them, and so do
    all unlabelled patients."""
    train: NonNegative = 0.4
    """Patients that fine-tuning learns from."""
    val: NonNegative = 0.2
    """Patients that settings are chosen on."""
    test: NonNegative = 0.4
    """Patients that results are reported on."""
    seed: Count = 0
    """Another seed, another draw."""
    fold: Count = 0
    """Other test patients for the same seed: folds 0, 1, 2, ... test on different people, as far as there
    are enough of them."""

    official: bool = False
    """True: whom the data set itself puts into test or val is there and nobody else is; `test` (and `val`,
    where it has one) is not read then, and the other sizes count among the remaining patients."""

    def __post_init__(self) -> None:
        """Check what involves several fields."""
        sizes = {name: getattr(self, name) for name in SPLITS}
        broken = [name for name, size in sizes.items() if size >= 1 and size != int(size)]
        if broken:
            raise ValueError(f"{broken[0]}: from 1 on it is a number of patients, so it must be whole.")
        counted = [size for name, size in sizes.items() if not (self.official and name == "test")]
        if sum(size for size in counted if size < 1) > 1 + 1e-9:
            raise ValueError("the shares of pool, train, val and test add up to more than 1.")


def official_splits(entries: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The split that the data set itself gives each patient it gives one; `entries` are (patient, split).

    A patient with scans in several is in test, before val.
    """
    found: dict[str, str] = {}
    for patient, split in entries:
        if split and found.get(patient) != "test":
            found[patient] = split
    return found


def split_patients(
    labelled: Iterable[str], settings: SplitConfig, official: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The split of each patient who has labelled scans; `official` is what the data set itself says.

    Raises:
        UserError: there are too few patients for what is asked.
    """
    labelled = set(labelled)
    given = {patient: split for patient, split in (official or {}).items() if patient in labelled}
    if not settings.official:
        return _draw_splits(labelled, settings)
    if "test" not in given.values():
        raise UserError(
            "split.official=true, but none of the patients with masks is in a test split of the data set "
            "itself. Set it to false, or check that data.root holds the official test images with masks."
        )
    without = dict.fromkeys(set(given.values()), 0.0)
    return given | _draw_splits(labelled - set(given), replace(settings, official=False, **without))


def _draw_splits(labelled: set[str], settings: SplitConfig) -> dict[str, str]:
    patients = _shuffled(labelled, f"split/{settings.seed}")
    if not patients:
        return {}
    # Test comes first, so that it stays the same people when the others are resized.
    asked = {name: getattr(settings, name) for name in reversed(SPLITS)}
    patients = _turned(patients, asked["test"], settings.fold)
    total, start, splits = 0.0, 0, {}
    for name, size in asked.items():
        total += size if size >= 1 else size * len(patients)
        stop = floor(total + 0.5)
        if size > 0 and not start < stop <= len(patients):
            numbers = ", ".join(f"{split}={getattr(settings, split):g}" for split in SPLITS)
            raise UserError(
                f"split.{name}={size:g} cannot be filled: {len(patients)} patients have masks, "
                f"and {numbers} are asked for. Ask for fewer or add patients."
            )
        splits |= dict.fromkeys(patients[start:stop], name)
        start = stop
    return splits | dict.fromkeys(patients[start:], "pool")


def _turned(patients: list[str], test: float, fold: int) -> list[str]:
    """The patients in an order in which those that fold number `fold` tests on come first.

    Raises:
        UserError: there are too few patients for so many folds.
    """
    size = floor((test if test >= 1 else test * len(patients)) + 0.5)
    start = fold * size
    if fold and start + size > len(patients):
        raise UserError(
            f"split.fold={fold} has no test patients: of {len(patients)} patients with masks each fold tests "
            f"on {size}. Ask for fewer folds or a smaller split.test."
        )
    return patients[start:] + patients[:start]


def one_patient_per_image(patients: Mapping[str, str], images: Mapping[str, str]) -> dict[str, str]:
    """`patients` (by case), with those who share an image merged, so that no image is in two splits.

    `images` holds the content digest of each case's voxels.
    """
    merged_into: dict[str, str] = {}

    def resolve(patient: str) -> str:
        while patient in merged_into:
            patient = merged_into[patient]
        return patient

    first_with: dict[str, str] = {}
    for case in sorted(patients):
        patient = resolve(patients[case])
        owner = resolve(first_with.setdefault(images[case], patient))
        if owner != patient:
            merged_into[max(owner, patient)] = min(owner, patient)
    return {case: resolve(patient) for case, patient in patients.items()}


def few_shot(
    index: pd.DataFrame, shots: PositiveInt, unit: Literal["patients", "slices"], seed: int
) -> list[tuple[str, int]]:
    """The (case, z) rows of `shots` patients or slices of the train split, of those with foreground.

    Patients bring all their slices. Fewer shots with the same seed are a subset of more.

    Raises:
        UserError: the train split has fewer than `shots`.
    """
    train = index.loc[index["split"] == "train"].sort_values(by=["case", "z"])
    usable = train.loc[train["foreground_fraction"] > 0]
    slices = {f"{case}/{z}": (case, int(z)) for case, z in zip(usable["case"], usable["z"], strict=True)}
    available = sorted(set(usable["patient"])) if unit == "patients" else list(slices)
    if shots > len(available):
        raise UserError(
            f"{shots} {unit} are asked for, but only {len(available)} of the train split have foreground. "
            "Ask for fewer, or give split.train more patients."
        )
    drawn = _shuffled(available, f"few-shot/{unit}/{seed}")[:shots]
    if unit == "slices":
        return [slices[key] for key in drawn]
    rows: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for patient, case, z in zip(train["patient"], train["case"], train["z"], strict=True):
        rows[patient].append((case, int(z)))
    return [row for patient in drawn for row in rows[patient]]


def _shuffled(items: Iterable[str], seed: str) -> list[str]:
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}/{item}".encode()).digest())
