"""Mapping a function over items in several processes; Ray's way to do it is given in from outside."""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from os import cpu_count
from typing import Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from samssl.config import UserError

In = TypeVar("In")
Out = TypeVar("Out")


@runtime_checkable
class Run(Protocol):
    """Maps a function over items, in whatever process and order."""

    def __call__(self, function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        """Yield the result of each item as it is ready; function, items and results are pickled."""
        ...


def local_map(workers: int) -> Run:
    """A `run` that uses as many local processes (0: one for each CPU); with 1 it stays in this one."""

    def run(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        items = list(items)
        count = min(workers or cpu_count() or 1, len(items))
        return map(function, items) if count <= 1 else _pool_map(function, items, count)

    return run


def _pool_map(function: Callable[[In], Out], items: list[In], workers: int) -> Iterator[Out]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(function, item) for item in items]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "A worker process died, most likely for want of memory. What is done is kept: "
                "run again with fewer workers."
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def with_progress(results: Iterable[Out], total: int, task: str, unit: str) -> Iterator[Out]:
    """Show a bar on a terminal, and a line every ten seconds elsewhere."""
    interval_s = 0.2 if sys.stderr.isatty() else 10
    return iter(tqdm(results, task, total, unit=unit, mininterval=interval_s))
