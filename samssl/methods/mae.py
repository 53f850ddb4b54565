"""Masked autoencoding of SAM's image encoder (MAE, arXiv:2111.06377) on visible tokens only.

The encoder computes a share of the tokens (`samssl.masking`). By default a small decoder lets queries at
masked patches attend to the visible tokens and predicts a subset of them (CrossMAE, arXiv:2401.14391); the
official decoder, which computes every token of the image, is there for comparison.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samssl.config import Fraction, PositiveInt, UserError, config
from samssl.masking import MaskingConfig, VisibleTokens, draw_visible, keyed_noise
from samssl.methods.decoders import CrossAttentionDecoder
from samssl.methods.targets import (
    Reconstruction,
    TargetConfig,
    fill,
    patch_targets,
    take,
    weighted_mean,
)
from samssl.models.encoder import encode_visible, patch_side, token_grid, window_size
from samssl.models.sam import normalise


@config
class MaeConfig:
    """The decoder of MAE and how much it predicts."""

    predicted_share: Fraction = 0.34
    """Share of the hidden patches that is predicted in a step."""
    decoder: Literal["cross_attention", "self_attention"] = "cross_attention"
    """`cross_attention` computes the predicted patches only; `self_attention` is the official decoder over
    all tokens (there 8 blocks of 512 with 16 heads)."""
    decoder_depth: PositiveInt = 4
    """Blocks of the decoder."""
    decoder_dim: PositiveInt = 256
    """Width of the decoder; a multiple of `decoder_heads` and of 4."""
    decoder_heads: PositiveInt = 8
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                f"decoder_dim {self.decoder_dim} is not a multiple of decoder_heads and of 4; choose one"
            )


class MaskedAutoencoder(nn.Module):
    """SAM's `image_encoder` with a decoder that is thrown away after pretraining."""

    def __init__(
        self,
        image_encoder: ImageEncoderViT,
        mae: MaeConfig,
        *,
        image_size: int,
        channels: int = 1,
        masking: MaskingConfig = MaskingConfig(),
        targets: TargetConfig = TargetConfig(),
    ) -> None:
        """For square images of `image_size` pixels with 1 or 3 `channels`.

        Raises:
            UserError: the mask ratio hides none or all of a window's tokens.
        """
        super().__init__()
        self.image_encoder = image_encoder
        self.image_encoder.neck.requires_grad_(False)  # it needs the whole grid, and takes no part
        self.masking, self.targets, self.predicted_share = masking, targets, mae.predicted_share
        slots = window_size(image_encoder) ** 2
        if round(slots * (1 - masking.ratio)) in (0, slots):
            raise UserError(
                f"masking.ratio {masking.ratio} hides none or all of a window's {slots} tokens. "
                "Choose one nearer to 0.75."
            )
        width = image_encoder.patch_embed.proj.out_channels
        self.patch = patch_side(image_encoder)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = _build_decoder(mae, width, channels * self.patch**2, (image_size // self.patch) ** 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a batch with `image` [B, C, H, W] in [0, 1] and `key` [B], which seeds each mask."""
        images, keys = batch["image"], batch["key"]
        targets = patch_targets(images, self.patch, self.targets)
        varies = targets.varies(self.targets.flat_std)
        visible = self._draw_visible(images, keys, varies)
        chosen = self._choose_predicted(visible.hidden(), varies, keys)
        predicted = self._predict(images, visible, chosen)
        errors = (predicted - take(targets.values, chosen)).square().mean(-1)
        loss = weighted_mean(errors, varies.gather(1, chosen), self.targets.flat_weight)
        return {"loss": loss, "varied_share": varies.float().mean()}

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor]) -> Reconstruction:
        """Every hidden patch predicted, at its own mean and contrast where targets are normalised."""
        images = batch["image"]
        targets = patch_targets(images, self.patch, self.targets)
        visible = self._draw_visible(images, batch["key"], targets.varies(self.targets.flat_std))
        hidden = visible.hidden().nonzero()[:, 1].view(len(images), -1)
        return fill(images, targets, self._predict(images, visible, hidden), hidden, self.patch)

    def _draw_visible(self, images: Tensor, keys: Tensor, tissue: Bool[Tensor, "B hw"]) -> VisibleTokens:
        grid, window = token_grid(self.image_encoder, images), window_size(self.image_encoder)
        return draw_visible(keys, grid, window, self.masking, tissue)

    def _choose_predicted(
        self, hidden: Bool[Tensor, "B N"], varies: Bool[Tensor, "B N"], keys: Int[Tensor, " B"]
    ) -> Int[Tensor, "B M"]:
        """A random share of each image's hidden patches; flat ones without weight come last."""
        count = max(1, round(self.predicted_share * int(hidden[0].sum())))
        noise = keyed_noise(keys ^ 0x5DEECE66D, hidden.shape[1])
        last = ~varies if self.targets.flat_weight == 0 else torch.zeros_like(varies)
        return (noise + last + 2 * ~hidden).argsort(dim=1)[:, :count]

    def _predict(
        self, images: Tensor, visible: VisibleTokens, chosen: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M CPP"]:
        tokens = encode_visible(self.image_encoder, normalise(images, self.image_encoder), visible)
        return self.decoder(self.norm(tokens), visible.tokens, chosen, visible.grid)


def _build_decoder(mae: MaeConfig, width: int, outputs: int, num_patches: int) -> nn.Module:
    sizes = (width, mae.decoder_dim, mae.decoder_depth, mae.decoder_heads, outputs)
    if mae.decoder == "cross_attention":
        return CrossAttentionDecoder(*sizes)
    from samssl.methods.official_decoder import SelfAttentionDecoder

    return SelfAttentionDecoder(*sizes, num_patches=num_patches)
