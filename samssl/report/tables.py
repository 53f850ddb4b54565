"""Tables of studies with many arms: the scores of their runs, and published values beside them.

A file of published values is YAML:

    values:
      - arm: lora                  as the study calls it, or another name
        dataset: hippocampus
        dice: 0.867
        source: Example et al. 2025, table 3, https://doi.org/...
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from samssl.arms import COLUMNS
from samssl.config import UserError, build_config, config, read_yaml
from samssl.metrics import case_dice
from samssl.report.study import Study
from samssl.report.verdict import arm_name


@config
class PublishedValue:
    """A Dice that somebody else reported, on their cases and by their way of measuring."""

    arm: str
    """What was evaluated."""
    dataset: str
    """Name of the data set, as the study calls it."""
    dice: float
    """Mean Dice, 0 to 1."""
    source: str
    """Where it can be read: publication and table."""

    def __post_init__(self) -> None:
        """Check that a reader can find the value and that it is a Dice."""
        if not 0 <= self.dice <= 1:
            raise ValueError(f"a Dice lies between 0 and 1, not at {self.dice}; divide percentages by 100.")
        if empty := [name for name in ("arm", "dataset", "source") if not getattr(self, name).strip()]:
            raise ValueError(
                f"{empty[0]} is empty; a published value needs an arm, a data set and its source."
            )


def read_published(path: Path) -> tuple[PublishedValue, ...]:
    """The published values in the YAML file at `path`.

    Raises:
        UserError: naming the file and the entry that cannot be used, or that is there twice.
    """
    if not path.exists():
        raise UserError(f"There is no file of published values {path}. Check its path, or leave it out.")
    entries = _entries(path)
    values = tuple(
        build_config(PublishedValue, entry, source=f"entry {number} of {path}")
        for number, entry in enumerate(entries, start=1)
    )
    places = [(value.arm, value.dataset, value.source) for value in values]
    if twice := [place for place in places if places.count(place) > 1]:
        arm, dataset, source = twice[0]
        raise UserError(f"{path} gives '{arm}' on {dataset} twice from {source}. Keep one of the two.")
    return values


def beside_published(measured: pd.DataFrame, published: tuple[PublishedValue, ...]) -> pd.DataFrame:
    """`samssl.arms.score_arms`' table with the published values of its data sets below ours.

    The column `published` tells them apart, `name` says so in words, and `source` where they come from.
    They have no interval and no cases: no test compares them with ours.
    """
    ours = measured.assign(
        name=[arm_name(arm) for arm in measured["arm"]], published=False, source="this study"
    )
    datasets = list(dict.fromkeys(measured["dataset"]))
    theirs = pd.DataFrame(
        [
            {**vars(value), "name": f"{arm_name(value.arm)} (published)", "published": True}
            for value in published
            if value.dataset in datasets
        ]
    )
    together = pd.concat([ours, theirs], ignore_index=True) if len(theirs) else ours
    order = together["dataset"].map(datasets.index)
    return together.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def tidy_scores(studies: Mapping[str, Study]) -> pd.DataFrame:
    """One row an arm, data set, seed and case (`samssl.arms.COLUMNS`); `studies` are by data set."""
    rows = [
        (arm, dataset, seed, case, dice)
        for dataset, study in studies.items()
        for arm, seeds in study.evaluations.items()
        for seed, evaluation in seeds.items()
        for case, dice in case_dice(evaluation.table).items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _entries(path: Path) -> list[dict[str, Any]]:
    tree = read_yaml(path)
    entries = tree.get("values")
    if set(tree) != {"values"} or not isinstance(entries, list):
        raise UserError(
            f"{path} must hold one list, 'values:', with an arm, dataset, dice and source an entry."
        )
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise UserError(
                f"Entry {number} of {path} must give arm, dataset, dice and source, not {entry!r}."
            )
    return entries
