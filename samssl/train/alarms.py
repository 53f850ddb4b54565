"""Alarms in plain words while a run trains: each once, printed by rank 0 and kept as a metric."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from samssl.interactive import click_rows
from samssl.metrics import case_dice, pooled_dice
from samssl.train.context import RunContext
from samssl.train.optim import FitConfig
from samssl.train.progress import Progress, log

LOOKED_AT = 64
"""Training slices that are segmented to compare their Dice with that of validation, at most."""
FLAT_LOSSES = 8
"""Logged losses that are needed to call them flat."""
FLAT_SHARE = 0.02
"""A loss that has fallen by less than this share is flat."""
GAP = 0.25
"""Dice that validation may lie below training."""


def sound(progress: Progress, alarms: Mapping[str, str], context: RunContext) -> None:
    """Tell each of `alarms` (name to sentence), unless it has been told in this run before."""
    told = {metric for _, metric, _ in progress.history}
    for name, sentence in alarms.items():
        if f"alarm/{name}" not in told:
            log(progress, {f"alarm/{name}": 1.0}, context)
            if context.rank == 0:
                print(f"ALARM at step {progress.step}: {sentence}", flush=True)


def loss_alarms(progress: Progress, fit_config: FitConfig) -> dict[str, str]:
    """Whether the training loss is where it was at the beginning, once the warm-up is over."""
    losses = [value for _, metric, value in progress.history if metric == "train/loss"]
    if progress.step <= fit_config.warmup_steps or len(losses) < FLAT_LOSSES:
        return {}
    quarter = len(losses) // 4
    first, last = float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:]))
    if first - last > FLAT_SHARE * abs(first):
        return {}
    return {
        "loss_flat": f"the training loss does not fall: it was {first:.4f} at first and is {last:.4f} now. "
        "Try another optim.lr, and check that the labels lie on the images."
    }


def validation_alarms(table: pd.DataFrame, learnt: pd.DataFrame | None) -> dict[str, str]:
    """What is wrong with predictions of the validation cases, beside those of training slices (`learnt`).

    Both are tables of `samssl.predict.score_case`.
    """
    alarms = _prediction_alarms(table)
    return alarms if learnt is None else alarms | _gap_alarms(pooled_dice(table), pooled_dice(learnt))


def prompt_alarms(table: pd.DataFrame) -> dict[str, str]:
    """What is wrong with the answers to prompts: rows of `samssl.interactive.prompted_cases`."""
    clicks = click_rows(table)
    last = clicks[clicks["clicks"] == clicks["clicks"].max()]
    if not last["predicted_voxels"].any():
        return {
            "predictions_empty": "every answer to the prompts of the validation cases is empty. Where this "
            "stays so, try another optim.lr."
        }
    first = case_dice(clicks[clicks["clicks"] == clicks["clicks"].min()]).mean()
    if case_dice(last).mean() >= first:
        return {}
    return {
        "clicks_do_not_help": "Dice of the validation cases falls with the number of clicks. Raise "
        "prompts.corrections, so that training answers more of them."
    }


def is_looked_at(step: int, fit_config: FitConfig) -> bool:
    """Whether training slices are segmented at this validation: the 1st, 2nd, 4th, 8th, ... and the last."""
    number = step // fit_config.validate_every
    return step == fit_config.steps or number & (number - 1) == 0


def _prediction_alarms(table: pd.DataFrame) -> dict[str, str]:
    if not table["predicted_voxels"].any():
        return {
            "predictions_empty": "every prediction of the validation cases is empty. Where this stays so, "
            "raise data.sampling.foreground_share, or try another optim.lr."
        }
    voxels = table.groupby("label", sort=False)[["reference_voxels", "predicted_voxels"]].sum()
    missing = voxels.index[(voxels["reference_voxels"] > 0) & (voxels["predicted_voxels"] == 0)]
    if not len(missing):
        return {}
    return {
        "never_predicted": f"no voxel of any validation case is predicted as {_few(list(missing))}. Where "
        "this stays so, set data.sampling.balance=class, or look whether training slices show these classes."
    }


def _gap_alarms(validation: float, training: float) -> dict[str, str]:
    if not training - validation > GAP:
        return {}
    return {
        "validation_below_training": f"Dice is {training:.3f} on training slices but {validation:.3f} on the "
        "validation cases: the training slices are learnt by heart, or the validation cases are unlike them. "
        "More shots, stronger data.augment or fewer trained parameters may help."
    }


def _few(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"
