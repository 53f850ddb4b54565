"""Segmentation losses on low-res logits."""

from functools import cache

from jaxtyping import Float, Int
from torch import Tensor, nn

from samssl.data.resize import downsample_labels


def dice_and_cross_entropy(
    low_res_logits: Float[Tensor, "B classes h w"], labels: Int[Tensor, "B H W"]
) -> Float[Tensor, ""]:
    """MONAI's Dice (over the classes of the whole batch, background left out) plus cross-entropy, 1 : 1.

    `labels` holds class numbers and is brought to the resolution of the logits.
    """
    target = downsample_labels(labels, (low_res_logits.shape[2], low_res_logits.shape[3]))
    return _dice_ce()(low_res_logits.float(), target[:, None])


@cache
def _dice_ce() -> nn.Module:
    from monai.losses.dice import DiceCELoss

    return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
