"""A small study on real files with real Ray and real MLflow."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SETTINGS = {
    "name": "tiny",
    "model": {"variant": "micro", "image_size": 32},
    "prepare": {"data": {"public_names": True}, "split": {"pool": 2, "train": 2, "val": 1, "test": 3}},
    "pretrain": {
        "mae": {"decoder_depth": 1, "decoder_dim": 32, "decoder_heads": 2},
        "optim": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "validate_every": 2, "log_every": 1},
    },
    "finetune": {
        "data": {"shots": 2},
        "optim": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "validate_every": 2, "log_every": 1},
    },
}


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder, the command that makes it, and its MLflow database."""

    root: Path
    out: Path

    def samssl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line as a user does, in the study's own working directory."""
        return samssl(self.root, *arguments, check=check)

    def study(self, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the study with overrides."""
        return self.samssl("study", "--config", str(self.root / "study.yaml"), *overrides, check=check)

    def json(self, name: str) -> Any:
        """A JSON file below the study's folder."""
        return json.loads((self.out / name).read_text())


def samssl(cwd: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{cwd / 'mlflow.db'}"}
    command = [str(Path(sys.executable).with_name("samssl")), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(arguments)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def make_study(root: Path, scans: Path, **changes: Any) -> StudyFolder:
    settings = json.loads(json.dumps(SETTINGS)) | changes
    settings["out"] = str(root / "study")
    settings["prepare"]["data"]["root"] = str(scans)
    (root / "study.yaml").write_text(yaml.safe_dump(settings))
    return StudyFolder(root, root / "study")
