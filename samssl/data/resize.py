"""A slice into SAM's square input and predictions back onto the slice: longest side first, then padding."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def fitted_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Rows and columns of a `height` x `width` slice once its longest side is `size` pixels."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_square(
    images: Float[Tensor, "B C H W"], size: int, mode: str = "bilinear"
) -> Float[Tensor, "B C size size"]:
    """Resize so that the longest side is `size` pixels, then pad with zeros below and to the right.

    `mode` is `bilinear` (antialiased) for intensities, `nearest-exact` for label ids.
    """
    height, width = fitted_shape(images.shape[2], images.shape[3], size)
    resized = F.interpolate(images, (height, width), mode=mode, antialias=mode == "bilinear")
    return F.pad(resized, (0, size - width, 0, size - height))


def fit_labels(labels: Int[Tensor, "B H W"], size: int, keep_small: bool = False) -> Int[Tensor, "B S S"]:
    """Class numbers on the fitted square of `size` pixels, by `downsample_labels`."""
    height, width = fitted_shape(labels.shape[1], labels.shape[2], size)
    resized = downsample_labels(labels, (height, width), keep_small)
    return F.pad(resized, (0, size - width, 0, size - height))


def unfit_square(
    logits: Float[Tensor, "B C h w"], height: int, width: int, size: int
) -> Float[Tensor, "B C height width"]:
    """Logits over a fitted square of `size` pixels, back on the `height` x `width` pixels of the slice."""
    full = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
    rows, columns = fitted_shape(height, width, size)
    return F.interpolate(full[:, :, :rows, :columns], (height, width), mode="bilinear", align_corners=False)


def downsample_labels(labels: Tensor, shape: tuple[int, int], keep_small: bool = False) -> Tensor:
    """Class numbers [B, H, W], or masks of regions [B, K, H, W], in cells of another size.

    A cell has what lies at its centre. With `keep_small`, objects that no centre meets are put back: a
    class that lies in a cell, but is the centre of neither this one nor one beside it, wins the cell.
    """
    if labels.ndim == 4:
        cells = F.interpolate(labels.float(), shape, mode="nearest-exact").to(torch.bool)
        return cells | (_lost_share(labels.float(), cells) > 0) if keep_small else cells
    cells = F.interpolate(labels[:, None].float(), shape, mode="nearest-exact")[:, 0].to(torch.int64)
    return _with_lost_classes(cells, labels) if keep_small else cells


def _with_lost_classes(cells: Int[Tensor, "B h w"], labels: Int[Tensor, "B H W"]) -> Int[Tensor, "B h w"]:
    """`cells`, each with the lost class that fills most of it, where one is lost."""
    kept, most = cells.clone(), torch.zeros(cells.shape, device=cells.device)
    for number in labels.unique().tolist():
        if number > 0:  # neither background nor IGNORED
            share = _lost_share((labels == number)[:, None].float(), (cells == number)[:, None])[:, 0]
            kept[share > most] = number
            most = torch.maximum(most, share)
    return kept


def _lost_share(masks: Float[Tensor, "B K H W"], cells: Bool[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
    """How much of each cell a mask fills that is found neither in this cell nor in one beside it, else 0."""
    share = F.adaptive_avg_pool2d(masks, (cells.shape[2], cells.shape[3]))
    found = F.max_pool2d(cells.float(), kernel_size=3, stride=1, padding=1) > 0
    return share * ~found
