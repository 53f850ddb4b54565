"""Volume-level scores of a model bundle on the held-out cases, at native resolution."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from samssl.bundle import load_segmenter, read_bundle
from samssl.config import UserError, config
from samssl.data.slices import SliceStore
from samssl.files import written_aside
from samssl.metrics import case_dice, label_dice
from samssl.predict import score_case, segment_cases
from samssl.statistics import Interval, mean_interval


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


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases."""

    table: pd.DataFrame
    """One row per case and label, as `samssl.predict.score_case` gives it."""
    interval: Interval
    """Mean Dice over cases with its 95 % bootstrap interval."""

    def metrics(self, split: str) -> dict[str, float]:
        """The scores by metric name."""
        return {
            f"{split}/dice": self.interval.mean,
            f"{split}/dice_ci95_low": self.interval.low,
            f"{split}/dice_ci95_high": self.interval.high,
            f"{split}/cases": float(self.interval.cases),
            **label_dice(self.table, f"{split}/dice"),
        }


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Segment and score every labelled case of the split; writes what `write_scores` does."""
    store = SliceStore(config.store)
    cases = labelled_cases(store, config.split)
    bundle = read_bundle(config.bundle)
    if bundle.labels != store.labels:
        raise UserError(
            f"The bundle {config.bundle} segments {bundle.labels}, but the store {config.store} is labelled "
            f"{store.labels}. Give a bundle and a store of the same label map."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segmenter = load_segmenter(config.bundle, config.base).to(device)
    predicted = segment_cases(segmenter, store, cases, bundle.model.image_size, device, bundle.input)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return write_scores(config.out, store, predicted, len(cases))


def labelled_cases(store: SliceStore, split: str) -> list[str]:
    """The cases of the split that have masks.

    Raises:
        UserError: there are none.
    """
    cases = [case for case in store.cases(split) if store.rows.labelled(store.first_row(case))]
    if not cases:
        raise UserError(f"The store {store.root} has no labelled cases in split '{split}'.")
    return cases


def write_scores(
    out: Path, store: SliceStore, predicted: Iterable[tuple[str, np.ndarray]], total: int
) -> Evaluation:
    """Score `total` predicted cases as they come; writes `cases.parquet` and `predictions.zarr`."""
    tables = []
    with written_aside(out / "predictions.zarr") as folder:
        for case, prediction in tqdm(predicted, total=total, desc="evaluate", unit="case", mininterval=2):
            _save_prediction(folder / case, prediction)
            tables.append(score_case(store, case, prediction))
    table = pd.concat(tables, ignore_index=True)
    with written_aside(out / "cases.parquet") as path:
        table.to_parquet(path)
    return Evaluation(table, mean_interval(case_dice(table).to_numpy()))


def _save_prediction(path: Path, prediction: np.ndarray) -> None:
    import zarr

    array = zarr.create_array(
        path,
        shape=prediction.shape,
        chunks=(1, *prediction.shape[1:]),
        shards=prediction.shape,
        dtype=prediction.dtype,
    )
    array[:] = prediction
