"""`samssl prepare` beside the usual loop over scans, and one slice out of its store beside one out of NIfTI.

    samssl bench prepare --json FILE

A set of CT volumes is simulated (int16, .nii.gz). The usual loop is MONAI's: LoadImage, Orientation, one
array a case, written as .npy or, the more usual, as compressed .npz. That `prepare` stores the same voxels
is checked bit for bit. All ways take turns in each round, in one process; `prepare` uses `--workers`
processes, and their start is part of its time. Files are in the page cache, so the disk is not measured.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.data.sources import DataSource
from samssl.environment import hardware

OURS = "samssl"


def main() -> None:
    """Time both, print how many times faster ours is, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--side", type=int, default=256, help="rows and columns of a slice")
    parser.add_argument("--slices", type=int, default=64, help="of a volume")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reads", type=int, default=50, help="random slices in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        scans = simulated_scans(Path(folder) / "set", options.cases, options.slices, options.side)
        config = prepare_config(Path(folder), options.workers)
        writing = in_turns(writing_ways(config, scans), options.rounds)
        store = check_equal(config, scans)
        reading = in_turns(reading_ways(store, scans, options.reads), options.rounds)
    result = {
        "hardware": hardware(),
        "load_before": round(load, 1),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "prepare": compared(writing),
        "random_slice": compared(reading),
    }
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def simulated_scans(folder: Path, cases: int, slices: int, side: int) -> list[Path]:
    """Volumes of bodies with 15 HU of noise in air, which compress about as well as CT does."""
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    body = (rows / 0.7) ** 2 + (columns / 0.9) ** 2 < 1
    affine = np.diag([0.8, 0.8, 2.5, 1.0])
    paths = []
    for number in range(cases):
        noise = np.random.default_rng(number).normal(20, 15, (side, side, slices))
        voxels = np.where(body[..., None], noise, -1000).astype(np.int16)
        paths.append(folder / "images" / f"scan_{number:04}.nii.gz")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, affine), paths[-1])
    return paths


def prepare_config(folder: Path, workers: int) -> PrepareConfig:
    """How our side prepares the set below `folder`."""
    source = DataSource(root=folder / "set", layout="folders", modality="CT", labels={}, public_names=True)
    return PrepareConfig(name="simulated", out=folder / "store", data=source, workers=workers)


def writing_ways(config: PrepareConfig, scans: list[Path]) -> dict[str, Callable[[], object]]:
    """Each way to bring a whole set into a form that is trained from."""

    def ours() -> object:
        shutil.rmtree(config.out, ignore_errors=True)
        return prepare(config)

    return {
        OURS: ours,
        "MONAI to .npy": partial(usual_loop, scans, config.out.with_name("npy"), np.save),
        "MONAI to .npz": partial(usual_loop, scans, config.out.with_name("npz"), np.savez_compressed),
    }


def usual_loop(scans: list[Path], out: Path, save: Callable[..., object]) -> None:
    """One scan after the other with MONAI, in slices as a radiologist looks at them."""
    from monai.transforms.compose import Compose
    from monai.transforms.io.array import LoadImage
    from monai.transforms.spatial.array import Orientation

    load = Compose([LoadImage(dtype=np.int16, ensure_channel_first=True), Orientation(axcodes="LPS")])
    out.mkdir(exist_ok=True)
    for scan in scans:
        save(out / scan.name.removesuffix(".nii.gz"), np.ascontiguousarray(np.asarray(load(scan)[0]).T))


def check_equal(config: PrepareConfig, scans: list[Path]) -> SliceStore:
    """The store, once every voxel of it was found to be what the usual loop wrote."""
    store = SliceStore(config.out)
    for scan in scans:
        name = scan.name.removesuffix(".nii.gz")
        usual, own = np.load(config.out.with_name("npy") / f"{name}.npy"), store.image(name)
        if usual.dtype != own.dtype or not np.array_equal(usual, own):
            raise SystemExit(f"The two ways differ in {name}: there is nothing to compare.")
    return store


def reading_ways(store: SliceStore, scans: list[Path], reads: int) -> dict[str, Callable[[], object]]:
    """Each way to read `reads` slices, drawn at random over all cases."""
    generator = np.random.default_rng(1)
    plain = [scan.with_suffix("") for scan in scans]
    for scan, path in zip(scans, plain, strict=True):
        nib.save(nib.load(scan), path)
    depth = store.shape(scans[0].name.removesuffix(".nii.gz"))[0]
    draws = [(int(generator.integers(len(scans))), int(generator.integers(depth))) for _ in range(reads)]

    def ours() -> None:
        for number, z in draws:
            store.image_slice(scans[number].name.removesuffix(".nii.gz"), z)

    def nibabel(paths: list[Path]) -> None:
        for number, z in draws:
            np.asarray(nib.load(paths[number]).dataobj[:, :, z])  # pyright: ignore[reportAttributeAccessIssue]

    return {
        OURS: ours,
        "nibabel, .nii.gz": partial(nibabel, scans),
        "nibabel, .nii": partial(nibabel, plain),
    }


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of each way, and how many times longer than ours: median, least and most over rounds."""
    from pretrain import spread_of  # not where the workers of `prepare` would import it as well

    return {
        name: {"seconds": [round(each, 4) for each in found], "times_longer": spread_of(found, seconds[OURS])}
        for name, found in seconds.items()
    }


def show(result: dict[str, Any]) -> None:
    """Both tables as text."""
    print(f"{result['settings']['workers']} workers, load {result['load_before']} when it began")
    for table in ("prepare", "random_slice"):
        print(table.replace("_", " "))
        for name, row in result[table].items():
            median, least, most = row["times_longer"]
            seconds = float(np.median(row["seconds"]))
            print(f"  {name:18} {seconds:9.4f} s  {median:7.2f} times [{least:.2f}, {most:.2f}]")


if __name__ == "__main__":
    main()
