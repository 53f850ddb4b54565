"""A slice into SAM's square input and predictions back onto the slice: longest side first, then padding."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
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


def unfit_square(
    logits: Float[Tensor, "B C h w"], height: int, width: int, size: int
) -> Float[Tensor, "B C height width"]:
    """Logits over a fitted square of `size` pixels, back on the `height` x `width` pixels of the slice."""
    full = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
    rows, columns = fitted_shape(height, width, size)
    return F.interpolate(full[:, :, :rows, :columns], (height, width), mode="bilinear", align_corners=False)


def downsample_labels(labels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Label ids [B, H, W] at the resolution of low-res logits: the id at each cell's centre."""
    return F.interpolate(labels[:, None].float(), shape, mode="nearest-exact")[:, 0].to(torch.int64)
