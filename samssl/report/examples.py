"""The worst, the median and the best case, and further bad ones, as pictures over the image."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Integer, Num

from samssl.config import UserError
from samssl.data.classes import Classes, run_classes
from samssl.data.slices import SliceStore
from samssl.report.figures import label_color, marked, overlay
from samssl.report.study import Evaluation, Study
from samssl.report.verdict import arm_name

LabelSlice = Integer[np.ndarray, "H W"]
MOST_FAILURES = 4
"""Further bad cases that are shown, worst first."""


@dataclass(frozen=True)
class Panel:
    """One picture of an example."""

    title: str
    uri: str
    alt: str


@dataclass(frozen=True)
class Example:
    """One case: above the labels of reference and predictions, below the image and where each is wrong."""

    rank: str
    case: str
    dice: Mapping[str, float]
    """Arm -> Dice of the whole volume."""
    z: int
    num_slices: int
    above: tuple[Panel, ...]
    below: tuple[Panel, ...]


@dataclass(frozen=True)
class Sources:
    """What pictures of cases are made from."""

    store: SliceStore
    root: Path
    """Folder of the study."""
    evaluations: Mapping[str, Evaluation]
    """By the name of the arm, the one that is judged first."""
    classes: Classes


def open_store(folder: Path) -> tuple[SliceStore | None, str]:
    """The study's slice store, or None and the sentence that says why there is none."""
    if not folder.is_dir():
        return None, "The study folder holds no slice store, so no scans can be shown."
    try:
        return SliceStore(folder), ""
    except UserError as error:
        return None, f"The slice store cannot be read, so no scans are shown. {error}"


def legend(study: Study, store: SliceStore) -> dict[str, str]:
    """Class name -> its colour in the overlays."""
    names = run_classes(store.labels, study.classes, study.overlapping).names
    return {name: label_color(class_id) for class_id, name in names.items()}


def make_examples(
    study: Study, summary: Mapping[str, Any], arms: list[str], store: SliceStore
) -> tuple[list[Example], list[Example]]:
    """Worst, median and best case of the treatment (of the first of `arms`, where nothing is compared).

    Then further cases, worst first, with the slice that is most wrong; none that are without a fault.
    """
    if paired := summary["paired"]:
        pictured, per_case, seed = (
            [paired["treatment"], paired["baseline"]],
            paired["per_case"],
            paired["seeds"][0],
        )
    else:
        pictured, seed = arms[:1], next(iter(study.evaluations[arms[0]]))
        per_case = {case: {arms[0]: dice} for case, dice in summary["arms"][arms[0]]["per_case"].items()}
    evaluations = {arm_name(arm): study.evaluations[arm][seed] for arm in pictured}
    classes = run_classes(store.labels, study.classes, study.overlapping)
    sources = Sources(store, study.root, evaluations, classes)
    judged = {case: dice[pictured[0]] for case, dice in per_case.items()}
    chosen = choose_cases(judged)
    made = [make_example(rank, case, per_case[case], sources) for rank, case in chosen.items()]
    further = [
        make_example(f"{place}.", case, per_case[case], sources, most_wrong=True)
        for place, case in further_failures(judged, chosen.values()).items()
    ]
    return [example for example in made if example], [example for example in further if example]


def choose_cases(dice: Mapping[str, float]) -> dict[str, str]:
    """`{"Worst": case, "Median": case, "Best": case}` by Dice; fewer where there are fewer cases."""
    ordered = sorted(dice, key=lambda case: (-dice[case], case))
    if len(ordered) < 3:
        return dict(reversed([*zip(("Best", "Worst"), ordered, strict=False)]))
    return {"Worst": ordered[-1], "Median": ordered[len(ordered) // 2], "Best": ordered[0]}


def further_failures(dice: Mapping[str, float], shown: Collection[str]) -> dict[int, str]:
    """Place from the end -> case, for the worst cases that are not in `shown` and not perfect."""
    ordered = sorted(dice, key=lambda case: (dice[case], case))
    worse = {place: case for place, case in enumerate(ordered, start=1) if dice[case] < 1}
    left = [(place, case) for place, case in worse.items() if case not in shown]
    return dict(left[:MOST_FAILURES])


def make_example(
    rank: str, case: str, dice: Mapping[str, float], sources: Sources, *, most_wrong: bool = False
) -> Example | None:
    """The pictures of one case in the slice with most reference foreground, one column an evaluation.

    With `most_wrong` in the slice in which the first evaluation has most errors. Regions that overlap are
    painted over each other, the largest first. None where the store cannot show the case; an arm that kept
    no prediction of it is left out.
    """
    try:
        mask = sources.store.mask(case)
    except UserError:
        return None
    if mask is None:
        return None
    reference = sources.classes.reference(mask)
    found = {
        name: sources.store.judged(case, kept)
        for name, ran in sources.evaluations.items()
        if (kept := read_prediction(sources.root / ran.stage.folder, case)) is not None
        and kept.shape == reference.shape
    }
    shown = reference > 0
    if most_wrong and found:
        shown = next(iter(found.values())) != reference
    z = int(shown.reshape(-1, *mask.shape).sum(axis=(0, 2, 3)).argmax())
    labels = {
        name: painted(volume[..., z, :, :], sources.classes)
        for name, volume in {"Reference": reference, **found}.items()
    }
    above, below = _panels(case, z, labels, sources.store)
    return Example(rank, case, dice, z, len(mask), above, below)


def _panels(
    case: str, z: int, labels: Mapping[str, LabelSlice], store: SliceStore
) -> tuple[tuple[Panel, ...], tuple[Panel, ...]]:
    """Labels over the image, and below the image and where each of the labels is wrong."""
    info = store.info(case)
    window = crop_around(labels.values())
    image = scale(store.image_slice(case, z), info)[window]
    aspect = float(info["spacing_y_mm"] / info["spacing_x_mm"])
    where = f"slice {z + 1} of case {case}"
    above = tuple(
        Panel(name, overlay(image, seen[window], aspect), f"Labels of {name} over {where}")
        for name, seen in labels.items()
    )
    nothing = np.zeros(image.shape, dtype=bool)
    below = [Panel("Image", marked(image, nothing, aspect), f"The image alone, {where}")]
    for name in list(labels)[1:]:
        drawn = marked(image, (labels[name] != labels["Reference"])[window], aspect)
        below.append(
            Panel(f"{name}: differences", drawn, f"Where {name} differs from the reference, {where}")
        )
    return above, tuple(below)


def painted(seen: np.ndarray, classes: Classes) -> LabelSlice:
    """A slice of class ids [H, W]; of regions [K, H, W] the largest first, the others over it."""
    if not classes.overlapping:
        return seen
    painting = np.zeros(seen.shape[1:], np.int32)
    for class_id, inside in sorted(
        zip(classes.names, seen, strict=True), key=lambda region: -region[1].sum()
    ):
        painting[inside] = class_id
    return painting


def read_prediction(folder: Path, case: str) -> np.ndarray | None:
    """A case's prediction [..., Z, H, W], or None where the evaluation kept no such array."""
    import zarr
    import zarr.errors

    try:
        return np.asarray(zarr.open_array(folder / "predictions.zarr" / case, mode="r")[...])
    except (OSError, zarr.errors.BaseZarrError):
        return None


def scale(image: Num[np.ndarray, "H W"], info: pd.Series) -> Float[np.ndarray, "H W"]:
    """Native units to [0, 1] by the case's own display window."""
    low, high = float(info["intensity_low"]), float(info["intensity_high"])
    return np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)


def crop_around(masks: Iterable[LabelSlice], margin: float = 0.4) -> tuple[slice, slice]:
    """Rows and columns of all foreground, widened on each side by `margin` of its extent.

    Small structures would be a speck in the whole field of view; at least a third of it stays visible.
    """
    foreground = np.any([mask > 0 for mask in masks], axis=0)
    return (_widened(foreground.any(axis=1), margin), _widened(foreground.any(axis=0), margin))


def _widened(occupied: Bool[np.ndarray, " N"], margin: float) -> slice:
    size, (indices,) = len(occupied), np.nonzero(occupied)
    if not len(indices):
        return slice(0, size)
    first, last = int(indices[0]), int(indices[-1]) + 1
    length = min(size, max(round((last - first) * (1 + 2 * margin)), -(-size // 3)))
    start = min(max(0, (first + last - length) // 2), size - length)
    return slice(start, start + length)
