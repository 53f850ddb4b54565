"""Stage two from the store to scores: classes, regions, sampling, alarms and the few shots."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from samssl.bundle import load_segmenter, read_bundle, write_bundle
from samssl.config import ConfigError, UserError, build_config, load_config
from samssl.data.classes import run_classes
from samssl.data.datasets import AugmentConfig
from samssl.data.sampling import SamplingConfig
from samssl.data.slices import SliceStore
from samssl.evaluate import EvaluateConfig, evaluate
from samssl.losses import LossConfig
from samssl.models.sam import ModelConfig
from samssl.predict import Predictor, score_case
from samssl.train.context import LocalContext, State
from samssl.train.finetune import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneFitConfig,
    finetune,
    training_rows,
)

CPU = torch.device("cpu")
STILL = AugmentConfig(degrees=0.0, translate=0.0, scale=0.0, intensity=0.0, noise=0.0)
MAPS: dict[str, dict[str, Any]] = {
    "every label": {},
    "merged": {"classes": {"box": ("core", "shell")}},
    "selected": {"classes": {"core": ("core",)}},
    "regions": {"classes": {"core": ("core",), "box": ("core", "shell")}, "overlapping": True},
    "one region": {"classes": {"box": ("core", "shell")}, "overlapping": True},
}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> SliceStore:
    """Boxes (core in shell) of six slices, of which the first and the last are empty."""
    return prepare_boxes(tmp_path_factory.mktemp("boxes"), train=4, val=1, test=1)


def config_for(store: SliceStore, out: Path, data: dict[str, Any], **fit: Any) -> FinetuneConfig:
    optim = {"steps": 12, "batch_size": 4, "warmup_steps": 1, "validate_every": 6, "lr": 0.01, "log_every": 1}
    return FinetuneConfig(
        out=out,
        data=FinetuneDataConfig(store=Path(store.root), **data),
        model=ModelConfig(variant="micro", image_size=32),
        optim=FinetuneFitConfig(**(optim | fit)),
    )


def run(config: FinetuneConfig) -> State:
    context = LocalContext()
    context.device = CPU
    return finetune(config, context)


@pytest.mark.parametrize("name", MAPS)
def test_a_run_learns_its_classes_and_its_bundle_is_scored_on_them(
    name: str, store: SliceStore, tmp_path: Path
) -> None:
    config = config_for(store, tmp_path, MAPS[name], steps=30, validate_every=30)
    state = run(config)
    tuned = {key.removeprefix("segmenter."): value for key, value in state["weights"].items()}
    write_bundle(tmp_path / "bundle", config, store, tuned)
    bundle = read_bundle(tmp_path / "bundle")
    classes = run_classes(store.labels, config.data.classes, config.data.overlapping)
    assert bundle.run_classes == classes
    scores = evaluate(EvaluateConfig(out=tmp_path, bundle=tmp_path / "bundle", store=Path(store.root)))
    (case,) = store.cases("test")
    segmenter = load_segmenter(tmp_path / "bundle")
    found = Predictor(segmenter, store, 32, CPU, bundle.input, classes).segment_case(case)
    import zarr

    kept = np.asarray(zarr.open_array(tmp_path / "predictions.zarr" / case, mode="r")[:])
    np.testing.assert_array_equal(kept, found)
    mask = store.mask(case)
    assert mask is not None
    assert found.shape == ((len(classes.names), *mask.shape) if classes.overlapping else mask.shape)
    assert scores.table["label"].tolist() == list(classes.names.values())
    for row, (class_id, members) in zip(scores.table.itertuples(), classes.members.items(), strict=True):
        wanted = np.isin(mask, members)
        predicted = found[class_id - 1] if classes.overlapping else found == class_id
        assert row.reference_voxels == wanted.sum()
        assert row.predicted_voxels == predicted.sum()
        assert row.dice == pytest.approx(2 * (wanted & predicted).sum() / (wanted.sum() + predicted.sum()))
    history = pd.DataFrame(state["progress"]["history"], columns=["step", "metric", "value"])
    loss = history[history["metric"] == "train/loss"]["value"]
    assert loss.iloc[-5:].mean() < loss.iloc[:5].mean()
    for label in classes.names.values():
        assert f"val/dice_{label}" in set(history["metric"])


def test_classes_that_nothing_shows_or_that_have_no_good_name_are_refused(
    store: SliceStore, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"does not have: liver\. It has: shell, core"):
        run(config_for(store, tmp_path, {"classes": {"organ": ("liver",)}}))
    with pytest.raises(ConfigError, match="cannot name a class"):
        build_config(FinetuneDataConfig, {"store": "s", "classes": {"a(b)": ["core"]}}, source="here")
    given = {"out": "o", "data.store": "s", "model.variant": "micro", "model.image_size": 32}
    with pytest.raises(ConfigError, match=r"loss\.resolution 64 is more than the 32 px"):
        load_config(FinetuneConfig, None, {**given, "loss.resolution": 64})


def test_empty_slices_are_learnt_from_validated_and_tested_on(store: SliceStore) -> None:
    """Whole cases: a voxel that is predicted in an empty slice counts against a case."""
    rows = training_rows(store, FinetuneDataConfig(store=Path(store.root), shots=2))
    assert sorted(store.rows.z[rows].tolist()) == sorted([*range(6)] * 2)
    for split in ("val", "test"):
        (case,) = store.cases(split)
        mask = store.mask(case)
        assert mask is not None
        assert not mask[[0, 5]].any()
        perfect, wrong = score_case(store, case, mask), mask.copy()
        assert perfect["dice"].tolist() == [1.0, 1.0]
        wrong[0] = 2
        scores = score_case(store, case, wrong)
        assert scores["dice"].tolist()[0] == 1.0
        assert scores["dice"].tolist()[1] < 0.5
        assert (scores["predicted_voxels"] - perfect["predicted_voxels"]).tolist() == [0, mask[0].size]


def test_slices_are_scored_as_the_cases_they_are_of(store: SliceStore) -> None:
    segmenter = torch.nn.Conv2d(1, 3, 1)
    rows = store.rows.rows(["train"])
    predictor = Predictor(segmenter, store, 16, CPU)
    table = predictor.score_slices(rows[::-1].copy())
    cases = [score_case(store, case, predictor.segment_case(case)) for case in store.cases("train")]
    pd.testing.assert_frame_equal(table, pd.concat(cases, ignore_index=True))
    one = predictor.score_slices(rows[2:3])
    mask = store.mask_slice(store.cases("train")[0], 2)
    assert mask is not None
    assert one["reference_voxels"].tolist() == [(mask == 1).sum(), (mask == 2).sum()]


@pytest.mark.parametrize("unit", ["patients", "slices"])
@pytest.mark.parametrize("seed", range(3))
def test_fewer_shots_are_among_the_more_and_show_the_classes_of_the_run(
    unit: Any, seed: int, store: SliceStore
) -> None:
    def shots(count: int, **given: Any) -> set[int]:
        data = FinetuneDataConfig(
            store=Path(store.root), shots=count, shot_unit=unit, shot_seed=seed, **given
        )
        return set(training_rows(store, data).tolist())

    drawn = [shots(count) for count in (1, 2, 3, 4)]
    assert all(fewer < more for fewer, more in pairwise(drawn))
    if unit == "slices":
        core = shots(8, classes={"core": ("core",)})  # all that there are
        assert set(store.rows.z[sorted(core)].tolist()) == {2, 3}


def test_sampling_changes_which_slices_are_learnt_from_and_the_rest_of_the_run_stays(
    store: SliceStore, tmp_path: Path
) -> None:
    def losses(**sampling: Any) -> list[float]:
        data = {"sampling": SamplingConfig(**sampling), "augment": STILL}
        history = run(config_for(store, tmp_path, data, steps=2))["progress"]["history"]
        return [value for _, metric, value in history if metric == "train/loss"]

    plain = losses()
    assert losses(foreground_share=1.0, balance="class") != plain
    data = {"sampling": SamplingConfig(foreground_share=0.5), "shots": 3, "shot_unit": "slices"}
    config = config_for(store, tmp_path, data)
    with pytest.raises(UserError, match="that do not show the classes"):
        run(config)


def test_average_layer_decay_and_early_stop_reach_fine_tuning(store: SliceStore, tmp_path: Path) -> None:
    fit = {"ema_decay": 0.9, "layer_decay": 0.5, "steps": 40, "validate_every": 2, "patience": 2}
    state = run(config_for(store, tmp_path, {"augment": STILL}, lr=1e-9, **fit))
    progress = state["progress"]
    assert progress["step"] < 40  # so small a rate finds nothing better
    assert state["raw_weights"].keys() == state["weights"].keys() == progress["best_weights"].keys()
    scales = {group["lr_scale"] for group in state["optimizer"]["param_groups"]}
    assert len(scales) > 3
    trained = run(config_for(store, tmp_path, {"augment": STILL}, **fit | {"patience": 0, "steps": 6}))
    best, last = trained["progress"]["best_weights"], trained["weights"]
    assert trained["progress"]["best_step"] <= 6
    assert any(not torch.equal(trained["raw_weights"][name], last[name]) for name in last)
    assert best.keys() == last.keys()


def test_alarms_are_told_in_words_and_kept(
    store: SliceStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = {"lr": 1e-9, "steps": 12, "batch_size": 24, "patience": 0}
    state = run(config_for(store, tmp_path, {"augment": STILL}, **fit))
    metrics = [metric for _, metric, _ in state["progress"]["history"]]
    assert metrics.count("alarm/loss_flat") == 1
    assert metrics.count("train/dice_pooled") == metrics.count("val/dice_pooled") == 2
    assert "ALARM at step 12: the training loss does not fall" in capsys.readouterr().out


def test_small_objects_are_warned_of_or_kept(
    store: SliceStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(store, tmp_path, {"augment": STILL}, steps=1)

    def heard(**loss: Any) -> str:
        run(replace(config, loss=LossConfig(**loss)))
        return capsys.readouterr().out

    assert "vanish at the 4 px" in heard(resolution=4)
    assert "vanish" not in heard(resolution=4, keep_small=True)
    assert "vanish" not in heard()
