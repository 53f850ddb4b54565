"""The masked autoencoder against independent code: lightly's patches, the official MAE's loss."""

from dataclasses import replace

import torch
from lightly.models.utils import patchify as lightly_patchify
from segment_anything.modeling import Sam
from torch import Tensor

from samssl.methods.decoders import sincos_positions
from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.methods.targets import TargetConfig
from samssl.models.encoder import patchify

SETTINGS = MaeConfig(decoder_depth=1, decoder_dim=32, decoder_heads=2)


def official_mae_loss(images: Tensor, predicted: Tensor, mask: Tensor, patch: int) -> Tensor:
    """The loss of arXiv:2111.06377 with normalised targets, written from the paper; mask 1 = hidden."""
    batch, _, height, width = images.shape
    rows, columns = height // patch, width // patch
    target = (
        images.reshape(batch, rows, patch, columns, patch)
        .permute(0, 1, 3, 2, 4)
        .reshape(batch, rows * columns, -1)
    )
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def test_patches_lie_in_lightlys_order() -> None:
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(patchify(images, 4), lightly_patchify(images, 4))


@torch.no_grad()
def test_loss_over_all_hidden_patches_is_the_official_loss(micro_sam: Sam) -> None:
    model = MaskedAutoencoder(
        micro_sam.image_encoder,
        replace(SETTINGS, predicted_share=1.0),
        image_size=64,
        targets=TargetConfig(flat_std=0.0),
    )
    batch = {"image": torch.rand(2, 1, 64, 64), "key": torch.tensor([3, 4])}
    visible = model._draw_visible(batch["image"], batch["key"], torch.ones(2, 256, dtype=torch.bool))
    hidden = visible.hidden()
    chosen = hidden.nonzero()[:, 1].view(2, -1)
    predicted = torch.zeros(2, 256, 16)
    predicted.scatter_(
        1, chosen[..., None].expand(-1, -1, 16), model._predict(batch["image"], visible, chosen)
    )
    wanted = official_mae_loss(batch["image"], predicted, hidden.float(), patch=4)
    assert torch.allclose(model(batch)["loss"], wanted, rtol=1e-5)


def test_positions_are_lightlys() -> None:
    """Rows and columns come in another order there; as sets of features per patch they are the same."""
    from lightly.models.utils import get_2d_sine_cosine_positional_embedding

    theirs = torch.as_tensor(get_2d_sine_cosine_positional_embedding(32, 4, cls_token=False)).float()
    assert torch.allclose(sincos_positions((4, 4), 32).sort(1).values, theirs.sort(1).values, atol=1e-5)
