"""`samssl completion`: what the Tab key of bash and zsh knows, down to the fields of each stage.

The script is written once, when the shell starts, so that Tab itself never waits for Python.
"""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import shtab

BASH_END = """
_samssl() { _shtab_samssl; [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null; return 0; }
complete -o bashdefault -F _samssl samssl
"""
"""A field is not finished until its value stands behind the equals sign: no space is added there."""

Fields = Mapping[str, Sequence[str]]
"""Dotted field names of each command that takes `field=value`."""


def completion_script(parser: argparse.ArgumentParser, shell: str, fields: Fields) -> str:
    """The script for `shell`, which its start-up file evaluates."""
    for command, action in _overrides(parser):
        words = [f"{name}=" for name in fields[command]]
        action.complete = {"bash": _function(command), "zsh": f"({' '.join(words)})"}  # pyright: ignore
    functions = "".join(_bash_function(command, names) for command, names in fields.items())
    script = shtab.complete(parser, shell, preamble={"bash": functions, "zsh": ""})  # pyright: ignore
    return script + (BASH_END if shell == "bash" else "")


def _overrides(parser: argparse.ArgumentParser) -> Iterator[tuple[str, Any]]:
    """Each argument that takes fields, with the name of its command, `submit` included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found = [(name, item) for item in command._actions if item.dest == "overrides"]
                yield from found or _overrides(command)
        elif action.type is not None and action.dest in ("config", "runtime_env"):
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]


def _function(command: str) -> str:
    return f"_samssl_fields_{command.replace('-', '_')}"


def _bash_function(command: str, names: Sequence[str]) -> str:
    words = shlex.quote(" ".join(f"{name}=" for name in names))
    return f'{_function(command)}() {{ compgen -W {words} -- "$1"; }}\n'
