"""What the fingerprints of a data set say: what may be wrong with it, and which settings suit it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samssl.data.copies import Pair
from samssl.data.fingerprint import SIDES_PX, CaseFingerprint, label_totals
from samssl.data.inspection import Inspection
from samssl.data.intensity import WINDOWS_HU

_OFF = 2.5
"""Times the median from which on a spacing or size stands out."""
_LOST = 0.05
"""Share of vanishing objects, specks aside, that is put up with."""


@dataclass(frozen=True)
class Finding:
    """One thing that a person should look at."""

    serious: bool
    """It makes results wrong, not only worse."""
    text: str
    cases: tuple[str, ...] = ()


def find_all(seen: Inspection, copies: Sequence[Pair]) -> list[Finding]:
    """Everything that stands out, serious things first."""
    checks = (_copies(copies), _patients(seen), _masks(seen), _objects(seen), _geometry(seen), _others(seen))
    found = [finding for check in checks for finding in check]
    return sorted(found, key=lambda finding: not finding.serious)


def _copies(pairs: Sequence[Pair]) -> Iterator[Finding]:
    for across, text in (
        (
            True,
            "pairs of images in different splits look like copies: what is tested on may have been learnt",
        ),
        (False, "pairs of images look like copies of each other"),
    ):
        chosen = [pair for pair in pairs if pair.across == across]
        if chosen:
            same = sum(pair.same_voxels for pair in chosen)
            other = sum(pair.patients[0] != pair.patients[1] for pair in chosen)
            yield Finding(
                across or bool(other and same),
                f"{len(chosen)} {text} ({same} voxel by voxel; {other} under different patients).",
                tuple(dict.fromkeys(case for pair in chosen for case in (pair.first, pair.second))),
            )


def _patients(seen: Inspection) -> Iterator[Finding]:
    splits = defaultdict(set)
    for entry in seen.cases:
        splits[entry.patient].add(entry.split)
    torn = {patient for patient, found in splits.items() if len(found) > 1}
    if torn and seen.store:
        cases = tuple(entry.case for entry in seen.cases if entry.patient in torn)
        yield Finding(True, f"{len(torn)} patients are in several splits.", cases)
    if len(splits) == len(seen.cases) > 1 and not seen.store:
        yield Finding(
            False,
            "No two scans are of one patient, as far as is known. If some are of one person, say so "
            "(data.patient_pattern, data.cases_per_patient, or a column patient), or tests will be too good.",
        )


def _masks(seen: Inspection) -> Iterator[Finding]:
    labelled = [entry for entry in seen.cases if entry.labelled]
    kinds = {
        "masks are empty: nothing is drawn": [
            entry.case for entry in labelled if not entry.labels and not entry.mask_is_constant
        ],
        "masks are one label all over": [entry.case for entry in labelled if entry.mask_is_constant],
        "masks have a label that touches all four borders of a slice, as if it were the background": [
            entry.case
            for entry in labelled
            if not entry.mask_is_constant
            and any(facts.touches_all_borders for facts in entry.labels.values())
        ],
    }
    for number, (text, cases) in enumerate(kinds.items()):
        if cases:
            yield Finding(number > 0, f"{len(cases)} of {len(labelled)} {text}.", tuple(cases))
    totals = label_totals(labelled)
    missing = [name for label, name in seen.labels.items() if label and label not in totals]
    if labelled and missing:
        yield Finding(False, f"No mask shows {_listed(missing)}: these labels cannot be learnt or tested.")
    if len(labelled) < len(seen.cases):
        yield Finding(False, f"{len(seen.cases) - len(labelled)} of {len(seen.cases)} scans have no mask.")


def _objects(seen: Inspection) -> Iterator[Finding]:
    totals = label_totals(seen.cases)
    specks = {label: facts for label, facts in totals.items() if facts.specks > 0.02 * facts.objects}
    if specks:
        listed = [
            f"{seen.labels.get(label, str(label))} ({facts.specks} of {facts.objects} parts)"
            for label, facts in specks.items()
        ]
        cases = tuple(
            entry.case for entry in seen.cases if any(facts.specks for facts in entry.labels.values())
        )
        yield Finding(False, f"Specks of one or two pixels are labelled: {_listed(listed)}.", cases)


def _geometry(seen: Inspection) -> Iterator[Finding]:
    planes = Counter(entry.plane for entry in seen.cases)
    if len(planes) > 1:
        listed = ", ".join(f"{count} {plane}" for plane, count in planes.most_common())
        rare = tuple(entry.case for entry in seen.cases if entry.plane != planes.most_common()[0][0])
        yield Finding(False, f"Volumes are cut in different planes: {listed}. data.axis gives all one.", rare)
    modalities = Counter(entry.modality for entry in seen.cases)
    if len(modalities) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in modalities.most_common())
        yield Finding(False, f"Several modalities: {listed}.")
    for what, values in (
        ("pixel spacing", [max(entry.spacing_mm[1:]) for entry in seen.cases]),
        ("longest side", [float(max(entry.shape[1:])) for entry in seen.cases]),
    ):
        ratio = np.array(values) / np.median(values)
        off = np.flatnonzero((ratio > _OFF) | (ratio < 1 / _OFF))
        if len(off):
            median = float(np.median(values))
            text = f"{len(off)} scans have a {what} more than {_OFF:g} times off the median {median:g}."
            yield Finding(False, text, tuple(seen.cases[place].case for place in off))


def _others(seen: Inspection) -> Iterator[Finding]:
    if seen.rejected:
        yield Finding(False, f"{len(seen.rejected)} files cannot be used; the list below says why.")


@dataclass(frozen=True)
class Recommendation:
    """A setting that suits the data set, and why."""

    stage: str
    """prepare or finetune."""
    field: str
    value: Any
    reason: str


def recommend(seen: Inspection) -> list[Recommendation]:
    """Settings that follow from the fingerprints."""
    return [*_input_size(seen), *_window(seen), *_axis(seen), *_balance(seen)]


def _input_size(seen: Inspection) -> Iterator[Recommendation]:
    longest = float(np.median([max(entry.shape[1:]) for entry in seen.cases]))
    totals = label_totals(seen.cases).values()
    specks = sum(facts.specks for facts in totals)
    objects = sum(facts.objects for facts in totals) - specks
    lost = {side: max(0, sum(facts.vanish[str(side)] for facts in totals) - specks) for side in SIDES_PX}
    fitting = [side for side in SIDES_PX if side >= 0.75 * longest and lost[side] <= _LOST * max(objects, 1)]
    side = fitting[0] if fitting else SIDES_PX[-1]
    share = (
        f"{lost[side]} of {objects} objects, specks aside, vanish at the loss"
        if objects
        else "nothing is labelled"
    )
    reason = f"slices are {longest:g} px long (median); at {side} px {share}"
    yield Recommendation("finetune", "model.image_size", side, reason)
    if objects and lost[side]:
        text = f"{lost[side]} of {objects} objects would vanish where labels are made smaller"
        yield Recommendation("finetune", "loss.keep_small", True, text)


def _window(seen: Inspection) -> Iterator[Recommendation]:
    values = [value for entry in seen.cases if entry.modality == "CT" for value in entry.foreground]
    if not values:
        return
    low, high = np.percentile(values, [0.5, 99.5]).tolist()
    margin = max(0.5 * (high - low), 40.0)
    wide = (float(np.floor((low - margin) / 5) * 5), float(np.ceil((high + margin) / 5) * 5))
    name, overlap = max(
        ((name, _overlap(window, wide)) for name, window in WINDOWS_HU.items()), key=lambda pair: pair[1]
    )
    chosen = WINDOWS_HU[name] if overlap >= 0.6 else wide
    reason = f"labelled voxels lie between {low:.0f} and {high:.0f} HU (0.5 and 99.5 %)"
    if chosen != wide:
        reason += f"; the {name.replace('_', ' ')} window shows them with what is around"
    yield Recommendation("prepare", "data.window_hu", [float(value) for value in chosen], reason)


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return max(shared, 0.0) / (max(one[1], other[1]) - min(one[0], other[0]))


def _axis(seen: Inspection) -> Iterator[Recommendation]:
    planes = Counter(entry.plane for entry in seen.cases if entry.plane != "image")
    if planes:
        plane, count = planes.most_common(1)[0]
        reason = f"{count} of {planes.total()} volumes are thinnest, or best, cut that way"
        yield Recommendation("prepare", "data.axis", plane, reason)


def _balance(seen: Inspection) -> Iterator[Recommendation]:
    labelled = [entry for entry in seen.cases if entry.labelled]
    slices = sum(entry.shape[0] for entry in labelled)
    totals = label_totals(labelled)
    if not totals or not slices:
        return
    most = max(facts.slices for facts in totals.values())
    least = min(facts.slices for facts in totals.values())
    if len(totals) > 1 and least < 0.25 * most:
        reason = f"the rarest label is in {least} slices, the commonest in {most}"
        yield Recommendation("finetune", "data.sampling.balance", "class", reason)
    if most < 0.25 * slices:
        reason = f"the commonest label is in {most} of {slices} slices"
        yield Recommendation("finetune", "data.sampling.foreground_share", 0.5, reason)


def foreground_shares(cases: Sequence[CaseFingerprint]) -> dict[int, float]:
    """Share of the voxels of labelled cases that each label has."""
    labelled = [entry for entry in cases if entry.labelled]
    voxels = sum(int(np.prod(entry.shape)) for entry in labelled)
    return {label: facts.voxels / voxels for label, facts in label_totals(labelled).items()}


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
