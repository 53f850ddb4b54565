"""Which tokens of an image an encoder computes: all of them, or a random share.

SAM pads its h x w token grid to whole windows and attends within them; the padding slots take part
as keys. The `stratified` layout keeps the same fraction of every window's slots, real and padding alike:
every window keeps the same number, windowed attention over visible tokens is one rectangular batch, and
no token's neighbourhood is starved. The `uniform` layout keeps the same fraction of the whole image.

Everything is drawn from noise that depends on each sample's key alone. True = hidden.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from samssl.config import Fraction, PositiveInt, config


@config
class MaskingConfig:
    """What is hidden from the encoder."""

    ratio: Fraction = 0.75
    """Share of the tokens that is hidden."""
    layout: Literal["stratified", "uniform"] = "stratified"
    """`stratified` hides the same share of every attention window (the fast way), `uniform` of the whole
    image; dense methods have no windows and are always uniform."""
    block: PositiveInt = 1
    """Side in tokens of the squares that are hidden or shown together; 1 draws token by token."""
    tissue_share: Fraction = 0.0
    """At least so much of the visible tokens is drawn from tissue (patches that are not flat), where there
    is enough of it; 0 does not look at the image."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio {self.ratio} hides nothing or everything; choose between 0 and 1")


@dataclass(frozen=True)
class VisibleTokens:
    """The visible tokens of B images, N of each, grouped by window; W windows keep K slots each.

    B is 1 where one layout serves every image of a batch.
    """

    grid: tuple[int, int]
    """Token rows and columns of the image (h, w)."""
    window: int
    """Window side in tokens."""
    tokens: Int[Tensor, "B N"]
    """Raster index `row * w + column` of each visible token."""
    slots: Int[Tensor, "B W K"]
    """Index `row * window + column` inside its window of each kept slot."""
    real: Int[Tensor, "_ N"]
    """Where each token lies in the flattened W * K slots; the other slots are padding or absent. One row
    where that is the same in every image."""
    present: Bool[Tensor, "B W K"] | None = None
    """False at slots that only fill up a window which keeps fewer than K; None where all are present."""

    @property
    def rows(self) -> Int[Tensor, "B N"]:
        """Row of each token in the grid."""
        return self.tokens // self.grid[1]

    @property
    def columns(self) -> Int[Tensor, "B N"]:
        """Column of each token in the grid."""
        return self.tokens % self.grid[1]

    def hidden(self) -> Bool[Tensor, "B hw"]:
        """True where a token of the raster grid is hidden."""
        hidden = torch.ones(len(self.tokens), self.grid[0] * self.grid[1], dtype=torch.bool)
        return hidden.to(self.tokens.device).scatter(1, self.tokens, False)


def draw_visible(
    keys: Int[Tensor, " B"],
    grid: tuple[int, int],
    window: int,
    masking: MaskingConfig,
    tissue: Bool[Tensor, "B hw"] | None = None,
) -> VisibleTokens:
    """The visible tokens of each image, for an encoder with attention windows."""
    noise = window_noise(keys, grid, window, masking.block)
    in_windows = None
    if masking.tissue_share > 0 and tissue is not None:
        in_windows = _in_windows(tissue, grid, window)
    draw = stratified if masking.layout == "stratified" else uniform
    return draw(noise, grid, window, masking.ratio, in_windows, masking.tissue_share)


def draw_hidden(
    keys: Int[Tensor, " B"],
    grid: tuple[int, int],
    masking: MaskingConfig,
    tissue: Bool[Tensor, "B hw"] | None = None,
) -> Bool[Tensor, "B hw"]:
    """The hidden tokens of each image in raster order, the same number of each, for a dense encoder."""
    noise = window_noise(keys, grid, max(grid), masking.block).flatten(1)
    noise = noise[:, _raster(grid, max(grid)).flatten() >= 0]  # one window holds the whole raster
    shown = round(grid[0] * grid[1] * (1 - masking.ratio))
    if masking.tissue_share and tissue is not None:
        noise = prefer(noise, tissue, torch.tensor([round(shown * masking.tissue_share)]))
    order = noise.argsort(dim=1)
    return torch.ones_like(noise, dtype=torch.bool).scatter(1, order[:, :shown], False)


def keyed_noise(keys: Int[Tensor, " B"], count: int) -> Float[Tensor, "B count"]:
    """Uniform numbers in [0, 1) that depend on each sample's key alone, not on batch, rank or device."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(key)) for key in keys.tolist()]
    return torch.stack(rows).to(keys.device)


def window_noise(
    keys: Int[Tensor, " B"], grid: tuple[int, int], window: int, block: int
) -> Float[Tensor, "B W slots"]:
    """Noise in [0, 1) for every slot of every window; slots of one `block` are neighbours in its order."""
    rows, columns = _windows(grid, window)
    slots = keyed_noise(keys, rows * columns * window**2).unflatten(1, (rows * columns, window**2))
    if block == 1:
        return slots
    place = [torch.arange(count * window, device=keys.device) // block for count in (rows, columns)]
    across = int(place[1][-1]) + 1
    index = (
        (place[0][:, None] * across + place[1]).unflatten(0, (rows, window)).unflatten(2, (columns, window))
    )
    blocks = keyed_noise(keys ^ 0x2545F4914F6CDD1D, int(index.max()) + 1)
    ranks = blocks.argsort(dim=1).argsort(dim=1)
    shared = ranks[:, index.transpose(1, 2).reshape(rows * columns, window**2)]
    return (shared + slots) / blocks.shape[1]


def stratified(
    noise: Float[Tensor, "B W slots"],
    grid: tuple[int, int],
    window: int,
    mask_ratio: float,
    tissue: Bool[Tensor, "B W slots"] | None = None,
    tissue_share: float = 0.0,
) -> VisibleTokens:
    """Keep the fraction `1 - mask_ratio` of every window's real and padding slots, those of least noise.

    In each window the kept real slots come first, then the kept padding slots.
    """
    counts = _counts(grid, window, mask_ratio)
    is_padding, raster, kept_real, take, real = (part.to(noise.device) for part in counts)
    if tissue is not None:
        noise = prefer(noise, tissue, (tissue_share * kept_real).round())
    order = (noise + 2 * is_padding).argsort(dim=-1, stable=True)  # real slots first: noise is below 1
    slots = order.gather(-1, take.expand(len(noise), -1, -1))
    tokens = raster.expand(len(noise), -1, -1).gather(-1, slots).flatten(1)[:, real]
    return VisibleTokens(grid=grid, window=window, tokens=tokens, slots=slots, real=real[None])


def uniform(
    noise: Float[Tensor, "B W slots"],
    grid: tuple[int, int],
    window: int,
    mask_ratio: float,
    tissue: Bool[Tensor, "B W slots"] | None = None,
    tissue_share: float = 0.0,
) -> VisibleTokens:
    """Keep the fraction `1 - mask_ratio` of the image's real and of its padding slots, those of least noise.

    Windows keep different numbers; each is filled up with absent slots to the largest of them.
    """
    is_padding = _raster(grid, window).to(noise.device) < 0
    kept_real = round(grid[0] * grid[1] * (1 - mask_ratio))
    kept_padding = round(int(is_padding.sum()) * (1 - mask_ratio))
    flat, padding = noise.flatten(1), is_padding.flatten()
    if tissue is not None:
        flat = prefer(flat, tissue.flatten(1), torch.tensor([round(tissue_share * kept_real)]))
    chosen = [
        (flat + 9 * (padding == skipped)).argsort(dim=1)[:, :count]
        for skipped, count in ((True, kept_real), (False, kept_padding))
    ]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(1, torch.cat(chosen, dim=1), True)
    kept = kept.view_as(noise)
    most = int(kept.sum(-1).max())
    slots = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    present = kept.gather(-1, slots)
    raster = _raster(grid, window).to(noise.device).expand_as(noise).gather(-1, slots).flatten(1)
    is_real = present.flatten(1) & (raster >= 0)
    real = is_real.nonzero()[:, 1].view(len(noise), kept_real)
    return VisibleTokens(grid, window, raster.gather(1, real), slots, real, present)


def prefer(
    noise: Float[Tensor, "*B slots"], tissue: Bool[Tensor, "*B slots"], quota: Tensor
) -> Float[Tensor, "*B slots"]:
    """`noise` with the `quota` least noisy slots of tissue moved below all others."""
    rank = (noise + 9 * ~tissue).argsort(dim=-1).argsort(dim=-1)
    return noise - (tissue & (rank < quota.to(noise.device))).to(noise.dtype)


@functools.lru_cache(maxsize=16)
def all_tokens(grid: tuple[int, int], window: int, device: torch.device) -> VisibleTokens:
    """Nothing hidden: one layout (B = 1) for every image."""
    rows, columns = _windows(grid, window)
    noise = torch.zeros(1, rows * columns, window**2, device=device)
    return stratified(noise, grid, window, mask_ratio=0.0)


def _windows(grid: tuple[int, int], window: int) -> tuple[int, int]:
    return -(-grid[0] // window), -(-grid[1] // window)


@functools.lru_cache(maxsize=16)
def _raster(grid: tuple[int, int], window: int) -> Int[Tensor, "W slots"]:
    """Raster index of every window's slots; -1 at padding."""
    num_rows, num_columns = _windows(grid, window)
    rows = torch.arange(num_rows * window).view(num_rows, 1, window, 1)
    columns = torch.arange(num_columns * window).view(1, num_columns, 1, window)
    raster = torch.where((rows >= grid[0]) | (columns >= grid[1]), -1, rows * grid[1] + columns)
    return raster.reshape(num_rows * num_columns, window**2)


def _in_windows(flags: Bool[Tensor, "B hw"], grid: tuple[int, int], window: int) -> Bool[Tensor, "B W slots"]:
    """Flags in raster order at every window's slots; False at padding."""
    raster = _raster(grid, window).to(flags.device)
    return flags[:, raster.clamp(min=0)] & (raster >= 0)


@functools.lru_cache(maxsize=16)
def _counts(grid: tuple[int, int], window: int, mask_ratio: float) -> tuple[Tensor, ...]:
    """The parts of a stratified layout that no random draw changes.

    Returns `is_padding` and `raster` [W, window**2]; `kept_real` [W, 1], how many real slots each window
    keeps; `take` [W, K], which places of the slots sorted real-first are kept; `real` [N].
    """
    raster = _raster(grid, window)
    kept = round(window**2 * (1 - mask_ratio))
    num_real = (raster >= 0).sum(-1, keepdim=True)
    kept_real = (num_real * (1 - mask_ratio)).round().long()
    kept_real = torch.maximum(kept_real, kept - (window**2 - num_real)).clamp(max=kept)
    place = torch.arange(kept)
    take = torch.where(place < kept_real, place, num_real + place - kept_real)
    real = (place < kept_real).flatten().nonzero().flatten()
    return raster < 0, raster, kept_real, take, real
