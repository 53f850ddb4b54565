"""Charts of many arms: what is drawn, where and in which order, read back from the SVG."""

import base64
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from samssl.arms import Pooled, Ranking, rank_arms
from samssl.report.comparison import Chart, cost_plot, critical_difference_diagram, forest_plot, setting_plot
from samssl.report.figures import BLUE, VERMILLION
from samssl.statistics import Paired

SVG = "{http://www.w3.org/2000/svg}"


def tree(chart: Chart) -> ElementTree.Element:
    media_type, content = chart.source.split(";base64,")
    assert media_type == "data:image/svg+xml"
    return ElementTree.fromstring(base64.b64decode(content))


def texts(chart: Chart) -> dict[str, tuple[float, float]]:
    """Every text with its anchor (x, y) in points; y grows downwards."""
    return {
        "".join(node.itertext()): (float(node.attrib["x"]), float(node.attrib["y"]))
        for node in tree(chart).iter(f"{SVG}text")
    }


def points(chart: Chart, name: str) -> list[tuple[float, float]]:
    """The vertices of the line called `name`, in points."""
    (group,) = [node for node in tree(chart).iter(f"{SVG}g") if node.get("id") == name]
    numbers = re.findall(r"-?[\d.]+(?:e-?\d+)?", next(group.iter(f"{SVG}path")).attrib["d"])
    return [(float(x), float(y)) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def markers(chart: Chart, name: str) -> list[tuple[float, float]]:
    (group,) = [node for node in tree(chart).iter(f"{SVG}g") if node.get("id") == name]
    return [(float(node.attrib["x"]), float(node.attrib["y"])) for node in group.iter(f"{SVG}use")]


def names(chart: Chart) -> set[str]:
    return {node.attrib["id"] for node in tree(chart).iter(f"{SVG}g") if "id" in node.attrib}


def ranking(critical_difference: float, **ranks: float) -> Ranking:
    none = pd.DataFrame(1.0, index=list(ranks), columns=list(ranks))
    return Ranking(pd.Series(ranks), 14, 9.3, 0.03, none, critical_difference)


def paired(mean: float, low: float, high: float) -> Paired:
    return Paired(mean, low, high, 0.01, 9, 1, 0, 10, 0.9, 1.1)


RANKING = ranking(1.15, lora=1.5, ssl=2.4, no_ssl=2.6, full=3.5, frozen=5.0)
BY_DATASET = {
    "liver": paired(0.04, 0.01, 0.07),
    "heart": paired(-0.03, -0.05, -0.01),
    "one": paired(0.1, math.nan, math.nan),
}
POOLED = Pooled(0.02, -0.02, 0.06, 3, 21, 2)
RUNS = pd.DataFrame(
    {
        "rank": [1, 1, 4, 4, 16, 2],
        "seed": [0, 1, 0, 1, 0, 0],
        "dice": [0.5, 0.6, 0.7, 0.7, 0.9, math.nan],
    }
)
TRIALS = pd.DataFrame(
    {
        "arm": ["full", "lora", "ssl", "frozen", "failed"],
        "gpu_seconds": [100.0, 10.0, 20.0, 1.0, math.nan],
        "dice": [0.8, 0.7, 0.6, 0.5, 0.9],
    }
)


class TestCriticalDifferenceDiagram:
    def test_arms_stand_in_the_order_of_their_ranks(self) -> None:
        shown = texts(critical_difference_diagram(RANKING))
        left = [shown[name] for name in ("lora  1.50", "SSL  2.40", "no SSL  2.60")]
        right = [shown[name] for name in ("full  3.50", "frozen  5.00")]
        # Best at the left and at the top there; worst at the right and at the top there.
        assert [y for _, y in left] == sorted(y for _, y in left)
        assert right[1][1] < right[0][1]
        assert max(x for x, _ in left) < shown["1"][0] < shown["5"][0] < min(x for x, _ in right)

    def test_bars_join_what_was_not_shown_to_differ(self) -> None:
        chart = critical_difference_diagram(RANKING)
        shown = texts(chart)
        first, step = shown["1"][0], shown["2"][0] - shown["1"][0]
        groups = {name for name in names(chart) if name.startswith("group-")}
        assert groups == {"group-0", "group-1"}
        for name, ends in (("group-0", (1.5, 2.6)), ("group-1", (2.4, 3.5))):
            drawn = [x for x, _ in points(chart, name)]
            expected = [first + step * (rank - 1) for rank in ends]
            assert drawn == pytest.approx(expected, abs=0.1), name

    def test_the_critical_difference_is_drawn_to_scale(self) -> None:
        chart = critical_difference_diagram(RANKING)
        shown = texts(chart)
        (start, _), (end, _) = points(chart, "critical-difference")
        assert (end - start) / (shown["2"][0] - shown["1"][0]) == pytest.approx(1.15, abs=0.01)
        assert "critical difference 1.15" in shown

    def test_one_longer_than_the_axis_is_only_said(self) -> None:
        chart = critical_difference_diagram(ranking(10.8, a=1.0, b=2.0, c=3.0))
        assert "critical-difference" not in names(chart)
        assert "critical difference 10.80, longer than this axis" in texts(chart)

    def test_its_words_hold_the_numbers(self) -> None:
        alt = critical_difference_diagram(RANKING).alt
        assert alt == (
            "Mean ranks over 14 blocks, best first: "
            "lora 1.50, SSL 2.40, no SSL 2.60, full 3.50, frozen 5.00. "
            "By the critical difference of 1.15, not shown to differ: lora to no SSL; SSL to full."
        )

    def test_arms_that_all_differ_have_no_bar(self) -> None:
        chart = critical_difference_diagram(ranking(0.5, a=1.0, b=2.0, c=3.0))
        assert not [name for name in names(chart) if name.startswith("group-")]
        assert chart.alt.endswith("every pair of arms differs.")

    def test_eighteen_long_names_stay_on_the_picture(self) -> None:
        scores = np.random.default_rng(0).random((30, 18))
        arms = [f"vit_b_encoder_decoder_adapter_{number}" for number in range(18)]
        chart = critical_difference_diagram(rank_arms(pd.DataFrame(scores, columns=arms)))
        width, height = map(float, tree(chart).attrib["viewBox"].split()[2:])
        for name, (x, y) in texts(chart).items():
            letters = 0.067 * 72 * len(name)
            left = x < width / 2
            assert (x - letters if left and "vit" in name else x) >= 0, name
            assert (x if left or "vit" not in name else x + letters) <= width, name
            assert 0 <= y <= height, name


class TestForestPlot:
    def test_data_sets_in_their_order_with_all_of_them_below(self) -> None:
        shown = texts(forest_plot(BY_DATASET, POOLED, "ssl", "no_ssl"))
        heights = [shown[name][1] for name in ("liver", "heart", "one", "all 3 data sets")]
        assert heights == sorted(heights)
        assert "difference in Dice: SSL minus no SSL" in shown
        for text, name in (
            ("+0.040 (+0.010 to +0.070), 10 cases", "liver"),
            ("+0.100 (no interval), 10 cases", "one"),
            ("+0.020 (\N{MINUS SIGN}0.020 to +0.060), 21 cases", "all 3 data sets"),
        ):
            assert shown[text][1] == pytest.approx(shown[name][1], abs=2)

    def test_intervals_lie_where_the_numbers_say(self) -> None:
        chart = forest_plot(BY_DATASET, POOLED, "a", "b")
        liver, heart, pooled = ([x for x, _ in points(chart, f"interval-{row}")] for row in (0, 1, 3))
        per_unit = (liver[1] - liver[0]) / 0.06
        assert (heart[1] - heart[0]) / per_unit == pytest.approx(0.04, abs=1e-4)
        assert (liver[0] - pooled[0]) / per_unit == pytest.approx(0.03, abs=1e-4)

    def test_colour_says_which_arm_the_interval_favours(self) -> None:
        chart = forest_plot(BY_DATASET, POOLED, "a", "b")
        groups = {node.get("id"): node for node in tree(chart).iter(f"{SVG}g")}
        styles = [next(groups[f"interval-{row}"].iter(f"{SVG}path")).attrib["style"] for row in (0, 1, 3)]
        assert [BLUE in styles[0], VERMILLION in styles[1], "currentColor" in styles[2]] == [True] * 3

    def test_its_words_hold_the_numbers(self) -> None:
        chart = forest_plot({"liver": paired(0.04, 0.01, 0.07)}, Pooled(0.04, 0.01, 0.07, 1, 10, 1), "a", "b")
        assert chart.alt == (
            "Difference in Dice: a minus b, with 95 % intervals. "
            "liver +0.040 (+0.010 to +0.070); all 1 data set +0.040 (+0.010 to +0.070)."
        )


class TestSettingPlot:
    def test_a_dot_a_run_and_the_means_by_rank(self) -> None:
        chart = setting_plot(RUNS, "rank", "LoRA rank")
        assert len(markers(chart, "runs")) == 5
        means = markers(chart, "means")
        xs, ys = zip(*means, strict=True)
        assert list(xs) == sorted(xs)
        # Rank 1 to 4 is two doublings, 4 to 16 two more; .55 to .7 is .15, .7 to .9 is .2.
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)
        assert (ys[1] - ys[2]) / (ys[0] - ys[1]) == pytest.approx(0.2 / 0.15, rel=1e-2)
        assert {"1", "4", "16", "LoRA rank", "Dice"} <= set(texts(chart))
        assert "2" not in texts(chart)

    def test_its_words_hold_means_and_intervals(self) -> None:
        # Two seeds 0.1 apart: half of it is 12.706 standard errors of 0.05.
        assert setting_plot(RUNS, "rank", "LoRA rank").alt == (
            "Mean Dice by LoRA rank. 1: 0.550 (2 seeds, -0.085 to 1.185); "
            "4: 0.700 (2 seeds, 0.700 to 0.700); 16: 0.900 (1 seed)."
        )

    def test_a_setting_that_may_be_zero_has_a_plain_axis(self) -> None:
        chart = setting_plot(
            pd.DataFrame({"dropout": [0.0, 0.1, 0.2], "dice": [0.5, 0.6, 0.7]}), "dropout", "dropout"
        )
        xs = [x for x, _ in markers(chart, "means")]
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)


class TestCostPlot:
    def test_the_front_is_drawn_from_cheap_to_dear(self) -> None:
        chart = cost_plot(TRIALS, "gpu_seconds", "GPU-seconds")
        front, (other,) = markers(chart, "front"), markers(chart, "others")
        assert [x for x, _ in front] == sorted(x for x, _ in front)
        assert [y for _, y in front] == sorted((y for _, y in front), reverse=True)
        # Logarithmic, since the dearest costs a hundred times the cheapest: 1 to 10 is as far as 10 to 100.
        assert front[1][0] - front[0][0] == pytest.approx(front[2][0] - front[1][0], abs=0.1)
        assert front[1][0] < other[0] < front[2][0]
        assert other[1] > front[1][1]

    def test_every_arm_that_has_a_place_is_named(self) -> None:
        chart = cost_plot(TRIALS, "gpu_seconds", "GPU-seconds")
        shown = texts(chart)
        assert {"full", "lora", "SSL", "frozen", "GPU-seconds", "1", "10", "100"} <= set(shown)
        assert "failed" not in shown
        assert chart.alt == (
            "Dice against GPU-seconds. On the Pareto front, cheapest first: "
            "frozen 0.500 at 1; lora 0.700 at 10; full 0.800 at 100. Off it: 1."
        )

    def test_large_costs_are_written_short(self) -> None:
        trials = TRIALS.assign(gpu_seconds=TRIALS["gpu_seconds"] * 1e5)
        assert {"100k", "1M", "10M"} <= set(texts(cost_plot(trials, "gpu_seconds", "trained parameters")))

    def test_of_many_only_the_front_is_named(self) -> None:
        trials = pd.DataFrame(
            {"arm": [f"trial {n}" for n in range(20)], "cost": range(20), "dice": [0.5] * 20}
        )
        shown = texts(cost_plot(trials, "cost", "parameters"))
        assert "trial 0" in shown
        assert "trial 1" not in shown


def test_charts_are_the_same_each_time() -> None:
    first, second = (cost_plot(TRIALS, "gpu_seconds", "s") for _ in range(2))
    assert first == second
