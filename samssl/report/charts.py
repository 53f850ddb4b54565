"""Which charts and training pictures a study's page has."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samssl.report import figures
from samssl.report.comparison import Chart
from samssl.report.figures import Curve
from samssl.report.lineage import lineage_chart
from samssl.report.study import Study
from samssl.report.verdict import arm_name


@dataclass(frozen=True)
class Reconstruction:
    """One picture that pretraining left."""

    seed: int
    step: int
    uri: str


def result_charts(summary: Mapping[str, Any], arms: list[str]) -> dict[str, str]:
    """`labels`, and where there is a comparison `paired` and `differences`."""
    colors = _arm_colors(arms)
    charts = {
        "labels": figures.dice_by_label(
            {arm_name(arm): summary["arms"][arm]["per_label"] for arm in arms},
            {arm_name(arm): color for arm, color in colors.items()},
        )
    }
    if paired := summary["paired"]:
        roles = [paired["baseline"], paired["treatment"]]
        per_case = pd.DataFrame.from_dict(paired["per_case"], orient="index")
        baseline, treatment = (per_case[arm].rename(arm_name(arm)) for arm in roles)
        entries = [summary["arms"][arm] for arm in roles]
        charts["paired"] = figures.paired_plot(baseline, treatment, entries)
        charts["differences"] = figures.difference_plot(treatment - baseline, paired["ci95"])
    return charts


def training_curves(study: Study, arms: list[str]) -> dict[str, str]:
    """One figure a stage, `pretrain` and `finetune`, where it left a history."""
    pretrain = [study.history(folder) for folder in study.pretrain_folders.values()]
    panels: dict[str, dict[str, list[Curve]]] = {
        "pretrain": {
            "Reconstruction loss": [
                *_curves(pretrain, "train/loss", "training", figures.INK),
                *_curves(pretrain, "val/loss", "validation", figures.GREEN),
            ],
            "Frozen-encoder probe, Dice": _curves(pretrain, "probe/dice", "validation", figures.GREEN),
        },
        "finetune": {"Training loss": [], "Validation Dice": []},
    }
    for arm, color in _arm_colors(arms).items():
        folders = [study.root / "arms" / arm / f"seed{seed}" / "finetune" for seed in study.evaluations[arm]]
        histories = [study.history(folder) for folder in folders]
        for title, metric in (("Training loss", "train/loss"), ("Validation Dice", "val/dice")):
            panels["finetune"][title] += _curves(histories, metric, arm_name(arm), color)
    drawn = {
        stage: {title: lines for title, lines in group.items() if lines} for stage, group in panels.items()
    }
    return {stage: figures.loss_curves(group) for stage, group in drawn.items() if group}


def reconstructions(study: Study) -> list[Reconstruction]:
    """Per seed the first and the last picture of pretraining."""
    shown = []
    for seed, folder in study.pretrain_folders.items():
        paths = sorted((folder / "reconstructions").glob("step_*.png"), key=_step)
        for path in dict.fromkeys([*paths[:1], *paths[-1:]]):
            try:
                shown.append(Reconstruction(seed, _step(path), figures.picture(path.read_bytes())))
            except OSError:  # one picture cut short is no reason to have no report
                continue
    return shown


def lineage(study: Study, arms: list[str]) -> Chart | None:
    """What every result of the study was made from."""
    return lineage_chart(study.stages, _arm_colors(arms))


def _arm_colors(arms: Iterable[str]) -> dict[str, str]:
    return {arm: figures.ARM_COLORS[index % len(figures.ARM_COLORS)] for index, arm in enumerate(arms)}


def _curves(histories: Iterable[pd.DataFrame | None], metric: str, name: str, color: str) -> list[Curve]:
    """One curve a history that holds the metric."""
    chosen = [rows[rows["metric"] == metric].sort_values("step") for rows in histories if rows is not None]
    return [
        Curve(name, color, rows["step"].to_numpy(np.float64), rows["value"].to_numpy(np.float64))
        for rows in chosen
        if len(rows)
    ]


def _step(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else 0
