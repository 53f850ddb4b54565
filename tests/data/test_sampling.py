from itertools import chain, pairwise

import numpy as np
import pytest

from samssl.config import UserError
from samssl.data.mixture import Pools
from samssl.data.sampling import pools_of
from samssl.train.context import LocalContext
from samssl.train.feed import BatchSampler, Order, batch_draws
from samssl.train.optim import FitConfig

HELD = np.zeros((40, 3), bool)  # of 40 slices 30 are empty, 10 show class 0, one class 1 too, none class 2
HELD[:10, 0] = HELD[4, 1] = True


def order(num_shown: int, by_class: bool) -> Pools:
    return Pools(*pools_of(HELD, num_shown, by_class, "here"))


@pytest.mark.parametrize("num_shown", [0, 13, 40])
def test_an_epoch_has_the_asked_share_of_slices_with_foreground(num_shown: int) -> None:
    drawn = order(num_shown, by_class=False)
    assert len(drawn) == 40
    for number in range(3):
        assert HELD[drawn.epoch(number, 0)].any(axis=1).sum() == num_shown


def test_each_class_is_drawn_equally_often_and_each_slice_of_a_pool_before_any_comes_again() -> None:
    drawn = order(20, by_class=True)
    assert drawn.quotas.tolist() == [10, 10, 20]
    for number in range(3):
        epoch = drawn.epoch(number, 7)
        assert (epoch == 4).sum() == 11  # ten times for class 1, once for class 0
        assert set(epoch[HELD[epoch].any(axis=1)]) == set(range(10))
    empty = np.concatenate([drawn.epoch(number, 7) for number in range(3)])
    assert len(set(empty[empty >= 10][:30])) == 30


def test_draws_are_the_same_for_any_number_of_workers_and_from_any_place() -> None:
    drawn: Order = order(25, by_class=True)
    whole = batch_draws(drawn, 0, 120, seed=3)
    for start, stop in pairwise([0, 1, 39, 40, 41, 120]):
        assert batch_draws(order(25, by_class=True), start, stop - start, seed=3) == whole[start:stop]
    assert batch_draws(drawn, 0, 120, seed=4) != whole
    config, context = FitConfig(steps=30, batch_size=4, seed=3), LocalContext()

    def batches(rank: int, world_size: int) -> list[list[tuple[int, int]]]:
        context.rank, context.world_size = rank, world_size
        return list(BatchSampler(drawn, config, context, start=0))

    halves = [left + right for left, right in zip(batches(0, 2), batches(1, 2), strict=True)]
    assert [*chain.from_iterable(halves)] == whole


def test_slices_that_are_not_there_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match=r"that show the classes.*here has none.*foreground_share"):
        pools_of(np.zeros((4, 2), bool), 2, False, "here")
    with pytest.raises(UserError, match=r"that do not show"):
        pools_of(np.ones((4, 2), bool), 2, False, "here")
