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
from samssl.config import PositiveInt, UserError, config
from samssl.data.classes import Classes, ClassMap
from samssl.data.slices import SliceStore
from samssl.files import written_aside
from samssl.interactive import Asking, click_rows, prompt_dice, prompted_cases
from samssl.metrics import case_dice, label_dice
from samssl.predict import Predictor, score_case
from samssl.statistics import Interval, mean_interval
from samssl.train.prompt_pictures import click_curve

CURVE_FILE = "clicks.png"
"""Dice against the number of clicks."""

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


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases."""

    table: pd.DataFrame
    """One row per case and class, as `samssl.predict.score_case` gives it; of a promptable bundle also per
    prompt, as in `samssl.interactive.PromptedCase`."""
    interval: Interval
    """Mean Dice over cases with its 95 % bootstrap interval; of a promptable bundle over 1, 2, ... clicks."""

    def metrics(self, split: str) -> dict[str, float]:
        """The scores by metric name."""
        return {
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
            scored = prompted_scores(segmenter, store, cases, asking)
        else:
            size, classes = bundle.model.image_size, bundle.run_classes
            predictor = Predictor(segmenter, store, size, device, bundle.input, classes)
            predicted = ((case, predictor.segment_case(case)) for case in cases)
            scored = class_scores(store, predicted, classes)
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
    store: SliceStore, predicted: Iterable[tuple[str, ClassMap]], classes: Classes | None = None
) -> Iterator[Scored]:
    """Predicted cases with their scores."""
    for case, prediction in predicted:
        yield case, prediction, score_case(store, case, prediction, classes)


def prompted_scores(segmenter: Any, store: SliceStore, cases: list[str], asking: Asking) -> Iterator[Scored]:
    """Cases with what simulated prompts gave, and their scores."""
    for case, found in prompted_cases(segmenter, store, cases, asking):
        yield case, found.prediction, found.table


def write_scores(out: Path, scored: Iterable[Scored], total: int) -> Evaluation:
    """Write `cases.parquet`, `predictions.zarr` and, of prompts, `clicks.png`, as `total` cases come."""
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
    return Evaluation(table, mean_interval(case_dice(click_rows(table)).to_numpy()))


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
