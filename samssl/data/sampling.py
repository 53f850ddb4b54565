"""How often training draws which slices: foreground against none, class against class.

An epoch has as many draws as there are slices. They are shared out over pools of slices, and each pool
gives its slices in an endless stream of shuffles (`samssl.data.mixture`), so that the order follows from
the seed alone.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from samssl.config import Fraction, UserError, config
from samssl.data.classes import Classes
from samssl.data.mixture import Pools
from samssl.data.slices import SliceStore


@config
class SamplingConfig:
    """Which training slices are drawn more often than others. Validation and test always see all."""

    foreground_share: Fraction | None = None
    """Share of draws that show any class of the run; null: as many as such slices are among all."""
    balance: Literal["none", "class"] = "none"
    """`class`: of the draws that show a class, each class has equally many; a slice stands for every class
    in it."""


def sampled_order(
    store: SliceStore, rows: Int[np.ndarray, " rows"], classes: Classes, sampling: SamplingConfig
) -> Pools | None:
    """The order in which `rows` are drawn; None, each once an epoch, where nothing is asked for.

    Raises:
        UserError: there are no slices of a kind that is asked for.
    """
    if sampling == SamplingConfig():
        return None
    held = classes_in(store, rows, classes)
    share = sampling.foreground_share
    num_shown = int(held.any(axis=1).sum()) if share is None else round(share * len(rows))
    return Pools(*pools_of(held, num_shown, sampling.balance == "class", where=store.root))


def pools_of(
    held: Bool[np.ndarray, "slices K"], num_shown: int, by_class: bool, where: str
) -> tuple[list[Int[np.ndarray, "_"]], Int[np.ndarray, " pools"]]:
    """Pools of slices and how many draws each has: `num_shown` of those that show classes, the rest empty.

    Classes that no slice shows have no pool. `where` names the store in messages.

    Raises:
        UserError: draws are asked of slices with, or without, classes, and there are none.
    """
    shown, num_empty = np.any(held, axis=1, keepdims=True), len(held) - num_shown
    for wanted, there, what in ((num_shown, shown, "show"), (num_empty, ~shown, "do not show")):
        if wanted and not there.any():
            raise UserError(
                f"data.sampling asks for training slices that {what} the classes of this run, but the store "
                f"{where} has none among those learnt from. Change data.sampling.foreground_share."
            )
    by_pool = [inside for inside in (held if by_class else shown).T if inside.any()]
    pools = [np.flatnonzero(inside).astype(np.int32) for inside in by_pool] if num_shown else []
    quotas = np.diff(np.linspace(0, num_shown, len(pools) + 1).round().astype(np.int64))
    if num_empty:
        pools.append(np.flatnonzero(~shown).astype(np.int32))
        quotas = np.append(quotas, num_empty)
    return pools, quotas


def evenly(length: int, count: int) -> Int[np.ndarray, " places"]:
    """At most `count` of `length` places, evenly from the first to the last."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


def classes_in(
    store: SliceStore, rows: Int[np.ndarray, " rows"], classes: Classes
) -> Bool[np.ndarray, "slices K"]:
    """Which classes each slice of the store's `rows` shows, by its index."""
    return classes.held(store.rows.columns(("labels",))["labels"].iloc[rows].tolist())
