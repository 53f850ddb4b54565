"""Charts of studies with many arms and of sweeps, each a function from plain tables to a `Chart`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter
from matplotlib.transforms import blended_transform_factory

from samssl.arms import Pooled, Ranking, pareto_front
from samssl.report.figures import BLUE, INK, VERMILLION, grid, svg_uri
from samssl.report.verdict import arm_name, number, signed
from samssl.statistics import Interval, Paired, seed_interval

_WIDTH_IN = 7.4
_LETTER_IN = 0.067
"""About as wide as a letter of the charts' font."""
_MOST_NAMED = 12
"""With more points than this only those on the Pareto front have their names beside them."""


@dataclass(frozen=True)
class Chart:
    """A picture, and in words what it shows."""

    source: str
    """SVG as a data URI, for the `src` of an image."""
    alt: str
    """For readers who do not see it: the numbers that are drawn."""


def critical_difference_diagram(ranking: Ranking) -> Chart:
    """Arms along an axis of mean ranks, best at the left; bars join those that were not shown to differ.

    After J. Demsar, JMLR 7 (2006), figure 1.
    """
    names = [f"{arm_name(str(arm))}  {rank:.2f}" for arm, rank in ranking.mean_ranks.items()]
    on_left = math.ceil(len(names) / 2)
    room_in = min(2.8, _LETTER_IN * max(map(len, names)) + 0.15)
    first_row = 1.0 + 0.5 * len(ranking.groups)

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")  # the names have their room at both sides
        axes = figure.add_axes((room_in / _WIDTH_IN, 0, 1 - 2 * room_in / _WIDTH_IN, 1))
        axes.set_axis_off()
        axes.set_xlim(1, len(names))
        axes.set_ylim(first_row + on_left - 0.4, -2.2)
        _rank_axis(axes, len(names), ranking.critical_difference)
        for place, (name, rank) in enumerate(zip(names, ranking.mean_ranks, strict=True)):
            left = place < on_left
            row = first_row + (place if left else len(names) - 1 - place)
            _rank_label(axes, name, float(rank), row, left=left)
        for level, group in enumerate(ranking.groups):
            ends = [float(ranking.mean_ranks[group[0]]), float(ranking.mean_ranks[group[-1]])]
            axes.plot(ends, [0.5 + 0.5 * level] * 2, color=BLUE, lw=3.5, clip_on=False, gid=f"group-{level}")

    source = svg_uri(draw, _WIDTH_IN, 0.2 * (first_row + on_left + 1.8))
    return Chart(source, _ranking_in_words(ranking))


def forest_plot(by_dataset: Mapping[str, Paired], pooled: Pooled, first: str, second: str) -> Chart:
    """`first` minus `second` on each data set and over all of them, with 95 % intervals."""
    rows = [
        (name, row.mean_difference, row.low, row.high, _count(row.cases, "case"))
        for name, row in by_dataset.items()
    ]
    everything = f"all {_count(pooled.datasets, 'data set')}"
    rows.append((everything, pooled.mean_difference, pooled.low, pooled.high, _count(pooled.cases, "case")))
    title = f"difference in Dice: {arm_name(first)} minus {arm_name(second)}"
    texts = [f"{signed(mean)} {_between(low, high)}" for _, mean, low, high, _ in rows]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, lw=0.8)
        beside = blended_transform_factory(axes.transAxes, axes.transData)
        for place, ((_, mean, low, high, cases), text) in enumerate(zip(rows, texts, strict=True)):
            overall = place == len(rows) - 1
            color = BLUE if low > 0 else VERMILLION if high < 0 else INK
            axes.plot([low, high], [place, place], color=color, lw=2.2, gid=f"interval-{place}")
            axes.plot([mean], [place], "D" if overall else "o", color=color, ms=8 if overall else 6)
            axes.text(1.03, place, f"{text}, {cases}", transform=beside, va="center")
        axes.axhline(len(rows) - 1.5, color=INK, lw=0.6, alpha=0.4)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params("y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(title)
        grid(axes, "x")

    sentences = [f"{name} {text}" for (name, *_), text in zip(rows, texts, strict=True)]
    alt = f"{title[0].upper()}{title[1:]}, with 95 % intervals. {'; '.join(sentences)}."
    return Chart(svg_uri(draw, _WIDTH_IN, 0.9 + 0.28 * len(rows)), alt)


def setting_plot(table: pd.DataFrame, setting: str, label: str) -> Chart:
    """Dice against a numeric setting such as LoRA rank: a dot a run, means with 95 % intervals over seeds.

    `table` has one row a run: a column `setting` (axis title `label`) and `dice`, the run's mean over cases.
    """
    runs = table.dropna(subset=[setting, "dice"])
    values = np.unique(runs[setting].to_numpy(np.float64))
    intervals = {
        float(value): seed_interval(runs.loc[runs[setting] == value, "dice"].to_numpy()) for value in values
    }

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _scale_to_values(axes, list(intervals))
        for value, interval in intervals.items():
            axes.plot([value, value], [interval.low, interval.high], color=BLUE, lw=2.2, alpha=0.6)
        means = [interval.mean for interval in intervals.values()]
        axes.plot(list(intervals), means, "-o", color=BLUE, lw=1.2, ms=7, gid="means")
        axes.plot(runs[setting], runs["dice"], "o", color=INK, alpha=0.7, ms=3, mew=0, zorder=3, gid="runs")
        axes.set_xlabel(label)
        axes.set_ylabel("Dice")
        grid(axes, "y")

    sentences = [
        f"{value:g}: {_interval_in_words(interval, 'seed')}" for value, interval in intervals.items()
    ]
    return Chart(svg_uri(draw, 5.2, 3.2), f"Mean Dice by {label}. {'; '.join(sentences)}.")


def cost_plot(table: pd.DataFrame, cost: str, label: str) -> Chart:
    """Dice of arms (or trials) against what they cost, with the Pareto front as a line.

    `table` has one row an arm: `arm`, `dice` and the column `cost` (axis title `label`, with its unit).
    Rows without both numbers, as of trials that failed, are not drawn.
    """
    front = pareto_front(table, cost)
    others = table.drop(index=front.index).dropna(subset=[cost, "dice"])
    drawn = pd.concat([front, others])
    named = drawn if len(drawn) <= _MOST_NAMED else front

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if 0 < 20 * drawn[cost].min() < drawn[cost].max():
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.plot(others[cost], others["dice"], "o", color=INK, alpha=0.45, ms=5, mew=0, gid="others")
        axes.plot(
            front[cost], front["dice"], "-o", color=BLUE, lw=1.2, ms=7, drawstyle="steps-post", gid="front"
        )
        for arm, x, y in zip(named["arm"], named[cost], named["dice"], strict=True):
            axes.annotate(arm_name(str(arm)), (x, y), (6, -4), textcoords="offset points", va="top")
        axes.margins(0.12)
        axes.set_xlabel(label)
        axes.set_ylabel("Dice")
        grid(axes, "both")

    listed = "; ".join(
        f"{arm_name(str(arm))} {number(dice)} at {value:.4g}"
        for arm, value, dice in zip(front["arm"], front[cost], front["dice"], strict=True)
    )
    alt = f"Dice against {label}. On the Pareto front, cheapest first: {listed}. Off it: {len(others)}."
    return Chart(svg_uri(draw, 6.2, 3.8), alt)


def _rank_axis(axes: Axes, num_arms: int, critical_difference: float) -> None:
    """The axis at height 0 with its ranks above it, and over them how long the critical difference is."""
    axes.plot([1, num_arms], [0, 0], color=INK, lw=1)
    for rank in range(1, num_arms + 1):
        axes.plot([rank, rank], [-0.2, 0], color=INK, lw=1, clip_on=False)
        axes.text(rank, -0.35, str(rank), ha="center", va="bottom")
    text = f"critical difference {critical_difference:.2f}"
    if critical_difference > num_arms - 1:
        axes.text(1, -1.6, f"{text}, longer than this axis", va="center")
        return
    end = 1 + critical_difference
    axes.plot([1, end], [-1.6, -1.6], color=INK, lw=1.6, marker="|", ms=6, gid="critical-difference")
    axes.annotate(text, (end, -1.6), (6, 0), textcoords="offset points", va="center", annotation_clip=False)


def _rank_label(axes: Axes, name: str, rank: float, row: float, *, left: bool) -> None:
    """A line from the axis down to the arm's row and out to its name at that side."""
    side = axes.get_xlim()[0 if left else 1]
    axes.plot([rank, rank, side], [0, row, row], color=INK, lw=0.8, clip_on=False)
    axes.plot([rank], [0], "o", color=INK, ms=4, clip_on=False)
    axes.annotate(
        name,
        (side, row),
        (-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        annotation_clip=False,
    )


def _ranking_in_words(ranking: Ranking) -> str:
    ranks = ", ".join(f"{arm_name(str(arm))} {rank:.2f}" for arm, rank in ranking.mean_ranks.items())
    groups = "; ".join(f"{arm_name(group[0])} to {arm_name(group[-1])}" for group in ranking.groups)
    differ = f"not shown to differ: {groups}" if groups else "every pair of arms differs"
    return (
        f"Mean ranks over {_count(ranking.blocks, 'block')}, best first: {ranks}. "
        f"By the critical difference of {ranking.critical_difference:.2f}, {differ}."
    )


def _scale_to_values(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the values that were tried; doubling is one step where all are above 0."""
    if min(values) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def _between(low: float, high: float) -> str:
    return "(no interval)" if math.isnan(low) else f"({signed(low)} to {signed(high)})"


def _interval_in_words(interval: Interval, unit: str) -> str:
    ends = "" if math.isnan(interval.low) else f", {number(interval.low)} to {number(interval.high)}"
    return f"{number(interval.mean)} ({_count(interval.cases, unit)}{ends})"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
