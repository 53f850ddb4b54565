"""Versions, code and hardware behind a result, without anything that names a person."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from samssl.files import sha256_file

PACKAGES = [
    "samssl",
    "torch",
    "torchvision",
    "segment-anything",
    "ray",
    "peft",
    "monai",
    "mlflow",
    "lightly",
    "nibabel",
    "numpy",
    "scipy",
    "zarr",
    "pandas",
]


@cache
def environment() -> dict[str, Any]:
    """Python and package versions, git commit and hardware of this machine."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "source_sha256": _source_sha256(),
        "hardware": hardware(),
    }


@cache
def hardware() -> dict[str, Any]:
    """Processor, cores, memory in GiB and GPUs."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "gpus": gpus}


def installed_version(name: str) -> str:
    """Of a package in this environment; absent where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _source_sha256() -> str:
    """SHA-256 over this package's own files, for code that came without its git history."""
    package = Path(__file__).parent
    lines = [f"{path.relative_to(package)} {sha256_file(path)}" for path in sorted(package.rglob("*.py"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _git_commit() -> str:
    """The commit of this code, marked where files differ from it; empty outside its own git checkout."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return ""
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + (" (with local changes)" if changed.stdout.strip() else "")
