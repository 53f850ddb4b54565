"""Our losses against formulas written out, so that MONAI's flags mean what we think they mean."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from samssl.losses import LossConfig, segmentation_loss

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 3, 6, 5, generator=GENERATOR)
EXCLUSIVE = torch.randint(0, 3, (2, 6, 5), generator=GENERATOR)
REGIONS = torch.rand(2, 3, 6, 5, generator=GENERATOR) > 0.5
CASES = pytest.mark.parametrize("targets", [EXCLUSIVE, REGIONS], ids=["exclusive", "regions"])


def probabilities(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of what has Dice: predicted and wanted, [B, K, h, w]."""
    if targets.ndim == 4:
        return LOGITS.sigmoid(), targets.float()
    return LOGITS.softmax(1)[:, 1:], F.one_hot(targets, 3).movedim(-1, 1)[:, 1:].float()


def dice(targets: Tensor, missed: float = 0.5) -> Tensor:
    predicted, wanted = probabilities(targets)
    hit, false, lost = (
        (part).sum(dim=(0, 2, 3))
        for part in (predicted * wanted, predicted * (1 - wanted), (1 - predicted) * wanted)
    )
    return (1 - hit / (hit + (1 - missed) * false + missed * lost)).mean()


def focal(targets: Tensor, gamma: float) -> Tensor:
    if targets.ndim == 4:
        right = torch.where(targets, LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    else:
        right = LOGITS.softmax(1).gather(1, targets[:, None])
    return (-((1 - right) ** gamma) * right.log()).mean()


@CASES
def test_dice_and_cross_entropy(targets: Tensor) -> None:
    torch.testing.assert_close(segmentation_loss(LOGITS, targets), dice(targets) + focal(targets, 0.0))


@CASES
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_dice_and_focal(targets: Tensor, gamma: float) -> None:
    found = segmentation_loss(LOGITS, targets, LossConfig(terms="dice_focal", focal_gamma=gamma))
    torch.testing.assert_close(found, dice(targets) + focal(targets, gamma))


@CASES
def test_tversky(targets: Tensor) -> None:
    found = segmentation_loss(LOGITS, targets, LossConfig(terms="tversky", tversky_missed=0.8))
    torch.testing.assert_close(found, dice(targets, missed=0.8))


def test_the_default_is_the_loss_of_monai() -> None:
    from monai.losses.dice import DiceCELoss

    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    assert torch.equal(segmentation_loss(LOGITS, EXCLUSIVE), monai(LOGITS, EXCLUSIVE[:, None]))
