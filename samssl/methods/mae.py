"""Masked autoencoding of SAM's image encoder (MAE, arXiv:2111.06377) on visible tokens only.

The encoder computes a window-stratified share of the tokens (`samssl.masking`); a small decoder lets
queries at masked patches attend to the visible tokens and predicts a subset of them (CrossMAE,
arXiv:2401.14391). Targets are normalised per patch; flat patches (air) have no target and no loss.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samssl.config import Fraction, NonNegative, PositiveInt, UserError, config
from samssl.masking import VisibleTokens, num_slots, stratified
from samssl.models.encoder import encode_visible, patch_side, patchify, token_grid, window_size
from samssl.models.sam import normalise

VARIANCE_FLOOR = 1e-6


@config
class MaeConfig:
    """Masking, decoder and targets of MAE."""

    mask_ratio: Fraction = 0.75
    """Share of every window's slots that is hidden from the encoder."""
    predicted_share: Fraction = 0.34
    """Share of the hidden patches that the decoder predicts in a step."""
    norm_pix_loss: bool = True
    """Normalise each target patch by its own mean and standard deviation."""
    flat_std: NonNegative = 0.02
    """Patches whose intensities (0 to 1) have a smaller standard deviation, as air has, get no target."""
    decoder_depth: PositiveInt = 4
    """Cross-attention blocks of the decoder."""
    decoder_dim: PositiveInt = 256
    """Width of the decoder; a multiple of `decoder_heads` and of 4."""
    decoder_heads: PositiveInt = 8
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} hides nothing or everything; choose between 0 and 1"
            )
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(f"decoder_dim {self.decoder_dim} is not a multiple of decoder_heads and of 4")


@dataclass(frozen=True)
class Reconstruction:
    """What `MaskedAutoencoder.reconstruct` shows of B images; intensities in [0, 1], True = hidden."""

    images: Float[Tensor, "B 1 H W"]
    predicted: Float[Tensor, "B 1 H W"]
    hidden: Bool[Tensor, "B 1 H W"]


class MaskedAutoencoder(nn.Module):
    """SAM's `image_encoder` with a decoder that is thrown away after pretraining."""

    def __init__(self, image_encoder: ImageEncoderViT, mae: MaeConfig) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.image_encoder.neck.requires_grad_(False)  # it needs the whole grid, and takes no part
        self.mae = mae
        slots = window_size(image_encoder) ** 2
        if round(slots * (1 - mae.mask_ratio)) in (0, slots):
            raise UserError(f"mask_ratio {mae.mask_ratio} hides none or all of a window's {slots} tokens.")
        width = image_encoder.patch_embed.proj.out_channels
        self.patch = patch_side(image_encoder)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = CrossAttentionDecoder(
            width, mae.decoder_dim, mae.decoder_depth, mae.decoder_heads, self.patch**2
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a batch with `image` [B, 1, H, W] in [0, 1] and `key` [B], which seeds each mask."""
        images = batch["image"]
        visible = self._draw_visible(images, batch["key"])
        targets, varies = self._targets(images)
        chosen = _choose_predicted(visible.hidden(), varies, batch["key"], self.mae.predicted_share)
        predicted = self._predict(images, visible, chosen)
        errors = (predicted - _take(targets, chosen)).square().mean(-1)
        weights = varies.gather(1, chosen).to(errors.dtype)
        loss = (errors * weights).sum() / weights.sum().clamp(min=1)
        return {"loss": loss, "varied_share": varies.float().mean()}

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor]) -> Reconstruction:
        """Every hidden patch predicted, at its own mean and contrast where targets are normalised."""
        images = batch["image"]
        visible = self._draw_visible(images, batch["key"])
        hidden = visible.hidden()
        chosen = hidden.nonzero()[:, 1].view(len(images), -1)
        predicted = self._predict(images, visible, chosen).to(images.dtype)
        patches = patchify(images, self.patch)
        if self.mae.norm_pix_loss:
            original = _take(patches, chosen)
            mean, std = _patch_statistics(original)
            predicted = predicted * std + mean
        filled = patches.scatter(1, chosen[..., None].expand_as(predicted), predicted)
        shown = hidden[..., None].expand(-1, -1, self.patch**2)
        return Reconstruction(images, self._to_image(filled, images), self._to_image(shown, images))

    def _draw_visible(self, images: Tensor, keys: Tensor) -> VisibleTokens:
        grid, window = token_grid(self.image_encoder, images), window_size(self.image_encoder)
        noise = keyed_noise(keys, num_slots(grid, window))
        return stratified(noise, grid, window, self.mae.mask_ratio)

    def _predict(self, images: Tensor, visible: VisibleTokens, chosen: Tensor) -> Tensor:
        tokens = encode_visible(self.image_encoder, normalise(images), visible)
        return self.decoder(self.norm(tokens), visible.tokens, chosen, visible.grid)

    def _targets(self, images: Tensor) -> tuple[Float[Tensor, "B N PP"], Bool[Tensor, "B N"]]:
        patches = patchify(images, self.patch)
        mean, std = _patch_statistics(patches)
        varies = std[..., 0] > self.mae.flat_std
        return ((patches - mean) / std if self.mae.norm_pix_loss else patches), varies

    def _to_image(self, patches: Float[Tensor, "B N PP"] | Bool[Tensor, "B N PP"], like: Tensor) -> Tensor:
        folded = F.fold(
            patches.to(like.dtype).transpose(1, 2), like.shape[-2:], kernel_size=self.patch, stride=self.patch
        )
        return folded.bool() if patches.dtype == torch.bool else folded


class CrossAttentionDecoder(nn.Module):
    """Queries at chosen patches attend to visible tokens, block by block; queries do not see each other."""

    def __init__(self, width: int, dim: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList([CrossAttentionBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        visible: Int[Tensor, "B N"],
        chosen: Int[Tensor, "B M"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B M outputs"]:
        """Predictions for the patches with raster indices `chosen`, from tokens at indices `visible`."""
        positions = sincos_positions(grid, len(self.mask_token)).to(tokens)
        memory = self.embed(tokens) + positions[visible]
        queries = self.mask_token + positions[chosen]
        for block in self.blocks:
            queries = block(queries, memory)
        return self.head(self.norm(queries))


class CrossAttentionBlock(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_queries = nn.LayerNorm(dim, eps=1e-6)
        self.norm_memory = nn.LayerNorm(dim, eps=1e-6)
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, queries: Float[Tensor, "B M D"], memory: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B M D"]:
        """Queries after one look at `memory`."""
        q = self.to_q(self.norm_queries(queries)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.to_kv(self.norm_memory(memory)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = queries + self.proj(attended)
        return queries + self.mlp(self.norm_mlp(queries))


def keyed_noise(keys: Int[Tensor, " B"], count: int) -> Float[Tensor, "B count"]:
    """Uniform numbers in [0, 1) that depend on each sample's key alone, not on batch, rank or device."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(key)) for key in keys.tolist()]
    return torch.stack(rows).to(keys.device)


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "N dim"]:
    """Fixed 2D sine-cosine positions in raster order, half of `dim` for rows and half for columns."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    frequencies = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def _choose_predicted(
    hidden: Bool[Tensor, "B N"], varies: Bool[Tensor, "B N"], keys: Int[Tensor, " B"], share: float
) -> Int[Tensor, "B M"]:
    """A random `share` of each image's hidden patches, flat ones only once the others are used up."""
    count = max(1, round(share * int(hidden[0].sum())))
    noise = keyed_noise(keys ^ 0x5DEECE66D, hidden.shape[1])
    rank = noise + (~varies) + 2 * (~hidden)
    return rank.argsort(dim=1)[:, :count]


def _patch_statistics(
    patches: Float[Tensor, "B N PP"],
) -> tuple[Float[Tensor, "B N 1"], Float[Tensor, "B N 1"]]:
    """Mean and standard deviation of each patch, as the official MAE takes them."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return mean, (variance + VARIANCE_FLOOR).sqrt()


def _take(patches: Float[Tensor, "B N PP"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M PP"]:
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
