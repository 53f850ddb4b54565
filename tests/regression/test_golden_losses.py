"""Losses of ten steps of each method, as they were when they were last looked at.

After a change that is meant to move them: `python tests/regression/test_golden_losses.py` writes them anew.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.models.decoder import AutomaticSam
from samssl.models.sam import ModelConfig, build_sam
from samssl.models.strategies import StrategyConfig, apply_strategy
from samssl.train.context import LocalContext
from samssl.train.finetune import SupervisedSegmenter
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig

GOLDEN = Path(__file__).with_name("golden_losses.json")
MICRO = ModelConfig(variant="micro", image_size=32)


class Discs:
    """Bright discs on a dark noisy ground; every item follows from its key."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(draw[1])
        row, column, radius = (
            torch.rand(3, generator=generator) * torch.tensor([16, 16, 6]) + 8 * torch.ones(3)
        ).tolist()
        place = torch.arange(32)
        inside = (place[:, None] - row) ** 2 + (place[None] - column) ** 2 < radius**2
        image = 0.5 * inside + 0.3 * torch.rand(32, 32, generator=generator)
        return {"image": image[None], "labels": inside.long(), "key": torch.tensor(draw[1])}


def mae() -> nn.Module:
    return MaskedAutoencoder(
        build_sam(MICRO).image_encoder,
        MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2),
        image_size=32,
    )


def strategy(method: str) -> nn.Module:
    config = StrategyConfig(method=method)  # pyright: ignore[reportArgumentType]
    return SupervisedSegmenter(apply_strategy(AutomaticSam(build_sam(MICRO), 2), config, 2))


METHODS = {"mae": mae, "lora": lambda: strategy("lora"), "vanilla": lambda: strategy("vanilla")}


def losses(method: str) -> list[float]:
    torch.manual_seed(0)
    context = LocalContext()
    context.device = torch.device("cpu")
    config = FitConfig(
        steps=10, batch_size=8, warmup_steps=2, log_every=1, validate_every=10, precision="fp32"
    )
    state = fit(METHODS[method](), Discs(), lambda step: Validation(0.0, {}), config, context)
    return [value for _, name, value in state["progress"]["history"] if name == "train/loss"]


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_golden_ones(method: str) -> None:
    assert losses(method) == pytest.approx(json.loads(GOLDEN.read_text())[method], rel=2e-3)


def test_golden_losses_fall() -> None:
    for method, values in json.loads(GOLDEN.read_text()).items():
        assert values[-1] < values[0], method


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({method: losses(method) for method in METHODS}, indent=1) + "\n")
