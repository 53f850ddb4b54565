"""Two labelled sets are learnt with prompts, and one task is fine-tuned from that, through Ray and MLflow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from segment_anything.modeling import Sam

from samssl.cluster.lineage import describe_lineage
from samssl.cluster.stages import run_evaluate, run_finetune, run_prepare
from samssl.config import build_config
from samssl.data.prepare import DataSource, PrepareConfig
from samssl.data.splits import SplitConfig
from samssl.evaluate import EvaluateConfig
from samssl.files import read_json
from samssl.models.checkpoints import load_weights, read_weights
from samssl.models.sam import ModelConfig, build_micro, build_sam
from samssl.train.finetune import FinetuneConfig

pytestmark = pytest.mark.ray


def test_a_task_is_fine_tuned_from_a_promptable_run(
    tmp_path: Path, make_scans: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for name in ("one", "two"):
        source = DataSource(root=make_scans(tmp_path / f"{name}_scans", cases=4))
        split = SplitConfig(train=2.0, val=1.0, test=1.0)
        run_prepare(PrepareConfig(name=name, out=tmp_path / name, data=source, split=split))
    tree: dict[str, Any] = {
        "out": tmp_path / "expansive",
        "mode": "promptable",
        "data": {"store": tmp_path / "one", "more_stores": [tmp_path / "two"]},
        "model": {"variant": "micro", "image_size": 32},
        "strategy": {"method": "vanilla"},
        "prompts": {"validation_clicks": 2, "objects_per_slice": 2},
        "optim": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "validate_every": 2, "keep_best": False},
        "resources": {"workers": 2},
    }
    expansive = build_config(FinetuneConfig, tree, source="test")
    bundle = run_finetune(expansive)
    checkpoint = tmp_path / "expansive" / "encoder.pth"
    starts_as_plain_sam(checkpoint)
    listed = pd.read_csv(tmp_path / "expansive" / "shots.csv")
    assert len(listed) == 2 * 2 * 4  # of six slices two show nothing
    assert sorted(path.name for path in (tmp_path / "expansive" / "prompts").iterdir()) == [
        *(f"clicks_{step:06d}.png" for step in (0, 2)),
        *(f"step_{step:06d}.png" for step in (0, 2)),
    ]

    run_evaluate(EvaluateConfig(out=tmp_path / "scores", bundle=bundle, store=tmp_path / "two", clicks=2))
    metrics = read_json(tmp_path / "scores" / "run.json")["metrics"]
    assert {"test/dice", "test/dice_box", "test/dice_clicks_1", "test/dice_clicks_2"} <= metrics.keys()

    task = {"out": tmp_path / "tuned", "mode": "automatic", "data": {"store": tmp_path / "one"}}
    task["model"] = tree["model"] | {"checkpoint": str(tmp_path / "expansive")}
    tuned = run_finetune(build_config(FinetuneConfig, tree | task | {"strategy": {}}, source="test"))
    text, unbroken = describe_lineage(str(tuned))
    assert unbroken, text
    lines = [line.strip() for line in text.splitlines()]
    assert sum(line.startswith("encoder ") for line in lines) == 2  # that of the promptable run, from random
    assert sum(line.startswith("manifest ") for line in lines) == 2, text


def starts_as_plain_sam(checkpoint: Path) -> None:
    """`segment_anything`'s own class takes it whole, and so does a run."""
    official: Sam = build_micro()
    load_weights(official, read_weights(checkpoint), "expansive")
    started = build_sam(ModelConfig(variant="micro", image_size=32, checkpoint=checkpoint.parent))
    untrained = build_sam(ModelConfig(variant="micro")).state_dict()
    for name, value in started.state_dict().items():
        assert torch.equal(value, official.state_dict()[name])
    changed = {
        name for name, value in official.state_dict().items() if not torch.equal(value, untrained[name])
    }
    assert {name.partition(".")[0] for name in changed} == {"image_encoder", "mask_decoder"}
