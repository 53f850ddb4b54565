"""Volume-level scores of a model bundle on the held-out cases, at native resolution."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from samssl.bundle import load_segmenter, read_bundle
from samssl.config import PositiveFloat, PositiveInt, UserError, config
from samssl.data.classes import Classes, ClassMap, run_classes
from samssl.data.slices import SliceStore
from samssl.files import write_table, written_aside
from samssl.interactive import Asking, click_rows, prompt_dice, prompted_cases
from samssl.metrics import case_dice, label_dice
from samssl.predict import Predictor, score_case
from samssl.scores import score_metrics, score_sheet, subgroup_columns, summarize_scores, with_volumes
from samssl.shapes import SURFACE_TOLERANCE_MM, compare_shapes
from samssl.statistics import Interval, patient_interval
from samssl.train.prompt_pictures import click_curve

CURVE_FILE = "clicks.png"
"""Dice against the number of clicks."""
SCORES_FILE = "scores"
"""Means and intervals of every score, with the suffixes .csv, .md and .tex."""

Scored = tuple[str, ClassMap, pd.DataFrame]
"""A case, its prediction and its rows of the table."""


@config
class EvaluateConfig:
    """A model bundle and a slice store to a table of per-case scores."""

    out: Path
    """Folder of this run."""
    bundle: Path
    """The bundle that `finetune` wrote."""
    base: Path | None = None
    """The bundle's base weights, if they are not where they were when it was made."""
    store: Path
    """The slice store."""
    split: str = "test"
    """Split whose labelled cases are scored."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass. bf16 is faster on GPUs, and on CPUs that multiply matrices in it."""
    clicks: PositiveInt = 8
    """Most clicks on each object of each slice, of a bundle that is promptable."""
    surface_tolerance_mm: PositiveFloat = SURFACE_TOLERANCE_MM
    """Surfaces no farther apart than this agree, for the normalised surface Dice (NSD). Choose what two
    experts would differ by."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases."""

    table: pd.DataFrame
    """One row per case and class, as `samssl.predict.score_case` gives it; of a promptable bundle also per
    prompt, as in `samssl.interactive.PromptedCase`."""
    interval: Interval
    """Mean Dice over cases with its 95 % bootstrap interval; of a promptable bundle over 1, 2, ... clicks."""
    scores: pd.DataFrame
    """`samssl.scores.summarize_scores` of the table."""

    def metrics(self, split: str) -> dict[str, float]:
        """The scores by metric name."""
        return {
            **score_metrics(self.scores, split),
            f"{split}/dice": self.interval.mean,
            f"{split}/dice_ci95_low": self.interval.low,
            f"{split}/dice_ci95_high": self.interval.high,
            f"{split}/cases": float(self.interval.cases),
            **label_dice(click_rows(self.table), f"{split}/dice"),
            **prompt_dice(self.table, f"{split}/dice"),
        }


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Segment and score every labelled case of the split; writes what `write_scores` does."""
    store = SliceStore(config.store)
    cases = labelled_cases(store, config.split)
    bundle = read_bundle(config.bundle)
    if bundle.mode == "automatic" and bundle.labels != store.labels:
        raise UserError(
            f"The bundle {config.bundle} segments {bundle.labels}, but the store {config.store} is labelled "
            f"{store.labels}. Give a bundle and a store of the same label map."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segmenter = load_segmenter(config.bundle, config.base).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        if bundle.mode == "promptable":
            asking = Asking(bundle.model.image_size, bundle.input, config.clicks, device)
            scored = prompted_scores(segmenter, store, cases, asking, config.surface_tolerance_mm)
        else:
            size, classes = bundle.model.image_size, bundle.run_classes
            predictor = Predictor(segmenter, store, size, device, bundle.input, classes)
            predicted = ((case, predictor.segment_case(case)) for case in cases)
            scored = class_scores(store, predicted, config.surface_tolerance_mm, classes)
        return write_scores(config.out, scored, len(cases))


def labelled_cases(store: SliceStore, split: str) -> list[str]:
    """The cases of the split that have masks.

    Raises:
        UserError: there are none.
    """
    cases = [case for case in store.cases(split) if store.rows.labelled(store.first_row(case))]
    if not cases:
        raise UserError(f"The store {store.root} has no labelled cases in split '{split}'.")
    return cases


def class_scores(
    store: SliceStore,
    predicted: Iterable[tuple[str, ClassMap]],
    tolerance_mm: float,
    classes: Classes | None = None,
) -> Iterator[Scored]:
    """Predicted cases with their scores."""
    classes = classes or run_classes(store.labels)
    for case, prediction in predicted:
        table = score_case(store, case, prediction, classes)
        yield case, prediction, with_shapes(table, store, case, prediction, classes, tolerance_mm)


def prompted_scores(
    segmenter: Any, store: SliceStore, cases: list[str], asking: Asking, tolerance_mm: float
) -> Iterator[Scored]:
    """Cases with what simulated prompts gave, and their scores; those of shapes after the last click only."""
    classes = run_classes(store.labels)
    for case, found in prompted_cases(segmenter, store, cases, asking):
        last = (found.table["prompt"] == "clicks") & (found.table["clicks"] == asking.clicks)
        table = found.table[last]
        scored = with_shapes(table, store, case, found.prediction, classes, tolerance_mm)
        others = with_volumes(found.table[~last], _spacing_mm(store, case))
        yield case, found.prediction, pd.concat([others, scored], ignore_index=True)


def with_shapes(
    table: pd.DataFrame,
    store: SliceStore,
    case: str,
    prediction: ClassMap,
    classes: Classes,
    tolerance_mm: float,
) -> pd.DataFrame:
    """The rows of one case, one a class, with every further score, the tolerance and the case's subgroups."""
    labels = store.mask(case)
    assert labels is not None, f"case {case} has no reference mask"
    reference, spacing_mm = classes.reference(labels), _spacing_mm(store, case)
    prediction = store.judged(case, prediction)
    shapes = []
    for class_id in table["label_id"]:
        found, wanted = (classes.mask_of(mask, class_id) for mask in (prediction, reference))
        shapes.append(compare_shapes(found, wanted, spacing_mm, tolerance_mm))
    return (
        with_volumes(table, spacing_mm)
        .join(pd.DataFrame(shapes, index=table.index))
        .assign(surface_tolerance_mm=tolerance_mm, **_subgroups(store, case))
    )


def _subgroups(store: SliceStore, case: str) -> dict[str, str]:
    info = store.info(case)
    return {name: str(info[name]) for name in subgroup_columns(store.index)}


def _spacing_mm(store: SliceStore, case: str) -> tuple[float, float, float]:
    info = store.info(case)
    z, y, x = (float(info[f"spacing_{axis}_mm"]) for axis in "zyx")
    return z, y, x


def write_scores(out: Path, scored: Iterable[Scored], total: int) -> Evaluation:
    """Write `cases.parquet`, `scores.*`, `predictions.zarr` and, of prompts, `clicks.png`, as cases come."""
    tables = []
    with written_aside(out / "predictions.zarr") as folder:
        for case, prediction, table in tqdm(scored, total=total, desc="evaluate", unit="case", mininterval=2):
            _save_prediction(folder / case, prediction)
            tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    with written_aside(out / "cases.parquet") as path:
        table.to_parquet(path)
    if "prompt" in table:
        _save_picture(out / CURVE_FILE, click_curve(table))
    scores = summarize_scores([table])
    write_table(out / SCORES_FILE, scores, score_sheet(scores))
    return Evaluation(table, _dice_interval(click_rows(table)), scores)


def _dice_interval(table: pd.DataFrame) -> Interval:
    dice = case_dice(table)
    patients = table.groupby("case")["patient"].first()[dice.index]
    return patient_interval(dice.to_numpy(), patients.astype(str).tolist())


def _save_picture(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    with written_aside(path) as partial:
        Image.fromarray(picture).save(partial, "PNG")


def _save_prediction(path: Path, prediction: ClassMap) -> None:
    """Class ids [Z, H, W], or regions [K, Z, H, W] of booleans; one chunk a slice."""
    import zarr

    array = zarr.create_array(
        path,
        shape=prediction.shape,
        chunks=(*(1 for _ in prediction.shape[:-2]), *prediction.shape[-2:]),
        shards=prediction.shape,
        dtype=prediction.dtype,
    )
    array[:] = prediction
