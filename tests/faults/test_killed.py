"""A worker or the driver is killed in the middle of training; the rerun ends with the undisturbed weights."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pipelines_support import samssl

pytestmark = pytest.mark.ray
SETTINGS = {
    "data": {"min_content": 0.0},
    "model": {"variant": "micro", "image_size": 32},
    "mae": {"decoder_depth": 1, "decoder_dim": 32, "decoder_heads": 2},
    "optim": {"steps": 60, "batch_size": 4, "warmup_steps": 1, "validate_every": 10, "log_every": 5},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Path:
    """A folder with a slice store and the weights of an undisturbed run."""
    root = tmp_path_factory.mktemp("killed")
    scans = make_scans(root / "scans", cases=5)
    split = ["split.pool=2", "split.train=1", "split.val=1", "split.test=1"]
    samssl(root, "prepare", "name=tiny", f"out={root / 'store'}", f"data.root={scans}", *split)
    (root / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    samssl(root, *pretrain(root, "undisturbed"))
    return root


def pretrain(root: Path, name: str) -> list[str]:
    return [
        "pretrain",
        "--config",
        str(root / "run.yaml"),
        f"data.store={root / 'store'}",
        f"out={root / name}",
    ]


def start(root: Path, name: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("samssl")), *pretrain(root, name)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for_checkpoint(out: Path, driver: subprocess.Popen[bytes]) -> None:
    """Until the run has saved a state after its first steps."""
    for _ in range(1200):
        assert driver.poll() is None, "the run ended before it could be killed"
        if len(list(out.glob("ray/train/checkpoint_*"))) > 0 and "train/loss" in metrics(out):
            return
        time.sleep(0.1)
    raise AssertionError("no checkpoint after two minutes")


def metrics(out: Path) -> set[str]:
    import json

    from mlflow.tracking import MlflowClient

    run_id = json.loads((out / "run.json").read_text())["run_id"]
    return set(MlflowClient(f"sqlite:///{out.parent / 'mlflow.db'}").get_run(run_id).data.metrics)


def children(name: str, driver: int) -> list[int]:
    """Processes called `name` that the driver's Ray has started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(ppid) for pid, ppid, _ in rows}

    def belongs(pid: int) -> bool:
        while pid and pid != driver:
            pid = parents.get(pid, 0)
        return pid == driver

    return [int(pid) for pid, _, args in rows if name in args and belongs(int(pid))]


def weights(root: Path, name: str) -> bytes:
    return (root / name / "encoder.pth").read_bytes()


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same_bit_for_bit(root: Path) -> None:
    driver = start(root, "worker")
    wait_for_checkpoint(root / "worker", driver)
    (worker,) = children("ray::RayTrainWorker", driver.pid)
    os.kill(worker, signal.SIGKILL)
    assert driver.wait(timeout=300) == 0
    assert weights(root, "worker") == weights(root, "undisturbed")
    history = (root / "worker/history.csv").read_text()
    assert history == (root / "undisturbed/history.csv").read_text()


def test_a_killed_driver_is_started_again_and_the_weights_are_the_same_bit_for_bit(root: Path) -> None:
    driver = start(root, "driver")
    wait_for_checkpoint(root / "driver", driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=60)
    assert not (root / "driver/encoder.pth").exists()
    refused = samssl(root, "report", f"study={root / 'driver'}", check=False)
    assert refused.returncode == 1  # what was interrupted is not taken for whole
    first = metrics(root / "driver")
    samssl(root, *pretrain(root, "driver"))
    assert weights(root, "driver") == weights(root, "undisturbed")
    assert first <= metrics(root / "driver")  # the same MLflow run went on


def test_ctrl_c_says_how_to_go_on(root: Path) -> None:
    command = [str(Path(sys.executable).with_name("samssl")), *pretrain(root, "interrupted")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    driver = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(root / "interrupted", driver)  # pyright: ignore[reportArgumentType]
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=120)
    assert driver.returncode not in (0, None)
    assert "the same command goes on from there" in stderr
    assert not (root / "interrupted/encoder.pth").exists()
