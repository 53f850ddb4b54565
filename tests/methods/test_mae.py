import pytest
import torch
from segment_anything.modeling import Sam

from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.methods.targets import TargetConfig, weighted_mean


def test_gradients_are_the_same_bit_for_bit_every_time(micro_sam: Sam) -> None:
    """With several threads, gradients that are added up in any order differ in their last bits."""
    model = MaskedAutoencoder(
        micro_sam.image_encoder, MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2), image_size=64
    )
    batch = {"image": torch.rand(32, 1, 64, 64), "key": torch.arange(32)}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    gradients = []
    for _ in range(8):
        model.zero_grad()
        model(batch)["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.set_num_threads(threads)
    for repeated in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.equal(repeated[name], gradient), name


@pytest.mark.parametrize(("flat_weight", "wanted"), [(0.0, 1.0), (0.5, 5 / 3), (1.0, 2.0)])
def test_flat_patches_count_as_much_as_they_are_told_to(flat_weight: float, wanted: float) -> None:
    errors, varies = torch.tensor([[1.0, 3.0]]), torch.tensor([[True, False]])
    assert weighted_mean(errors, varies, flat_weight).item() == pytest.approx(wanted)


@pytest.mark.parametrize(("flat_weight", "flat"), [(0.0, 0), (1.0, 32)])
def test_flat_patches_are_predicted_where_they_count(micro_sam: Sam, flat_weight: float, flat: int) -> None:
    """Half of the patches are flat; a third of the hidden ones is predicted."""
    mae = MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2)
    targets = TargetConfig(flat_weight=flat_weight)
    model = MaskedAutoencoder(micro_sam.image_encoder, mae, image_size=64, targets=targets)
    varies = torch.arange(256)[None] < 128
    chosen = model._choose_predicted(torch.ones_like(varies), varies, torch.tensor([1]))
    assert (~varies).gather(1, chosen).sum() == pytest.approx(flat, abs=12 if flat else 0)


@pytest.mark.parametrize("decoder", ["cross_attention", "self_attention"])
def test_each_decoder_learns_three_channels_and_shows_them(micro_sam: Sam, decoder) -> None:
    torch.manual_seed(0)
    mae = MaeConfig(decoder=decoder, decoder_depth=1, decoder_dim=32, decoder_heads=2)
    model = MaskedAutoencoder(micro_sam.image_encoder, mae, image_size=64, channels=3)
    ramps = torch.linspace(0, 1, 64).expand(1, 3, 64, 64) * torch.tensor([0.3, 0.6, 1.0]).view(1, 3, 1, 1)
    batch = {"image": ramps, "key": torch.tensor([1])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    shown = model.reconstruct(batch)
    assert shown.predicted.shape == ramps.shape
    assert torch.equal(shown.predicted[~shown.hidden], ramps[~shown.hidden])
