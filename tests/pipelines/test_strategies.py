"""Every strategy trains two steps in one Ray Train worker, and its bundle reloads to equal predictions."""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samssl.bundle import load_segmenter, write_bundle
from samssl.cluster.launch import train
from samssl.cluster.tracking import open_run
from samssl.data.slices import SliceStore
from samssl.models.decoder import AutomaticSam
from samssl.models.sam import ModelConfig, Variant, build_sam
from samssl.models.strategies import PUBLISHED_METHODS, StrategyConfig, build_segmenter, strategy_name
from samssl.train.context import RunContext, State
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig, FinetuneFitConfig, finetune
from samssl.train.resources import ResourcesConfig
from samssl.train.resume import put_trained

pytestmark = pytest.mark.ray
VARIANTS: tuple[Variant, ...] = ("micro", "vit_t")
IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(2))


def strategies() -> Iterator[StrategyConfig]:
    for scope in ("decoder", "encoder_decoder"):
        for method in PUBLISHED_METHODS:
            for profile in ("fixed", "paper"):
                yield StrategyConfig(method=method, scope=scope, profile=profile)
        for method in ("bitfit", "norm"):
            yield StrategyConfig(method=method, scope=scope)


def every_config(config: FinetuneConfig) -> dict[str, FinetuneConfig]:
    """Each strategy on the micro dimensions of each family of encoders, by name."""
    return {
        f"{strategy_name(variant, strategy.scope, strategy.method)}/{strategy.profile}": replace(
            config, model=replace(config.model, variant=variant), strategy=strategy
        )
        for variant in VARIANTS
        for strategy in strategies()
    }


class OneOfMany:
    """A Ray worker's context for one of several runs in it: nothing is logged, and states are handed back."""

    def __init__(self, context: RunContext) -> None:
        self.rank, self.world_size, self.device = context.rank, context.world_size, context.device
        self.prepare_model = context.prepare_model

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, image: np.ndarray) -> None: ...

    def progress(self, step: int, total: int, text: str) -> None: ...

    def save(self, state: State, metrics: dict[str, float]) -> None: ...

    def restore(self) -> State | None: ...


def tune_all(config: FinetuneConfig, context: RunContext, images: Tensor) -> State:
    """Every strategy, one after the other: its tuned tensors, and its logits of `images`."""
    results: State = {}
    for name, each in every_config(config).items():
        state = finetune(each, OneOfMany(context))
        weights = {key.removeprefix("segmenter."): value for key, value in state["weights"].items()}
        tuned: nn.Module = build_segmenter(each.model, each.strategy, 3, each.optim.seed)
        put_trained(tuned, weights)
        with torch.no_grad():
            results[name] = {"weights": weights, "logits": tuned.eval()(images)}
    context.save(results, {})
    return results


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process sums in the same order as a worker of one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def untuned_logits(model: ModelConfig) -> Tensor:
    with torch.no_grad():
        return AutomaticSam(build_sam(model), 3).eval()(IMAGES)


@pytest.mark.usefixtures("one_thread")
def test_every_strategy_trains_and_its_bundle_predicts_the_same(
    tmp_path: Path, prepare_boxes: Callable[..., SliceStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    store = prepare_boxes(tmp_path, "tiny", train=2, val=1, test=1)
    config = FinetuneConfig(
        out=tmp_path / "run",
        data=FinetuneDataConfig(store=tmp_path / "store", shots=1),
        model=ModelConfig(variant="micro", image_size=64),
        optim=FinetuneFitConfig(steps=2, batch_size=2, warmup_steps=1, validate_every=2, lr=0.01),
        resources=ResourcesConfig(cpus_per_worker=1),
    )
    from ray import cloudpickle  # after samssl's launch, which sets the variables that ray reads

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    run = open_run("samssl", "finetune", {"stage": "finetune"})
    task = functools.partial(tune_all, images=IMAGES)
    results = train(task, config, config.resources, run, tmp_path / "ray")
    configs = every_config(config)
    assert len(results) == len(configs) == len(VARIANTS) * 2 * (3 * 2 + 2)
    untuned = {variant: untuned_logits(replace(config.model, variant=variant)) for variant in VARIANTS}
    for name, each in configs.items():
        write_bundle(tmp_path / "bundle", each, store, results[name]["weights"])
        with torch.no_grad():
            logits = load_segmenter(tmp_path / "bundle")(IMAGES)
        assert torch.equal(logits, results[name]["logits"]), name
        assert not torch.equal(logits, untuned[each.model.variant]), name
