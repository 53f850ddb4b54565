"""Which slices an epoch shows where modalities or data sets of very different sizes are mixed.

Groups are drawn with a probability in proportion to n ** (1 / temperature), n being their size (as
languages are balanced in arXiv:1911.02116): 1 leaves the sizes as they are, a high
temperature makes them equal. Nothing is left to chance but the order: an epoch gives each group its quota.
"""

import hashlib
from collections.abc import Sequence
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


class Pools:
    """An order (`samssl.train.feed.Order`) that draws a fixed number of slices an epoch from each pool.

    Each pool has an endless stream of its own: all its items shuffled, then all shuffled anew. An epoch
    takes the next of each stream, so no item of a pool comes again before all others have come.
    """

    def __init__(self, pools: Sequence[Int[np.ndarray, "_"]], quotas: Int[np.ndarray, " pools"]) -> None:
        """`pools` hold item numbers, of which some may be in several; one that is drawn from is not empty."""
        self.pools, self.quotas = pools, quotas
        self._kept: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.quotas.sum())

    def epoch(self, number: int, seed: int) -> Int[np.ndarray, " draws"]:
        """The items of epoch `number`, mixed."""
        if self._kept is None or self._kept[0] != (number, seed):
            self._kept = (number, seed), self._draw(number, seed)
        return self._kept[1]

    def _draw(self, number: int, seed: int) -> Int[np.ndarray, " draws"]:
        pool_of_place = np.repeat(np.arange(len(self.quotas), dtype=np.int32), self.quotas)
        pool_of_place = pool_of_place[_permutation(len(self), f"{seed}/places/{number}")]
        drawn = np.empty(len(self), np.int32)
        for pool, (items, quota) in enumerate(zip(self.pools, self.quotas.tolist(), strict=True)):
            if quota:
                stream = _stream(len(items), number * quota, quota, f"{seed}/group/{pool}")
                drawn[pool_of_place == pool] = items[stream]
        return drawn


class Mixture(Pools):
    """Pools of the items of each group, balanced by a temperature; as many draws as there are items."""

    def __init__(self, groups: Int[np.ndarray, " items"], temperature: float) -> None:
        """`groups` holds the group number of each item."""
        sizes = np.bincount(groups)
        pools = [np.flatnonzero(groups == group).astype(np.int32) for group in range(len(sizes))]
        super().__init__(pools, quotas(sizes, temperature, draws=len(groups)))


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
