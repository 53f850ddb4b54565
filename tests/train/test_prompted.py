from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.utils.data import default_collate

from samssl.bundle import load_segmenter, read_bundle, write_bundle
from samssl.config import ConfigError, build_config
from samssl.data.datasets import AugmentConfig, LabelledSlices, rows_of
from samssl.data.objects import ObjectSlices
from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.data.splits import SplitConfig
from samssl.evaluate import EvaluateConfig, evaluate
from samssl.models.checkpoints import load_weights, trained_tensors
from samssl.models.merging import merged_weights
from samssl.models.promptable import PromptableSam, Prompts
from samssl.models.sam import ModelConfig, build_micro
from samssl.models.strategies import StrategyConfig, promptable_from
from samssl.prompts import KINDS, PromptConfig
from samssl.train.context import LocalContext
from samssl.train.finetune import FinetuneConfig, finetune, learnt_slices
from samssl.train.prompted import Objects, PromptedSegmenter, mask_losses, shrunk, true_iou

SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> Path:
    """Two stores of boxes; the second has more cases than the first."""
    root = tmp_path_factory.mktemp("prompted")
    split = SplitConfig(train=0.5, val=0.25, test=0.25)
    for name, cases in (("few", 4), ("many", 8)):
        source = DataSource(root=make_scans(root / f"{name}_scans", cases=cases))
        prepare(PrepareConfig(name=name, out=root / name, data=source, split=split, workers=1))
    return root


def settings(root: Path, **changes: Any) -> FinetuneConfig:
    tree = {
        "out": root / "run",
        "mode": "promptable",
        "data": {"store": root / "few"},
        "model": {"variant": "micro", "image_size": SIZE},
        "prompts": {"validation_clicks": 2, "objects_per_slice": 2},
        "optim": {
            "steps": 30,
            "batch_size": 4,
            "warmup_steps": 2,
            "validate_every": 30,
            "lr": 3e-3,
            "log_every": 5,
        },
    }
    return build_config(FinetuneConfig, tree | changes, source="test")


def cpu() -> LocalContext:
    context = LocalContext()
    context.device = torch.device("cpu")
    return context


def items(root: Path, count: int = 4, **changes: Any) -> dict[str, Tensor]:
    store = SliceStore(root / "many")
    slices = LabelledSlices(store, rows_of(store, ["train"])[1:], SIZE, AugmentConfig())
    objects = ObjectSlices(slices, replace(PromptConfig(objects_per_slice=2), **changes))
    return default_collate([objects[place, 1000 + place] for place in range(count)])


def test_an_object_is_pointed_out_the_same_whenever_its_key_is_drawn(root: Path) -> None:
    one, again = items(root), items(root)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert one["objects"].shape == (4, 2, SIZE, SIZE)
    for objects, points, boxes in zip(one["objects"], one["points"], one["tight_boxes"], strict=True):
        for mask, (x, y), (left, top, right, bottom) in zip(objects, points, boxes, strict=True):
            if mask.any():
                assert mask[int(y), int(x)]
                inside = mask[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
                assert inside.sum() == mask.sum()
    moved = (one["boxes"] - one["tight_boxes"]).abs()
    assert 0 < moved.max() <= 0.1 * SIZE
    kinds = items(root, count=12, box=0.0, mask=0.5)["kinds"].flatten().tolist()
    assert {*kinds} == {KINDS.index("point"), KINDS.index("mask")}


def test_targets_keep_small_objects_and_empty_ones_empty() -> None:
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[0, 5, 6] = True
    masks[1, :8, :8] = True
    small = shrunk(masks, (4, 4))
    assert small[0].nonzero().tolist() == [[1, 1]]
    assert small[1].sum() == 4
    assert not small[2].any()


def test_the_loss_of_a_batch_is_that_of_its_parts(root: Path) -> None:
    """Nothing random is shared among images: any number of workers learns the same."""
    model = PromptedSegmenter(PromptableSam(build_micro().eval()), PromptConfig())
    batch = items(root)
    present = batch["objects"].flatten(2).any(-1).all(-1).tolist()
    assert all(present)
    with torch.no_grad():
        whole = model(batch)
        parts = [
            model({name: value[place : place + 1] for name, value in batch.items()}) for place in range(4)
        ]
    for name, value in whole.items():
        assert torch.stack([part[name] for part in parts]).mean() == pytest.approx(float(value), rel=1e-5)
    assert whole["loss"] == pytest.approx(float(whole["mask_loss"] + whole["iou_loss"]))


def test_empty_objects_count_for_nothing_and_break_nothing(root: Path) -> None:
    model = PromptedSegmenter(PromptableSam(build_micro()), PromptConfig())
    batch = items(root)
    batch["objects"][2:] = False
    half = {name: value[:2] for name, value in batch.items()}
    with torch.no_grad():
        assert model(batch)["loss"] == pytest.approx(float(model(half)["loss"]), rel=1e-5)
    batch["objects"][:] = False
    losses = model(batch)
    losses["loss"].backward()
    assert losses["loss"] == 0
    assert all(p.grad is not None for p in model.segmenter.mask_decoder.parameters())


def test_one_point_is_answered_thrice_and_the_best_answer_learns(micro_sam: Sam, root: Path) -> None:
    model = PromptedSegmenter(
        promptable_from(micro_sam, StrategyConfig(head="sam"), 0), PromptConfig(corrections=0)
    )
    batch = items(root, count=1, objects_per_slice=1)
    batch["kinds"][:] = KINDS.index("point")
    objects = Objects.of_batch(batch, (32, 32))
    embeddings = model.segmenter.embed(batch["image"])
    prompts = Prompts(objects.image, points=batch["points"][0][:, None], labels=torch.ones(1, 1).long())
    logits, iou = model.segmenter.decode(embeddings, prompts, multimask=True)
    by_mask = mask_losses(logits, objects.targets, 20.0)
    found = {name: value.detach() for name, value in model(batch).items()}
    by_mask, iou = by_mask.detach(), iou.detach()
    assert by_mask.shape == (1, 3)
    assert float(found["mask_loss"]) == pytest.approx(float(by_mask.min()), rel=1e-5)
    error = (iou - true_iou(logits, objects.targets)).square().mean()
    assert float(found["iou_loss"]) == pytest.approx(float(error), rel=1e-5)


def test_corrections_go_into_the_error_and_carry_the_answer(root: Path) -> None:
    objects = Objects.of_batch(items(root, count=1), (32, 32))
    answer = torch.where(objects.targets, 3.0, -3.0)
    prompts = objects.first_prompts("box")
    right = objects.corrected(prompts, answer, 0, PromptConfig())
    assert right.labels is not None
    assert right.labels.tolist() == [[-1], [-1]]
    wrong = objects.corrected(prompts, -answer, 0, PromptConfig(clicks="interior"))
    assert wrong.points is not None
    assert wrong.labels is not None
    for target, (point,), (label,) in zip(objects.targets, wrong.points, wrong.labels, strict=True):
        x, y = ((point + 0.5) * objects.scale - 0.5).tolist()
        assert bool(target[int(y), int(x)]) == bool(label)
    assert wrong.masks is not None
    assert torch.equal(wrong.masks[:, 0], -answer)
    rough = objects.first_prompts("mask").masks
    assert rough is not None
    overlap = (rough[:, 0] > 0) & objects.targets
    assert (overlap.sum((1, 2)) > 0.5 * objects.targets.sum((1, 2))).all()


@pytest.mark.parametrize("method", ["vanilla", "lora"])
def test_heads_train_with_the_iou_head_and_the_prompt_encoder_does_not(micro_sam: Sam, method) -> None:
    model = promptable_from(micro_sam, StrategyConfig(method=method, head="sam"), 0)
    trained = trained_tensors(model)
    assert any("iou_prediction_head.layers.2.weight" in name for name in trained)
    assert all(any(f"output_hypernetworks_mlps.{head}." in name for name in trained) for head in range(4))
    assert not any("prompt_encoder" in name for name in trained)


@pytest.mark.parametrize("method", ["lora", "vanilla"])
def test_a_promptable_model_learns_and_its_bundle_answers_alike(root: Path, tmp_path: Path, method) -> None:
    config = settings(root, strategy={"method": method})
    assert config.strategy.head == "sam"
    context = cpu()
    state = finetune(config, context)
    losses = [value for _, name, value in state["progress"]["history"] if name == "train/mask_loss"]
    assert losses[-1] < losses[0]
    history = {name for _, name, _ in state["progress"]["history"]}
    assert {"train/iou_loss", "val/dice", "val/dice_box", "val/dice_clicks_2", "val/dice_core"} <= history
    assert sorted(context.pictures) == [
        *(f"prompts/clicks_{step:06d}.png" for step in (0, 30)),
        *(f"prompts/step_{step:06d}.png" for step in (0, 30)),
    ]
    assert all(picture.ndim == 3 and picture.std() > 0 for picture in context.pictures.values())

    weights = {name.removeprefix("segmenter."): value for name, value in state["weights"].items()}
    store = SliceStore(root / "few")
    write_bundle(tmp_path / "bundle", config, store, weights)
    assert read_bundle(tmp_path / "bundle").mode == "promptable"
    result = evaluate(
        EvaluateConfig(
            out=tmp_path / "val", bundle=tmp_path / "bundle", store=root / "few", split="val", clicks=2
        )
    )
    recorded = {name: value for _, name, value in state["progress"]["history"]}
    for name in ("dice", "dice_box", "dice_clicks_1", "dice_clicks_2", "dice_core"):
        assert result.metrics("val")[f"val/{name}"] == pytest.approx(recorded[f"val/{name}"], abs=1e-6)
    rows = pd.read_parquet(tmp_path / "val" / "cases.parquet")
    assert len(rows) == 1 * 2 * 3
    assert (rows["hd95_mm"].notna() == (rows["clicks"] == 2)).all()  # shapes: after the last click
    assert (tmp_path / "val" / "clicks.png").stat().st_size > 1000

    other = evaluate(
        EvaluateConfig(
            out=tmp_path / "all", bundle=tmp_path / "bundle", store=root / "many", split="val", clicks=1
        )
    )
    assert "val/dice_clicks_2" not in other.metrics("val")
    merged_is_plain_sam(tmp_path / "bundle", config)


def merged_is_plain_sam(bundle: Path, config: FinetuneConfig) -> None:
    """What the next run starts from answers as the bundle does."""
    tuned = load_segmenter(bundle)
    images = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    prompts = Prompts(torch.tensor([0, 1]), boxes=torch.tensor([[3.0, 4, 20, 21], [1, 1, 9, 30]]))
    with torch.no_grad():
        wanted = tuned(images, prompts, multimask=True)
        sam = build_micro().eval()
        before = PromptableSam(sam)(images, prompts, multimask=True)[0]
        load_weights(sam, merged_weights(tuned, config.strategy), "merged")
        found = PromptableSam(sam)(images, prompts, multimask=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, found[0], atol=1e-2)


def test_several_stores_are_learnt_from_together(root: Path) -> None:
    """In bf16, as on a GPU."""
    data = {"store": root / "few", "more_stores": [root / "many"]}
    optim = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "validate_every": 2, "precision": "bf16"}
    config = settings(root, data=data, optim=optim)
    assert len(learnt_slices(config)) == 4 * (2 + 4)  # two of the six slices of a case are empty
    recorded = {name: value for _, name, value in finetune(config, cpu())["progress"]["history"]}
    assert np.isfinite(recorded["val/dice"])
    with pytest.raises(ConfigError, match="needs mode=promptable"):
        settings(root, data=data, mode="automatic")
    with pytest.raises(ConfigError, match=r"set strategy\.head=sam"):
        settings(root, strategy={"head": "classes"})


def test_a_shared_model_of_another_size(root: Path) -> None:
    """TinyViT is pointed at too."""
    model = {"variant": "vit_t", "image_size": 64}
    optim = {"steps": 1, "batch_size": 1, "warmup_steps": 1, "validate_every": 1, "log_every": 1}
    prompts = {"validation_clicks": 1, "objects_per_slice": 1}
    config = settings(root, model=model, optim=optim, prompts=prompts, strategy={"scope": "decoder"})
    assert isinstance(config.model, ModelConfig)
    state = finetune(config, cpu())
    assert all("image_encoder" not in name for name in state["weights"])
