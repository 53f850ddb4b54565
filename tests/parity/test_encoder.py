"""Our encoder against `segment_anything`'s, weights drawn at random."""

from typing import Literal

import pytest
import torch
from conftest import randomise
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.image_encoder import Block
from torch import Tensor
from torch.nn import functional as F

from samssl.masking import MaskingConfig, VisibleTokens, draw_visible, stratified, window_noise
from samssl.models.encoder import encode_images, encode_visible, patchify, token_grid


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
def test_micro_equals_segment_anything(micro_sam: Sam) -> None:
    images = torch.randn(3, 3, 64, 64)
    assert (
        relative_error(encode_images(micro_sam.image_encoder, images), micro_sam.image_encoder(images)) < 1e-5
    )


@torch.no_grad()
def test_vit_b_at_1024_equals_segment_anything() -> None:
    torch.manual_seed(0)
    encoder = sam_model_registry["vit_b"]().image_encoder.eval()
    randomise(encoder)
    images = torch.randn(1, 3, 1024, 1024)
    assert relative_error(encode_images(encoder, images), encoder(images)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (1280, 16)], ids=["vit_l", "vit_h"])
def test_blocks_as_wide_as_those_of_larger_vits_equal_segment_anything(width: int, heads: int) -> None:
    """One windowed and one global block, over a grid of 18 x 18 that windows of 14 do not fill."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=288,
        embed_dim=width,
        depth=2,
        num_heads=heads,
        norm_layer=lambda size: torch.nn.LayerNorm(size, eps=1e-6),  # pyright: ignore[reportArgumentType]
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1,),
    ).eval()
    randomise(encoder)
    images = torch.randn(1, 3, 288, 288)
    assert relative_error(encode_images(encoder, images), encoder(images)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 48, 96])
def test_other_sizes_equal_an_encoder_built_with_resized_parameters(micro_sam: Sam, size: int) -> None:
    encoder = micro_sam.image_encoder
    resized = ImageEncoderViT(
        img_size=size,
        patch_size=4,
        embed_dim=128,
        depth=4,
        num_heads=4,
        out_chans=64,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),  # pyright: ignore[reportArgumentType]
        use_rel_pos=True,
        window_size=6,
        global_attn_indexes=(1, 3),
    ).eval()
    weights = encoder.state_dict()
    grid = (size // 4, size // 4)
    positions = weights["pos_embed"].permute(0, 3, 1, 2)
    weights["pos_embed"] = F.interpolate(positions, grid, mode="bicubic").permute(0, 2, 3, 1)
    for name in [name for name, value in resized.state_dict().items() if value.shape != weights[name].shape]:
        table = weights[name].T[None]
        weights[name] = F.interpolate(table, size=2 * grid[0] - 1, mode="linear")[0].T
    resized.load_state_dict(weights)
    images = torch.randn(2, 3, size, size)
    assert relative_error(encode_images(encoder, images), resized(images)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("layout", ["stratified", "uniform"])
@pytest.mark.parametrize("mask_ratio", [0.3, 0.75])
def test_visible_tokens_equal_dense_attention_with_dropped_slots_shut_out(
    micro_sam: Sam, mask_ratio: float, layout: Literal["stratified", "uniform"]
) -> None:
    """The dense reference computes every slot and sets the scores of dropped keys to -inf."""
    encoder, images = micro_sam.image_encoder, torch.randn(2, 3, 64, 64)
    masking = MaskingConfig(ratio=mask_ratio, layout=layout)
    visible = draw_visible(torch.tensor([1, 2]), (16, 16), 6, masking)
    wanted = dense_reference(encoder, images, visible)
    assert relative_error(encode_visible(encoder, images, visible), wanted) < 1e-5


def dense_reference(encoder: ImageEncoderViT, images: Tensor, visible: VisibleTokens) -> Tensor:
    tokens = encoder.patch_embed(images) + encoder.pos_embed
    for block in encoder.blocks:
        assert isinstance(block, Block)
        tokens = tokens + masked_attention(block, block.norm1(tokens), visible)
        tokens = tokens + block.mlp(block.norm2(tokens))
    index = visible.tokens[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.flatten(1, 2).gather(1, index)


def masked_attention(block: Block, tokens: Tensor, visible: VisibleTokens) -> Tensor:
    """`Block`'s attention with -inf at the keys that `visible` dropped, slot by slot."""
    from segment_anything.modeling import image_encoder as reference

    batch, height, width, _ = tokens.shape
    if block.window_size:
        windows, padded = reference.window_partition(tokens, block.window_size)
        kept = torch.zeros(batch, visible.slots.shape[1], block.window_size**2, dtype=torch.bool)
        there = True if visible.present is None else visible.present
        kept = kept.scatter(2, visible.slots, there).flatten(0, 1)
    else:
        windows, padded = tokens, (height, width)
        kept = ~visible.hidden()
    attention = block.attn
    side = (windows.shape[1], windows.shape[2])
    qkv = attention.qkv(windows).flatten(1, 2).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)
    scores = (q * attention.scale) @ k.transpose(1, 2)
    scores = reference.add_decomposed_rel_pos(scores, q, attention.rel_pos_h, attention.rel_pos_w, side, side)
    shut = ~kept.repeat_interleave(attention.num_heads, dim=0)[:, None, :]
    out = scores.masked_fill(shut, -torch.inf).softmax(-1) @ v
    out = out.unflatten(0, (-1, attention.num_heads)).transpose(1, 2).flatten(2).unflatten(1, side)
    out = attention.proj(out)
    return (
        reference.window_unpartition(out, block.window_size, padded, (height, width))
        if block.window_size
        else out
    )


def test_gradients_equal_those_of_segment_anything(micro_sam: Sam) -> None:
    encoder, images = micro_sam.image_encoder, torch.randn(2, 3, 64, 64)
    encoder(images).square().mean().backward()
    wanted = {
        name: parameter.grad.clone()
        for name, parameter in encoder.named_parameters()
        if parameter.grad is not None
    }
    encoder.zero_grad()
    encode_images(encoder, images).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6), name


def test_dropping_tokens_drops_the_work(micro_sam: Sam) -> None:
    """With 3 of 4 tokens hidden a quarter of the multiply-adds is left, and the padding slot's."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder, images = micro_sam.image_encoder, torch.randn(1, 3, 64, 64)

    def count(mask_ratio: float) -> int:
        visible = stratified(window_noise(torch.tensor([1]), (16, 16), 6, 1), (16, 16), 6, mask_ratio)
        with FlopCounterMode(display=False) as counter:
            encode_visible(encoder, images, visible)
        return counter.get_total_flops()

    assert count(0.75) < 0.26 * count(0.0)


def test_patchify_is_the_patch_embedding(micro_sam: Sam) -> None:
    encoder, images = micro_sam.image_encoder, torch.randn(2, 3, 64, 64)
    projection = encoder.patch_embed.proj
    tokens = F.linear(patchify(images, 4), projection.weight.flatten(1), projection.bias)
    assert torch.allclose(tokens, encoder.patch_embed(images).flatten(1, 2), atol=1e-5)
    assert token_grid(encoder, images) == (16, 16)
