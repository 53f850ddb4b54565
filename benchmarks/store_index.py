"""A simulated index of a big slice store: how long it takes to write and to open, and how much memory.

    python benchmarks/store_index.py --rows 1000000 --json FILE

No pixels are written: cases of 100 slices, as a CT store of 10^6 slices has, with names, digests, ranges
and labels as `prepare` gives them. Opening is measured in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from samssl.data.index import INDEX_COLUMNS
from samssl.data.mixture import Mixture
from samssl.data.slices import SliceStore, write_index
from samssl.environment import hardware
from samssl.train.feed import Shuffled, batch_draws

SLICES_PER_CASE = 100


def main() -> None:
    """Write the index, open it in another process, and print what both took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(measure_opening(options.open)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure_writing(Path(folder), options.rows)
        command = [sys.executable, __file__, "--open", folder]
        results |= json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    for name, value in results.items():
        print(f"{name:32} {value:12,.4g}")
    if options.json:
        result = {"hardware": hardware(), "results": results}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure_writing(folder: Path, rows: int) -> dict[str, float]:
    """Write a store without pixels, whose manifest lists the files that its cases would have."""
    index = simulated_index(rows)
    names = ("case.json", "zarr.json", "image/zarr.json", "image/c/0/0/0", "mask/zarr.json", "mask/c/0/0/0")
    files = {f"cases/{case}.zarr/{name}": "0" * 64 for case in index["case"].unique() for name in names}
    began = time.perf_counter()
    write_index(folder, "simulated", {0: "background", 1: "liver", 2: "tumour"}, index, files)
    return {
        "rows": rows,
        "write_seconds": time.perf_counter() - began,
        "index_mib": (folder / "index.parquet").stat().st_size / 2**20,
        "manifest_mib": (folder / "manifest.json").stat().st_size / 2**20,
    }


def simulated_index(rows: int) -> pd.DataFrame:
    """An index whose rows are as different from each other as those of a real store."""
    generator = np.random.default_rng(0)
    cases = -(-rows // SLICES_PER_CASE)

    def digests() -> np.ndarray:
        return np.array([bytes(row).hex() for row in generator.integers(0, 256, (cases, 32), np.uint8)])

    of_case = pd.DataFrame({"case": np.sort([f"simulated-{name[:12]}" for name in digests()])})
    of_case["patient"] = [f"simulated-{name[:12]}" for name in digests()]
    of_case["split"] = generator.choice(["pool", "train", "val", "test"], cases, p=[0.9, 0.05, 0.02, 0.03])
    of_case["modality"] = generator.choice(["CT", "MR"], cases, p=[0.8, 0.2])
    of_case = of_case.assign(num_slices=SLICES_PER_CASE, height=512, width=512, mask_source="")
    for name in INDEX_COLUMNS:
        if name.endswith("sha256") or name == "source":
            of_case[name] = digests()
        elif name.startswith(("spacing", "intensity")):
            of_case[name] = generator.normal(size=cases)
    index = of_case.loc[np.repeat(np.arange(cases), SLICES_PER_CASE)[:rows]].reset_index(drop=True)
    index["z"] = np.arange(rows) % SLICES_PER_CASE
    index["content_fraction"] = generator.random(rows)
    index["foreground_fraction"] = generator.random(rows)
    kinds = [[], [1], [1, 2]]
    index["labels"] = [kinds[number] for number in generator.integers(0, 3, rows)]
    return index[list(INDEX_COLUMNS)]


def measure_opening(folder: Path) -> dict[str, float]:
    """Open the store, pick its pool, and draw from it, with the memory of each in MiB."""
    results = {"memory_before_mib": resident_mib()}

    def measure(name: str, began: float) -> None:
        results[f"{name}_seconds"] = time.perf_counter() - began
        results[f"{name}_resident_mib"] = resident_mib()

    began = time.perf_counter()
    store = SliceStore(folder)
    measure("open", began)
    results["open_peak_mib"] = peak_mib()
    began = time.perf_counter()
    rows = store.rows.rows(("pool", "train"), 0.05)
    measure("rows_of_splits", began)
    began = time.perf_counter()
    shuffled = Shuffled(len(rows))
    shuffled.epoch(0, 0)
    measure("shuffled_epoch", began)
    began = time.perf_counter()
    numbers, _ = store.rows.groups("modality")
    mixture = Mixture(numbers[rows], 2.0)
    mixture.epoch(0, 0)
    measure("mixture_epoch", began)
    began = time.perf_counter()
    for index, _ in batch_draws(mixture, 0, 10_000, seed=0):
        store.describe(int(rows[index]))
        store.rows.intensity(int(rows[index]))
    measure("ten_thousand_draws", began)
    results["peak_mib"] = peak_mib()
    return results


def resident_mib() -> float:
    """Memory of this process as it is now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """The most memory that this process had; `getrusage` would count what it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


if __name__ == "__main__":
    main()
