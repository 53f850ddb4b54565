"""One small study, shared by the tests that read it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pipelines_support import SETTINGS, StudyFolder, make_study
from privacy_support import plant_decathlon


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> StudyFolder:
    """A study of scans that say whose they are, under pseudonyms, with what it printed and Ray's logs."""
    root = tmp_path_factory.mktemp("study")
    scans = plant_decathlon(make_scans(root / "scans", cases=8))
    folder = make_study(root, scans, prepare=SETTINGS["prepare"] | {"data": {}})
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="ray") as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", short)
        done = folder.study()
        for logs in Path(short).glob("ray/session_2*/logs"):
            shutil.copytree(logs, root / "ray_logs", dirs_exist_ok=True)
    (root / "printed.txt").write_text(done.stdout + done.stderr)
    return folder
