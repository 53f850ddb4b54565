"""Arms of a study compared: cases paired across arms, ranks, corrected pairs, intervals over data sets.

Every function starts from one tidy table, `COLUMNS`: the Dice of one case by the run of one arm and seed
on one data set. What each result says, and what it does not, is in docs/concepts.md.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Float

from samssl.config import UserError
from samssl.statistics import CONFIDENCE, NUM_RESAMPLES, mean_interval, paired_comparison

COLUMNS = ("arm", "dataset", "seed", "case", "dice")
_BATCH = 1_000
"""Resamples held in memory at once."""


@dataclass(frozen=True)
class Pairing:
    """Dice of the cases and seeds that all compared arms share; columns are arms, in the order asked for."""

    by_seed: pd.DataFrame
    """One row a data set, case and seed; of a data set every case has every seed."""
    left_out: int
    """Cases that are in the table, but that not every arm was scored on."""
    notes: tuple[str, ...]
    """One sentence for each thing left out."""

    @cached_property
    def by_case(self) -> pd.DataFrame:
        """One row a data set and case: the mean over seeds."""
        return self.by_seed.groupby(level=["dataset", "case"]).mean()

    @cached_property
    def by_dataset(self) -> pd.DataFrame:
        """One row a data set: the mean over its cases."""
        return self.by_case.groupby(level="dataset").mean()


@dataclass(frozen=True)
class Ranking:
    """Arms by their mean rank over blocks (cases, or data sets); the best has rank 1, ties share ranks."""

    mean_ranks: pd.Series
    """By arm, best first."""
    blocks: int
    friedman_statistic: float
    """Chi-square of Friedman's test that no arm differs, corrected for ties."""
    friedman_p: float
    nemenyi_p: pd.DataFrame
    """Of every pair of arms, already corrected for their number; rows and columns as in `mean_ranks`."""
    critical_difference: float
    """Mean ranks at least this far apart differ at the 5 % level of Nemenyi's test."""

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The longest runs of neighbours that lie closer together than the critical difference."""
        arms, ranks = list(self.mean_ranks.index), self.mean_ranks.to_numpy()
        ends = [int((ranks < rank + self.critical_difference).sum()) for rank in ranks]
        return [
            tuple(arms[start:end])
            for start, (before, end) in enumerate(itertools.pairwise([0, *ends]))
            if end - start > 1 and end > before
        ]


@dataclass(frozen=True)
class Pooled:
    """The mean over data sets of how two arms differ; positive means that the first is larger."""

    mean_difference: float
    low: float
    high: float
    datasets: int
    cases: int
    seeds: int
    """In the data set that has fewest."""


def pair_arms(table: pd.DataFrame, arms: Sequence[str]) -> Pairing:
    """The cases and seeds of `table` on which all of `arms` can be compared.

    In each data set these are the seeds that every arm has, and of the cases those that every arm was
    scored on with every one of these seeds. A Dice that is NaN counts as not scored.

    Raises:
        ValueError: when columns are missing, a run scored a case twice, or fewer than two arms are named.
        UserError: when an arm is not in the table or the arms share no case.
    """
    rows = _rows_of(table, arms)
    wide = rows.pivot(index=["dataset", "case", "seed"], columns="arm", values="dice")[list(arms)]
    parts, notes = [], []
    for dataset, scores in wide.groupby(level="dataset"):
        part = _shared(scores)
        parts.append(part)
        notes += _left_out(str(dataset), scores, part)
    by_seed = pd.concat(parts)
    if by_seed.empty:
        raise UserError(
            f"Arms {', '.join(arms)} share no data set, seed and case, and cannot be compared. "
            "Evaluate them on the same store with the same seeds."
        )
    return Pairing(by_seed, _num_cases(wide) - _num_cases(by_seed), tuple(notes))


def score_arms(table: pd.DataFrame) -> pd.DataFrame:
    """Every arm on every data set: mean Dice over cases with its 95 % interval (`dice`, `low`, `high`).

    A case's Dice is averaged over the arm's seeds; cases that a seed left unscored are left out.
    """
    rows = []
    for (arm, dataset), runs in _scored(table).groupby(["arm", "dataset"], sort=False):
        by_seed = runs.pivot(index="case", columns="seed", values="dice").dropna()
        if len(by_seed):
            interval = mean_interval(by_seed.mean(axis=1).to_numpy())
            rows.append(
                {
                    "arm": arm,
                    "dataset": dataset,
                    "dice": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "cases": interval.cases,
                    "seeds": by_seed.shape[1],
                }
            )
    return pd.DataFrame(rows, columns=["arm", "dataset", "dice", "low", "high", "cases", "seeds"])


def rank_arms(scores: pd.DataFrame) -> Ranking:
    """Friedman's test over the rows of `scores` (blocks), and Nemenyi's for its pairs of columns (arms).

    Blocks are cases (`Pairing.by_case`) or data sets (`Pairing.by_dataset`). Method and critical difference:
    J. Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 7 (2006), section 3.2.2.

    Raises:
        ValueError: with fewer than three arms, for which there is `paired_comparison`, or than two blocks.
    """
    blocks, num_arms = scores.shape
    if num_arms < 3 or blocks < 2:
        raise ValueError(f"Ranks need three arms and two blocks at least, not {num_arms} and {blocks}.")
    mean_ranks = scores.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    statistic, p = _friedman(scores)
    return Ranking(
        mean_ranks=mean_ranks,
        blocks=blocks,
        friedman_statistic=statistic,
        friedman_p=p,
        nemenyi_p=_nemenyi(scores[mean_ranks.index]),
        critical_difference=critical_difference(num_arms, blocks),
    )


def critical_difference(num_arms: int, blocks: int) -> float:
    """How far apart two mean ranks must lie to differ at the 5 % level of Nemenyi's test."""
    from scipy.stats import studentized_range

    quantile = float(studentized_range.ppf(CONFIDENCE, num_arms, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(num_arms * (num_arms + 1) / (6 * blocks))


def compare_pairs(scores: pd.DataFrame, pairs: Sequence[tuple[str, str]] | None = None) -> pd.DataFrame:
    """Pairs of columns of `scores` compared row by row: `first`, `second`, the fields of `Paired`, `holm_p`.

    `holm_p` is Wilcoxon's p corrected by Holm's method for the number of pairs, which are all there are or
    those named, as in each arm against one baseline. Name them before looking at the results.
    """
    from statsmodels.stats.multitest import multipletests

    chosen = itertools.combinations(scores.columns, 2) if pairs is None else pairs
    rows = [
        {"first": a, "second": b, **asdict(paired_comparison(scores[a].to_numpy(), scores[b].to_numpy()))}
        for a, b in chosen
    ]
    table = pd.DataFrame(rows)
    table["holm_p"] = multipletests(table["wilcoxon_p"], method="holm")[1]
    return table


def pooled_difference(pairing: Pairing, first: str, second: str, seed: int = 0) -> Pooled:
    """Mean difference between two arms over data sets that count equally, with a 95 % interval.

    The interval is that of a hierarchical bootstrap (percentiles): data sets are drawn, then cases and
    seeds within each. One draw of seeds serves all cases of a drawn data set, since what a seed changes is
    the training run that they share; seeds drawn for each case by itself would average it away. With two
    or three data sets or seeds the interval is too narrow; a single case has none (NaN ends).
    """
    difference = pairing.by_seed[first] - pairing.by_seed[second]
    grids = [rows.unstack("seed").to_numpy() for _, rows in difference.groupby(level="dataset")]
    cases = sum(len(grid) for grid in grids)
    low, high = _bootstrap_ends(grids, np.random.default_rng(seed)) if cases > 1 else (math.nan, math.nan)
    return Pooled(
        mean_difference=float(np.mean([grid.mean() for grid in grids])),
        low=low,
        high=high,
        datasets=len(grids),
        cases=cases,
        seeds=min(grid.shape[1] for grid in grids),
    )


def pareto_front(table: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows of `table` than which no other is both as cheap and as good, and better in one of the two.

    Cheapest first, `dice` rising with `cost`; rows without a finite number in either are left out.
    """
    finite = table[[cost, "dice"]].abs().max(axis=1, skipna=False) < math.inf
    known = table[finite].sort_values(cost, kind="stable")
    best = known.groupby(cost)["dice"].max()
    front = best[best > best.cummax().shift(fill_value=-math.inf)]
    return known[known["dice"] == known[cost].map(front)]


def _rows_of(table: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    if len(set(arms)) < max(2, len(arms)):
        raise ValueError(f"Two or more different arms can be compared, not {list(arms)}.")
    rows = _scored(table)
    if missing := [arm for arm in arms if arm not in set(rows["arm"])]:
        known = ", ".join(map(str, rows["arm"].unique())) or "none"
        raise UserError(f"There is no score of arm {' or '.join(missing)}; the arms are {known}.")
    return rows[rows["arm"].isin(arms)]


def _scored(table: pd.DataFrame) -> pd.DataFrame:
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise ValueError(f"The table of scores lacks {', '.join(missing)}.")
    return table[table["dice"].notna()]


def _shared(scores: pd.DataFrame) -> pd.DataFrame:
    """Of one data set, the seeds that every arm has and the cases that all of them scored."""
    seeds = _shared_seeds(scores)
    rows = scores[scores.index.isin(seeds, level="seed")].dropna()
    times = rows.index.get_level_values("case").value_counts()
    return rows[rows.index.isin(times.index[times == len(seeds)], level="case")]


def _shared_seeds(scores: pd.DataFrame) -> pd.Index:
    by_seed = scores.notna().groupby(level="seed").any()
    return by_seed.index[by_seed.all(axis=1)]


def _left_out(dataset: str, scores: pd.DataFrame, kept: pd.DataFrame) -> Iterator[str]:
    if kept.empty:
        yield f"{dataset} is left out: there is no seed and case that every arm has."
        return
    seeds = scores.index.get_level_values("seed").unique().difference(_shared_seeds(scores))
    if len(seeds):
        yield f"{dataset}: seed {', '.join(map(str, seeds))} is left out, which not every arm has."
    cases, shared = _num_cases(scores), _num_cases(kept)
    if shared < cases:
        yield f"{dataset}: {cases - shared} of {cases} cases are left out, which not every run scored."


def _num_cases(rows: pd.DataFrame) -> int:
    return rows.groupby(level=["dataset", "case"]).ngroups


def _friedman(scores: pd.DataFrame) -> tuple[float, float]:
    """Statistic and p; where every block is tied throughout, nothing speaks against equality."""
    if (scores.nunique(axis=1) == 1).all():
        return 0.0, 1.0
    from scipy.stats import friedmanchisquare

    statistic, p = friedmanchisquare(*scores.to_numpy().T)
    return float(statistic), float(p)


def _nemenyi(scores: pd.DataFrame) -> pd.DataFrame:
    from scikit_posthocs import posthoc_nemenyi_friedman

    p = posthoc_nemenyi_friedman(scores.to_numpy()).to_numpy()
    return pd.DataFrame(p, index=scores.columns, columns=scores.columns)


def _bootstrap_ends(
    grids: Sequence[Float[np.ndarray, "cases seeds"]], rng: np.random.Generator
) -> tuple[float, float]:
    drawn = rng.integers(len(grids), size=(NUM_RESAMPLES, len(grids)))
    means = np.empty(drawn.shape)
    for index, grid in enumerate(grids):
        chosen = drawn == index
        means[chosen] = _resampled_means(grid, int(chosen.sum()), rng)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means.mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _resampled_means(
    grid: Float[np.ndarray, "cases seeds"], count: int, rng: np.random.Generator
) -> Float[np.ndarray, " count"]:
    """Means of `count` redraws of the cases and, all cases together, of the seeds."""
    means = [np.empty(0)]
    for start in range(0, count, _BATCH):
        times = [
            rng.multinomial(size, np.full(size, 1 / size), min(_BATCH, count - start)) for size in grid.shape
        ]
        means.append((times[0] @ grid * times[1]).sum(axis=1) / grid.size)
    return np.concatenate(means)
