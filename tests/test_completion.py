"""What the Tab key offers, by bash itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samssl.cli import main
from samssl.commands import STAGES
from samssl.examples import EXAMPLES

PRESS_TAB = """
eval "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_samssl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    code = "from samssl.cli import main; main(['completion', 'bash'])"
    folder = tmp_path_factory.mktemp("anywhere")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


def tab(script: str, *words: str) -> set[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    command = [bash, "-c", PRESS_TAB, "bash", script, "samssl", *words]
    done = subprocess.run(
        command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_commands_fields_and_options_are_completed(script: str) -> None:
    assert tab(script, "pre") == {"predict", "prepare", "pretrain"}
    assert tab(script, "pretrain", "optim.l") >= {"optim.lr=", "optim.log_every=", "optim.layer_decay="}
    assert tab(script, "pretrain", "optim.lr_") == {"optim.lr_batch_size="}
    assert "--config" in tab(script, "finetune", "--c")
    assert tab(script, "submit", "evaluate", "bund") == {"bundle="}
    assert tab(script, "demo", "see") == {"seeds="}
    assert tab(script, "pretrain", "bundle") == set()


def test_zsh_gets_a_script_with_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "zsh"])
    written = capsys.readouterr().out
    assert written.startswith("#compdef samssl")
    assert "optim.lr=" in written


def test_every_command_has_an_example_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in EXAMPLES.items():
        if name in STAGES:
            main([name, "--help"])
        else:
            with pytest.raises(SystemExit, match=r"^0$"):
                main([name, "--help"])
        assert text.strip().splitlines()[-1] in capsys.readouterr().out
    assert set(STAGES) <= set(EXAMPLES)


def test_a_stage_without_settings_names_itself_and_where_to_look(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["pretrain"])
    assert "`samssl pretrain` needs its settings" in capsys.readouterr().err
