"""SAM's image encoder, forward + backward, side by side in one process: time and peak memory.

    python benchmarks/encoder.py --variant vit_b --image-size 1024 --repeats 3 --json FILE

Baseline: `segment_anything`'s own encoder on all tokens. Against it: ours on all tokens, and ours on
the quarter of the tokens that MAE leaves visible. Weights are drawn at random; run it on an idle machine.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samssl.environment import hardware
from samssl.masking import MaskingConfig, draw_visible
from samssl.models.encoder import encode_images, encode_visible, token_grid, window_size
from samssl.models.sam import ModelConfig, build_sam

BASELINE = "segment_anything, all tokens"


def main() -> None:
    """Measure every path in turn, `repeats` times, and print time, ratio and memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument(
        "--image-size", type=int, default=1024, help="pixels; the size the variant is built for"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    paths = encoder_paths(options.variant, options.image_size, options.batch_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
        measured = measure(paths, options.repeats)
    table = summarise(measured)
    result = {"settings": vars(options) | {"json": None}, "hardware": hardware(), "torch": torch.__version__}
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {options}")
    for name, row in table.items():
        ratio = f"{row['ratio']:5.2f}x {row['ratio_range']}"
        print(f"{name:32} {row['seconds']:8.3f} s  {ratio}  {row['peak_mib']:7.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(result | {"paths": table}, indent=1) + "\n")


def encoder_paths(variant: Any, image_size: int, batch_size: int) -> dict[str, Callable[[], Tensor]]:
    """The three encoders on the same images."""
    encoder = build_sam(ModelConfig(variant=variant, image_size=image_size)).image_encoder
    images = torch.randn(batch_size, 3, image_size, image_size)
    grid, window = token_grid(encoder, images), window_size(encoder)
    visible = draw_visible(torch.arange(batch_size), grid, window, MaskingConfig(ratio=0.75))
    return {
        BASELINE: lambda: encoder(images),
        "samssl, all tokens": lambda: encode_images(encoder, images),
        "samssl, a quarter visible": lambda: encode_visible(encoder, images, visible),
    }


def measure(paths: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, peak MiB above the start) of each path, round robin after one round unmeasured."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for repeat in range(repeats + 1):
        for name, path in paths.items():
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory of one path would be free for the next
            with PeakMemory() as memory:
                started = time.perf_counter()
                path().float().square().mean().backward()
                seconds = time.perf_counter() - started
            if repeat:
                measured[name].append((seconds, memory.peak_mib))
    return measured


def summarise(measured: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, Any]]:
    """Medians, and how many times faster than the baseline of the same round, with its range."""
    table = {}
    for name, rows in measured.items():
        ratios = [base / own for (base, _), (own, _) in zip(measured[BASELINE], rows, strict=True)]
        table[name] = {
            "seconds": statistics.median(seconds for seconds, _ in rows),
            "ratio": statistics.median(ratios),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            "peak_mib": statistics.median(peak for _, peak in rows),
        }
    return table


class PeakMemory:
    """Largest resident memory of this process inside the block, above what it was at its start."""

    def __enter__(self) -> "PeakMemory":
        self.start, self.largest, self.stopped = resident_mib(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stopped.wait(0.005):
            self.largest = max(self.largest, resident_mib())

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    @property
    def peak_mib(self) -> float:
        """MiB above the start."""
        return max(0.0, self.largest - self.start)


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    main()
