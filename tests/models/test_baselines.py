from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samssl.bundle import load_segmenter, read_bundle, write_bundle
from samssl.config import ConfigError, load_config
from samssl.data.slices import SliceStore
from samssl.evaluate import EvaluateConfig, evaluate
from samssl.models.baselines import (
    BaselineConfig,
    SwinUnetrConfig,
    UNetConfig,
    build_baseline,
    check_baseline,
    unet_levels,
)
from samssl.models.checkpoints import put_weights, weights_digest
from samssl.models.sam import ModelConfig
from samssl.models.strategies import StrategyConfig
from samssl.predict import Predictor
from samssl.train.context import LocalContext
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig, finetune
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig

SMALL = BaselineConfig(
    unet=UNetConfig(features=8), swin_unetr=SwinUnetrConfig(features=12, depths=(1, 1, 1, 1))
)
MODEL = ModelConfig(variant="micro", image_size=64)
NETWORKS = pytest.mark.parametrize("network", ["unet", "swin_unetr"])


@NETWORKS
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_are_at_the_resolution_of_the_input(network, channels: int) -> None:
    segmenter = build_baseline(network, SMALL, MODEL, num_classes=4, seed=0)
    assert segmenter(torch.rand(2, channels, 64, 64)).shape == (2, 4, 64, 64)


@NETWORKS
def test_the_seed_draws_the_weights_and_nothing_else(network) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (
        weights_digest(build_baseline(network, SMALL, MODEL, 3, seed).state_dict()) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_normalisation_counts() -> None:
    unit = ModelConfig(variant="micro", image_size=64, normalisation="unit")
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        outputs = [build_baseline("unet", SMALL, model, 2, seed=0)(images) for model in (MODEL, unit)]
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize(("image_size", "levels"), [(1024, 9), (256, 7), (320, 7), (64, 5), (16, 3), (24, 3)])
def test_the_unet_is_as_deep_as_the_image_allows(image_size: int, levels: int) -> None:
    assert unet_levels(image_size) == levels


@pytest.mark.parametrize(("network", "image_size"), [("unet", 8), ("swin_unetr", 32), ("swin_unetr", 80)])
def test_images_that_do_not_fit_are_refused(network, image_size: int) -> None:
    with pytest.raises(ValueError, match=rf"model\.image_size.*{image_size}|{image_size} twice"):
        check_baseline(network, image_size)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model.checkpoint": "sam"}, r"set model\.checkpoint=null"),
        ({"data.embeddings.folder": "kept"}, r"set data\.embeddings\.folder=null"),
        ({"model.image_size": "48", "strategy.network": "swin_unetr"}, "multiple of 32"),
        ({"strategy.baseline.swin_unetr.features": "20"}, "multiple of 12"),
    ],
)
def test_settings_that_a_baseline_cannot_use_are_refused(fields: dict[str, str], says: str) -> None:
    given = {"out": "x", "data.store": "y", "strategy.network": "unet", "model.variant": "micro", **fields}
    with pytest.raises(ConfigError, match=says):
        load_config(FinetuneConfig, None, given)


def on_cpu() -> LocalContext:
    context = LocalContext()
    context.device = torch.device("cpu")
    return context


@NETWORKS
def test_a_bundle_predicts_what_was_trained(
    network, tmp_path: Path, prepare_boxes: Callable[..., SliceStore]
) -> None:
    store = prepare_boxes(tmp_path, train=2, val=1, test=1)
    config = FinetuneConfig(
        out=tmp_path / "run",
        data=FinetuneDataConfig(store=tmp_path / "store", shots=1),
        model=MODEL,
        strategy=StrategyConfig(network=network, baseline=SMALL),
        optim=FinetuneFitConfig(steps=12, batch_size=4, warmup_steps=1, validate_every=12, lr=3e-3),
    )
    state = finetune(config, on_cpu())
    losses = [value for _, name, value in state["progress"]["history"] if name == "train/loss"]
    assert np.isfinite(losses).all()
    tuned = {name.removeprefix("segmenter."): value for name, value in state["weights"].items()}
    write_bundle(tmp_path / "bundle", config, store, tuned)
    assert read_bundle(tmp_path / "bundle").strategy == config.strategy

    trained = build_baseline(network, SMALL, MODEL, len(store.labels), seed=config.optim.seed)
    put_weights(trained, tuned)
    (case,) = store.cases("test")
    own, loaded = (
        Predictor(segmenter, store, 64, torch.device("cpu")).segment_case(case)
        for segmenter in (trained, load_segmenter(tmp_path / "bundle"))
    )
    np.testing.assert_array_equal(own, loaded)
    assert (own > 0).any()
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        scores = evaluate(
            EvaluateConfig(out=out, bundle=tmp_path / "bundle", store=tmp_path / "store", precision=precision)  # pyright: ignore[reportArgumentType]
        )
        assert len(scores.table) == len(store.labels) - 1


def test_a_bundle_of_merged_classes_loads(tmp_path: Path, prepare_boxes: Callable[..., SliceStore]) -> None:
    store = prepare_boxes(tmp_path, train=2, val=1, test=1)
    config = FinetuneConfig(
        out=tmp_path / "run",
        data=FinetuneDataConfig(store=tmp_path / "store", classes={"box": ("shell", "core")}),
        model=MODEL,
        strategy=StrategyConfig(network="unet", baseline=SMALL),
        optim=FinetuneFitConfig(steps=2, batch_size=2, warmup_steps=1, validate_every=2),
    )
    weights = finetune(config, on_cpu())["weights"]
    tuned = {name.removeprefix("segmenter."): value for name, value in weights.items()}
    write_bundle(tmp_path / "bundle", config, store, tuned)
    with torch.no_grad():
        assert load_segmenter(tmp_path / "bundle")(torch.rand(1, 1, 64, 64)).shape[1] == 2


def test_a_small_unet_learns() -> None:
    """Bright discs on a noisy ground, as in the golden losses: the loss halves in forty steps."""
    from samssl.train.finetune import SupervisedSegmenter

    class Discs:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, draw: tuple[int, int]) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(draw[1])
            place = torch.arange(64)
            row, column = torch.randint(16, 48, (2,), generator=generator).tolist()
            inside = (place[:, None] - row) ** 2 + (place[None] - column) ** 2 < 100
            image = 0.5 * inside + 0.3 * torch.rand(64, 64, generator=generator)
            return {"image": image[None], "labels": inside.long()}

    model = SupervisedSegmenter(build_baseline("unet", SMALL, MODEL, 2, seed=0))
    settings = FitConfig(steps=40, batch_size=4, warmup_steps=2, log_every=1, validate_every=40, lr=3e-3)
    state = fit(model, Discs(), lambda step: Validation(0.0, {}), settings, on_cpu())
    losses = [value for _, name, value in state["progress"]["history"] if name == "train/loss"]
    assert losses[-1] < losses[0] / 2
