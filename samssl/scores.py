"""The scores of an evaluation: by class, over classes and by subgroup, with intervals over patients.

An evaluation leaves one row a case and class (`cases.parquet`). What follows from such a row alone is added
here, and rows are brought together here, for `samssl evaluate` and for the reports alike. What each score
says, and what becomes of empty masks, is in docs/concepts.md.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from samssl.statistics import Interval, patient_interval

SUBGROUP = "subgroup_"
"""Begins the columns that tell subgroups of cases apart: `subgroup_site`."""
SHAPE_COLUMNS = ("nsd", "hd95_mm", "assd_mm", "reference_lesions", "predicted_lesions", "detected_lesions")
"""Of `samssl.shapes.compare_shapes`."""
MANY_LESIONS = 2.0
"""Lesions are counted for classes that have at least so many in each reference that has any, on average."""
ALL_CLASSES = "all classes"
"""In place of a label: the mean over the classes of each case."""
EVERYONE = "all"
"""In place of a subgroup: all cases."""


@dataclass(frozen=True)
class Score:
    """A score of one case and class."""

    title: str
    """With its unit."""
    of: Callable[[pd.DataFrame], pd.Series]
    """From the rows of an evaluation; NaN: left out of means."""
    decimals: int = 3
    weight: str = ""
    """The column by which means are weighted."""
    count: bool = False
    """Summed over cases and classes, in place of a mean."""
    of_lesions: bool = False
    """Only for classes with many lesions, and never over classes."""


SCORES = {
    "dice": Score("Dice", lambda rows: rows["dice"]),
    "dice_empty_counted": Score("Dice, empty references counted", lambda rows: _with_empty(rows)),
    "iou": Score("IoU", lambda rows: rows["iou"]),
    "nsd": Score("NSD", lambda rows: rows["nsd"]),
    "hd95_mm": Score("HD95 (mm)", lambda rows: rows["hd95_mm"], 2),
    "hd95_found_mm": Score("HD95 where found (mm)", lambda rows: _found(rows, "hd95_mm"), 2),
    "assd_mm": Score("ASSD (mm)", lambda rows: rows["assd_mm"], 2),
    "assd_found_mm": Score("ASSD where found (mm)", lambda rows: _found(rows, "assd_mm"), 2),
    "volume_error_ml": Score("volume error (ml)", lambda rows: rows["volume_error_ml"], 2),
    "absolute_volume_error_ml": Score(
        "absolute volume error (ml)", lambda rows: rows["volume_error_ml"].abs(), 2
    ),
    "relative_volume_error": Score("relative volume error", lambda rows: rows["relative_volume_error"]),
    "absolute_relative_volume_error": Score(
        "absolute relative volume error", lambda rows: rows["relative_volume_error"].abs()
    ),
    "missed": Score("missed", lambda rows: _where(rows, rows["reference_voxels"] > 0, "missed"), count=True),
    "false_positive": Score(
        "false positives",
        lambda rows: _where(rows, rows["reference_voxels"] == 0, "false_positive"),
        count=True,
    ),
    "lesion_sensitivity": Score(
        "lesion sensitivity",
        lambda rows: (rows["detected_lesions"] / rows["reference_lesions"]).where(
            rows["reference_lesions"] > 0
        ),
        weight="reference_lesions",
        of_lesions=True,
    ),
    "false_positive_lesions": Score(
        "false lesions a case",
        lambda rows: rows["predicted_lesions"] - rows["detected_lesions"],
        2,
        of_lesions=True,
    ),
}
"""Every score by its name in tables and metrics, in the order in which they are shown."""


def with_volumes(table: pd.DataFrame, spacing_mm: tuple[float, float, float]) -> pd.DataFrame:
    """The rows of one case with what follows from Dice and voxel counts.

    `iou`, `volume_error_ml` (predicted minus reference), `relative_volume_error` (by the reference; NaN
    without one), `missed` and `false_positive` (something in only one of the two masks).
    """
    reference, predicted = table["reference_voxels"], table["predicted_voxels"]
    error = predicted - reference
    return table.assign(
        iou=table["dice"] / (2 - table["dice"]),
        volume_error_ml=error * math.prod(spacing_mm) / 1000,
        relative_volume_error=(error / reference).where(reference > 0),
        missed=(reference > 0) & (predicted == 0),
        false_positive=(reference == 0) & (predicted > 0),
    )


def summarize_scores(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Means, 95 % intervals over patients and counts of the same cases, by one or several seeds.

    One row a `subgroup` (all, or a column and its value, as `site=A`), `label` (a class, or all classes) and
    `score`, with `mean`, `low`, `high` and `cases`. A case is first averaged over seeds. For counts `mean`
    is the count, without an interval, and `cases` the number of cases and classes at stake. Subgroups have
    no rows of single classes. Empty for evaluations that were made before there were scores of shapes.
    """
    if not all(set(SHAPE_COLUMNS) <= set(table.columns) for table in tables):
        return pd.DataFrame()
    rows = _seeds_averaged([last_clicks(table) for table in tables])
    found = [*_summaries(rows, EVERYONE, _labels(rows))]
    for column in subgroup_columns(rows):
        for value, part in rows.groupby(column, sort=True):
            found += _summaries(part, f"{column.removeprefix(SUBGROUP)}={value}", [ALL_CLASSES])
    return pd.DataFrame(found)


def score_metrics(summary: pd.DataFrame, prefix: str) -> dict[str, float]:
    """A summary by metric name, which consists of what MLflow allows.

    `{prefix}/{score}`, with `_ci95_low` and `_ci95_high`; `{prefix}/{score}_{label}`; for subgroups
    `{prefix}/{column}/{value}/{score}`.
    """
    metrics = {}
    for row in summary.to_dict("records"):
        within = "" if row["subgroup"] == EVERYONE else f"{row['subgroup'].replace('=', '/')}/"
        of_label = "" if row["label"] == ALL_CLASSES else f"_{row['label']}"
        name = re.sub(r"[^\w./-]", "_", f"{prefix}/{within}{row['score']}{of_label}")
        ends = {"_ci95_low": row["low"], "_ci95_high": row["high"]} if not of_label else {}
        values = {name: row["mean"]} | {f"{name}{end}": value for end, value in ends.items()}
        metrics |= {name: float(value) for name, value in values.items() if not math.isnan(value)}
    return metrics


def score_sheet(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary as one reads it: a row a subgroup and label, a column a score, `0.871 (0.842 to 0.893)`."""
    if summary.empty:
        return summary
    rows: list[Any] = summary.to_dict("records")
    cells = summary.assign(cell=[score_text(row) for row in rows])
    order = [name for name in SCORES if name in set(summary["score"])]
    keys = [name for name in ("arm", "subgroup", "label") if name in summary]
    wide = cells.pivot_table("cell", keys, "score", aggfunc="first", sort=False)
    return wide[order].fillna("").rename(columns={name: SCORES[name].title for name in order}).reset_index()


def score_text(row: Mapping[str, Any]) -> str:
    """A row of a summary as `0.871 (0.842 to 0.893)`, or `2 of 20` of counts; empty without a value."""
    mean, low, high = (math.nan if row[name] is None else row[name] for name in ("mean", "low", "high"))
    score = SCORES[row["score"]]
    if math.isnan(mean) or not row["cases"]:
        return ""
    if score.count:
        return f"{mean:g} of {row['cases']}"
    ends = "" if math.isnan(low) else f" ({low:.{score.decimals}f} to {high:.{score.decimals}f})"
    return f"{mean:.{score.decimals}f}{ends}"


def subgroup_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a table that tell subgroups apart."""
    return [str(name) for name in table.columns if str(name).startswith(SUBGROUP)]


def last_clicks(table: pd.DataFrame) -> pd.DataFrame:
    """Of prompted segmentation the rows after the last click, of which alone shapes are scored; else all."""
    if "clicks" not in table:
        return table
    return table[table["clicks"] == table["clicks"].max()]


def lesion_labels(rows: pd.DataFrame) -> list[str]:
    """The classes of which a reference that has any has `MANY_LESIONS` lesions or more on average."""
    present = rows[rows["reference_lesions"] > 0]
    means = present.groupby("label", sort=False)["reference_lesions"].mean()
    return [str(label) for label in means.index[means >= MANY_LESIONS]]


def _with_empty(rows: pd.DataFrame) -> pd.Series:
    """Dice, and without a reference 1 where nothing is predicted and 0 where anything is."""
    empty = (rows["predicted_voxels"] == 0).astype(float)
    return rows["dice"].where(rows["reference_voxels"] > 0, empty)


def _found(rows: pd.DataFrame, column: str) -> pd.Series:
    return rows[column].where(~rows["missed"])


def _where(rows: pd.DataFrame, at_stake: pd.Series, column: str) -> pd.Series:
    return rows[column].astype(float).where(at_stake)


def _seeds_averaged(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One row a case and label with every score, averaged over the tables; cases that all of them have."""
    scored = []
    for table in tables:
        columns = {name: score.of(table).astype(float) for name, score in SCORES.items()}
        scored.append(table.drop(columns=["dice"]).assign(**columns))
    common = set.intersection(*(set(table["case"]) for table in tables))
    rows = pd.concat(scored)
    rows = rows[rows["case"].isin(common)]
    texts = ["patient", *subgroup_columns(rows)]
    averaged = dict.fromkeys([*SCORES, "reference_lesions"], "mean")
    grouped = rows.groupby(["label_id", "label", "case"], sort=False)
    return grouped.agg(averaged | dict.fromkeys(texts, "first")).reset_index()


def _labels(rows: pd.DataFrame) -> list[str]:
    labels = rows.sort_values("label_id", kind="stable")["label"].drop_duplicates()
    return [ALL_CLASSES, *map(str, labels)]


def _summaries(rows: pd.DataFrame, subgroup: str, labels: Sequence[str]) -> Iterator[dict[str, object]]:
    with_lesions = lesion_labels(rows)
    for label in labels:
        own = rows if label == ALL_CLASSES else rows[rows["label"] == label]
        for name, score in SCORES.items():
            if score.of_lesions and label not in with_lesions:
                continue
            interval = _counted(own[name]) if score.count else _averaged(own, name, score.weight)
            yield {"subgroup": subgroup, "label": label, "score": name, **vars(interval)}


def _counted(values: pd.Series) -> Interval:
    at_stake = values.dropna()
    return Interval(float(at_stake.sum()), math.nan, math.nan, len(at_stake))


def _averaged(rows: pd.DataFrame, column: str, weight: str) -> Interval:
    """Classes are averaged within a case, cases over patients."""
    cases = (
        rows.assign(weight=rows[weight] if weight else 1.0)
        .dropna(subset=[column])
        .groupby("case", sort=False)
    )
    if not len(cases):
        return Interval(math.nan, math.nan, math.nan, 0)
    means, weights = cases[column].mean().to_numpy(np.float64), cases["weight"].sum().to_numpy(np.float64)
    patients = cases["patient"].first().astype(str).tolist()
    return patient_interval(means, patients, weights if weight else None)
