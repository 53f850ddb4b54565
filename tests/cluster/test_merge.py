"""A fine-tuned model merged into plain SAM weights: `segment_anything` computes the same from them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from segment_anything.modeling import Sam

from samssl.bundle import load_segmenter, write_bundle
from samssl.cluster.export import ExportConfig, run_export
from samssl.cluster.launch import Executor
from samssl.cluster.lineage import describe_lineage
from samssl.cluster.stages import run_evaluate
from samssl.config import UserError
from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.data.splits import SplitConfig
from samssl.evaluate import EvaluateConfig
from samssl.models.checkpoints import weights_digest
from samssl.models.lora import LoraConfig
from samssl.models.sam import ModelConfig, build_micro, build_sam
from samssl.models.strategies import StrategyConfig
from samssl.report.card import CardConfig
from samssl.train.context import LocalContext
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig, finetune

Tune = Callable[[StrategyConfig], Path]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Path:
    """A store with one label: the boxes of `make_scans`, whole."""
    root = tmp_path_factory.mktemp("merge")
    scans = make_scans(root / "scans", cases=4)
    for path in (scans / "labelsTr").glob("*.nii.gz"):
        mask: Any = nib.load(path)  # pyright: ignore[reportPrivateImportUsage]
        whole = (np.asarray(mask.dataobj) > 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(whole, mask.affine), path)  # pyright: ignore[reportPrivateImportUsage]
    facts = json.loads((scans / "dataset.json").read_text())
    (scans / "dataset.json").write_text(json.dumps({**facts, "labels": {"0": "background", "1": "box"}}))
    split, source = SplitConfig(train=2.0, val=1.0, test=1.0), DataSource(root=scans)
    prepare(PrepareConfig(name="boxes", out=root / "store", data=source, split=split, workers=1))
    return root / "store"


@pytest.fixture
def tune(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Fine-tunes the micro model a little; gives the bundle."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")

    def tuned(strategy: StrategyConfig) -> Path:
        config = FinetuneConfig(
            out=tmp_path / "run",
            data=FinetuneDataConfig(store=store),
            model=ModelConfig(variant="micro", image_size=64),
            strategy=strategy,
            optim=FinetuneFitConfig(steps=3, batch_size=2, warmup_steps=1, validate_every=3, lr=0.01),
        )
        context = LocalContext()
        context.device = torch.device("cpu")
        state = finetune(config, context)
        weights = {name.removeprefix("segmenter."): value for name, value in state["weights"].items()}
        write_bundle(tmp_path / "run/bundle", config, SliceStore(store), weights)
        return tmp_path / "run/bundle"

    return tuned


@pytest.mark.parametrize(
    "strategy",
    [
        StrategyConfig(head="sam"),
        StrategyConfig(head="sam", lora=LoraConfig(dora=True, targets=("q", "proj", "mlp"))),
        StrategyConfig(head="sam", method="vanilla", scope="decoder"),
    ],
    ids=["lora", "dora", "vanilla"],
)
def test_the_merged_file_is_a_sam_that_gives_the_same_masks(
    tune: Tune, tmp_path: Path, strategy: StrategyConfig
) -> None:
    bundle = tune(strategy)
    model = run_export(ExportConfig(run=bundle.parent, out=tmp_path / "export", merge=True))
    official: Sam = build_micro().eval()
    weights = torch.load(model / "encoder.pth", weights_only=True)
    official.load_state_dict(weights, strict=True)
    assert weights_digest(load_file(model / "encoder.safetensors")) == weights_digest(weights)
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_segmenter(bundle)(images)
    batch = [{"image": 255 * image.expand(3, -1, -1), "original_size": (64, 64)} for image in images]
    theirs = torch.cat([found["low_res_logits"] for found in official(batch, multimask_output=False)])
    assert torch.allclose(theirs[:, 0], ours[:, 1], atol=1e-5)
    assert torch.count_nonzero(ours[:, 0]) == 0
    assert "fine-tuned to draw one label, `box`" in (model / "README.md").read_text()
    again = build_sam(ModelConfig(variant="micro", image_size=64, checkpoint=model))
    assert weights_digest(again.state_dict()) == weights_digest(weights)
    assert "encoder" in describe_lineage(str(model / "encoder.pth"))[0]


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (StrategyConfig(), "a mask token for each class"),
        (StrategyConfig(head="sam", method="adapter"), r"a GELU lies between.*strategy\.method=lora"),
    ],
)
def test_what_no_sam_computes_is_refused(
    tune: Tune, tmp_path: Path, strategy: StrategyConfig, reason: str
) -> None:
    bundle = tune(strategy)
    with pytest.raises(UserError, match=reason):
        run_export(ExportConfig(run=bundle, out=tmp_path / "export", merge=True))
    assert not (tmp_path / "export").exists()


def evaluated(bundle: Path, store: Path, out: Path) -> Path:
    """The folder of an evaluation of the bundle, in this process."""
    here = Executor(
        lambda *given, **more: pytest.fail("nothing is trained"), lambda work, *given: work(*given)
    )
    run_evaluate(EvaluateConfig(out=out, bundle=bundle, store=store), executor=here)
    return out


def test_any_bundle_becomes_onnx_with_a_card_of_its_scores(tune: Tune, store: Path, tmp_path: Path) -> None:
    bundle = tune(StrategyConfig())
    scores = evaluated(bundle, store, tmp_path / "evaluate")
    card = CardConfig(license="cc-by-nc-4.0", evaluation=scores, base_model="facebook/sam-vit-base")
    config = ExportConfig(run=bundle.parent, out=tmp_path / "export", onnx=True, card=card)
    model = run_export(config)
    names = {path.name for path in model.iterdir()}
    assert names == {"README.md", "config.yaml", "image_encoder.onnx", "mask_decoder.onnx"}
    images = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"images": images.numpy()}
    for name, given, given_out in (
        ("image_encoder", "images", "image_embeddings"),
        ("mask_decoder", "image_embeddings", "low_res_logits"),
    ):
        session = onnxruntime.InferenceSession(model / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found[given_out],) = session.run([given_out], {given: found[given]})
    with torch.no_grad():
        expected = load_segmenter(bundle)(images)
    np.testing.assert_allclose(found["low_res_logits"], expected.numpy(), atol=1e-3)
    for path in model.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert b"scan_00" not in path.read_bytes(), path
    check_card(model, json.loads((scores / "run.json").read_text())["metrics"])
    other = replace(config, out=tmp_path / "other", run=tune(StrategyConfig(head="sam")))
    with pytest.raises(UserError, match="evaluation of another bundle"):
        run_export(other)


def check_card(model: Path, metrics: dict[str, float]) -> None:
    """The front matter is what the hub's own library reads, and its numbers are those of the evaluation."""
    read: Any = ModelCard.load(model / "README.md").data
    assert (read.license, read.library_name, read.base_model) == (
        "cc-by-nc-4.0",
        "samssl",
        "facebook/sam-vit-base",
    )
    assert read.pipeline_tag == "image-segmentation"
    assert {"segment-anything", "radiology", "lora"} <= set(read.tags or ())
    results = read.eval_results or []
    assert {result.task_type for result in results} == {"image-segmentation"}
    given = {result.metric_name: result.metric_value for result in results}
    assert given["test/dice"] == metrics["test/dice"]
    assert {name for name in metrics if np.isfinite(metrics[name])} - set(given) == {"test/cases"}
    assert [f"sha256-{digest}" for digest in {result.dataset_name[7:] for result in results}] == read.datasets
    again = ModelCardData(**read.to_dict() | {"model_name": read.model_name, "eval_results": results})
    assert again.to_dict()["model-index"] == read.to_dict()["model-index"]
