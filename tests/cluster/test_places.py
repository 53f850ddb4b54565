"""Two nodes on this machine, and paths that each process reads in its own way, as a node's own disk is."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samssl.cluster.places import JOB_COPIES, TRACKING, check_places, named_paths
from samssl.config import UserError, config

pytestmark = pytest.mark.ray
OWN = Path("/proc/self/cwd")
"""The working directory of whoever looks."""


@config
class DataConfig:
    store: Path
    cache: Path | None = None
    more_stores: tuple[Path, ...] = ()


@config
class RunConfig:
    out: Path
    data: DataConfig


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run whose store exists, started in a folder that no node works in."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store/manifest.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return RunConfig(out=tmp_path / "out", data=DataConfig(store=tmp_path / "store"))


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.mark.usefixtures("_cluster")
def test_what_every_node_sees_is_taken_and_nothing_is_left(run: RunConfig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_places(run, f"http://127.0.0.1:{server.getsockname()[1]}")
    check_places(run, sqlite(tmp_path / "runs"))
    assert list((tmp_path / "out").iterdir()) == list((tmp_path / "runs").iterdir()) == []


@pytest.mark.usefixtures("_cluster")
def test_what_a_node_has_for_itself_is_refused_by_the_name_of_its_setting(
    run: RunConfig, tmp_path: Path
) -> None:
    Path("store").mkdir()
    Path("store/manifest.json").write_text("{}")
    own = RunConfig(
        out=OWN / "out",
        data=DataConfig(store=OWN / "store", more_stores=(run.data.store,), cache=OWN / "store"),
    )
    with pytest.raises(UserError) as caught:
        check_places(own, sqlite(OWN / "runs"))
    message = str(caught.value)
    assert "The cluster has 2 nodes" in message
    for name, place in [("out", "out"), ("data.store", "store"), (TRACKING, "runs/mlflow.db")]:
        assert f"{place}: not on " in next(
            line for line in message.splitlines() if line.startswith(f"  {name}=")
        )
    assert "more_stores" not in message
    assert "cache" not in message
    assert "Put `out`, stores and checkpoints on a file system" in message
    assert f"set {TRACKING} to a server" in message


@pytest.mark.usefixtures("_cluster")
def test_a_store_that_is_another_one_elsewhere_is_refused(run: RunConfig, tmp_path: Path) -> None:
    """A folder of this name is everywhere, with other files in it."""
    own = RunConfig(out=run.out, data=DataConfig(store=OWN))
    (tmp_path / "here/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.store=/proc/self/cwd: not on "):
        check_places(own, sqlite(tmp_path))


@pytest.mark.usefixtures("_cluster")
def test_a_tracking_server_that_nodes_do_not_reach_is_refused_without_its_password(run: RunConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=rf"{TRACKING}=http://127\.0\.0\.1:{port}: not on "):
        check_places(run, f"http://me:hunter2@127.0.0.1:{port}")


@pytest.mark.usefixtures("_cluster")
def test_what_an_autoscaler_may_add_counts_as_there() -> None:
    """The cluster's description is what Ray's autoscaler leaves for others to read."""
    import ray
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY as key  # pyright: ignore
    from ray._raylet import GCS_AUTOSCALER_STATE_NAMESPACE as space  # pyright: ignore
    from ray.core.generated import autoscaler_pb2
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    from samssl.cluster.tasks import resources_at_most

    assert "GPU" not in resources_at_most()
    described: Any = autoscaler_pb2  # generated, without types
    group = described.NodeGroupConfig(resources={"CPU": 8, "GPU": 1}, max_count=4)
    content = described.ClusterConfig(node_group_configs=[group]).SerializeToString()
    _internal_kv_put(key, content, namespace=space.encode())
    try:
        found = resources_at_most()
        assert (found["GPU"], found["CPU"]) == (4, 32)
        assert found["memory"] == ray.cluster_resources()["memory"]
    finally:
        _internal_kv_del(key, namespace=space.encode())


def test_a_jobs_copy_of_the_working_directory_is_no_place_for_results(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / JOB_COPIES / "_ray_pkg_0"
    copy.mkdir(parents=True)
    check_places(RunConfig(out=copy / "runs/demo", data=run.data), sqlite(copy))
    monkeypatch.chdir(copy)
    check_places(run, sqlite(tmp_path))
    with pytest.raises(UserError, match=r"out=.*runs/demo would be lost"):
        check_places(RunConfig(out=copy / "runs/demo", data=run.data), "http://host:5000")
    with pytest.raises(UserError, match=f"Give the job {TRACKING}: a server"):
        check_places(run, sqlite(copy / "runs"))


def test_paths_are_named_as_settings_are() -> None:
    given = RunConfig(
        out=Path("/out"),
        data=DataConfig(store=Path("s3:/bucket/store"), more_stores=(Path("/a"), Path("/b"))),
    )
    assert dict(named_paths(given)) == {
        "out": "/out",
        "data.store": "s3://bucket/store",
        "data.more_stores[0]": "/a",
        "data.more_stores[1]": "/b",
    }
