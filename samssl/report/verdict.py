"""The result in plain words, computed from `summary.json`'s numbers and from nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIGNIFICANCE = 0.05
FEW_CASES = 20
DASH, MINUS, NBSP = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Verdict:
    """One sentence in two parts: what was found, and the numbers that say so."""

    claim: str
    detail: str


def verdict(summary: Mapping[str, Any]) -> Verdict:
    """What the comparison shows, and no more."""
    kind = "simulated " if summary["simulated"] else ""
    paired = summary["paired"]
    if paired is None:
        arms = "; ".join(_single(arm, entry, kind) for arm, entry in summary["arms"].items())
        return Verdict("There is no pair of arms to compare", f"{arms}.")
    treatment, baseline = arm_name(paired["treatment"]), arm_name(paired["baseline"])
    means = [number(paired["means"][paired[role]]) for role in ("treatment", "baseline")]
    both = f"mean Dice {means[0]} against {means[1]} on the same {_cases(paired['cases'], kind)}"
    low, high = paired["ci95"]
    if paired["tied"] == paired["cases"]:
        return Verdict(f"{treatment} and {baseline} gave exactly the same Dice on every case", f"{both}.")
    if low is None:
        return Verdict(f"One case cannot show whether {treatment} is better than {baseline}", f"{both}.")
    interval = f"95{NBSP}% interval {signed(low)} to {signed(high)}; {p_value(paired['wilcoxon_p'])}"
    detail = f"{both}, a difference of {signed(paired['mean_difference'])} ({interval}); {_changes(paired)}."
    return Verdict(_claim(paired, treatment, baseline), detail)


def caveats(summary: Mapping[str, Any]) -> list[str]:
    """What a careful reader should hold against the result."""
    cases = min(entry["cases"] for entry in summary["arms"].values())
    seeds = min(len(entry["per_seed"]) for entry in summary["arms"].values())
    sentences = []
    if summary["simulated"]:
        sentences.append(
            "The subjects are simulated: the numbers show that the method works end to end, "
            "not how it would do on patients."
        )
    if 1 < cases < FEW_CASES:
        sentences.append(
            f"{cases} test cases are few: at such sizes a 95 % bootstrap interval tends to be too narrow "
            "(in simulations of skewed Dice it covered the truth nearer 90 % of the time)."
        )
    if cases > 1 and 2 / 2**cases > SIGNIFICANCE:
        sentences.append(f"With {cases} cases the signed-rank test cannot reach p < {SIGNIFICANCE} at all.")
    if seeds == 1:
        sentences.append(
            "There is one training seed: the intervals hold the variation between cases, "
            "not the variation from one training run to the next."
        )
    return sentences


def arm_name(arm: str) -> str:
    """How the report writes an arm's name."""
    return {"ssl": "SSL", "no_ssl": "no SSL"}.get(arm, arm.replace("_", " "))


def number(value: float | None) -> str:
    """A Dice with three decimals, or a dash where there is none."""
    return DASH if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with its sign, a true minus, and no sign on zero."""
    if value is None:
        return DASH
    rounded = round(value, 3)
    return f"{rounded:+.3f}".replace("-", MINUS) if rounded else "0.000"


def p_value(value: float) -> str:
    """`p = 0.012`, or `p < 0.001`, unbroken at the end of a line."""
    return (f"p = {value:.3f}" if value >= 0.001 else "p < 0.001").replace(" ", NBSP)


def _claim(paired: Mapping[str, Any], treatment: str, baseline: str) -> str:
    """Better or worse only where interval and rank test agree."""
    low, high = paired["ci95"]
    apart, significant = low > 0 or high < 0, paired["wilcoxon_p"] < SIGNIFICANCE
    if apart and significant:
        return f"{treatment} did {'better' if low > 0 else 'worse'} than {baseline}"
    if apart or significant:
        dissenter = "the rank test does not confirm the interval" if apart else "the interval includes zero"
        return f"{treatment} against {baseline} is undecided ({dissenter})"
    return f"No difference between {treatment} and {baseline} was shown"


def _changes(paired: Mapping[str, Any]) -> str:
    better, worse, cases = paired["better"], paired["worse"], paired["cases"]
    if cases in (better, worse):
        return f"all {cases} cases {'improved' if better else 'got worse'}"
    return f"{better} of {cases} cases improved and {worse} got worse"


def _single(arm: str, entry: Mapping[str, Any], kind: str) -> str:
    low, high = entry["ci95"]
    interval = f" (95{NBSP}% interval {number(low)} to {number(high)})" if low is not None else ""
    mean = number(entry["test/dice"])
    return f"{arm_name(arm)} reached a mean Dice of {mean}{interval} on {_cases(entry['cases'], kind)}"


def _cases(count: int, kind: str) -> str:
    return f"{count} {kind}test {'case' if count == 1 else 'cases'}"
