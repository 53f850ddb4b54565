"""Runs that are to be killed: the micro model on a tiny store, and the processes behind them."""

import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import yaml
from pipelines_support import samssl

STEPS = 80
SETTINGS = {
    "data": {"min_content": 0.0},
    "model": {"variant": "micro", "image_size": 32},
    "mae": {"decoder_depth": 1, "decoder_dim": 32, "decoder_heads": 2},
    "optim": {
        **{"steps": STEPS, "batch_size": 4, "warmup_steps": 1, "validate_every": 20, "log_every": 1},
        **{"save_every": 15, "ema_decay": 0.9},
    },
}


def make_store(root: Path, make_scans: Callable[..., Path]) -> None:
    """A slice store and `run.yaml` in `root`."""
    scans = make_scans(root / "scans", cases=5)
    split = ["split.pool=2", "split.train=1", "split.val=1", "split.test=1"]
    samssl(root, "prepare", "name=tiny", f"out={root / 'store'}", f"data.root={scans}", *split)
    (root / "run.yaml").write_text(yaml.safe_dump(SETTINGS))


def pretrain(root: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of the run that writes `root / name`."""
    out, store = f"out={root / name}", f"data.store={root / 'store'}"
    return ["pretrain", "--config", str(root / "run.yaml"), store, out, *overrides]


def start(root: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own; its output is read by `wait_for_step`."""
    command = [str(Path(sys.executable).with_name("samssl")), *arguments]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"} | environment
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def random_step() -> int:
    """A step to kill at, from a seed that is printed."""
    seed = random.randrange(10**6)
    step = random.Random(seed).randrange(1, STEPS // 2)
    print(f"seed {seed}: kill at step {step}")
    return step


def wait_for_step(driver: subprocess.Popen[str], step: int) -> None:
    """Until the run says that it has done `step`; what it says later is thrown away."""
    assert driver.stdout
    for line in driver.stdout:
        told = re.search(rf"step (\d+)/{STEPS}", line)
        if told and int(told[1]) >= step:
            print(f"killed after it told of step {told[1]}")
            threading.Thread(target=driver.communicate, daemon=True).start()
            return
    raise AssertionError(
        f"the run ended before step {step}: {driver.stderr and driver.stderr.read()[-3000:]}"
    )


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


def check_same(root: Path, name: str, undisturbed: str) -> None:
    """Weights and the sequence of losses are equal bit for bit."""
    found, wanted = root / name, root / undisturbed
    assert (found / "history.csv").read_text() == (wanted / "history.csv").read_text()
    assert (found / "encoder.pth").read_bytes() == (wanted / "encoder.pth").read_bytes()
