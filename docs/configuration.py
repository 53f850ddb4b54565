"""Write docs/configuration.md: every setting of every stage, from the config classes themselves.

python docs/configuration.py    (part of `make docs`; tests/test_documents.py says when the page is old)
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

from samssl.commands import STAGES
from samssl.config import Field, describe

PAGE = Path(__file__).with_suffix(".md")
TOP = """\
# All settings

This page is written by `docs/configuration.py` from the config classes, whose docstrings stand here and in
`samssl STAGE --help`. Change it there.

Every setting is a dotted name: in YAML nested (`optim: {lr: 3.0e-4}`), on the command line `optim.lr=3e-4`,
and the same in a sweep's `space` and in MLflow. Lists and mappings are written as in YAML, in quotes for the
shell: `'seeds=[0, 1]'`, `'data.labels={1: liver}'`. `null` is no value; `...` in a type means any number of
these; NAME in a setting is a name that you choose.
"""
PARTS = {
    "study": ("prepare", "pretrain", "finetune", "simulate"),
    "sweep": ("prepare", "pretrain", "finetune"),
}
"""Stages whose settings another stage has too, below their name."""


def page() -> str:
    """The whole page."""
    return "\n".join([TOP, *(line for stage in STAGES for line in section(stage))])


def section(stage: str) -> Iterator[str]:
    """Heading, the one sentence of `--help`, and a table of a stage's own settings."""
    yield f"## {stage}\n"
    yield f"`samssl {stage}`: {STAGES[stage].help}.\n"
    parts = PARTS.get(stage, ())
    if parts:
        listed = ", ".join(f"`{part}.` has those of [{part}](#{part})" for part in parts)
        yield f"Below its own settings, {listed}.\n"
    module, name = STAGES[stage].config.split(":")
    yield "| setting | type | default | |\n|---|---|---|---|"
    for field in describe(getattr(importlib.import_module(module), name)):
        own = field.name.partition(".NAME.")[2] or field.name
        if not own.startswith(tuple(f"{part}." for part in (*parts, "expansive"))):
            yield row(field)
    yield ""


def row(field: Field) -> str:
    """One setting. A bar would end the cell."""
    shown = field.default.strip('"') or "(empty)"
    default = "**required**" if field.default == "required" else f"`{shown}`"
    cells = [f"`{field.name}`", f"`{field.type}`".replace(" | ", " or "), default, field.help]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
