"""Which slices an epoch shows where modalities or data sets of very different sizes are mixed.

Groups are drawn with a probability in proportion to n ** (1 / temperature), n being their size (as
languages are balanced in arXiv:1911.02116): 1 leaves the sizes as they are, a high
temperature makes them equal. Nothing is left to chance but the order: an epoch gives each group its quota.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float, Int

from samssl.config import config


@config
class BalanceConfig:
    """How groups of slices are balanced against each other."""

    by: str = "modality"
    """Column of the index that names the groups, as modality or patient; with one group nothing changes."""
    temperature: Annotated[float, Ge(1)] = 2.0
    """Groups are drawn in proportion to their size ** (1 / temperature); 1 balances nothing."""


class Mixture:
    """An order (`samssl.train.feed.Order`) of as many draws an epoch as there are items.

    Each group has an endless stream of its own: all its items shuffled, then all shuffled anew. An epoch
    takes the next of each stream, so no item of a group comes again before all others have come.
    """

    def __init__(self, groups: Int[np.ndarray, " items"], temperature: float) -> None:
        """`groups` holds the group number of each item."""
        sizes = np.bincount(groups)
        self._groups = groups
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None
        self.quotas = quotas(sizes, temperature, draws=len(groups))

    def __len__(self) -> int:
        return len(self._groups)

    def epoch(self, number: int, seed: int) -> Int[np.ndarray, " draws"]:
        """The items of epoch `number`."""
        if self._kept is None or self._kept[0] != (number, seed):
            groups = (
                np.flatnonzero(self._groups == group).astype(np.int32) for group in range(len(self.quotas))
            )
            self._kept = (number, seed), draw_from(groups, self.quotas, number, seed)
        return self._kept[1]


def draw_from(
    groups: Iterable[Int[np.ndarray, "_"]], quotas: Int[np.ndarray, " groups"], number: int, seed: int
) -> Int[np.ndarray, " draws"]:
    """The items of epoch `number`, mixed: of each group as many as its quota, the next of its stream."""
    draws = int(quotas.sum())
    group_of_place = np.repeat(np.arange(len(quotas), dtype=np.int32), quotas)
    group_of_place = group_of_place[_permutation(draws, f"{seed}/places/{number}")]
    drawn = np.empty(draws, np.int32)
    for group, (items, quota) in enumerate(zip(groups, quotas.tolist(), strict=True)):
        if quota:
            stream = _stream(len(items), number * quota, quota, f"{seed}/group/{group}")
            drawn[group_of_place == group] = items[stream]
    return drawn


def quotas(sizes: Int[np.ndarray, " groups"], temperature: float, draws: int) -> Int[np.ndarray, " groups"]:
    """How many of `draws` each group gets: its share rounded down, and the rest to the largest remainders."""
    exact = shares(sizes, temperature) * draws
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: draws - int(whole.sum())]] += 1
    return whole


def shares(sizes: Int[np.ndarray, " groups"], temperature: float) -> Float[np.ndarray, " groups"]:
    """The probability of each group; an empty one has none."""
    weights = np.where(sizes > 0, np.maximum(sizes, 1) ** (1 / temperature), 0.0)
    return weights / weights.sum()


def _stream(size: int, start: int, count: int, seed: str) -> Int[np.ndarray, " count"]:
    """Places `start` to `start + count` of the endless stream of shuffles of `size` items."""
    parts, stop = [], start + count
    for turn in range(start // size, -(-stop // size)):
        first = turn * size
        parts.append(_permutation(size, f"{seed}/{turn}")[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


def _permutation(size: int, seed: str) -> Int[np.ndarray, " size"]:
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(key)
    return torch.randperm(size, generator=generator, dtype=torch.int32).numpy()
