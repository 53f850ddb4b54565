"""The overview of a study of several settings: `report.html` and tables, above the page of each setting."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from samssl.arms import (
    Pairing,
    compare_pairs,
    pair_arms,
    pooled_difference,
    rank_arms,
    score_arms,
)
from samssl.config import UserError
from samssl.files import write_json, write_table, write_text
from samssl.report.comparison import Chart, cost_plot, critical_difference_diagram, forest_plot
from samssl.report.page import template
from samssl.report.study import Study, read_study
from samssl.report.tables import beside_published, read_published, tidy_scores
from samssl.report.verdict import arm_name
from samssl.statistics import paired_comparison

FEWEST_RANKED = 3
"""Arms from which on ranks say more than a difference."""


@dataclass(frozen=True)
class SettingPage:
    """One setting with finished runs."""

    name: str
    """Data set, fold and shots, as the overview calls it."""
    folder: Path


def write_overview(
    out: Path,
    name: str,
    settings: Sequence[SettingPage],
    treatment: str,
    baseline: str,
    published: Path | None = None,
) -> Path:
    """Write `report.html`, `summary.json` and the tables `scores` and `pairs` into `out`; returns the page.

    Tables are written as `.csv`, `.md` and `.tex`.
    """
    studies = {setting.name: read_study(setting.folder) for setting in settings}
    scores = tidy_scores(studies)
    table = beside_published(score_arms(scores), read_published(published) if published else ())
    arms = list(dict.fromkeys(scores["arm"]))
    notes: list[str] = []
    pairing = _paired(scores, arms, notes)
    pairs = compare_pairs(pairing.by_case) if pairing else pd.DataFrame()
    difference, charts = _difference(scores, treatment, baseline, notes)
    if pairing and len(arms) >= FEWEST_RANKED and len(pairing.by_case) > 1:
        charts["Ranks over cases"] = critical_difference_diagram(rank_arms(pairing.by_case))
    if pairing and len(costs := arm_costs(pairing.by_dataset, studies.values())) > 1:
        charts["Dice against cost"] = cost_plot(costs, "seconds", "mean seconds of fine-tuning")
    page = template("overview.html").render(
        name=name,
        settings=[(entry.name, entry.folder.relative_to(out).as_posix()) for entry in settings],
        rows=table.to_dict("records"),
        pairs=pairs.to_dict("records"),
        difference=difference,
        charts=charts,
        notes=notes,
        cases=len(pairing.by_case) if pairing else 0,
    )
    write_table(out / "scores", table)
    write_table(out / "pairs", pairs)
    write_text(out / "report.html", page)
    summary = {"study": name, "difference": difference, "arms": table.to_dict("records"), "notes": notes}
    write_json(out / "summary.json", _without_nan(summary))
    return out / "report.html"


def arm_costs(by_dataset: pd.DataFrame, studies: Iterable[Study]) -> pd.DataFrame:
    """One row an arm: `dice` over data sets that count equally, and mean `seconds` of its fine-tuning."""
    times = [
        (stage.arm, stage.wall_time_s)
        for study in studies
        for stage in study.stages
        if stage.stage == "finetune" and stage.status == "finished" and stage.wall_time_s is not None
    ]
    seconds = pd.DataFrame(times, columns=["arm", "seconds"]).groupby("arm")["seconds"].mean()
    dice = by_dataset.mean().rename("dice").rename_axis("arm")
    return dice.to_frame().join(seconds, how="inner").reset_index()


def _paired(scores: pd.DataFrame, arms: Sequence[str], notes: list[str]) -> Pairing | None:
    """The cases that every arm has; None, and a note, where there are none."""
    if len(arms) < 2:
        notes.append("There is one arm, so there is nothing to compare.")
        return None
    try:
        pairing = pair_arms(scores, arms)
    except UserError as error:
        notes.append(str(error))
        return None
    notes += pairing.notes
    return pairing


def _difference(
    scores: pd.DataFrame, treatment: str, baseline: str, notes: list[str]
) -> tuple[dict[str, Any] | None, dict[str, Chart]]:
    """`treatment` against `baseline` over all settings, where both are there, and its forest plot."""
    if not {treatment, baseline} <= set(scores["arm"]):
        notes.append(f"There is no {treatment} or no {baseline}: set the study's `treatment` and `baseline`.")
        return None, {}
    try:
        pairing = pair_arms(scores, [treatment, baseline])
    except UserError as error:
        notes.append(str(error))
        return None, {}
    pooled = pooled_difference(pairing, treatment, baseline)
    by_setting = {
        str(setting): paired_comparison(rows[treatment].to_numpy(), rows[baseline].to_numpy())
        for setting, rows in pairing.by_case.groupby(level="dataset", sort=False)
    }
    rows = [{"setting": setting, **vars(result)} for setting, result in by_setting.items()]
    difference = {"treatment": treatment, "baseline": baseline, "settings": rows, **vars(pooled)}
    chart = forest_plot(by_setting, pooled, treatment, baseline)
    return difference, {f"{arm_name(treatment)} against {arm_name(baseline)}": chart}


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
