"""The numbers of a study: what `summary.json` holds, and all that the page shows.

The case is the unit. With several seeds a case's Dice is first averaged over the seeds.
"""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from samssl.metrics import case_dice
from samssl.report.study import Evaluation, Study
from samssl.scores import last_clicks, summarize_scores
from samssl.statistics import Interval, mean_interval, paired_comparison


def summarize(study: Study, baseline: str, treatment: str) -> dict[str, Any]:
    """The content of `summary.json`; `paired` is None where the two arms share no seed or no case."""
    paired, reason = _paired(study, baseline, treatment)
    return {
        "study": study.name,
        "simulated": study.simulated,
        "environment": study.environment,
        "arms": {arm: _arm(seeds) for arm, seeds in study.evaluations.items()},
        "paired": paired,
        "digests": {stage.folder: stage.outputs for stage in study.stages if stage.outputs},
        "stages": [vars(stage) for stage in study.stages],
        "notes": [*study.notes, *_unequal_cases(study), *reason],
    }


def seed_mean(evaluations: Iterable[Evaluation]) -> pd.Series:
    """Dice by case, averaged over the seeds; only cases that every seed scored."""
    by_seed = [case_dice(evaluation.table) for evaluation in evaluations]
    return pd.concat(by_seed, axis=1, join="inner").mean(axis=1)


def _arm(seeds: dict[int, Evaluation]) -> dict[str, Any]:
    tables = [evaluation.table for evaluation in seeds.values()]
    scores = seed_mean(seeds.values())
    return {
        **_entry(scores),
        "run_id": next(iter(seeds.values())).stage.run_id,
        "run_ids": {str(seed): evaluation.stage.run_id for seed, evaluation in seeds.items()},
        "per_seed": {str(seed): _entry(case_dice(evaluation.table)) for seed, evaluation in seeds.items()},
        "per_label": _per_label(tables, scores.index),
        "per_case": scores.to_dict(),
        "false_positive_cases": _false_positive_cases(tables),
        "failures": _failures(tables),
        "scores": _scores(tables),
    }


def _per_label(tables: Iterable[pd.DataFrame], cases: pd.Index) -> dict[str, Any]:
    """Dice over the cases whose reference holds the label, averaged over seeds within a case."""
    rows = pd.concat(tables)
    rows = rows[rows["case"].isin(cases)]
    by_case = rows.groupby(["label_id", "label", "case"])["dice"].mean()
    return {str(label): _entry(dice.dropna()) for (_, label), dice in by_case.groupby(["label_id", "label"])}


def _false_positive_cases(tables: Iterable[pd.DataFrame]) -> dict[str, dict[str, int]]:
    """Of the cases whose reference lacks a label, those where any seed predicted it all the same."""
    rows = pd.concat(tables)
    absent = rows[rows["reference_voxels"] == 0]
    predicted = absent.groupby(["label_id", "label", "case"])["predicted_voxels"].max() > 0
    return {
        str(label): {"cases": int(cases.sum()), "of": len(cases)}
        for (_, label), cases in predicted.groupby(["label_id", "label"])
    }


def _failures(tables: Iterable[pd.DataFrame]) -> list[dict[str, str]]:
    """Every case and label that is missed, or is predicted though the reference lacks it, with any seed."""
    rows = pd.concat([last_clicks(table) for table in tables]).sort_values(["case", "label_id"])
    wanted, found = rows["reference_voxels"] > 0, rows["predicted_voxels"] > 0
    kinds = {"missed": rows[wanted & ~found], "false positive": rows[~wanted & found]}
    return [
        {"case": str(case), "label": str(label), "what": what}
        for what, failed in kinds.items()
        for case, label in failed[["case", "label"]].drop_duplicates().itertuples(index=False)
    ]


def _scores(tables: list[pd.DataFrame]) -> list[dict[str, Any]]:
    """`samssl.scores.summarize_scores` as JSON takes it."""
    rows: list[Any] = summarize_scores(tables).to_dict("records")
    return [
        {name: _number(value) if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]


def _unequal_cases(study: Study) -> list[str]:
    sentences = []
    for arm, seeds in study.evaluations.items():
        scored = [set(case_dice(evaluation.table).index) for evaluation in seeds.values()]
        if left_out := len(set.union(*scored) - set.intersection(*scored)):
            sentences.append(f"Arm {arm}: cases not scored by every seed are left out ({left_out}).")
    return sentences


def _paired(study: Study, baseline: str, treatment: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The comparison on the cases and seeds that both arms have, and what had to be left out of it."""
    if missing := [arm for arm in (treatment, baseline) if arm not in study.evaluations]:
        return None, [
            f"There is no evaluation of arm {' or '.join(missing)}, so there is nothing to compare."
        ]
    treated, base = study.evaluations[treatment], study.evaluations[baseline]
    seeds = sorted(treated.keys() & base.keys())
    if not seeds:
        return None, [f"Arms {treatment} and {baseline} have no seed in common and cannot be compared."]
    per_case = pd.DataFrame(
        {arm: seed_mean(study.evaluations[arm][seed] for seed in seeds) for arm in (treatment, baseline)}
    )
    notes = []
    if unpaired := sorted(treated.keys() ^ base.keys()):
        listed = ", ".join(map(str, unpaired))
        notes.append(f"The comparison leaves out what only one of the two arms has: seed {listed}.")
    if left_out := int(per_case.isna().any(axis=1).sum()):
        notes.append(f"The comparison leaves out cases that only one of the two arms has ({left_out}).")
    per_case = per_case.dropna()
    if per_case.empty:
        return None, [f"Arms {treatment} and {baseline} have no case in common and cannot be compared."]
    result = paired_comparison(per_case[treatment].to_numpy(), per_case[baseline].to_numpy())
    return {
        "treatment": treatment,
        "baseline": baseline,
        "seeds": seeds,
        "mean_difference": result.mean_difference,
        "ci95": [_number(result.low), _number(result.high)],
        "wilcoxon_p": result.wilcoxon_p,
        "better": result.better,
        "worse": result.worse,
        "tied": result.tied,
        "cases": result.cases,
        "means": per_case.mean().to_dict(),
        "per_case": per_case.to_dict(orient="index"),
    }, notes


def _entry(dice: pd.Series) -> dict[str, Any]:
    interval = mean_interval(dice.to_numpy()) if len(dice) else Interval(math.nan, math.nan, math.nan, 0)
    return {
        "test/dice": _number(interval.mean),
        "ci95": [_number(interval.low), _number(interval.high)],
        "cases": interval.cases,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)
