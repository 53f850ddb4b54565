"""The plan beside what the micro model really keeps and computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samssl.cli import main
from samssl.data.inputs import InputConfig
from samssl.methods.mae import MaeConfig
from samssl.models.recompute import choose_block_mode
from samssl.models.sam import ModelConfig
from samssl.train.costs import LiveBytes, step_costs
from samssl.train.plan import make_plan, micro_batch, whole_costs
from samssl.train.pretrain import PretrainConfig, PretrainDataConfig, PretrainFitConfig, build_method
from samssl.train.resources import ResourcesConfig

CONFIG = PretrainConfig(
    out=Path("-"),
    data=PretrainDataConfig(store=Path("-")),
    model=ModelConfig(variant="micro", image_size=64),
    mae=MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2),
    optim=PretrainFitConfig(batch_size=16, precision="fp32"),
)


def saved_bytes(config: PretrainConfig) -> int:
    """What autograd itself holds on to after one forward pass of the whole method, weights left out."""
    model = build_method(config)
    choose_block_mode(model, recompute=config.optim.checkpoint_activations, compiled=False)
    size = config.model.image_size
    batch = {
        "image": torch.rand(micro_batch(config), 1, size, size),
        "key": torch.arange(micro_batch(config)),
    }
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *batch.values()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch)["loss"]
    assert loss.requires_grad
    return sum(storage.nbytes() for place, storage in kept.items() if place not in known)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_planned_activations_are_those_that_autograd_keeps(recompute: bool, accumulate: int) -> None:
    optim = replace(CONFIG.optim, checkpoint_activations=recompute, accumulate=accumulate)
    config = replace(CONFIG, optim=optim)
    model = build_method(config)
    choose_block_mode(model, recompute=recompute, compiled=False)
    assert whole_costs(model, config, bf16=False).kept == pytest.approx(saved_bytes(config), rel=0.1)


def test_planned_operations_are_those_of_the_whole_model() -> None:
    model = build_method(CONFIG)
    with FlopCounterMode(display=False) as counter:
        model({"image": torch.rand(16, 1, 64, 64), "key": torch.arange(16)})["loss"].backward()
    counted = counter.get_total_flops()
    assert whole_costs(model, CONFIG, bf16=False).flops == pytest.approx(counted, rel=0.2)


def test_the_plan_adds_up_and_says_whether_it_fits() -> None:
    plan = make_plan(CONFIG, gib=24, tflops=100)
    trained = sum(p.numel() for p in build_method(CONFIG).parameters() if p.requires_grad)
    assert plan.parts["optimizer"] == 2 * plan.parts["gradients"] == 8 * trained
    assert plan.peak < sum(plan.parts.values())  # gradients come as activations go
    assert plan.fits
    assert not make_plan(CONFIG, gib=0.5).fits
    assert plan.seconds == pytest.approx(plan.flops / 100e12 / 0.35)
    sharded = replace(CONFIG, resources=ResourcesConfig(workers=2, strategy="fsdp"))
    assert make_plan(sharded, gib=24).parts["optimizer"] == plan.parts["optimizer"] / 2


def test_the_command_says_so_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--gib", "0.1", "model.variant=micro", "model.image_size=32", "optim.batch_size=4"])
    assert "IT DOES NOT FIT" in capsys.readouterr().out


def test_live_bytes_are_counted_until_a_tensor_is_gone() -> None:
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        one = torch.zeros(1000)
        view = one[:10]
        del one
        assert live.now == 4000
        del view
        assert live.now == 0
        known.add_(1)
        assert live.peak == 4000


def test_operations_of_fused_attention_are_counted() -> None:
    class Attention(torch.nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            image = batch["image"]
            return {"loss": torch.nn.functional.scaled_dot_product_attention(image, image, image).sum()}

    images = torch.rand(1, 2, 512, 32, requires_grad=True)
    products = 2 * (1 * 2 * 512 * 512 * 32)  # of one of two products forwards, five backwards
    counted = step_costs(Attention(), {"image": images}, bf16=False, repeats=1).flops
    assert counted == 7 * products


def test_inputs_of_three_channels_are_planned_for() -> None:
    data = replace(CONFIG.data, input=InputConfig(channels="neighbours"))
    config = replace(CONFIG, data=data, optim=replace(CONFIG.optim, batch_size=1))
    grey = replace(CONFIG, optim=config.optim)
    costs = [whole_costs(build_method(each), each, bf16=False) for each in (grey, config)]
    assert costs[1].flops > costs[0].flops  # the head predicts three times as many values
