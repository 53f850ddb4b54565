"""SimMIM over both families of encoders."""

from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samssl.config import UserError
from samssl.masking import MaskingConfig
from samssl.methods.simmim import SimMim
from samssl.methods.targets import TargetConfig
from samssl.models.tinyvit import TinyViT
from samssl.train.context import LocalContext, State
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig

BATCH = {"image": torch.rand(3, 1, 64, 64), "key": torch.tensor([3, 4, 5])}
PLAIN = TargetConfig(norm_pix_loss=False, flat_std=0.0)
FAMILIES = pytest.mark.parametrize("name", ["micro_sam", "micro_mobile_sam"])


@pytest.fixture
def method(name: str, request: pytest.FixtureRequest) -> SimMim:
    sam: Sam = request.getfixturevalue(name)
    return SimMim(sam.image_encoder, image_size=64, targets=PLAIN).eval()


@FAMILIES
@torch.no_grad()
def test_what_is_hidden_is_not_seen(method: SimMim) -> None:
    shown = method.reconstruct(BATCH)
    assert shown.hidden.float().mean() == 0.75
    assert torch.equal(shown.predicted[~shown.hidden], BATCH["image"][~shown.hidden])
    noise = BATCH["image"].where(~shown.hidden, torch.rand_like(BATCH["image"]))
    again = method.reconstruct({**BATCH, "image": noise})
    assert torch.equal(again.predicted, shown.predicted)
    moved = BATCH["image"].where(shown.hidden, torch.rand_like(BATCH["image"]))
    assert not torch.allclose(
        method.reconstruct({**BATCH, "image": moved}).predicted[shown.hidden], shown.predicted[shown.hidden]
    )


@FAMILIES
@torch.no_grad()
def test_the_loss_is_the_l1_distance_over_hidden_pixels(method: SimMim) -> None:
    shown = method.reconstruct(BATCH)
    wanted = (shown.predicted - BATCH["image"])[shown.hidden].abs().mean()
    assert torch.allclose(method(BATCH)["loss"], wanted, rtol=1e-5)


@FAMILIES
def test_everything_that_trains_has_a_gradient_the_same_every_time(method: SimMim) -> None:
    gradients = []
    for _ in range(3):
        method.train().zero_grad()
        method(BATCH)["loss"].backward()
        trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
        assert not [name for name, parameter in trained.items() if parameter.grad is None]
        gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
        assert torch.equal(gradients[2][name], gradient), name


@FAMILIES
def test_three_channels_and_bf16(method: SimMim) -> None:
    coloured = SimMim(method.image_encoder, image_size=64, channels=3)
    batch = {**BATCH, "image": BATCH["image"].expand(-1, 3, -1, -1)}
    with torch.autocast("cpu", torch.bfloat16):
        loss = coloured(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert coloured.reconstruct(batch).predicted.shape == (3, 3, 64, 64)


def test_a_ratio_that_hides_nothing_or_everything_is_refused(micro_mobile_sam: Sam) -> None:
    with pytest.raises(UserError, match=r"masking\.ratio 0\.01 hides none or all of an image's 16 tokens"):
        SimMim(micro_mobile_sam.image_encoder, image_size=64, masking=MaskingConfig(ratio=0.01))


class Slices:
    """Noise on a gradient; every item follows from its key."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(draw[1])
        image = torch.linspace(0, 0.7, 64) + 0.3 * torch.rand(1, 64, 64, generator=generator)
        return {"image": image, "key": torch.tensor(draw[1])}


class Interrupted(Exception):
    pass


def run(context: LocalContext, stop_at: int | None = None) -> State:
    context.device = torch.device("cpu")
    torch.manual_seed(0)
    encoder = TinyViT((8, 16, 24, 32), (1, 1, 1, 1), (1, 2, 3, 4), (3, 3, 4, 3), out_channels=8)

    def validate(step: int) -> Validation:
        if step == stop_at:
            raise Interrupted
        return Validation(0.0, {})

    config = FitConfig(steps=6, batch_size=4, warmup_steps=1, validate_every=2, log_every=1)
    return fit(SimMim(encoder, image_size=64, targets=PLAIN), Slices(), validate, config, context)


def test_a_resumed_run_has_the_weights_and_the_statistics_of_the_undisturbed_one(tmp_path: Path) -> None:
    wanted = run(LocalContext())
    with pytest.raises(Interrupted):
        run(LocalContext(tmp_path), stop_at=4)
    found = run(LocalContext(tmp_path))
    assert found["progress"]["history"] == wanted["progress"]["history"]
    assert found["weights"].keys() == wanted["weights"].keys()
    statistics = [name for name in wanted["weights"] if name.endswith("running_var")]
    assert len(statistics) == 2 + 3 * 4 + 3  # stem; MBConv and 3 merges of 3 convolutions; local ones
    for name, value in wanted["weights"].items():
        assert torch.equal(found["weights"][name], value), name
