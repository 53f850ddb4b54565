"""The sentence at the top of the report says what the numbers say."""

from typing import Any

import pytest

from samssl.report.verdict import caveats, p_value, signed, verdict


def summary(
    difference: float, low: float | None, high: float | None, p: float, *, cases: int = 30, **facts: Any
) -> dict[str, Any]:
    """A summary of two arms with two seeds each."""
    entry = {"test/dice": 0.8, "ci95": [0.7, 0.9], "cases": cases, "per_seed": {"0": {}, "1": {}}}
    paired = {
        "treatment": "ssl",
        "baseline": "no_ssl",
        "mean_difference": difference,
        "ci95": [low, high],
        "wilcoxon_p": p,
        "better": 20,
        "worse": 8,
        "tied": 2,
        "cases": cases,
        "means": {"ssl": 0.8, "no_ssl": 0.8 - difference},
    }
    return {"simulated": False, "arms": {"ssl": entry, "no_ssl": entry}, "paired": paired | facts}


def unbroken(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("case", "claim"),
    [
        (summary(0.02, 0.01, 0.03, 0.001), "SSL did better than no SSL"),
        (summary(-0.02, -0.03, -0.01, 0.001), "SSL did worse than no SSL"),
        (summary(0.01, -0.01, 0.03, 0.3), "No difference between SSL and no SSL was shown"),
        (
            summary(0.01, 0.001, 0.03, 0.2),
            "SSL against no SSL is undecided (the rank test does not confirm the interval)",
        ),
        (summary(0.01, -0.01, 0.03, 0.02), "SSL against no SSL is undecided (the interval includes zero)"),
        (summary(0, 0, 0, 1, tied=30), "SSL and no SSL gave exactly the same Dice on every case"),
        (summary(0.1, None, None, 1, cases=1), "One case cannot show whether SSL is better than no SSL"),
    ],
)
def test_claim(case: dict[str, Any], claim: str) -> None:
    assert verdict(case).claim == claim


def test_detail_gives_the_numbers() -> None:
    assert unbroken(verdict(summary(0.02, 0.0104, 0.03, 0.0004)).detail) == (
        "mean Dice 0.800 against 0.780 on the same 30 test cases, a difference of +0.020 "
        "(95 % interval +0.010 to +0.030; p < 0.001); 20 of 30 cases improved and 8 got worse."
    )


def test_one_arm_alone() -> None:
    case = summary(0.02, 0.01, 0.03, 0.001) | {"paired": None, "simulated": True}
    del case["arms"]["no_ssl"]
    assert verdict(case).claim == "There is no pair of arms to compare"
    assert unbroken(verdict(case).detail) == (
        "SSL reached a mean Dice of 0.800 (95 % interval 0.700 to 0.900) on 30 simulated test cases."
    )


def test_caveats_only_where_they_apply() -> None:
    assert caveats(summary(0.02, 0.01, 0.03, 0.001)) == []
    few = summary(0.02, 0.01, 0.03, 0.06, cases=5) | {"simulated": True}
    few["arms"] = {"ssl": {"cases": 5, "per_seed": {"0": {}}}, "no_ssl": {"cases": 5, "per_seed": {"0": {}}}}
    simulated, narrow, test, seed = caveats(few)
    assert simulated.startswith("The subjects are simulated")
    assert narrow.startswith("5 test cases are few")
    assert "cannot reach p < 0.05" in test
    assert seed.startswith("There is one training seed")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0214, "+0.021"), (-0.0214, "\N{MINUS SIGN}0.021"), (-0.0001, "0.000"), (None, "\N{EN DASH}")],
)
def test_signed(value: float | None, text: str) -> None:
    assert signed(value) == text


def test_p_value() -> None:
    texts = [unbroken(p_value(value)) for value in (0.0123, 0.001, 0.00099, 1.0)]
    assert texts == ["p = 0.012", "p = 0.001", "p < 0.001", "p = 1.000"]
