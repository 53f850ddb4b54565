"""`samssl doctor`: whether this machine can run samssl, and what to do where it cannot.

Each check returns a `Finding`. Looking at the machine (`check_...`) is apart from what is made of the numbers
(`judge_...`), so that the latter can be tested on machines that nobody has.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
import torch
from packaging.requirements import Requirement

from samssl.cluster.server import SQLITE, client_of, shown, tracking_uri
from samssl.cluster.tasks import start_ray
from samssl.config import UserError
from samssl.models.initial import FOLDER_VARIABLE, checkpoint_folder
from samssl.train.costs import peak_flops

GIB = 2**30
Level = Literal["ok", "note", "fail"]
MARKS: Mapping[Level, str] = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
LEAST_DISK_GIB, USUAL_DISK_GIB = 1.0, 20.0
"""Free space without which the demo does not run, and with which a study of thin checkpoints does."""
USUAL_SHARED_GIB = 2.0
"""Size of /dev/shm below which Ray keeps objects on the disk, and loader processes may die."""
LEAST_FILES, USUAL_FILES = 1024, 8192
"""Open files a process needs on one machine, and with Ray on many cores."""


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    what: str
    level: Level
    text: str
    fix: str = ""
    """What to do about it; empty where nothing has to be done."""


def describe_health(with_ray: bool) -> tuple[str, bool]:
    """All findings as lines of text, and whether none of them keeps samssl from running here.

    `with_ray` also starts Ray, or joins the cluster that RAY_ADDRESS names, and runs one task.
    """
    found = list(_findings([*CHECKS, *([check_ray_task] if with_ray else [])]))
    width = max(len(finding.what) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{MARKS[finding.level]}  {finding.what:<{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':<{width + 8}}-> {finding.fix}")
    failed = [finding.what for finding in found if finding.level == "fail"]
    lines.append(
        f"Mend first: {', '.join(failed)}." if failed else "samssl can run here. `samssl demo` shows it."
    )
    return "\n".join(lines), not failed


def _findings(checks: Sequence[Callable[[], Finding]]) -> Iterator[Finding]:
    for check in checks:
        yield check()


def check_python() -> Finding:
    """Python, the operating system and where samssl comes from."""
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def check_packages() -> Finding:
    """Installed versions against those that samssl asks for."""
    try:
        asked = importlib.metadata.requires("samssl") or []
    except importlib.metadata.PackageNotFoundError:
        text = "samssl is used from a folder without being installed; versions were not checked"
        return Finding("packages", "note", text, "pip install samssl, or `make demo` in the project's folder")
    installed = {}
    for line in asked:
        name = Requirement(line).name
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return judge_packages(asked, installed)


def judge_packages(asked: Sequence[str], installed: Mapping[str, str]) -> Finding:
    """`asked`: requirements as package metadata has them; those of extras are passed over."""
    wrong, count = [], 0
    for requirement in map(Requirement, asked):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        version = installed.get(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'absent'} (needed: {requirement.specifier})")
    if wrong:
        return Finding("packages", "fail", "; ".join(wrong), "pip install --upgrade samssl")
    own = {name: installed[name] for name in ("torch", "ray", "mlflow") if name in installed}
    listed = ", ".join(f"{name} {version}" for name, version in own.items())
    return Finding("packages", "ok", f"{count} as asked for: {listed}")


def check_gpu() -> Finding:
    """GPUs that torch can use, or why it cannot use those that are there."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        listed = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("gpu", "ok", f"{listed}, bf16, CUDA {torch.version.cuda}")
        fix = "set optim.precision=fp32: without bf16 units the default is slower, not faster"
        return Finding("gpu", "note", f"{listed}, without bf16", fix)
    return judge_no_gpu(shutil.which("nvidia-smi") is not None, torch.version.cuda)


def judge_no_gpu(has_driver: bool, built_for: str | None) -> Finding:
    """`built_for`: the CUDA version that torch was built for, None where it was built without."""
    if has_driver and built_for is None:
        fix = "install the torch build for CUDA: pip install --force-reinstall torch torchvision"
        return Finding("gpu", "fail", "an NVIDIA driver is here, but this torch knows no CUDA", fix)
    if has_driver:
        fix = (
            f"update the NVIDIA driver to one for CUDA {built_for}; in a container, start it with --gpus all"
        )
        return Finding("gpu", "fail", "an NVIDIA driver is here, but torch cannot use it", fix)
    return Finding("gpu", "note", "none: `micro` trains here, ViT-B and ViT-H are for a machine with one")


def check_processor() -> Finding:
    """Cores, memory and what bf16 is worth on this processor."""
    ratio = peak_flops(bf16=True, side=1024) / peak_flops(bf16=False, side=1024)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return judge_processor(len(os.sched_getaffinity(0)), memory, ratio)


def judge_processor(cores: int, memory_gib: float, bf16_ratio: float) -> Finding:
    """`bf16_ratio`: matrix products a second in bf16, as a multiple of those in fp32."""
    text = f"{cores} cores, {memory_gib:.0f} GiB memory, bf16 products {bf16_ratio:.1f} times as fast as fp32"
    if memory_gib < 6:
        return Finding("cpu", "note", text, "the demo needs some 5 GiB: close other programs")
    return Finding("cpu", "ok", text)


def check_disk() -> Finding:
    """Space where runs are written, unless `out` says otherwise."""
    return judge_disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free / GIB)


def judge_disk(folder: Path, free_gib: float) -> Finding:
    """`free_gib`: of the file system of `folder`."""
    text = f"{free_gib:.0f} GiB free in {folder}"
    fix = "delete runs that are not needed any more, or set `out` to another disk"
    level = _level(free_gib, LEAST_DISK_GIB, USUAL_DISK_GIB)
    return Finding("disk", level, text, "" if level == "ok" else fix)


def check_shared_memory() -> Finding:
    """/dev/shm, in which Ray and loader processes pass arrays on."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("/dev/shm", "note", "not there; Ray uses a folder on disk instead")
    return judge_shared_memory(shutil.disk_usage(place).total / GIB)


def judge_shared_memory(size_gib: float) -> Finding:
    """`size_gib`: of all of it, not of what is free."""
    text = f"{size_gib:.2f} GiB"
    fix = "docker run --shm-size 4g; on Kubernetes mount an emptyDir with medium Memory at /dev/shm"
    ok = size_gib >= USUAL_SHARED_GIB
    return Finding("/dev/shm", "ok", text) if ok else Finding("/dev/shm", "note", text, fix)


def check_open_files() -> Finding:
    """How many files a process may have open."""
    return judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judge_open_files(soft: int, hard: int) -> Finding:
    """`soft` and `hard` limits as `ulimit -n` and `ulimit -Hn` print them; Ray raises soft to hard itself."""
    soft, hard = (limit if limit != resource.RLIM_INFINITY else 2**31 for limit in (soft, hard))
    text = f"{soft}, at most {hard}"
    fix = "ulimit -n 65536 before the command; for good, `nofile` in /etc/security/limits.conf"
    level = _level(hard, LEAST_FILES, USUAL_FILES)
    return Finding("open files", level, text, "" if level == "ok" else fix)


def _level(value: float, least: float, usual: float) -> Level:
    return "fail" if value < least else "note" if value < usual else "ok"


def check_ray() -> Finding:
    """Ray's version, and which cluster commands will join."""
    address = os.environ.get("RAY_ADDRESS")
    mode = os.environ["RAY_AUTH_MODE"]
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or Path("~/.ray/auth_token").expanduser().is_file()
    place = f"joins {address}" if address else "starts one of its own"
    text = f"{ray.__version__}, {place}, RAY_AUTH_MODE={mode}"
    if address and mode == "token" and not has_token:
        fix = "set RAY_AUTH_TOKEN to the cluster's token (`ray get-auth-token` on its head prints it)"
        return Finding("ray", "fail", f"{text}, but there is no token", fix)
    return Finding("ray", "ok", text)


def check_ray_task() -> Finding:
    """One task on the cluster that commands would use."""
    try:
        start_ray()
        ray.get(ray.remote(os.getpid).remote(), timeout=60)
        held = ray.cluster_resources()
    except Exception as error:  # Ray raises what it likes where it cannot start
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "`ray stop` ends what is left of an earlier one; then check RAY_ADDRESS, /dev/shm and the disk"
        return Finding("ray task", "fail", reason, fix)
    finally:
        ray.shutdown()
    return Finding("ray task", "ok", f"ran; {held.get('CPU', 0):g} cores, {held.get('GPU', 0):g} GPUs")


def check_mlflow() -> Finding:
    """The tracking server, or the folder in which its file will be made."""
    uri = tracking_uri()
    fix = "start it, or set MLFLOW_TRACKING_URI; sqlite:////path/to/mlflow.db needs no server"
    if uri.startswith(SQLITE) and not (file := Path(uri.removeprefix(SQLITE))).exists():
        existing = next(folder for folder in file.parents if folder.exists())
        if os.access(existing, os.W_OK):
            return Finding("mlflow", "ok", f"{shown(uri)}, which the first run makes")
        return Finding("mlflow", "fail", f"{existing} cannot be written to", fix)
    try:
        client_of(uri).search_experiments(max_results=1)
    except UserError as error:
        return Finding("mlflow", "fail", str(error))
    except Exception as error:  # MLflow's and those of what it calls
        return Finding("mlflow", "fail", f"{shown(uri)} does not answer ({type(error).__name__})", fix)
    return Finding("mlflow", "ok", f"{shown(uri)} answers")


def check_checkpoints() -> Finding:
    """Published weights that `model.checkpoint` finds by name."""
    folder = checkpoint_folder()
    files = sorted(path.name for path in folder.glob("*") if path.suffix in (".pth", ".pt", ".safetensors"))
    if files:
        return Finding("weights", "ok", f"{', '.join(files)} in {folder}")
    fix = f"for real work put sam_vit_b_01ec64.pth there, or name its folder in {FOLDER_VARIABLE}"
    return Finding("weights", "note", f"none in {folder}; weights are drawn at random", fix)


CHECKS = (
    *(check_python, check_packages, check_gpu, check_processor, check_disk, check_shared_memory),
    *(check_open_files, check_ray, check_mlflow, check_checkpoints),
)
