"""`samssl plan` beside a real run: peak memory of the process and time per step, on the CPU.

    python benchmarks/plan.py --steps 6 model.variant=vit_b optim.batch_size=1

The run trains on noise in a process of its own, and writes its state in a thread as Ray workers do.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from samssl.config import load_config, parse_overrides
from samssl.environment import hardware
from samssl.models.checkpoints import save_state
from samssl.train.context import LocalContext, State
from samssl.train.loop import Validation, fit
from samssl.train.memory import keep_freed_memory
from samssl.train.plan import make_plan
from samssl.train.pretrain import PretrainConfig, build_method


def main() -> None:
    """Print both, and how far the plan is off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    options = parser.parse_args()
    fields = {"out": "-", "data.store": "-", "optim.steps": str(options.steps), "optim.log_every": "1"}
    config = load_config(PretrainConfig, None, fields | parse_overrides(options.overrides))
    processes = multiprocessing.get_context("spawn")
    with processes.Pool(1) as pool:
        measured = pool.apply(run, (config,))
    with processes.Pool(1) as pool:
        planned = pool.apply(plan, (config,))
    for name, unit in (("peak", 2**30), ("seconds", 1)):
        ratio = planned[name] / measured[name]
        print(
            f"{name}: planned {planned[name] / unit:.3f}, measured {measured[name] / unit:.3f}, {ratio:.2f}"
        )
    if options.json:
        result = {
            "fields": options.overrides,
            "planned": planned,
            "measured": measured,
            "hardware": hardware(),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def plan(config: PretrainConfig) -> dict[str, Any]:
    """The plan for this machine."""
    planned = make_plan(config)
    return {"peak": planned.peak, "seconds": planned.seconds, "parts": planned.parts}


class Noise:
    """Images without anything in them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        return {"image": torch.rand(1, self.size, self.size), "key": torch.tensor(draw[1])}


class WritingContext(LocalContext):
    """Writes the state in a thread, and notes when each step is done."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.device = torch.device("cpu")
        self.times: list[float] = []

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """Start writing."""
        threading.Thread(target=save_state, args=(state, (self.folder or Path()) / "state.pt")).start()

    def progress(self, step: int, total: int, text: str) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train; the process's peak memory in bytes and the median time of a step."""
    keep_freed_memory()
    with TemporaryDirectory() as folder:
        context = WritingContext(Path(folder))
        fit(
            build_method(config),
            Noise(config.model.image_size),
            lambda step: Validation(0.0, {}),
            config.optim,
            context,
        )
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.name.startswith("Thread-"):
                thread.join()
    steps = [after - before for before, after in zip(context.times, context.times[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "seconds": statistics.median(steps), "steps": steps}


if __name__ == "__main__":
    main()
