"""A worker or the driver is killed at a random step; the rerun ends with the undisturbed weights."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults_support import check_same, children, make_store, pretrain, random_step, start, wait_for_step
from pipelines_support import samssl

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Path:
    """A folder with a slice store and an undisturbed run."""
    root = tmp_path_factory.mktemp("killed")
    make_store(root, make_scans)
    samssl(root, *pretrain(root, "undisturbed"))
    return root


def metrics(out: Path) -> set[str]:
    from mlflow.tracking import MlflowClient

    run_id = json.loads((out / "run.json").read_text())["run_id"]
    return set(MlflowClient(f"sqlite:///{out.parent / 'mlflow.db'}").get_run(run_id).data.metrics)


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same_bit_for_bit(root: Path) -> None:
    driver = start(root, *pretrain(root, "worker"))
    wait_for_step(driver, random_step())
    (worker,) = children("ray::RayTrainWorker", driver.pid)
    os.kill(worker, signal.SIGKILL)
    assert driver.wait(timeout=300) == 0
    check_same(root, "worker", "undisturbed")


def test_a_killed_driver_is_started_again_and_the_weights_are_the_same_bit_for_bit(root: Path) -> None:
    driver = start(root, *pretrain(root, "driver"))
    wait_for_step(driver, random_step())
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=60)
    assert not (root / "driver/encoder.pth").exists()
    refused = samssl(root, "report", f"study={root / 'driver'}", check=False)
    assert refused.returncode == 1  # what was interrupted is not taken for whole
    first = metrics(root / "driver")
    samssl(root, *pretrain(root, "driver"))
    check_same(root, "driver", "undisturbed")
    assert first <= metrics(root / "driver")  # the same MLflow run went on


def test_ctrl_c_says_how_to_go_on(root: Path) -> None:
    driver = start(root, *pretrain(root, "interrupted"))
    assert driver.stdout
    assert driver.stderr
    for line in driver.stdout:
        if "step 1/" in line:
            break
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=120)
    assert driver.returncode not in (0, None)
    assert "the same command goes on from there" in stderr
    assert not (root / "interrupted/encoder.pth").exists()
