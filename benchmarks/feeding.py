"""Slices a second that one core delivers to the trainer, and that the store alone reads.

    python benchmarks/feeding.py --json FILE

A store is made of simulated 512 x 512 CT slices (smooth shapes, noise as in a scan, air around), then slices
are drawn at random from it: read and decoded only, and as pretraining takes them (decode, clip, crop,
resize) at several input sizes, in one thread. Nothing is kept in memory between draws, as in a store that
is larger than memory; the files themselves are in the page cache, so the disk is not measured.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from samssl.data import datasets
from samssl.data.cases import Origin, case_folder, write_case
from samssl.data.datasets import UnlabelledSlices
from samssl.data.index import INDEX_COLUMNS
from samssl.data.inputs import InputConfig
from samssl.data.scans import Scan
from samssl.data.slices import SliceStore, write_index
from samssl.data.views import CropConfig
from samssl.environment import hardware
from samssl.train.feed import sample_key

SIDE, SLICES = 512, 40


def main() -> None:
    """Measure every way of drawing a slice, and print slices a second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each way of drawing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.CACHE_BYTES = 0
    with tempfile.TemporaryDirectory() as folder:
        store, megabytes = simulated_store(Path(folder), options.cases)
        ways = ways_of_drawing(store)
        rates = {
            name: [rate(way, options.seconds) for _ in range(options.repeats)] for name, way in ways.items()
        }
    table = {name: {"median": float(np.median(found)), "all": found} for name, found in rates.items()}
    print(f"{megabytes / (options.cases * SLICES):.3f} MB a slice on disk, of {2 * SIDE**2 / 1e6:.3f} MB")
    for name, row in table.items():
        print(f"{name:40} {row['median']:8.1f} slices/s  {min(row['all']):.1f} to {max(row['all']):.1f}")
    if options.json:
        settings = {"cases": options.cases, "slices_per_case": SLICES, "side": SIDE, "threads": 1}
        result = {"hardware": hardware(), "settings": settings, "megabytes_on_disk": megabytes}
        options.json.write_text(json.dumps(result | {"slices_per_second": table}, indent=1) + "\n")


def simulated_store(folder: Path, cases: int) -> tuple[SliceStore, float]:
    """A store of CT volumes, and its size in MB; voxels compress about as well as those of a real scan."""
    rows, files = [], {}
    for number in range(cases):
        voxels = simulated_volume(number)
        name = f"simulated-{number:05}"
        origin = Origin(source_sha256=str(number), mask_source_sha256="", settings_sha256="")
        scan = Scan(voxels, (2.0, 0.8, 0.8), np.eye(4), "CT")
        facts = write_case(folder, name, scan, None, origin=origin, window_hu=(-160.0, 240.0))
        files |= {f"cases/{name}.zarr/{file}": digest for file, digest in facts.files.items()}
        facts_of_case = {"case": name, "patient": name, "split": "pool", "modality": "CT", "labels": []}
        facts_of_case |= {"num_slices": SLICES, "height": SIDE, "width": SIDE}
        facts_of_case |= {"intensity_low": -160.0, "intensity_high": 240.0, "content_fraction": 1.0}
        rows += [facts_of_case | {"z": z} for z in range(SLICES)]
    index = pd.DataFrame(rows, columns=list(INDEX_COLUMNS))
    text = {name: "" for name in INDEX_COLUMNS if "sha256" in name or "source" in name}
    write_index(folder, "simulated", {0: "background"}, index.assign(**text), files)
    sizes = [(case_folder(folder, row["case"]) / "image/c/0/0/0").stat().st_size for row in rows[::SLICES]]
    return SliceStore(folder), sum(sizes) / 1e6


def simulated_volume(number: int) -> np.ndarray:
    """An elliptic body with organs of different density in air, with 15 HU of noise: [Z, H, W] int16."""
    generator = np.random.default_rng(number)
    rows, columns = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    density = np.full((SIDE, SIDE), -1000.0)
    density[(rows / 0.6) ** 2 + (columns / 0.85) ** 2 < 1] = 20
    for _ in range(12):
        y, x, radius = *generator.uniform(-0.45, 0.45, 2), generator.uniform(0.05, 0.25)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        density[inside & (density > -1000)] = generator.uniform(-700, 300)
    noise = generator.normal(0, 15, (SLICES, SIDE, SIDE)) * (density > -1000)
    return (density + noise).clip(-1024, 3000).astype(np.int16)


def ways_of_drawing(store: SliceStore) -> dict[str, Callable[[int], object]]:
    """Each way as a function of the number of the draw."""
    rows = store.rows.rows(["pool"])
    generator = np.random.default_rng(1)
    order = generator.integers(0, len(rows), 1 << 16)

    def read(number: int) -> object:
        row = int(rows[order[number]])
        return store.image_slice(store.rows.case_name(row), int(store.rows.z[row]))

    def drawn(size: int, crop: CropConfig, inputs: InputConfig) -> Callable[[int], object]:
        dataset = UnlabelledSlices(store, rows, size, crop, inputs)
        return lambda number: dataset[int(order[number]), sample_key(0, number)]

    ways: dict[str, Callable[[int], object]] = {"read and decode only": read}
    for size in (64, 256, 512, 1024):
        ways[f"grey, resized crop, {size} px"] = drawn(size, CropConfig(), InputConfig())
    for size in (256, 1024):
        ways[f"windows, resized crop, {size} px"] = drawn(size, CropConfig(), InputConfig(channels="windows"))
        ways[f"neighbours, resized crop, {size} px"] = drawn(
            size, CropConfig(), InputConfig(channels="neighbours")
        )
    ways["grey, native crop, 256 px"] = drawn(256, CropConfig(kind="native"), InputConfig())
    rotated = CropConfig(degrees=10.0, intensity=0.1, gamma=0.2)
    ways["grey, resized, rotated, shaded, 1024 px"] = drawn(1024, rotated, InputConfig())
    return ways


def rate(way: Callable[[int], object], seconds: float) -> float:
    """Draws a second."""
    way(0)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += 1
        way(count)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
