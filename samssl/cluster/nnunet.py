"""nnU-Net's own planner, trainer and predictor (2d) on our splits, scored as our models are.

The package is an extra: `pip install 'samssl[nnunet]'`. It runs in processes of its own on this machine.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from samssl.cluster.stage import Place, stage
from samssl.cluster.stages import manifest_of, record_scores
from samssl.config import Count, PositiveFloat, UserError, config
from samssl.data.nnunet import DATASET, SPLITS_FILE, export_nnunet, read_nnunet_prediction
from samssl.data.slices import SliceStore
from samssl.evaluate import Evaluation, class_scores, labelled_cases, write_scores
from samssl.shapes import SURFACE_TOLERANCE_MM
from samssl.train.finetune import FinetuneDataConfig, training_rows


@config
class NnunetConfig:
    """Labelled cases to an nnU-Net and its scores."""

    out: Path
    """Folder of this run."""
    store: Path
    """The slice store."""
    shots: Count = 0
    """Patients of the split `train` that are learnt from, the same as in finetune; 0 takes all of them."""
    shot_seed: Count = 0
    """Another seed, another draw of the shots."""
    split: str = "test"
    """Split whose labelled cases are scored."""
    trainer: str = "nnUNetTrainer"
    """nnU-Net's trainer; `nnUNetTrainer_100epochs` takes a tenth of the epochs."""
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    """Where it trains and predicts."""
    surface_tolerance_mm: PositiveFloat = SURFACE_TOLERANCE_MM
    """As in evaluate."""


def run_nnunet(config: NnunetConfig, place: Place = Place()) -> None:
    """Export, plan, train, predict and score; a part that is done is not done again."""
    if importlib.util.find_spec("nnunetv2") is None:
        raise UserError("nnU-Net is not installed. Install it with: pip install 'samssl[nnunet]'")
    with stage("nnunet", config, {"manifest": manifest_of(config.store)}, place) as work:
        if not work.done:
            record_scores(work, train_and_score(config), config.split)


def train_and_score(config: NnunetConfig) -> Evaluation:
    """nnU-Net's four commands, and `cases.parquet` and `predictions.zarr` as evaluate writes them."""
    store, root = SliceStore(config.store), config.out / "nnunet"
    test = labelled_cases(store, config.split)
    dataset = root / "raw" / DATASET
    if not dataset.is_dir():
        export_nnunet(store, root / "raw", train=shot_cases(store, config), val=store.cases("val"), test=test)
    plans = root / "preprocessed" / DATASET
    if not (plans / SPLITS_FILE).is_file():
        _run(root, "plan_and_preprocess", "-d", "1", "-c", "2d", "--verify_dataset_integrity")
        shutil.copy(dataset / SPLITS_FILE, plans / SPLITS_FILE)
    chosen = ("-tr", config.trainer, "-device", config.device)
    _run(root, "train", "1", "2d", "0", "--c", *chosen)  # --c goes on where there is something to go on from
    folders = ("-i", str(dataset / "imagesTs"), "-o", str(root / "predictions"))
    _run(root, "predict", *folders, "-d", "1", "-c", "2d", "-f", "0", *chosen)
    predicted = (
        (case, read_nnunet_prediction(store, root / "predictions" / f"{case}.nii.gz")) for case in test
    )
    return write_scores(config.out, class_scores(store, predicted, config.surface_tolerance_mm), len(test))


def shot_cases(store: SliceStore, config: NnunetConfig) -> list[str]:
    """The cases that fine-tuning with as many shots and this seed learns from."""
    data = FinetuneDataConfig(store=config.store, shots=config.shots, shot_seed=config.shot_seed)
    return sorted({store.rows.case_name(row) for row in training_rows(store, data).tolist()})


def _run(root: Path, command: str, *arguments: str) -> None:
    """One of nnU-Net's commands, which find their folders in the environment.

    Raises:
        UserError: it failed; its own messages are above.
    """
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    line: Sequence[str] = [str(Path(sys.executable).with_name(f"nnUNetv2_{command}")), *arguments]
    if subprocess.run(line, env={**os.environ, **folders}).returncode:
        raise UserError(
            f"nnUNetv2_{command} failed; its own messages are above. The same command goes on from there."
        )
