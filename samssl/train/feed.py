"""Which slices each step sees: the same for any number of workers, and after any interruption."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from samssl.train.context import RunContext
from samssl.train.optim import FitConfig

Batch = dict[str, Tensor]


class KeyedDataset(Protocol):
    """A dataset whose items are drawn by `(index, key)`; all randomness of an item comes from its key."""

    def __len__(self) -> int:
        """Number of different items."""
        ...

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        """Item `index` as the draw `key` varies it."""
        ...


def batch_draws(order: "Order", position: int, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` draws `(index, key)` from place `position` of an endless stream of epochs."""
    draws = []
    for place in range(position, position + count):
        epoch, offset = divmod(place, len(order))
        draws.append((int(order.epoch(epoch, seed)[offset]), sample_key(seed, place)))
    return draws


def say_draws(data: KeyedDataset, draws: list[tuple[int, int]], limit: int = 20) -> str:
    """A sentence that names the slices of `draws`: those that hold numbers that are none, or else all.

    They are named by `data.describe(index)` where `data` has it, and by their index where not.
    """
    describe = getattr(data, "describe", lambda index: f"item {index}")
    broken = [index for index, key in draws if not _is_finite(data[index, key])]
    what = "These slices hold values that are no number" if broken else "They learnt from these slices"
    names = list(dict.fromkeys(str(describe(index)) for index in broken or [index for index, _ in draws]))
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{what}: {', '.join(names[:limit])}{more}."


def _is_finite(item: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in item.values())


def sample_key(seed: int, place: int) -> int:
    """A well-mixed 62-bit number from the seed and the place in the stream (splitmix64's finaliser)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) % 2**64
    return (mixed ^ (mixed >> 31)) >> 2


class Order(Protocol):
    """Which items an epoch shows, and in what order."""

    def __len__(self) -> int:
        """Draws in one epoch."""
        ...

    def epoch(self, number: int, seed: int) -> Int[np.ndarray, " draws"]:
        """The items of epoch `number`; the same for the same seed, on every machine."""
        ...


class Shuffled:
    """Every item once an epoch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def epoch(self, number: int, seed: int) -> Int[np.ndarray, " draws"]:
        """All items, shuffled anew."""
        if self._last is None or self._last[0] != (number, seed):
            generator = torch.Generator().manual_seed(sample_key(seed, -1 - number))
            self._last = (number, seed), torch.randperm(self.length, generator=generator).numpy()
        return self._last[1]


class _Drawn(Dataset):
    """A view of a keyed dataset for `DataLoader`, which wants integers."""

    def __init__(self, data: KeyedDataset) -> None:
        self.data = data

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        return self.data[draw]


class BatchSampler:
    """The draws of this rank, step by step."""

    def __init__(self, order: Order, fit_config: FitConfig, context: RunContext, start: int) -> None:
        fit_config.check_workers(context.world_size)
        share = fit_config.batch_size // context.world_size
        self.order, self.config, self.start = order, fit_config, start
        self.first, self.share = context.rank * share, share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.config.steps):
            position = step * self.config.batch_size + self.first
            yield batch_draws(self.order, position, self.share, self.config.seed)


def batches(
    data: KeyedDataset, order: Order, fit_config: FitConfig, context: RunContext, start: int
) -> Iterator[tuple[int, Batch]]:
    """The steps from `start` on, each with this rank's share of its batch."""
    sampler = BatchSampler(order, fit_config, context, start)
    loader = DataLoader(
        _Drawn(data),
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
        num_workers=fit_config.loader_workers,
        pin_memory=context.device.type == "cuda",
    )
    return enumerate(loader, start=start)
