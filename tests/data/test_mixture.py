from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samssl.data.mixture import Mixture, quotas, shares
from samssl.train.feed import Order, batch_draws

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def groups_of(sizes: list[int]) -> np.ndarray:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(groups)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, temperature=st.sampled_from([1.0, 1.5, 2.0, 10.0]), seed=st.integers(0, 5))
def test_every_epoch_gives_each_group_its_quota_and_nothing_comes_twice_too_soon(sizes, temperature, seed):
    groups = groups_of(sizes)
    mixture = Mixture(groups, temperature)
    assert mixture.quotas.sum() == len(groups) == len(mixture)
    exact = shares(np.array(sizes), temperature) * len(groups)
    assert (np.abs(mixture.quotas - exact) < 1).all()
    epochs = [mixture.epoch(number, seed) for number in range(4)]
    for drawn in epochs:
        assert drawn.dtype == np.int32
        assert (np.bincount(groups[drawn], minlength=len(sizes)) == mixture.quotas).all()
    stream = np.concatenate(epochs)
    for group, size in enumerate(sizes):
        own = stream[groups[stream] == group]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


def test_temperature_makes_groups_equal():
    sizes = np.array([900, 90, 10])
    assert quotas(sizes, 1.0, 1000).tolist() == [900, 90, 10]
    assert quotas(sizes, 2.0, 1000).tolist() == [703, 223, 74]
    assert quotas(sizes, 1e9, 1000).tolist() == [334, 333, 333]
    assert quotas(np.array([3, 0, 3]), 2.0, 4).tolist() == [2, 0, 2]


def test_any_place_of_the_stream_is_the_same_without_what_came_before():
    groups = groups_of([50, 7])
    whole = batch_draws(Mixture(groups, 2.0), 0, 200, seed=3)
    for start, stop in pairwise([0, 1, 56, 57, 58, 130, 200]):
        assert batch_draws(Mixture(groups, 2.0), start, stop - start, seed=3) == whole[start:stop]
    assert batch_draws(Mixture(groups, 2.0), 0, 200, seed=4) != whole


def test_places_of_groups_are_mixed():
    groups = groups_of([500, 500])
    order: Order = Mixture(groups, 1.0)
    first_half = groups[order.epoch(0, 0)[:500]]
    assert 200 < first_half.sum() < 300


@pytest.mark.parametrize("epoch", [0, 10**6])
def test_a_late_epoch_costs_no_more_than_the_first(epoch):
    groups = groups_of([30, 3])
    mixture = Mixture(groups, 2.0)
    assert np.bincount(groups[mixture.epoch(epoch, 0)]).tolist() == mixture.quotas.tolist()
