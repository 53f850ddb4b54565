"""Functions mapped over Ray tasks, within limits."""

import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from samssl.cluster import tasks
from samssl.cluster.tasks import ray_map

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """Ray on this machine, as a command starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # as the command line sets it
        tasks.start_ray()
        yield
        tasks.ray.shutdown()


def lasting(seconds: float) -> tuple[float, float, bool]:
    """When it began and ended, and whether the libraries of training were loaded for it."""
    began = time.time()
    time.sleep(seconds)
    return began, time.time(), "torch" in sys.modules or "mlflow" in sys.modules


def test_tasks_run_one_at_a_time_where_that_is_asked_for_and_in_light_processes() -> None:
    spans = sorted(ray_map(lasting, [0.1, 0.2, 0.1], at_once=1))
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert not any(loaded for _, _, loaded in spans)


def test_tasks_that_need_more_memory_than_there_is_have_a_node_alone() -> None:
    spans = sorted(ray_map(lasting, [0.1, 0.2, 0.1], memory=lambda _: 1 << 60))
    assert len(spans) == 3
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
