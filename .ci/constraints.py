"""Print the versions in this environment of all that samssl and its `dev` extra need, for constraints.txt.

`make constraints` writes the file from `.venv`, in which `make check`, `make test` and `make demo` have run.
"""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HEADER = """\
# The versions that samssl was tested with, on Linux and Python {python}: pip install -c constraints.txt ...
# Written by `make constraints`; tests/test_packaging.py holds it against pyproject.toml.
"""


def direct_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, `dev` included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


def pinned() -> dict[str, str]:
    """Versions of everything that is needed here, by name, directly or by something else."""
    found: dict[str, str] = {}
    waiting = direct_requirements()
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found[key[0]] = distribution(key[0]).version.partition("+")[0]
        except PackageNotFoundError:
            raise SystemExit(f"{requirement} is not installed: run this by `make constraints`.") from None
        needed = map(Requirement, requires(key[0]) or [])
        waiting += [item for item in needed if _applies(item, requirement.extras)]
    return found


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


if __name__ == "__main__":
    import platform

    python = ".".join(platform.python_version_tuple()[:2])
    lines = [f"{name}=={version}" for name, version in sorted(pinned().items())]
    print(HEADER.format(python=python) + "\n".join(lines))
