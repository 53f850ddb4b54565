"""The wheel, the sdist, the tested versions and the steps of the image. Nothing is downloaded."""

import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".html", ".css", ".js", ".txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    return Path(built)


def test_the_wheel_holds_code_pages_and_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"samssl/{path.relative_to(ROOT)}" for path in (ROOT / "ray_configs").rglob("*.yaml")}
    package = [path for path in (ROOT / "samssl").rglob("*") if path.suffix in SUFFIXES]
    assert configs
    assert configs | {path.relative_to(ROOT).as_posix() for path in package} <= names
    assert {name.split("/")[0] for name in names} == {"samssl", f"samssl-{PROJECT['version']}.dist-info"}


def test_the_demo_of_an_unpacked_wheel_reads_its_own_config(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "packages")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'packages')!r}); "
    code += "from samssl.cli import main; main(['demo', 'no_such_field=1'])"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert str(tmp_path / "packages/samssl/ray_configs/studies/demo.yaml") in done.stderr
    assert "no_such_field: there is no such field" in done.stderr


def test_the_sdist_holds_what_builds_and_explains_it(tmp_path: Path) -> None:
    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "Dockerfile"}
    assert (
        expected | {"ray_configs/studies/demo.yaml", "docs/concepts.md", "samssl/report/base.html"} <= names
    )
    assert not [name for name in names if name.startswith((".venv", "runs", ".git/"))]


def test_the_tested_versions_are_all_there_and_are_those_asked_for() -> None:
    """`make constraints` mends it."""
    extras = PROJECT["optional-dependencies"]
    asked = [Requirement(line) for line in PROJECT["dependencies"] + extras["dev"]]
    wrong = [
        str(item)
        for item in asked
        if not item.specifier.contains(PINS.get(canonicalize_name(item.name), "0"))
    ]
    assert not wrong
    runpy.run_path(str(ROOT / ".ci/constraints.py"))  # loads where it is run by name


def steps() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile: its word and what follows, continued lines joined."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in pairs]


def test_the_dockerfile_is_as_its_linter_wants_it() -> None:
    program = Path(sys.executable).with_name("hadolint")
    command = [str(program), "--failure-threshold", "warning", "--no-color", str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_keeps_no_caches_and_runs_without_root() -> None:
    runs = [rest for word, rest in steps() if word == "RUN"]
    assert all(
        "--no-cache-dir" in command for run in runs for command in re.findall(r"pip install[^&]*", run)
    )
    assert all("rm -rf /var/lib/apt/lists/*" in run for run in runs if "apt-get" in run)
    assert [rest for word, rest in steps() if word == "USER"][-1] == "ray"


@pytest.mark.parametrize(("variant", "code"), [("gpu", 0), ("cpu", 0), ("tpu", 1)])
def test_the_variant_of_the_image_is_one_of_two(variant: str, code: int, tmp_path: Path) -> None:
    """The step that installs, with a `pip` that says what it was told."""
    (run,) = (rest for word, rest in steps() if word == "RUN" and "VARIANT" in rest)
    say = 'pip() { echo "$PIP_EXTRA_INDEX_URL" pip "$@"; }; '
    shell = ["bash", "-c", say + run]
    done = subprocess.run(
        shell, cwd=tmp_path, env={"VARIANT": variant, "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert done.returncode == code
    assert (b"/whl/cpu pip install" in done.stdout) == (variant == "cpu")


def test_the_image_is_given_what_it_copies() -> None:
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for word, rest in steps() if word == "COPY" for name in rest.split()[1:-1]}
    assert copied == given
    assert all((ROOT / name).exists() for name in copied)


def test_files_about_the_project_parse_and_agree_on_its_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    make = (ROOT / "Makefile").read_text()
    for hook in hooks[0]["hooks"]:
        program = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"$(VENV)/bin/{program}" in make
