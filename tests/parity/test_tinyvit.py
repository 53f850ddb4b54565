"""Our MobileSAM against the published code (the package `mobilesam-mirror`), weights drawn at random."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from segment_anything.modeling import Sam
from torch import Tensor, nn

from samssl.models.checkpoints import load_weights, read_weights, save_weights, weights_digest
from samssl.models.sam import ModelConfig, build_sam
from samssl.models.tinyvit import TinyViT

with warnings.catch_warnings():  # it imports timm by an old name and registers its models a second time
    warnings.simplefilter("ignore")
    import mobile_sam
    from mobile_sam.modeling.tiny_vit_sam import TinyViT as PublishedTinyViT


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def published() -> Any:
    torch.manual_seed(0)
    sam = mobile_sam.sam_model_registry["vit_t"]()
    randomise(sam)
    for name, parameter in sam.named_parameters():
        if "image_encoder.head" in name or "image_encoder.norm_head" in name:
            nn.init.normal_(parameter)  # nothing computes with them, and they come back all the same
    return sam.train().eval()  # it derives attention biases anew when training ends


def published_encoder(size: int) -> PublishedTinyViT:
    torch.manual_seed(0)
    encoder = PublishedTinyViT(
        img_size=size,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        drop_path_rate=0.0,
    )
    randomise(encoder)
    return encoder.train().eval()


def ours(reference: nn.Module) -> Sam:
    sam = build_sam(ModelConfig(variant="vit_t"))
    load_weights(sam, reference.state_dict(), source="the published model")
    return sam


@torch.no_grad()
def test_the_encoder_at_1024_equals_the_published_one() -> None:
    reference = published()
    images = torch.randn(1, 3, 1024, 1024)
    found = ours(reference).image_encoder(images)
    assert relative_error(found, reference.image_encoder(images)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 80, 224])
def test_other_sizes_equal_a_published_encoder_built_for_them(size: int) -> None:
    """Its forward ends in a view as 64 x 64 tokens, so its parts are called one by one."""
    reference = published_encoder(size)
    encoder = TinyViT().eval()
    load_weights(encoder, reference.state_dict(), source="the published encoder")
    images = torch.randn(2, 3, size, size)
    tokens = reference.patch_embed(images)
    for layer in reference.layers:
        tokens = layer(tokens)
    side = size // 16
    wanted = reference.neck(tokens.transpose(1, 2).unflatten(2, (side, side)))
    assert relative_error(encoder(images), wanted) < 1e-5


def test_gradients_and_statistics_of_a_training_step_equal_the_published_ones() -> None:
    """Both in training mode, where batch norms use and update the statistics of the batch."""
    reference = published_encoder(64)
    encoder = TinyViT()
    load_weights(encoder, reference.state_dict(), source="the published encoder")
    images = torch.randn(4, 3, 64, 64)
    tokens = reference.train().patch_embed(images)
    for layer in reference.layers:
        tokens = layer(tokens)
    tokens.square().mean().backward()
    encoder.train().encode(images).square().mean().backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in found.items():
        assert gradient is not None
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-5 * scale), name
    for name, value in encoder.named_buffers():
        if "running" in name:
            assert torch.allclose(value, reference.get_buffer(name), rtol=1e-4, atol=1e-6), name


def test_files_load_strictly_there_and_here(tmp_path: Path) -> None:
    reference = published()
    torch.save(reference.state_dict(), tmp_path / "mobile_sam.pt")
    sam = build_sam(ModelConfig(variant="vit_t", checkpoint=tmp_path / "mobile_sam.pt"))
    assert list(sam.state_dict()) == list(reference.state_dict())
    assert weights_digest(sam.state_dict()) == weights_digest(reference.state_dict())
    save_weights(build_sam(ModelConfig(variant="vit_t", init_seed=1)), tmp_path / "ours.pth")
    back = mobile_sam.sam_model_registry["vit_t"](checkpoint=str(tmp_path / "ours.pth"))
    assert weights_digest(back.state_dict()) == weights_digest(read_weights(tmp_path / "ours.pth"))
