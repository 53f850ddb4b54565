"""Intervals and paired tests against hand-computed and SciPy values."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from samssl.statistics import Interval, Paired, mean_interval, paired_comparison, seed_interval


def test_two_cases_span_the_interval() -> None:
    # Resampling two cases gives 0.5, 0.625 or 0.75 with chances 1/4, 1/2, 1/4: the 95 % ends are the cases.
    assert mean_interval([0.5, 0.75]) == Interval(0.625, 0.5, 0.75, 2)


def test_interval_is_scipys_bca() -> None:
    values = np.array([0.61, 0.72, 0.74, 0.80, 0.81, 0.83, 0.35])
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    interval = mean_interval(values, seed=3)
    assert interval.mean == pytest.approx(4.86 / 7)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_narrows_with_cases_and_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    few, many = (mean_interval(rng.normal(0.8, 0.05, n)) for n in (10, 1000))
    assert few.high - few.low > 4 * (many.high - many.low)
    # The normal approximation is good at 1000 cases: 2 * 1.96 * 0.05 / sqrt(1000).
    assert many.high - many.low == pytest.approx(0.0062, rel=0.1)
    assert many.low < many.mean < many.high


def test_interval_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(0).uniform(0.5, 1, 20)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_one_case_has_no_interval() -> None:
    interval = mean_interval([0.5])
    assert (interval.mean, interval.cases) == (0.5, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert mean_interval([0.25, 0.25, 0.25]) == Interval(0.25, 0.25, 0.25, 3)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_values_that_cannot_be_averaged_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="case"):
        mean_interval(values)


def test_paired_comparison_by_hand() -> None:
    # Differences .1 .2 .3 -.4 .5: ranks 1 2 3 4 5, the negative ranks sum to 4. Of the 32 sign patterns
    # 7 have a sum of at most 4 ({}, 1, 2, 3, 4, 1+2, 1+3), so p = 2 * 7 / 32.
    result = paired_comparison([0.1, 0.2, 0.3, 0.0, 0.5], [0.0, 0.0, 0.0, 0.4, 0.0])
    assert result.mean_difference == pytest.approx(0.14)
    assert result.wilcoxon_p == pytest.approx(14 / 32)
    assert (result.better, result.worse, result.tied, result.cases) == (4, 1, 0, 5)
    assert result.low < 0 < result.high


def test_paired_comparison_is_antisymmetric() -> None:
    a, b = np.random.default_rng(1).uniform(0.5, 1, (2, 12))
    forth, back = paired_comparison(a, b), paired_comparison(b, a)
    assert forth.mean_difference == pytest.approx(-back.mean_difference)
    assert forth.wilcoxon_p == pytest.approx(back.wilcoxon_p)
    assert (forth.better, forth.worse) == (back.worse, back.better)


def test_ties_are_counted_and_left_out_of_the_test() -> None:
    a, b = [0.5, 0.6, 0.7, 0.9], [0.5, 0.5, 0.5, 0.6]
    result = paired_comparison(a, b)
    assert (result.better, result.worse, result.tied) == (3, 0, 1)
    assert result.wilcoxon_p == pytest.approx(2 / 2**3)  # the three untied cases all have one sign


def test_arms_that_are_equal_on_every_case() -> None:
    result = paired_comparison([0.5, 0.7], [0.5, 0.7])
    assert replace(result, cohens_dz=0.0) == Paired(0.0, 0.0, 0.0, 1.0, 0, 0, 2, 2, 0.0, 0.0)
    assert math.isnan(result.cohens_dz)


def test_unequal_numbers_of_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="same cases twice, not 2 and 1"):
        paired_comparison([0.5, 0.7], [0.5])


def test_darwins_plants() -> None:
    """Heights of crossed less self-fertilised plants, the example in SciPy's documentation of `wilcoxon`."""
    differences = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
    result = paired_comparison(differences, np.zeros(15))
    assert result.wilcoxon_p == pytest.approx(0.041259765625)
    # 48 and 67 have ranks 10 and 14 of 1 .. 15, whose sum is 120.
    assert result.rank_biserial == pytest.approx((96 - 24) / 120)


def test_effect_sizes_by_hand() -> None:
    # Differences .1 .2 .3 -.4 .5: mean .14, squares sum to .55; ranks for 1 + 2 + 3 + 5, against 4.
    result = paired_comparison([0.1, 0.2, 0.3, 0.0, 0.5], [0.0, 0.0, 0.0, 0.4, 0.0])
    assert result.rank_biserial == pytest.approx(7 / 15)
    assert result.cohens_dz == pytest.approx(0.14 / math.sqrt((0.55 - 5 * 0.14**2) / 4))


@pytest.mark.parametrize(("a", "b", "expected"), [([2, 3], [1, 1], 1.0), ([0, 0, 5], [1, 2, 5], -1.0)])
def test_rank_biserial_has_its_ends_where_all_untied_cases_agree(a: list, b: list, expected: float) -> None:
    assert paired_comparison(a, b).rank_biserial == expected


def test_interval_over_seeds_is_students() -> None:
    # t at 97.5 % with 2 degrees of freedom is 4.303 (any table); the standard error is .01 / sqrt(3).
    interval = seed_interval([0.79, 0.80, 0.81])
    assert interval.mean == pytest.approx(0.80)
    assert interval.high - interval.mean == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-4)
    assert math.isnan(seed_interval([0.8]).low)
