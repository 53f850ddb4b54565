"""What SimMIM's encoder computes, against `segment_anything`'s and TinyViT's own forward passes."""

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samssl.models.backbones import encode_masked, mask_width, token_side


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["micro_sam", "micro_mobile_sam"])
def test_with_nothing_hidden_the_embeddings_are_the_encoders(
    name: str, request: pytest.FixtureRequest
) -> None:
    encoder = request.getfixturevalue(name).image_encoder
    images, side = torch.randn(2, 3, 64, 64), 64 // token_side(encoder)
    hidden = torch.zeros(2, side**2, dtype=torch.bool)
    tokens = encode_masked(encoder, images, hidden, torch.randn(mask_width(encoder)))
    found = encoder.neck(tokens.transpose(1, 2).unflatten(2, (side, side)))
    assert relative_error(found, encoder(images)) < 1e-5


@torch.no_grad()
def test_in_a_vit_the_mask_token_is_written_over_embeddings_before_positions(micro_sam: Sam) -> None:
    encoder, images, token = micro_sam.image_encoder, torch.randn(2, 3, 64, 64), torch.randn(128)
    hidden = torch.rand(2, 256) < 0.6
    tokens = encoder.patch_embed(images)
    tokens[hidden.view(2, 16, 16)] = token
    tokens = tokens + encoder.pos_embed
    for block in encoder.blocks:
        tokens = block(tokens)
    assert relative_error(encode_masked(encoder, images, hidden, token), tokens.flatten(1, 2)) < 1e-5


@torch.no_grad()
def test_in_tinyvit_hidden_patches_are_painted_over(micro_mobile_sam: Sam) -> None:
    encoder, images, colour = micro_mobile_sam.image_encoder, torch.randn(2, 3, 64, 96), torch.randn(3)
    hidden = torch.rand(2, 24) < 0.6
    painted = images.clone()
    for image, patch in hidden.nonzero().tolist():
        row, column = 16 * (patch // 6), 16 * (patch % 6)
        painted[image, :, row : row + 16, column : column + 16] = colour[:, None, None]
    wanted = encoder.encode(painted).flatten(2).transpose(1, 2)  # pyright: ignore[reportCallIssue]
    assert torch.equal(encode_masked(encoder, images, hidden, colour), wanted)
