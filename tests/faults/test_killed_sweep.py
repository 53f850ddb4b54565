"""Sweeps whose driver or node is killed in the middle: the table is that of an undisturbed one."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from faults_support import children, make_store, start
from pipelines_support import samssl

pytestmark = pytest.mark.ray
RANKS = [1, 2, 4]
OF_TRIALS = ["point", "finetune.strategy.lora.rank", "status", "score", "best_step", "trained_parameters"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Path:
    """A folder with a slice store, `sweep.yaml`, and what an undisturbed sweep found."""
    root = tmp_path_factory.mktemp("killed_sweep")
    make_store(root, make_scans)
    optim: dict[str, float] = {
        "steps": 40,
        "batch_size": 4,
        "warmup_steps": 1,
        "validate_every": 20,
        "save_every": 5,
    }
    optim["lr"] = 5e-3  # high enough to learn something, so that tables differ where trials do
    settings = {
        "name": "ranks",
        "model": {"variant": "micro", "image_size": 32},
        "finetune": {"data": {"store": str(root / "store")}, "optim": optim},
        "space": {"finetune.strategy.lora.rank": {"choice": RANKS}},
        "search": {"at_once": 1},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(settings))
    samssl(root, *sweep(root, "undisturbed"))
    return root


def sweep(root: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of the sweep that writes `root / name`."""
    return ["sweep", "--config", str(root / "sweep.yaml"), f"out={root / name}", *overrides]


def table(root: Path, name: str) -> pd.DataFrame:
    """What the sweep found, without its times and run ids."""
    return pd.read_csv(root / name / "trials.csv")[OF_TRIALS]


def wait_for(driver: subprocess.Popen[str], done: int) -> None:
    """Until the driver tells that so many trials are over; what it says later is thrown away."""
    assert driver.stdout
    for line in driver.stdout:
        told = re.search(r"(\d+) of \d+ done", line)
        if told and int(told[1]) >= done:
            threading.Thread(target=driver.communicate, daemon=True).start()
            return
    raise AssertionError("the sweep ended first")


def test_a_killed_driver_loses_no_finished_trial_and_repeats_none(root: Path) -> None:
    driver = start(root, *sweep(root, "driver"))
    wait_for(driver, 1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    finished = sorted((root / "driver/trials").rglob("bundle/bundle.json"))
    assert 1 <= len(finished) < len(RANKS)
    before = {path: path.stat().st_mtime_ns for path in finished}
    samssl(root, *sweep(root, "driver"))
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    pd.testing.assert_frame_equal(table(root, "driver"), table(root, "undisturbed"))


def test_a_killed_trial_is_started_again_and_goes_on(root: Path) -> None:
    driver = start(root, *sweep(root, "trial"))
    wait_for(driver, 1)
    for process in children("_trial", driver.pid):
        os.kill(process, signal.SIGKILL)
    assert driver.wait(timeout=300) == 0
    pd.testing.assert_frame_equal(table(root, "trial"), table(root, "undisturbed"))


def test_a_killed_node_costs_no_trial(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as the command line sets it
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        driver = start(root, *sweep(root, "node", "search.at_once=2"), RAY_ADDRESS=str(cluster.address))
        wait_for(driver, 1)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        assert driver.wait(timeout=300) == 0
    finally:
        cluster.shutdown()
    pd.testing.assert_frame_equal(table(root, "node"), table(root, "undisturbed"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that a sweep of the three ranks does not fit in."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a filesystem is not allowed here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_told_and_the_rerun_ends_with_the_same_table(root: Path, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(600_000))
    full = samssl(root, *sweep(root, str(small_disk / "full")), check=False)
    assert full.returncode == 1
    assert "Once there is room, the same command goes on" in full.stderr
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    samssl(root, *sweep(root, str(small_disk / "full")))
    pd.testing.assert_frame_equal(table(root, str(small_disk / "full")), table(root, "undisturbed"))
