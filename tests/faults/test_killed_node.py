"""Two workers on the two nodes of a cluster; one node is killed, another takes its place."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from faults_support import check_same, make_store, pretrain, random_step, start, wait_for_step
from pipelines_support import samssl

pytestmark = pytest.mark.ray
TWO = ("resources.workers=2", "resources.cpus_per_worker=1")
FEW = ("optim.steps=10", "optim.warmup_steps=1000")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Path:
    """A folder with a slice store."""
    root = tmp_path_factory.mktemp("killed_node")
    make_store(root, make_scans)
    return root


def test_a_killed_node_is_replaced_and_the_weights_are_the_same_bit_for_bit(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as the command line sets it
    from ray.cluster_utils import Cluster

    samssl(root, *pretrain(root, "undisturbed", *TWO))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        driver = start(root, *pretrain(root, "node", *TWO), RAY_ADDRESS=str(cluster.address))
        wait_for_step(driver, random_step())
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        assert driver.wait(timeout=300) == 0
    finally:
        cluster.shutdown()
    check_same(root, "node", "undisturbed")


def test_two_workers_that_shard_the_model_have_the_losses_of_one(root: Path) -> None:
    """Without sharding `tests/pipelines/test_study.py` has them."""
    samssl(root, *pretrain(root, "one", *FEW))
    samssl(root, *pretrain(root, "two", *FEW, *TWO, "resources.strategy=fsdp"))
    one, two = losses(root / "one"), losses(root / "two")
    assert len([metric for _, metric in one if metric == "train/loss"]) == 10
    assert two.keys() == one.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), rel=2e-2)


def losses(out: Path) -> dict[tuple[str, str], float]:
    """Everything in `history.csv` that is a loss."""
    with (out / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"].endswith("loss")]
    return {(row["step"], row["metric"]): float(row["value"]) for row in rows}
