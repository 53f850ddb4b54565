"""The pages of docs/: built strictly, their reference current, their messages real, cheap commands run."""

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from samssl.cluster.study_design import StudyConfig
from samssl.commands import STAGES
from samssl.config import describe

ROOT = Path(__file__).parents[1]
ERRORS = ("UserError", "ConfigError", "CheckpointError", "BundleError", "ValueError")
CHEAP = ["samssl doctor", "samssl strategies", "samssl completion zsh", "samssl pretrain --help"]
"""Commands of the documents that end within seconds, and are run as they stand."""


def quoted(page: str) -> list[str]:
    """Messages that a page quotes, each a paragraph that begins with `> `."""
    blocks = re.findall(r"(?:^> .*\n)+", page, re.MULTILINE)
    return [" ".join(line.removeprefix("> ") for line in block.splitlines()) for block in blocks]


def message_patterns() -> Iterator[re.Pattern[str]]:
    """All texts in the source as patterns: what an f-string fills in may be anything."""
    for path in sorted((ROOT / "samssl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if sum(len(part) for part in parts if isinstance(part, str)) > 20:
                    filled = [".*" if part is None else re.escape(str(part)) for part in parts]
                    yield re.compile("".join(filled).removeprefix(r"\ \ "))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 20:
                yield re.compile(re.escape(node.value))


def test_every_message_in_troubleshooting_is_one_of_the_source() -> None:
    messages = quoted((ROOT / "docs/troubleshooting.md").read_text())
    assert len(messages) > 20
    patterns = list(message_patterns())
    assert not [text for text in messages if not any(pattern.fullmatch(text) for pattern in patterns)]


def test_a_message_that_was_changed_would_be_noticed() -> None:
    assert quoted("> one\n> two\n\nthen\n\n> three\n") == ["one two", "three"]
    assert not any(
        pattern.fullmatch("There is no checkpoint x. Look again.") for pattern in message_patterns()
    )


def test_the_reference_of_settings_is_current() -> None:
    """`make docs`, or `python docs/configuration.py`, writes it anew."""
    made = runpy.run_path(str(ROOT / "docs/configuration.py"))
    assert (ROOT / "docs/configuration.md").read_text() == made["page"](), "run: python docs/configuration.py"


def test_the_reference_has_every_stage_and_setting() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == list(STAGES)
    own = {field.name for field in describe(StudyConfig)} - {""}
    named = set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))
    parts = {name.removeprefix("datasets.NAME.").partition(".")[2] for name in own - named}
    assert parts <= named
    assert "0x" not in unescape(page)


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("mkdocs"))
    command = [program, "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "tutorial.html", "configuration.html", "archive.html"} <= {
        page.name for page in pages
    }
    outside = re.compile(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?https?://""")
    assert not [page.name for page in pages if outside.search(page.read_text())]


@pytest.mark.parametrize("command", CHEAP)
def test_a_cheap_command_of_the_documents_runs(command: str, tmp_path: Path) -> None:
    code = f"import sys; sys.argv = {command.split()!r}; from samssl.cli import main; main()"
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_python_in_a_page_parses_and_imports_what_there_is(page: Path) -> None:
    for text in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = __import__(node.module, fromlist=[name.name for name in node.names])
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
