"""How many runs a study is, and what they would cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from samssl.cluster.study_design import (
    EXPANSIVE,
    SSL,
    StudyConfig,
    arm_folder,
    arms_of,
    expansive_of,
    finetune_of,
    pretrain_of,
    settings_of,
    start_folder,
)
from samssl.cluster.trials import stage_status
from samssl.config import config_digest
from samssl.files import files_below
from samssl.train.estimate import NOTHING, Estimate, estimate_finetune, estimate_pretrain
from samssl.train.memory import GIB
from samssl.train.pretrain import PretrainConfig

UTILISATION = 0.35
"""Share of a GPU's peak that training reaches; an assumption."""
SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Planned:
    """One run of the study."""

    kind: str
    folder: Path
    """Of its last stage."""
    estimate: Estimate | None
    """None where nothing is known of what it costs."""


def describe_study(config: StudyConfig) -> str:
    """Runs by kind, those that have finished, GPU-hours and disk as text."""
    rows = []
    for run in planned_runs(config):
        known = run.estimate or NOTHING
        hours = known.flops / (config.gpu_tflops * 1e12 * UTILISATION) / SECONDS_AN_HOUR
        done = stage_status(run.folder) == "finished"
        rows.append((run.kind, 1, int(done), hours, 0.0 if done else hours, known.bytes_kept / GIB))
    table = pd.DataFrame(rows, columns=["kind", "runs", "finished", "GPU-hours", "still to do", "GiB"])
    by_kind = table.groupby("kind", sort=False).sum()
    by_kind.loc["all"] = by_kind.sum()
    by_kind = by_kind.astype({"runs": int, "finished": int}).rename_axis(None)
    return "\n".join(
        [
            f"{config.name}: {len(settings_of(config))} setting(s), {len(arms_of(config))} arms, "
            f"{len(config.seeds)} seed(s)",
            by_kind.to_string(float_format=lambda value: f"{value:.3g}"),
            f"GPU-hours: operations of training at {UTILISATION:.0%} of {config.gpu_tflops:g} TFLOP/s "
            "(gpu_tflops); reading, validation and nnU-Net are not in them.",
            f"GiB: weights and states, without predictions and stores. {_stores(config)}",
        ]
    )


def planned_runs(config: StudyConfig) -> Iterator[Planned]:
    """Every run of the study once, what arms start from first."""
    pretrainings: dict[str, Estimate] = {}
    runs = [
        (setting, name, arm, seed)
        for setting in settings_of(config)
        for seed in config.seeds
        for name, arm in arms_of(config).items()
    ]
    seen = set[Path]()
    for setting, _, arm, seed in runs:
        folder = start_folder(config, setting, arm, seed)
        if folder is None or arm.trainer == "nnunet" or folder in seen:
            continue
        seen.add(folder)
        if arm.init == SSL:
            estimate = _pretraining(pretrain_of(config, setting, arm, seed), pretrainings)
            yield Planned("pretraining", folder, estimate)
        if arm.init == EXPANSIVE:
            yield Planned("expansive", folder, estimate_finetune(expansive_of(config, setting, arm, seed)))
    for setting, name, arm, seed in runs:
        folder = arm_folder(setting, name, seed) / "evaluate"
        if arm.trainer == "nnunet":
            yield Planned("nnU-Net", folder, None)
        else:
            yield Planned("fine-tuning", folder, estimate_finetune(finetune_of(config, setting, name, seed)))


def _pretraining(config: PretrainConfig, known: dict[str, Estimate]) -> Estimate:
    """Measured once for all that differ in their folders and seeds only."""
    apart = ("out", "data.store", "model.init_seed", "model.checkpoint", "optim.seed")
    digest = config_digest(config, ignore=apart)
    if digest not in known:
        known[digest] = estimate_pretrain(config)
    return known[digest]


def _stores(config: StudyConfig) -> str:
    """What the stores that are there take."""
    stores = {setting.store for setting in settings_of(config)}
    there = [store for store in stores if store.is_dir()]
    size = sum(file.stat().st_size for store in there for file in files_below(store))
    return f"Stores: {len(there)} of {len(stores)} are prepared, {size / GIB:.2f} GiB."
