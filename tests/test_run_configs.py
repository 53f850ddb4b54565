"""Every YAML below ray_configs/ and every command in the documents is accepted; nothing is run."""

import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest

from samssl.cli import main
from samssl.cluster.submit import job_command
from samssl.commands import STAGES
from samssl.config import ConfigError, flatten, load_config, read_yaml
from samssl.examples import EXAMPLES

ROOT = Path(__file__).parents[1]
FOR_RAY = ("cluster", "jobs")
"""Folders of files that Ray reads: tests/cluster/test_cluster_configs.py."""
CONFIGS = sorted(path for path in (ROOT / "ray_configs").rglob("*.yaml") if path.parent.name not in FOR_RAY)
# docs/lab.md is history: it keeps commands as they were on their day.
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs/lab.md"})]
REQUIRED = {
    "prepare": {"data.root": "/scans"},
    "study": {"prepare.data.root": "/scans"},
    "pretrain": {"data.store": "/store"},
    "finetune": {"data.store": "/store"},
    "sweep": {"prepare.data.root": "/scans", "finetune.data.store": "/store"},
}
"""What a shipped file may leave for the command line, since only the user knows it."""


def stage_of(path: Path) -> str:
    """`studies/x.yaml` is a study; elsewhere the name ends in the stage, as in `runs/x_prepare.yaml`."""
    folders = {"studies": "study", "sweeps": "sweep"}
    return folders.get(path.parent.name) or path.stem.rpartition("_")[2]


def config_class(stage: str) -> type:
    found = locate(STAGES[stage].config.replace(":", "."))
    assert isinstance(found, type)
    return found


def fences(document: Path) -> Iterator[str]:
    yield from re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(texts: Iterable[str]) -> Iterator[list[str]]:
    """The arguments of every `samssl ...` and `python pipelines/....py ...` in these fences."""
    for fence in texts:
        for line in fence.replace("\\\n", " ").splitlines():
            found = re.search(r"^samssl (.*)|python pipelines/(\w+)\.py(.*)", line)
            if found:
                arguments = shlex.split(found[1] or found[2] + found[3], comments=True)
                yield arguments


def written_files(document: Path) -> dict[str, str]:
    """YAML that the document tells its reader to write, by the name in its first line's comment."""
    named = [re.match(r"# (\S+\.yaml)\n", fence) for fence in fences(document)]
    return {found[1]: found.string for found in named if found}


WORK: dict[str, tuple[str, Any]] = {
    "lineage": ("samssl.cluster.lineage.describe_lineage", lambda start: ("", True)),
    "plan": ("samssl.train.plan.describe_plan", lambda *given: ""),
    "promote": ("samssl.cluster.promote.promote", lambda *given: ""),
    "strategies": ("samssl.train.catalogue.describe_strategies", lambda *given: ""),
    "datasets": ("samssl.data.recipe_tables.describe_recipes", lambda name: ""),
    "download": ("samssl.data.download.fetch", lambda archive, folder: None),
    "doctor": ("samssl.cluster.doctor.describe_health", lambda with_ray: ("", True)),
}
"""What commands that are no stage do, and what they do here instead."""
SUFFIXES = (".py", ".yaml", ".html", ".css", ".js")
"""Of the files that the README names."""
COMMANDS = {*STAGES, *WORK, "bench", "completion", "demo", "submit"}
ALL_COMMANDS = [(document, arguments) for document in DOCUMENTS for arguments in commands(fences(document))]
ALL_COMMANDS += [(ROOT / "samssl/examples.py", arguments) for arguments in commands(EXAMPLES.values())]


def test_there_are_configs_and_commands_to_check() -> None:
    assert {path.parent.name for path in CONFIGS} >= {"runs", "studies"}
    assert {document.name for document, _ in ALL_COMMANDS} >= {
        "README.md",
        "how-to.md",
        "tutorial.md",
        "few-cases.md",
        "examples.py",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_config_loads_with_the_class_that_its_name_says(path: Path) -> None:
    stage = stage_of(path)
    assert stage in STAGES, f"{path.name} must end in _<stage>.yaml, or lie in studies/"
    given = flatten(read_yaml(path))
    missing = {name: value for name, value in REQUIRED.get(stage, {}).items() if name not in given}
    if sets := read_yaml(path).get("datasets"):
        missing = {f"datasets.{name}.prepare.data.root": "/scans" for name in sets}
    load_config(config_class(stage), path, missing)


@pytest.mark.parametrize(
    ("name", "field"),
    [("runs/hippocampus_prepare.yaml", "data.root"), ("runs/vit_b_pretrain.yaml", "data.store")],
)
def test_what_only_the_user_knows_is_asked_for(name: str, field: str) -> None:
    path = ROOT / "ray_configs" / name
    with pytest.raises(ConfigError, match=rf"{field}: is required"):
        load_config(config_class(stage_of(path)), path, {})


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "finetune"])
def test_stage_by_stage_is_the_study(stage: str) -> None:
    """The hippocampus runs have the study's settings, folders and initial weights apart."""
    study = flatten(read_yaml(ROOT / "ray_configs/studies/hippocampus.yaml"))
    run = flatten(read_yaml(ROOT / f"ray_configs/runs/hippocampus_{stage}.yaml"))
    expected = {name.removeprefix(f"{stage}."): value for name, value in study.items()}
    places = {"name", "out", "data.store", "model.checkpoint"}
    settings = {name: value for name, value in run.items() if name not in places}
    of_stage = {name for name in study if name.startswith(f"{stage}.")}
    assert settings == {name: expected[name] for name in settings}
    assert {name.removeprefix(f"{stage}.") for name in of_stage} <= settings.keys()


def test_fine_tuning_in_a_study_sees_the_input_of_pretraining() -> None:
    path = ROOT / "ray_configs/studies/hippocampus.yaml"
    given = {"pretrain.data.input.channels": "neighbours", "pretrain.data.input.mr": "zscore"}
    study = load_config(config_class("study"), path, {**given, **REQUIRED.get("study", {})})
    assert study.pretrain.data.input.mr == "zscore"
    assert study.finetune.data.input == study.pretrain.data.input


@pytest.mark.parametrize(
    ("document", "arguments"),
    ALL_COMMANDS,
    ids=[f"{document.name}: {shlex.join(arguments)}" for document, arguments in ALL_COMMANDS],
)
def test_a_documented_command_is_accepted(
    document: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = arguments[0]
    assert stage in COMMANDS
    shutil.copytree(ROOT / "ray_configs", tmp_path / "ray_configs")
    for name, content in written_files(document).items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    if stage in WORK:
        monkeypatch.setattr(*WORK[stage])
    elif stage == "submit":
        sent = "samssl.cluster.submit.submit"
        monkeypatch.setattr(sent, lambda submission: int("--" not in job_command(submission, "job")))
    elif stage == "bench":
        monkeypatch.setattr("runpy.run_path", lambda path, run_name: Path(path).read_text())
    elif stage != "completion":
        name = "study" if stage == "demo" else stage
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], function="builtins:repr"))
    main(arguments)  # ends the process where a file, a field or a value is not accepted


def test_the_readme_names_every_file() -> None:
    """The tree: two spaces a level, folders end in a slash, one line a file."""
    tree = next(fence for fence in fences(ROOT / "README.md") if fence.startswith("pipelines/"))
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    named, folders = set(), []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        folders[len(indent) // 2 :] = [name]
        named.add("".join(folders))
    folders = [*("pipelines", "samssl"), "ray_configs"]
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    files = {path.relative_to(ROOT).as_posix() for path in paths if path.suffix in SUFFIXES}
    # A recipe is a file for each public data set; `samssl datasets` is their list.
    files -= {name for name in files if name.endswith("__init__.py") or "/recipes/public/" in name}
    assert {name for name in named if name.startswith(tuple(folders)) and not name.endswith("/")} == files
    assert all((ROOT / name).exists() for name in named)
    assert {name for name in named if name.startswith("docs/") and name.endswith(".md")} == pages
