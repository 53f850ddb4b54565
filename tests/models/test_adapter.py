"""Bottleneck adapters: what they compute, and where they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import nn

from samssl.models.adapter import AdaptedMlp, AdaptedOutput, AdapterConfig, Bottleneck, insert_adapters
from samssl.models.encoder import encode_images


def trained_bottleneck() -> Bottleneck:
    bottleneck = Bottleneck(2, 1)
    with torch.no_grad():
        bottleneck.down.weight.copy_(torch.tensor([[1.0, -1.0]]))
        bottleneck.down.bias.copy_(torch.tensor([0.5]))
        bottleneck.up.weight.copy_(torch.tensor([[2.0], [0.0]]))
        bottleneck.up.bias.copy_(torch.tensor([0.0, 1.0]))
    return bottleneck


def test_a_bottleneck_follows_the_attention_and_lies_beside_the_mlp() -> None:
    base = nn.Linear(2, 2, bias=False)
    nn.init.eye_(base.weight)
    base.weight.data *= 3
    tokens = torch.tensor([[1.0, 0.5]])
    after = AdaptedOutput(base, trained_bottleneck())(tokens)
    beside = AdaptedMlp(base, trained_bottleneck())(tokens)
    gelu = F.gelu(torch.tensor([3.0 - 1.5 + 0.5, 1.0 - 0.5 + 0.5]))
    assert torch.allclose(after, torch.tensor([[3.0 + 2 * gelu[0], 1.5 + 1.0]]))
    assert torch.allclose(beside, torch.tensor([[3.0 + 2 * gelu[1], 1.5 + 1.0]]))


def test_bottlenecks_are_a_quarter_as_wide_as_tokens_and_where_they_are_asked_for(micro_sam: Sam) -> None:
    insert_adapters(micro_sam, AdapterConfig(blocks=(1, 3)), in_encoder=True)
    found = {name: module for name, module in micro_sam.named_modules() if isinstance(module, Bottleneck)}
    in_blocks = [f"image_encoder.blocks.{block}.{at}" for block in (1, 3) for at in ("attn.proj", "mlp")]
    layers = [f"mask_decoder.transformer.layers.{layer}" for layer in (0, 1)]
    in_layers = [f"{layer}.{at}" for layer in layers for at in ("self_attn.out_proj", "mlp")]
    assert found.keys() == {f"{place}.adapter" for place in [*in_blocks, *in_layers]}
    widths = {(module.down.in_features, module.down.out_features) for module in found.values()}
    assert widths == {(128, 32), (64, 16)}


def test_decoder_scope_leaves_the_encoder_alone(micro_sam: Sam) -> None:
    before = list(micro_sam.image_encoder.state_dict())
    insert_adapters(micro_sam, AdapterConfig(), in_encoder=False)
    assert list(micro_sam.image_encoder.state_dict()) == before


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
def test_our_encoder_with_adapters_is_segment_anythings_with_them(micro_sam: Sam, trained: bool) -> None:
    plain = copy.deepcopy(micro_sam.image_encoder)
    insert_adapters(micro_sam, AdapterConfig(), in_encoder=True)
    encoder, images = micro_sam.image_encoder, torch.randn(2, 3, 64, 64)
    if trained:
        for module in encoder.modules():
            if isinstance(module, Bottleneck):
                nn.init.normal_(module.up.weight, std=0.3)
    assert torch.allclose(encode_images(encoder, images), encoder(images), atol=1e-4)
    assert torch.equal(encoder(images), plain(images)) == (not trained)
