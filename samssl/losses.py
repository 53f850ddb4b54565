"""Segmentation losses on low-res logits, built of MONAI's."""

from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from samssl.config import Count, Fraction, NonNegative, config
from samssl.data.resize import downsample_labels

_SURE = 100.0
"""A logit whose softmax and sigmoid are 0 or 1 in float32."""


@config
class LossConfig:
    """What is minimised, and at which resolution."""

    terms: Literal["dice_ce", "dice_focal", "tversky"] = "dice_ce"
    """Dice and cross-entropy 1 : 1, Dice and focal loss 1 : 1, or Tversky's."""
    focal_gamma: NonNegative = 2.0
    """Of the focal loss: how much less a pixel counts that is right already; 0 is cross-entropy."""
    tversky_missed: Fraction = 0.7
    """Of Tversky's loss: weight of missed pixels; those that are too many weigh the rest to 1."""
    boundary_weight: NonNegative = 0.0
    """Weight of a term that grows with the distance between boundaries (MONAI's LogHausdorffDTLoss, after
    arXiv:1904.10030); 0 leaves it out. Its distance transforms run on the CPU."""
    resolution: Count = 0
    """Side in pixels at which the loss is taken, logits upsampled to it; 0: that of the logits."""
    keep_small: bool = False
    """Keep small objects that would vanish where labels are made smaller, for the model and for the loss."""


def segmentation_loss(
    low_res_logits: Float[Tensor, "B outputs h w"],
    targets: Int[Tensor, "B H W"] | Bool[Tensor, "B outputs H W"],
    loss: LossConfig = LossConfig(),
    ignored: Bool[Tensor, "B H W"] | None = None,
) -> Float[Tensor, ""]:
    """The loss of a batch, with Dice and Tversky terms over all its slices together.

    `targets` are the numbers of exclusive classes (softmax; class 0, the background, has no Dice), or masks
    of regions, True inside (sigmoid). They are brought to the resolution of the loss. What is `ignored`
    (True) counts in no term but that of boundaries, for which it is background that was found.
    """
    logits = low_res_logits.float()
    if loss.resolution:
        side = (loss.resolution, loss.resolution)
        logits = F.interpolate(logits, side, mode="bilinear", align_corners=False)
    exclusive = targets.ndim == 3
    labels = downsample_labels(targets, (logits.shape[2], logits.shape[3]), loss.keep_small)
    labels = labels[:, None] if exclusive else labels.float()
    share_counted = 1.0
    if ignored is not None:
        hidden = downsample_labels(ignored[:, None], (logits.shape[2], logits.shape[3]))
        logits, labels = _certain(logits, hidden, exclusive), labels.masked_fill(hidden, 0)
        share_counted = (~hidden).float().mean().clamp(min=1 / hidden.numel())
    total = logits.new_zeros(())
    for weight, part, is_mean in _parts(loss, exclusive):
        of_part = weight * part(logits, labels)
        total = total + (of_part / share_counted if is_mean else of_part)
    return total


def _certain(
    logits: Float[Tensor, "B outputs h w"], hidden: Bool[Tensor, "B 1 h w"], exclusive: bool
) -> Float[Tensor, "B outputs h w"]:
    """Logits with no doubt about background where it is hidden: no term has an error or a gradient there."""
    sure = torch.full_like(logits[:1, :, :1, :1], -_SURE)
    if exclusive:
        sure[:, 0] = _SURE
    return torch.where(hidden, sure, logits)


@cache
def _parts(loss: LossConfig, exclusive: bool) -> list[tuple[float, nn.Module, bool]]:
    """The terms of a loss, each with its weight and whether it is a mean over pixels.

    MONAI is slow to import, and not needed to predict.
    """
    from monai.losses.dice import DiceLoss
    from monai.losses.hausdorff_loss import LogHausdorffDTLoss
    from monai.losses.tversky import TverskyLoss

    of_outputs: dict[str, Any] = {
        "include_background": not exclusive,
        "to_onehot_y": exclusive,
        "softmax": exclusive,
        "sigmoid": not exclusive,
    }
    parts: list[tuple[float, nn.Module, bool]] = [(1.0, DiceLoss(**of_outputs, batch=True), False)]
    if loss.terms == "tversky":
        missed = loss.tversky_missed
        parts = [(1.0, TverskyLoss(**of_outputs, alpha=1 - missed, beta=missed, batch=True), False)]
    elif loss.terms == "dice_focal":
        parts.append((1.0, _Focal(loss.focal_gamma, exclusive), True))
    else:
        parts.append((1.0, _CrossEntropy() if exclusive else nn.BCEWithLogitsLoss(), True))
    if loss.boundary_weight:
        parts.append((loss.boundary_weight, LogHausdorffDTLoss(**of_outputs), True))
    return parts


class _CrossEntropy(nn.Module):
    """Of exclusive classes, with their numbers as a channel, as MONAI's losses take them."""

    def forward(self, logits: Float[Tensor, "B outputs h w"], labels: Int[Tensor, "B 1 h w"]) -> Tensor:
        return F.cross_entropy(logits, labels[:, 0])


class _Focal(nn.Module):
    """MONAI's focal loss as a mean over pixels, whatever the number of exclusive classes."""

    def __init__(self, gamma: float, exclusive: bool) -> None:
        from monai.losses.focal_loss import FocalLoss

        super().__init__()
        self.exclusive = exclusive
        self.focal = FocalLoss(to_onehot_y=exclusive, use_softmax=exclusive, gamma=gamma, reduction="none")

    def forward(self, logits: Float[Tensor, "B outputs h w"], labels: Tensor) -> Float[Tensor, ""]:
        by_output = self.focal(logits, labels)
        return by_output.sum(dim=1).mean() if self.exclusive else by_output.mean()
