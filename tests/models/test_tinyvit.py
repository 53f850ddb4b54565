"""MobileSAM's encoder in samssl: what trains, what is kept, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from training_support import train_two_steps

from samssl.models.backbones import embed_images
from samssl.models.checkpoints import CheckpointError, load_weights, put_weights, trained_tensors
from samssl.models.decoder import AutomaticSam
from samssl.models.recompute import choose_block_mode
from samssl.models.sam import ModelConfig, build_micro, build_sam
from samssl.models.strategies import StrategyConfig, apply_strategy
from samssl.models.tinyvit import TinyViT, WindowAttention

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
DECODER = StrategyConfig(scope="decoder")
VANILLA = StrategyConfig(method="vanilla")


def changes(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("strategy", [DECODER, replace(DECODER, method="vanilla"), VANILLA])
def test_what_trains_and_its_statistics_are_what_changes_and_what_is_kept(
    micro_mobile_sam: Sam, strategy: StrategyConfig
) -> None:
    """With a frozen encoder its batch norms stay as they are, in training mode too."""
    model = apply_strategy(AutomaticSam(micro_mobile_sam, 3), strategy, 3)
    other = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_two_steps(model, IMAGES)
    kept = {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}
    assert changes(model, before) == kept.keys()
    in_encoder = strategy.scope == "encoder_decoder"
    assert any("local_conv.bn.running_var" in name for name in kept) == in_encoder
    assert not any("head" in name and "image_encoder" in name for name in kept)
    put_weights(other, kept)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))


def test_new_weights_take_effect_at_once(micro_mobile_sam: Sam) -> None:
    """In evaluation mode timm's own attention keeps the position biases of the first forward pass."""
    encoder, images = micro_mobile_sam.image_encoder, torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(images)
        weights = dict(encoder.state_dict())
        for name in [name for name in weights if "attention_biases" in name]:
            weights[name] = weights[name] + torch.randn_like(weights[name])
        load_weights(encoder, weights, source="test")
        assert not torch.allclose(encoder(images), before)
    assert any(isinstance(module, WindowAttention) for module in encoder.modules())


@pytest.mark.parametrize("size", [(64, 64), (80, 80), (48, 112)])
def test_any_multiple_of_16_gives_one_token_for_16_pixels(
    micro_mobile_sam: Sam, size: tuple[int, int]
) -> None:
    encoder = micro_mobile_sam.image_encoder
    embeddings = embed_images(encoder, torch.randn(1, 3, *size))
    assert embeddings.shape == (1, 64, size[0] // 16, size[1] // 16)
    with pytest.raises(AssertionError, match="not a multiple of 16"):
        embed_images(encoder, torch.randn(1, 3, 72, 64))


def test_bf16_is_close_to_fp32(micro_mobile_sam: Sam) -> None:
    encoder, images = micro_mobile_sam.image_encoder, torch.randn(1, 3, 64, 64)
    wanted = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(images)
    found.float().sum().backward()
    assert ((found - wanted).norm() / wanted.norm()) < 0.05
    assert encoder.get_parameter("layers.1.blocks.0.attn.attention_biases").grad is not None


def test_vit_t_is_drawn_from_its_seed_and_segments() -> None:
    sam = build_sam(ModelConfig(variant="vit_t", image_size=64, init_seed=3))
    same = build_sam(ModelConfig(variant="vit_t", image_size=64, init_seed=3))
    other = build_sam(ModelConfig(variant="vit_t", image_size=64, init_seed=4))
    stem = "image_encoder.patch_embed.seq.0.c.weight"
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in sam.state_dict().items())
    assert not torch.equal(sam.state_dict()[stem], other.state_dict()[stem])
    with torch.no_grad():
        assert AutomaticSam(sam, 2)(IMAGES).shape == (2, 2, 16, 16)
    trained = sum(parameter.numel() for parameter in sam.image_encoder.parameters())
    assert 5.5e6 < trained < 6.5e6  # TinyViT-5M without its classifier, and the neck


def test_weights_of_the_other_family_are_named(micro_mobile_sam: Sam) -> None:
    with pytest.raises(CheckpointError, match=r"model\.variant is vit_t"):
        load_weights(build_micro(), micro_mobile_sam.state_dict(), source="mobile_sam.pt")


def test_unused_weights_of_the_published_file_are_kept_and_never_train() -> None:
    encoder = TinyViT()
    assert encoder.state_dict()["head.weight"].shape == (1000, 320)
    assert not any("head" in name for name, _ in encoder.named_parameters())


def test_recomputed_stages_give_the_same_gradients_and_gather_statistics_once(micro_mobile_sam: Sam) -> None:
    holder = nn.ModuleDict({"image_encoder": micro_mobile_sam.image_encoder})
    found = []
    for recompute in (False, True):
        model = copy.deepcopy(holder).train()
        choose_block_mode(model, recompute=recompute, compiled=False)
        encoder = model["image_encoder"]
        assert isinstance(encoder, TinyViT)
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        encoder.encode(images).square().mean().backward()
        gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        found.append((gradients, dict(encoder.named_buffers())))
    for plain, recomputed in zip(*found, strict=True):
        assert plain.keys() == recomputed.keys()
        assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
