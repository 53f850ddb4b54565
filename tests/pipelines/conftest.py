"""One small study, shared by the tests that read it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pipelines_support import StudyFolder, make_study


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> StudyFolder:
    root = tmp_path_factory.mktemp("study")
    folder = make_study(root, make_scans(root / "scans", cases=8))
    folder.study()
    return folder
