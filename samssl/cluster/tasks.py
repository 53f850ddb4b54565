"""Ray started or joined, what it has, and functions mapped over its tasks.

A worker process imports this module with each task, so it must stay light: no torch and no MLflow.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import ray
import ray.exceptions

from samssl.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AT_ONCE = 1000
"""Tasks handed to Ray beforehand: enough for an autoscaler to see the need, few enough to wait for."""


def start_ray() -> None:
    """Join the cluster that `RAY_ADDRESS` names (a submitted job has it), or start Ray on this machine.

    Ray on this machine lives as long as the command, so it has no dashboard: that would be ten processes.
    """
    if ray.is_initialized():
        return
    local = {"address": "local", "num_cpus": os.cpu_count(), "include_dashboard": False}
    options = {} if os.environ.get("RAY_ADDRESS") else local
    ray.init(logging_level="WARNING", **options)  # pyright: ignore[reportArgumentType]
    if threading.current_thread() is threading.main_thread():
        # As Ctrl-C. The exit that Ray puts in its place is lost where it comes while Tune waits.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def join_cluster() -> None:
    """Join the cluster that `RAY_ADDRESS` names, if it names one."""
    if os.environ.get("RAY_ADDRESS"):
        start_ray()


def nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def resources_at_most() -> dict[str, float]:
    """Resources of the cluster: what it has, or what its autoscaler may add up to."""
    from ray._private.state import state

    now = ray.cluster_resources()
    most = state.get_max_resources_from_cluster_config() or {}
    return now | {kind: float(max(amount, now.get(kind, 0))) for kind, amount in most.items()}


def ray_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    at_once: int = 0,
    memory: Callable[[Any], int] = lambda _: 0,
) -> Iterator[Result]:
    """Results of `function` on each item, as they come, from one Ray task each.

    `at_once` tasks run together at most (0: as many as there are CPUs). `memory` is how many bytes an item
    may need: no node gets more tasks than fit in it together, and one that fits nowhere has a node alone.
    """
    start_ray()
    shared, items = ray.put(function), iter(items)
    largest = int(max(node.get("memory", 0) for node in nodes()))
    waiting: list[ray.ObjectRef] = []
    while True:
        for item in islice(items, (at_once or _AT_ONCE) - len(waiting)):
            reserved = min(memory(item), largest) or None
            waiting.append(_apply.options(memory=reserved).remote(shared, item))
        if not waiting:
            return
        done, waiting = ray.wait(waiting)
        yield _get(done[0])


@ray.remote
def _apply(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def call_remote(function: Callable[[Item], Result], argument: Item) -> Result:
    """`function(argument)` in a Ray worker, with a GPU where the cluster has one."""
    start_ray()
    gpus = min(1, ray.cluster_resources().get("GPU", 0))
    cores = max(node.get("CPU", 1) for node in nodes() if node.get("GPU", 0) >= gpus)
    return _get(_apply.options(num_cpus=cores, num_gpus=gpus).remote(function, argument))


def _get(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error_for_user(error) or error from None


def error_for_user(error: BaseException) -> UserError | OSError | None:
    """The error with a sentence for the user inside one that came through Ray, if there is one."""
    seen: list[BaseException] = [error]
    for link in seen:
        if isinstance(link, (UserError, OSError)) and not isinstance(link, ray.exceptions.RayError):
            return link
        causes = [
            link.__cause__,
            getattr(link, "cause", None),
            *getattr(link, "worker_failures", {}).values(),
        ]
        seen += [cause for cause in causes if isinstance(cause, BaseException) and cause not in seen]
    return None
