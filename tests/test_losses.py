import pytest
import torch
from torch import Tensor

from samssl.losses import LossConfig, segmentation_loss

GENERATOR = torch.Generator().manual_seed(0)
EXCLUSIVE = torch.randint(0, 3, (2, 8, 8), generator=GENERATOR)
REGIONS = torch.rand(2, 3, 8, 8, generator=GENERATOR) > 0.6
LOSSES = [
    LossConfig(),
    LossConfig(terms="dice_focal"),
    LossConfig(terms="tversky"),
    LossConfig(boundary_weight=0.1),
    LossConfig(resolution=16, keep_small=True),
]


def perfect(targets: Tensor) -> Tensor:
    """Logits that say exactly the targets."""
    if targets.ndim == 3:
        targets = torch.nn.functional.one_hot(targets, 3).movedim(-1, 1)
    return 40 * targets.float() - 20


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("targets", [EXCLUSIVE, REGIONS, REGIONS[:, :1]], ids=["classes", "regions", "one"])
def test_a_loss_is_lowest_where_the_logits_are_right_and_leads_there(
    targets: Tensor, loss: LossConfig
) -> None:
    logits = torch.randn(perfect(targets).shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    start = segmentation_loss(logits, targets, loss)
    start.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    step = segmentation_loss(logits - 1.0 * logits.grad / logits.grad.norm(), targets, loss)
    assert step < start
    if not loss.resolution:
        assert segmentation_loss(perfect(targets), targets, loss) < 1e-3
    assert segmentation_loss(-perfect(targets), targets, loss) > segmentation_loss(
        perfect(targets), targets, loss
    )


def test_the_loss_is_taken_at_the_resolution_that_is_asked_for() -> None:
    targets = torch.zeros(1, 16, 16, dtype=torch.int64)
    targets[0, 5, 5] = 1  # no centre of a cell of 4 x 4
    logits = torch.zeros(1, 2, 4, 4)
    missed, seen, kept = (
        segmentation_loss(logits, targets, loss)
        for loss in (LossConfig(), LossConfig(resolution=16), LossConfig(keep_small=True))
    )
    empty = segmentation_loss(logits, torch.zeros_like(targets), LossConfig())
    assert missed == empty
    assert seen != missed
    assert kept != missed


def test_missed_pixels_weigh_more_than_false_ones_if_told() -> None:
    targets = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    targets[0, 0, :2] = True
    too_few, too_many = perfect(targets), perfect(targets)
    too_few[0, 0, 1], too_many[0, 0, 2] = -20, 20
    loss = LossConfig(terms="tversky", tversky_missed=0.9)
    assert segmentation_loss(too_few, targets, loss) > segmentation_loss(too_many, targets, loss)


def test_a_wrong_pixel_far_away_costs_more_with_the_boundary_term() -> None:
    targets = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    targets[0, 0, 2:6, 2:6] = True
    near, far = perfect(targets), perfect(targets)
    near[0, 0, 6, 6] = far[0, 0, 30, 30] = 20.0
    plain, boundary = LossConfig(), LossConfig(boundary_weight=1.0)
    torch.testing.assert_close(
        segmentation_loss(near, targets, plain), segmentation_loss(far, targets, plain)
    )
    assert segmentation_loss(far, targets, boundary) > segmentation_loss(near, targets, boundary) + 0.01
