"""Study folders small enough to compute by hand."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.data.sources import DataSource
from samssl.data.splits import SplitConfig
from samssl.files import sha256_file
from samssl.scores import with_volumes

LABELS = {1: "liver", 2: "tumour"}
SHAPES: dict[str, Any] = {
    **{"nsd": 0.9, "hd95_mm": 4.0, "assd_mm": 1.0, "surface_tolerance_mm": 2.0},
    **{"reference_lesions": 1, "predicted_lesions": 1, "detected_lesions": 1},
}
"""Of every case and label of these studies."""


@dataclass
class StudyWriter:
    """Writes parts of a study folder as the stages do."""

    root: Path

    def run(self, folder: str, stage: str, **facts: Any) -> Path:
        """A stage's folder with its `run.json`; returns the folder."""
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        record = {"stage": stage, "run_id": f"id-{folder}", "status": "finished", "wall_time_s": 61.0}
        record |= {"arm": None, "seed": None, "inputs": {}, "outputs": {}}
        record |= {"hardware": {"processor": "Abacus", "cores": 2, "memory_gib": 4.0, "gpus": []}}
        (path / "run.json").write_text(json.dumps(record | facts))
        return path

    def evaluation(
        self, arm: str, seed: int, dice: Mapping[str, Mapping[int, float] | float], **facts: Any
    ) -> Path:
        """`dice` is case -> label id -> Dice (a number alone: label 1); NaN: not in the reference."""
        rows = []
        for case, scores in dice.items():
            for label_id, value in scores.items() if isinstance(scores, Mapping) else [(1, scores)]:
                voxels = 0 if math.isnan(value) else 10
                rows.append((case, case, LABELS[label_id], label_id, value, voxels, 7))
        columns = ["case", "patient", "label", "label_id", "dice", "reference_voxels", "predicted_voxels"]
        folder = f"arms/{arm}/seed{seed}/evaluate"
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        table = self.root / folder / "cases.parquet"
        scored = with_volumes(pd.DataFrame(rows, columns=columns), (1.0, 1.0, 1.0))
        scored.assign(**SHAPES, subgroup_site="A").to_parquet(table)
        facts.setdefault("outputs", {"cases": sha256_file(table)})
        return self.run(folder, "evaluate", arm=arm, seed=seed, **facts)

    def history(self, folder: str, **metrics: list[float]) -> None:
        """`history.csv` with a value of each metric at steps 1, 2, ...; `train__loss` is `train/loss`."""
        rows = [
            (step, name.replace("__", "/"), value)
            for name, values in metrics.items()
            for step, value in enumerate(values, start=1)
        ]
        path = self.root / folder / "history.csv"
        pd.DataFrame(rows, columns=["step", "metric", "value"]).to_csv(path, index=False)


@pytest.fixture
def study(tmp_path: Path) -> StudyWriter:
    """An empty study folder and the means to fill it."""
    root = tmp_path / "tiny"
    root.mkdir()
    return StudyWriter(root)


@pytest.fixture
def store(study: StudyWriter, tmp_path: Path) -> SliceStore:
    """A real slice store in the study folder, with four test cases of 3 slices of 12 x 10."""
    rng = np.random.default_rng(0)
    for number in range(6):
        mask = np.zeros((10, 12, 3), np.uint8)
        mask[2:6, 3:7, 1] = 1
        mask[7:9, 3:5, 1:] = 2
        for kind, array in (("images", rng.normal(100, 20, mask.shape).astype(np.float32)), ("masks", mask)):
            path = tmp_path / "scans" / kind / f"case{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    source = DataSource(root=tmp_path / "scans", modality="MR", labels=LABELS, public_names=True)
    out = study.root / "store"
    split = SplitConfig(train=1.0, val=1.0, test=4.0)
    prepare(PrepareConfig(name="tiny", out=out, data=source, split=split, workers=1))
    opened = SliceStore(out)
    study.run("store", "prepare", outputs={"manifest": opened.digest})
    return opened
