"""Arms compared: pairing by hand, published examples of the rank tests, bootstraps that can be enumerated."""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from samssl.arms import (
    COLUMNS,
    Pairing,
    compare_pairs,
    critical_difference,
    pair_arms,
    pareto_front,
    pooled_difference,
    rank_arms,
    score_arms,
)
from samssl.config import UserError
from samssl.statistics import paired_comparison

DEMSAR = pd.DataFrame(
    {
        "C4.5": [
            0.763,
            0.599,
            0.954,
            0.628,
            0.882,
            0.936,
            0.661,
            0.583,
            0.775,
            1.0,
            0.940,
            0.619,
            0.972,
            0.957,
        ],
        "m": [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.0, 0.962, 0.666, 0.981, 0.978],
        "cf": [
            0.771,
            0.590,
            0.968,
            0.654,
            0.886,
            0.916,
            0.609,
            0.563,
            0.866,
            1.0,
            0.965,
            0.614,
            0.9751,
            0.946,
        ],
        "m+cf": [
            0.798,
            0.569,
            0.967,
            0.657,
            0.898,
            0.931,
            0.685,
            0.625,
            0.875,
            1.0,
            0.962,
            0.669,
            0.975,
            0.970,
        ],
    }
)
"""AUC of four settings of C4.5 on 14 data sets: Demsar, JMLR 7 (2006), table 6.

On one data set (voting) both `cf` and `m+cf` are printed as 0.975, but ranked 2 and 3: the ranks are those
of numbers with more digits. SciPy's own test has 0.9751 there, and so has this.
"""


def scores(**arms: dict) -> pd.DataFrame:
    """`scores(a={("liver", 0): {"p1": 0.5}})` as the tidy table."""
    rows = [
        (arm, dataset, seed, case, dice)
        for arm, runs in arms.items()
        for (dataset, seed), cases in runs.items()
        for case, dice in cases.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def pairing(**grids: list[list[float]]) -> Pairing:
    """Differences of arm `a` from arm `b`, which is always 0: data set -> cases x seeds."""
    runs = {
        (dataset, seed): {f"case{case}": row[seed] for case, row in enumerate(grid)}
        for dataset, grid in grids.items()
        for seed in range(len(grid[0]))
    }
    return pair_arms(
        scores(a=runs, b={run: dict.fromkeys(cases, 0.0) for run, cases in runs.items()}), ["a", "b"]
    )


class TestPairing:
    def test_a_case_is_averaged_over_its_seeds(self) -> None:
        table = scores(
            a={("liver", 0): {"p1": 0.5, "p2": 0.75}, ("liver", 1): {"p1": 1.0, "p2": 0.25}},
            b={("liver", 0): {"p1": 0.25, "p2": 0.5}, ("liver", 1): {"p1": 0.75, "p2": 0.0}},
        )
        paired = pair_arms(table, ["b", "a"])
        assert list(paired.by_case.columns) == ["b", "a"]
        assert paired.by_case.to_dict("index") == {
            ("liver", "p1"): {"a": 0.75, "b": 0.5},
            ("liver", "p2"): {"a": 0.5, "b": 0.25},
        }
        assert (paired.left_out, paired.notes) == (0, ())

    def test_what_an_arm_lacks_is_left_out_of_all_and_counted(self) -> None:
        table = scores(
            a={("liver", 0): {"p1": 0.5, "p2": 0.7, "p3": math.nan}, ("liver", 1): {"p1": 0.5, "p2": 0.7}},
            b={("liver", 0): {"p1": 0.2, "p3": 0.9, "p4": 0.9}, ("liver", 2): {"p1": 0.9, "p2": 0.9}},
        )
        paired = pair_arms(table, ["a", "b"])
        assert paired.by_case.to_dict("index") == {("liver", "p1"): {"a": 0.5, "b": 0.2}}
        assert paired.left_out == 3
        assert paired.notes == (
            "liver: seed 1, 2 is left out, which not every arm has.",
            "liver: 3 of 4 cases are left out, which not every run scored.",
        )

    def test_a_case_needs_every_shared_seed(self) -> None:
        runs = {("liver", 0): {"p1": 0.5, "p2": 0.5}, ("liver", 1): {"p1": 0.5}}
        paired = pair_arms(scores(a=runs, b={**runs, ("liver", 1): {"p1": 0.5, "p2": 0.5}}), ["a", "b"])
        assert list(paired.by_case.index) == [("liver", "p1")]
        assert paired.left_out == 1

    def test_cases_of_one_name_in_two_data_sets_are_two_cases(self) -> None:
        runs = {("liver", 0): {"p1": 0.5}, ("heart", 0): {"p1": 1.0}}
        paired = pair_arms(scores(a=runs, b=runs), ["a", "b"])
        assert list(paired.by_case.index) == [("heart", "p1"), ("liver", "p1")]
        assert paired.by_dataset["a"].to_dict() == {"heart": 1.0, "liver": 0.5}

    def test_a_data_set_that_one_arm_lacks_is_named(self) -> None:
        liver, heart = {("liver", 0): {"p1": 0.5}}, {("heart", 0): {"p1": 1.0, "p2": 1.0}}
        paired = pair_arms(scores(a={**liver, **heart}, b=liver), ["a", "b"])
        assert paired.left_out == 2
        assert paired.notes == ("heart is left out: there is no seed and case that every arm has.",)

    def test_arms_that_are_not_compared_do_not_matter(self) -> None:
        runs = {("liver", 0): {"p1": 0.5, "p2": 0.6}}
        table = scores(a=runs, b=runs, c={("liver", 7): {"p9": 0.1}})
        assert pair_arms(table, ["a", "b"]).left_out == 0

    def test_what_cannot_be_compared_is_refused_in_words(self) -> None:
        table = scores(a={("liver", 0): {"p1": 0.5}}, b={("liver", 1): {"p1": 0.5}})
        with pytest.raises(UserError, match="no score of arm c; the arms are a, b"):
            pair_arms(table, ["a", "c"])
        with pytest.raises(UserError, match="Arms a, b share no data set, seed and case"):
            pair_arms(table, ["a", "b"])
        with pytest.raises(ValueError, match="different arms"):
            pair_arms(table, ["a", "a"])
        with pytest.raises(ValueError, match="lacks seed"):
            pair_arms(table.drop(columns="seed"), ["a", "b"])
        with pytest.raises(ValueError, match="duplicate"):
            pair_arms(pd.concat([table, table]), ["a", "b"])


def test_scores_of_arms_by_data_set() -> None:
    table = scores(
        a={("liver", 0): {"p1": 0.5, "p2": 0.75}, ("liver", 1): {"p1": 1.0, "p3": 0.5}},
        b={("heart", 3): {"p1": 0.25, "p2": 0.75}},
    )
    liver, heart = score_arms(table).to_dict("records")
    assert math.isnan(liver.pop("low"))
    assert math.isnan(liver.pop("high"))
    assert liver == {"arm": "a", "dataset": "liver", "dice": 0.75, "cases": 1, "seeds": 2}
    assert heart == {
        "arm": "b",
        "dataset": "heart",
        "dice": 0.5,
        "low": 0.25,
        "high": 0.75,
        "cases": 2,
        "seeds": 1,
    }


class TestRanks:
    def test_demsars_table(self) -> None:
        ranking = rank_arms(DEMSAR)
        published = {"m+cf": 1.964, "m": 2.000, "cf": 2.893, "C4.5": 3.143}
        assert ranking.mean_ranks.round(3).to_dict() == published
        assert list(ranking.mean_ranks.index) == list(published)
        # The published 9.28 is not corrected for ties; this is, and so is what SciPy's test holds.
        assert (ranking.friedman_statistic, ranking.friedman_p) == pytest.approx(
            (10.2283464567, 0.0167215803)
        )
        # Three rows have a pair of ties (6 each), one is tied throughout (60); N k (k^2 - 1) is 840.
        assert ranking.friedman_statistic * (1 - (3 * 6 + 60) / 840) == pytest.approx(9.28, abs=0.01)
        assert ranking.critical_difference == pytest.approx(1.25, abs=0.005)
        # "None of them is": the largest distance, 1.18, is below 1.25.
        assert ranking.groups == [("m+cf", "m", "cf", "C4.5")]
        assert (ranking.nemenyi_p.to_numpy() > 0.05).all()

    @pytest.mark.parametrize(
        ("num_arms", "quantile"),
        [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (10, 3.164)],
    )
    def test_critical_values_are_those_of_demsars_table_5(self, num_arms: int, quantile: float) -> None:
        expected = quantile * math.sqrt(num_arms * (num_arms + 1) / (6 * 20))
        assert critical_difference(num_arms, 20) == pytest.approx(expected, rel=3e-4)

    @pytest.mark.parametrize(
        ("samples", "statistic"),
        [
            (
                [
                    [4, 3, 5, 3, 5, 3, 2, 5, 4, 4, 4, 3],
                    [2, 2, 1, 2, 3, 1, 2, 3, 2, 1, 1, 3],
                    [2, 4, 3, 3, 4, 3, 3, 4, 4, 1, 2, 1],
                    [3, 5, 4, 3, 4, 4, 3, 3, 3, 4, 4, 4],
                ],
                18.94,  # Bioestadistica para las ciencias de la salud
            ),
            (
                [
                    [7.0, 9.9, 8.5, 5.1, 10.3],
                    [5.3, 5.7, 4.7, 3.5, 7.7],
                    [4.9, 7.6, 5.5, 2.8, 8.4],
                    [8.8, 8.9, 8.1, 3.3, 9.1],
                ],
                10.68,  # Zar, Biostatistical Analysis, example 12.6
            ),
        ],
    )
    def test_textbook_examples_of_friedman(self, samples: list[list[float]], statistic: float) -> None:
        ranking = rank_arms(pd.DataFrame(np.transpose(samples), columns=list("abcd")))
        assert ranking.friedman_statistic == pytest.approx(statistic, abs=0.005)

    def test_scipys_example_of_friedman(self) -> None:
        samples = np.random.default_rng(seed=18).random((6, 10))
        ranking = rank_arms(pd.DataFrame(samples.T, columns=list("abcdef")))
        assert ranking.friedman_statistic == pytest.approx(11.428571428571416)
        assert ranking.friedman_p == pytest.approx(0.043514520866727614)

    def test_nemenyi_on_an_example_that_scikit_posthocs_checks_against_r(self) -> None:
        blocks = [[4, 3, 4, 4, 5, 6, 3], [1, 2, 3, 5, 6, 7, 7], [1, 2, 6, 4, 1, 5, 1]]
        p = rank_arms(pd.DataFrame(blocks, columns=list("abcdefg"))).nemenyi_p.to_dict()
        published = {"af": 0.2147827, "bf": 0.2597539, "ac": 0.8414506, "cf": 0.9449086, "fg": 0.5511935}
        for (one, other), value in published.items():
            assert p[one][other] == pytest.approx(value, abs=1e-6)
            assert p[other][one] == p[one][other]

    def test_p_and_critical_difference_say_the_same(self) -> None:
        rng = np.random.default_rng(0)
        ranking = rank_arms(
            pd.DataFrame(rng.normal([0, 0.3, 0.6, 1.5, 1.6], 1, (30, 5)), columns=list("abcde"))
        )
        ranks, p = ranking.mean_ranks, ranking.nemenyi_p.to_dict()
        apart = np.abs(np.subtract.outer(ranks.to_numpy(), ranks.to_numpy())) >= ranking.critical_difference
        assert apart.any()
        np.testing.assert_array_equal(ranking.nemenyi_p.to_numpy() <= 0.05, apart)
        in_one = {frozenset(pair) for group in ranking.groups for pair in itertools.combinations(group, 2)}
        close = {
            frozenset((one, other))
            for one, other in itertools.combinations(ranks.index, 2)
            if p[one][other] > 0.05
        }
        assert in_one == close

    def test_the_larger_dice_ranks_first_and_ties_share(self) -> None:
        table = pd.DataFrame({"bad": [0.1, 0.2, 0.1], "good": [0.9, 0.8, 0.7], "as good": [0.9, 0.8, 0.7]})
        assert rank_arms(table).mean_ranks.to_dict() == {"good": 1.5, "as good": 1.5, "bad": 3.0}

    def test_arms_that_are_equal_everywhere_do_not_differ(self) -> None:
        ranking = rank_arms(pd.DataFrame({arm: [0.5, 0.6] for arm in "abc"}))
        assert (ranking.friedman_statistic, ranking.friedman_p) == (0.0, 1.0)
        assert ranking.groups == [("a", "b", "c")]

    def test_two_arms_or_one_block_have_no_ranking(self) -> None:
        with pytest.raises(ValueError, match="three arms and two blocks at least, not 2 and 14"):
            rank_arms(DEMSAR[["C4.5", "m"]])
        with pytest.raises(ValueError, match="not 4 and 1"):
            rank_arms(DEMSAR[:1])


def wilcoxon_p(first: str, second: str) -> float:
    result: Any = scipy.stats.wilcoxon(DEMSAR[first] - DEMSAR[second])
    return float(result.pvalue)


class TestPairs:
    def test_every_pair_with_holms_correction(self) -> None:
        table = compare_pairs(DEMSAR)
        assert list(zip(table["first"], table["second"], strict=True)) == list(
            itertools.combinations(DEMSAR.columns, 2)
        )
        raw = np.array([wilcoxon_p(a, b) for a, b in itertools.combinations(map(str, DEMSAR), 2)])
        np.testing.assert_allclose(table["wilcoxon_p"], raw)
        # Holm: the i-th smallest of m times m - i + 1, never below the one before it, never above 1.
        order = np.argsort(raw)
        holm = np.minimum(1, np.maximum.accumulate(raw[order] * np.arange(6, 0, -1)))
        np.testing.assert_allclose(table["holm_p"].to_numpy()[order], holm)

    def test_a_row_is_the_paired_comparison(self) -> None:
        row = compare_pairs(DEMSAR, [("m", "C4.5")]).iloc[0]
        expected = paired_comparison(DEMSAR["m"].to_numpy(), DEMSAR["C4.5"].to_numpy())
        assert row["mean_difference"] == expected.mean_difference
        assert (row["better"], row["worse"], row["tied"]) == (10, 2, 2)
        assert row["holm_p"] == row["wilcoxon_p"] == expected.wilcoxon_p

    def test_only_the_named_pairs_are_corrected_for(self) -> None:
        few = compare_pairs(DEMSAR, [("m", "C4.5"), ("cf", "C4.5")])
        assert few["holm_p"].min() == pytest.approx(2 * few["wilcoxon_p"].min())


class TestPooledDifference:
    def test_data_sets_count_equally_whatever_their_size(self) -> None:
        pooled = pooled_difference(pairing(liver=[[0.3]] * 9, heart=[[0.1]]), "a", "b")
        assert pooled.mean_difference == pytest.approx(0.2)
        assert (pooled.datasets, pooled.cases, pooled.seeds) == (2, 10, 1)

    def test_two_data_sets_without_other_variation_span_the_interval(self) -> None:
        # Two draws of 0 and 1 average 0, 0.5 or 1 with chances 1/4, 1/2, 1/4.
        pooled = pooled_difference(pairing(liver=[[0.0]] * 3, heart=[[1.0]] * 3), "a", "b")
        assert (pooled.mean_difference, pooled.low, pooled.high) == (0.5, 0.0, 1.0)

    def test_seeds_are_drawn_for_all_cases_together(self) -> None:
        # The seed alone decides: two draws of seeds give 0, 0.5 or 1 for all 50 cases at once. Seeds drawn
        # for each case by itself would give 0.5 within 0.14.
        pooled = pooled_difference(pairing(liver=[[0.0, 1.0]] * 50), "a", "b")
        assert (pooled.mean_difference, pooled.low, pooled.high) == (0.5, 0.0, 1.0)

    def test_one_data_set_and_seed_is_the_ordinary_bootstrap(self) -> None:
        values = np.random.default_rng(0).normal(0.02, 0.05, 40)
        pooled = pooled_difference(pairing(liver=[[value] for value in values]), "a", "b")
        expected = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert (pooled.low, pooled.high) == pytest.approx((expected.low, expected.high), abs=1e-3)

    def test_its_spread_is_what_the_levels_add_up_to(self) -> None:
        # Expected variance of a redraw, level by level, where cases and seeds add: within data set d
        # var(cases)/n + var(seeds)/s, averaged over D and divided by D, plus var(data sets)/D.
        rng = np.random.default_rng(2)
        case_effects, seed_effects = rng.normal(0, 0.2, (4, 30)), rng.normal(0, 0.1, (4, 5))
        dataset_effects = np.array([-0.1, 0.0, 0.2, 0.3])
        grids = dataset_effects[:, None, None] + case_effects[:, :, None] + seed_effects[:, None, :]
        pooled = pooled_difference(
            pairing(**{f"d{d}": grid.tolist() for d, grid in enumerate(grids)}), "a", "b"
        )
        within = case_effects.var(axis=1) / 30 + seed_effects.var(axis=1) / 5
        spread = math.sqrt((within.mean() + grids.mean(axis=(1, 2)).var()) / 4)
        # Four data sets are nearly normal already.
        assert pooled.high - pooled.low == pytest.approx(2 * 1.96 * spread, rel=0.06)

    def test_the_other_way_round_it_is_mirrored(self) -> None:
        paired = pairing(liver=[[0.1], [0.2], [0.4]])
        forth, back = pooled_difference(paired, "a", "b"), pooled_difference(paired, "b", "a")
        assert (back.mean_difference, back.low, back.high) == pytest.approx(
            (-forth.mean_difference, -forth.high, -forth.low), abs=0.02
        )

    def test_one_case_has_no_interval(self) -> None:
        pooled = pooled_difference(pairing(liver=[[0.1, 0.2]]), "a", "b")
        assert pooled.mean_difference == pytest.approx(0.15)
        assert math.isnan(pooled.low)
        assert math.isnan(pooled.high)

    def test_more_redraws_than_fit_a_batch_keep_their_order_of_size(self) -> None:
        pooled = pooled_difference(pairing(liver=[[0.25]] * 7), "a", "b")
        assert (pooled.low, pooled.high) == pytest.approx((0.25, 0.25))


def test_pareto_front_is_what_nothing_beats() -> None:
    table = pd.DataFrame(
        [
            ("cheap", 1.0, 0.5),
            ("dearer and worse", 2.0, 0.4),
            ("dearer and equal", 2.0, 0.5),
            ("good", 3.0, 0.8),
            ("as good for as much", 3.0, 0.8),
            ("worse for as much", 3.0, 0.7),
            ("failed", 0.1, math.nan),
            ("free", math.inf, 0.9),
        ],
        columns=["arm", "gpu_seconds", "dice"],
    )
    assert list(pareto_front(table[::-1], "gpu_seconds")["arm"]) == ["cheap", "as good for as much", "good"]
