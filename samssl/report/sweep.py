"""The report of a sweep: `report.html`, a page that stands alone, and `trials.csv`, `.md` and `.tex`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from samssl.files import write_table, write_text
from samssl.report.comparison import Chart, cost_plot, setting_plot
from samssl.report.figures import BLUE, INK, svg_uri
from samssl.report.page import template
from samssl.report.verdict import number

COSTS = {"trained_parameters": "trained parameters", "seconds": "seconds of training"}
"""Columns that say what a trial cost, and what they are called."""
_WIDTH_IN = 7.4
_COLUMN_IN = 0.9


def write_sweep_report(
    out: Path, name: str, table: pd.DataFrame, axes: Mapping[str, str], best: str, tested: Mapping[int, float]
) -> Path:
    """Write the report into `out`; returns the path of the page.

    `table` has one row a trial and seed: `point`, the columns of `axes` (by their short names), `seed`,
    `status`, `score` on the validation split, what it cost, and `error`. `best` is the point that was
    tested; `tested` its Dice on the test split by seed.
    """
    points = by_point(table, list(axes))
    page = template("sweep.html").render(
        name=name,
        axes=axes,
        best=best,
        validated=points.loc[best, "dice"],
        tested=float(np.mean(list(tested.values()))),
        seeds=sorted(table["seed"].unique().tolist()),
        rows=points.reset_index().to_dict("records"),
        counts=table["status"].value_counts().to_dict(),
        failures=table[table["status"] == "failed"].to_dict("records"),
        charts=sweep_charts(table, points, axes),
        device=" and ".join(sorted(table["device"].dropna().unique())),
    )
    write_table(out / "trials", table, points.drop(columns=["low", "high"]).reset_index())
    write_text(out / "report.html", page)
    return out / "report.html"


def by_point(table: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """One row a point, best first: its mean score over the seeds that finished, their range, and its cost."""
    finished = table[table["status"] == "finished"]
    scores = finished.groupby("point")["score"]
    costs = finished.groupby("point")[list(COSTS)].mean()
    settings = table.groupby("point", sort=False)[list(axes)].first()
    summary = pd.DataFrame({"dice": scores.mean(), "low": scores.min(), "high": scores.max()})
    summary["finished"] = scores.size()
    states = table.groupby("point")["status"].agg(lambda states: ", ".join(sorted(set(states))))
    joined = settings.join(summary).join(costs).join(states)
    return joined.sort_values("dice", ascending=False, kind="stable")


def sweep_charts(table: pd.DataFrame, points: pd.DataFrame, axes: Mapping[str, str]) -> dict[str, Chart]:
    """Every chart that the table has numbers for, by its heading."""
    finished = table[table["status"] == "finished"].rename(columns={"score": "dice"})
    charts = {}
    for axis, label in axes.items():
        if pd.api.types.is_numeric_dtype(finished[axis]) and 1 < finished[axis].nunique() <= 12:
            charts[f"Dice against {label}"] = setting_plot(finished, axis, label)
    if len(axes) > 1 and len(points.dropna(subset=["dice"])) > 1:
        charts["Every point"] = parallel_plot(points, axes)
    costed = points.rename_axis("arm").reset_index()
    for cost, label in COSTS.items():
        if costed[cost].notna().any():
            charts[f"Dice against {label}"] = cost_plot(costed, cost, label)
    return charts


def parallel_plot(points: pd.DataFrame, axes: Mapping[str, str]) -> Chart:
    """Parallel coordinates: a line a point through its value on every axis to its Dice; the best is blue."""
    drawn = points.dropna(subset=["dice"])
    columns = [*axes, "dice"]
    heights = {name: _heights(drawn[name]) for name in columns}

    def draw(figure: Figure) -> None:
        panel = figure.add_subplot()
        for place in range(len(drawn) - 1, -1, -1):
            line = [heights[name][0][place] for name in columns]
            best = place == 0
            color, width, alpha = (BLUE, 2.4, 1.0) if best else (INK, 0.8, 0.35)
            panel.plot(range(len(columns)), line, color=color, lw=width, alpha=alpha, gid=f"point-{place}")
        for column, name in enumerate(columns):
            panel.plot([column, column], [0, 1], color=INK, lw=0.8)
            for height, text in heights[name][1].items():
                panel.annotate(
                    text, (column, height), (-4, 0), textcoords="offset points", ha="right", va="center"
                )
        panel.set_xticks(range(len(columns)), [*axes.values(), "Dice"])
        panel.set_yticks([])
        panel.set_xlim(-0.6, len(columns) - 0.8)
        panel.spines[["left", "bottom"]].set_visible(False)
        panel.tick_params("x", length=0)

    best = ", ".join(f"{label} {drawn[name].iloc[0]}" for name, label in axes.items())
    alt = f"Parallel coordinates of {len(drawn)} points. The best, {number(drawn['dice'].iloc[0])}: {best}."
    return Chart(svg_uri(draw, max(4.5, min(_WIDTH_IN, 1.6 * len(columns))), 3.2), alt)


def _heights(values: pd.Series) -> tuple[list[float], dict[float, str]]:
    """Where each value lies on its axis of 0 to 1, and what is written there.

    Numbers of one sign that span more than a factor of 20 lie by their logarithm; a value that a condition
    left out lies below the axis.
    """
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        names = list(dict.fromkeys(values.dropna().map(str)))
        places = {
            name: (0.5 if len(names) == 1 else index / (len(names) - 1)) for index, name in enumerate(names)
        }
        found = [places[str(value)] if pd.notna(value) else -0.15 for value in values]
        return found, {height: name for name, height in places.items()}
    floats = values.to_numpy(np.float64)
    low, high = float(np.nanmin(floats)), float(np.nanmax(floats))
    logarithmic = low > 0 and high > 20 * low
    scaled = np.log(floats) if logarithmic else floats
    start, span = float(np.nanmin(scaled)), float(np.nanmax(scaled) - np.nanmin(scaled)) or 1.0
    found = np.where(np.isnan(scaled), -0.15, (scaled - start) / span)
    return found.tolist(), {0.0: f"{low:.3g}"} | ({1.0: f"{high:.3g}"} if high > low else {})
