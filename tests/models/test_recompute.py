"""Recomputed and compiled blocks give what plain ones give."""

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.models.recompute import choose_block_mode, encoder_blocks, why_not_compiled

CPU = torch.device("cpu")


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    batch = {"image": torch.rand(2, 1, 64, 64), "key": torch.tensor([3, 4])}
    model(batch)["loss"].backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.fixture
def autoencoder(micro_sam: Sam) -> MaskedAutoencoder:
    return MaskedAutoencoder(
        micro_sam.image_encoder, MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2), image_size=64
    )


def test_recomputed_blocks_give_the_same_gradients_bit_for_bit_and_keep_less(
    autoencoder: MaskedAutoencoder,
) -> None:
    assert len(encoder_blocks(autoencoder)) == 4
    wanted, plain = gradients(autoencoder), saved_bytes(autoencoder)
    choose_block_mode(autoencoder, recompute=True, compiled=False)
    found = gradients(autoencoder)
    assert len(found) == len(wanted) > 50
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert saved_bytes(autoencoder) < plain / 3


def saved_bytes(model: nn.Module) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = {"image": torch.rand(2, 1, 64, 64), "key": torch.tensor([3, 4])}
        loss = model(batch)["loss"]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert loss.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason="no compiler")
def test_compiled_blocks_give_the_same_gradients(autoencoder: MaskedAutoencoder) -> None:
    encoder = autoencoder.image_encoder
    encoder.blocks = encoder.blocks[:1]  # compiling takes seconds a kind of block
    wanted = gradients(autoencoder)
    choose_block_mode(autoencoder, recompute=False, compiled=True)
    torch.testing.assert_close(gradients(autoencoder), wanted, rtol=1e-3, atol=1e-5)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX" in str(why_not_compiled(CPU))
