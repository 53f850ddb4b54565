"""Which tokens of an image an encoder computes: all, or a window-stratified random share.

SAM pads its h x w token grid to whole windows and attends within them; the padding slots take part
as keys. Keeping the same fraction of every window's slots, real and padding alike, leaves every
window with the same number of slots, so windowed attention over visible tokens is one rectangular
batch and no token's neighbourhood is starved.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class VisibleTokens:
    """The visible tokens of B images, N of each, grouped by window; W windows keep K slots each.

    B is 1 where one layout serves every image of a batch. In each window the kept real slots come
    first, then the kept padding slots.
    """

    grid: tuple[int, int]
    """Token rows and columns of the image (h, w)."""
    window: int
    """Window side in tokens."""
    tokens: Int[Tensor, "B N"]
    """Raster index `row * w + column` of each visible token."""
    slots: Int[Tensor, "B W K"]
    """Index `row * window + column` inside its window of each kept slot."""
    real: Int[Tensor, " N"]
    """Where each token lies in the flattened W * K slots; the other slots are padding."""

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


def num_slots(grid: tuple[int, int], window: int) -> int:
    """Slots of the grid padded to whole windows: how many random numbers `stratified` needs."""
    rows, columns = _windows(grid, window)
    return rows * columns * window * window


def stratified(
    noise: Float[Tensor, "B slots"], grid: tuple[int, int], window: int, mask_ratio: float
) -> VisibleTokens:
    """Keep the fraction `1 - mask_ratio` of every window's real and padding slots, those of least noise."""
    counts = _counts(grid, window, mask_ratio)
    is_padding, raster, take, real = (part.to(noise.device) for part in counts)
    noise = noise.reshape(len(noise), *is_padding.shape)
    order = (noise + 2 * is_padding).argsort(dim=-1, stable=True)  # real slots first: noise is below 1
    slots = order.gather(-1, take.expand(len(noise), -1, -1))
    tokens = raster.expand(len(noise), -1, -1).gather(-1, slots).flatten(1)[:, real]
    return VisibleTokens(grid=grid, window=window, tokens=tokens, slots=slots, real=real)


@functools.lru_cache(maxsize=16)
def all_tokens(grid: tuple[int, int], window: int, device: torch.device) -> VisibleTokens:
    """Nothing hidden: one layout (B = 1) for every image."""
    return stratified(torch.zeros(1, num_slots(grid, window), device=device), grid, window, mask_ratio=0.0)


def _windows(grid: tuple[int, int], window: int) -> tuple[int, int]:
    return -(-grid[0] // window), -(-grid[1] // window)


@functools.lru_cache(maxsize=16)
def _counts(grid: tuple[int, int], window: int, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of a layout that no random draw changes.

    Returns `is_padding` [W, window**2]; `raster` [W, window**2], the raster index of each slot;
    `take` [W, K], which places of the slots sorted real-first are kept; `real` [N].
    """
    num_rows, num_columns = _windows(grid, window)
    rows = torch.arange(num_rows * window).view(num_rows, 1, window, 1)
    columns = torch.arange(num_columns * window).view(1, num_columns, 1, window)
    is_padding = ((rows >= grid[0]) | (columns >= grid[1])).reshape(num_rows * num_columns, window**2)
    raster = (rows * grid[1] + columns).reshape(num_rows * num_columns, window**2)

    kept = round(window**2 * (1 - mask_ratio))
    num_real = (~is_padding).sum(-1, keepdim=True)
    kept_real = (num_real * (1 - mask_ratio)).round().long()
    kept_real = torch.maximum(kept_real, kept - (window**2 - num_real)).clamp(max=kept)
    place = torch.arange(kept)
    take = torch.where(place < kept_real, place, num_real + place - kept_real)
    real = (place < kept_real).flatten().nonzero().flatten()
    return is_padding, raster, take, real
