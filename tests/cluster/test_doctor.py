"""`samssl doctor` on this machine, and what it says of machines that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from samssl.cluster.doctor import (
    check_mlflow,
    check_ray,
    judge_disk,
    judge_no_gpu,
    judge_open_files,
    judge_packages,
    judge_processor,
    judge_shared_memory,
)

ASKED = [
    "torch>=2.11",
    "ray[tune]<2.61,>=2.60",
    "pytest>=9; extra == 'dev'",
    "colorama; sys_platform == 'none'",
]


def doctor(cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "from samssl.cli import main; main(['doctor'])"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=kept | variables, capture_output=True, text=True
    )


def test_it_names_a_server_that_is_away_says_what_to_do_and_fails(tmp_path: Path) -> None:
    done = doctor(tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith("FAIL  mlflow"))
    assert "http://127.0.0.1:9 does not answer" in lines[place]
    assert "MLFLOW_TRACKING_URI" in lines[place + 1]
    assert "mlflow" in lines[-1]
    assert {line[6:17].strip() for line in lines if line[:4] in ("ok  ", "note", "FAIL")} == {
        *("python", "packages", "gpu", "cpu", "disk", "/dev/shm", "open files", "ray", "mlflow", "weights")
    }


def test_a_new_sqlite_file_is_not_made_and_a_broken_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs" / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    assert check_mlflow().level == "ok"
    assert not file.parent.exists()
    file.parent.mkdir()
    file.write_text("not a database, though it is long enough to have a header" * 20)
    finding = check_mlflow()
    assert (finding.level, "holds no MLflow database" in finding.text) == ("fail", True)


def test_a_cluster_with_tokens_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert check_ray().level == "fail"
    assert "RAY_AUTH_TOKEN" in check_ray().fix
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert check_ray().level == "ok"


@pytest.mark.parametrize(
    ("installed", "level", "named"),
    [
        ({"torch": "2.14.1", "ray": "2.60.0"}, "ok", "2 as asked for"),
        ({"torch": "2.14.1+cpu", "ray": "2.60.0"}, "ok", "torch 2.14.1+cpu"),
        ({"torch": "2.14.1", "ray": "2.61.0"}, "fail", "ray 2.61.0 (needed: <2.61,>=2.60)"),
        ({"ray": "2.60.0"}, "fail", "torch absent (needed: >=2.11)"),
    ],
)
def test_versions_are_held_against_those_asked_for(installed: dict[str, str], level: str, named: str) -> None:
    finding = judge_packages(ASKED, installed)
    assert (finding.level, bool(finding.fix)) == (level, level == "fail")
    assert named in finding.text
    assert "pytest" not in finding.text


def test_numbers_become_findings() -> None:
    here = Path("/somewhere")
    assert [judge_disk(here, free).level for free in (0.5, 5, 50)] == ["fail", "note", "ok"]
    assert [judge_shared_memory(size).level for size in (64 / 1024, 1, 8)] == ["note", "note", "ok"]
    assert [judge_open_files(256, hard).level for hard in (512, 4096, 65536, -1)] == [
        "fail",
        "note",
        "ok",
        "ok",
    ]
    assert [judge_processor(2, memory, 1.0).level for memory in (3, 24)] == ["note", "ok"]
    for finding in (judge_disk(here, 0.5), judge_shared_memory(0.1), judge_open_files(256, 512)):
        assert finding.fix


def test_a_gpu_that_torch_cannot_use_is_no_missing_gpu() -> None:
    assert judge_no_gpu(has_driver=False, built_for=None).level == "note"
    assert "CUDA 13.0" in judge_no_gpu(has_driver=True, built_for="13.0").fix
    assert "knows no CUDA" in judge_no_gpu(has_driver=True, built_for=None).text
