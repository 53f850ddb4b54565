"""Training SAM with simulated prompts, as SAM itself was trained (arXiv:2304.02643, appendix A).

Each object gets a first prompt, then corrective clicks into the largest error of the answer so far, which
is given back as a mask prompt. Every answer has a loss: focal and Dice on the mask, and the squared error
of the predicted IoU. To a single point SAM has three answers; only the one with the least loss learns.
Errors are looked for at the resolution of the low-res logits, on the CPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from samssl.config import UserError
from samssl.data.slices import SliceStore
from samssl.interactive import Asking, click_rows, prompt_dice, prompted_cases
from samssl.metrics import case_dice, label_dice
from samssl.models.promptable import Prompts, best_masks
from samssl.prompts import INSIDE, KINDS, NO_POINT, Kind, PromptConfig, corrective_clicks, rescaled, stretched
from samssl.train.alarms import prompt_alarms
from samssl.train.context import RunContext
from samssl.train.loop import Validation
from samssl.train.probe import labelled_rows
from samssl.train.prompt_pictures import click_curve, dialogues, prompts_picture

MASK_LOGIT = 8.0
"""Logits of a rough mask inside the object; outside it is as much below 0."""


@dataclass(frozen=True)
class Objects:
    """N objects of a batch of images, as `samssl.data.objects.ObjectSlices` points them out."""

    image: Int[Tensor, " N"]
    """Place in the batch of the image that the object is in."""
    targets: Bool[Tensor, "N h w"]
    """The object at the resolution of the low-res logits; one that was empty is empty here too."""
    points: Float[Tensor, "N 2"]
    boxes: Float[Tensor, "N 4"]
    tight_boxes: Float[Tensor, "N 4"]
    kinds: Int[Tensor, " N"]
    keys: Int[Tensor, "N 2"]
    """Key of the image's draw, and place of the object in it."""
    scale: float
    """Pixels of the low-res logits in the side of one pixel of the image."""

    @classmethod
    def of_batch(cls, batch: dict[str, Tensor], shape: tuple[int, int]) -> "Objects":
        """The objects of a batch of `ObjectSlices`, with targets of `shape`."""
        count, each = batch["objects"].shape[:2]
        places = torch.arange(each, device=batch["key"].device)
        keys = torch.stack([batch["key"].repeat_interleave(each), places.repeat(count)], dim=1)
        names = ("points", "boxes", "tight_boxes", "kinds")
        return cls(
            image=torch.arange(count, device=keys.device).repeat_interleave(each),
            targets=shrunk(batch["objects"].flatten(0, 1), shape),
            keys=keys,
            scale=shape[1] / batch["image"].shape[-1],
            **{name: batch[name].flatten(0, 1) for name in names},
        )

    def of_kind(self, kind: Kind) -> "Objects":
        """Those that are to be pointed out by `kind` at first."""
        chosen = self.kinds == KINDS.index(kind)
        parts = {name: value[chosen] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Objects(scale=self.scale, **parts)

    @property
    def present(self) -> Bool[Tensor, " N"]:
        """Whether there is anything of the object."""
        return self.targets.flatten(1).any(dim=1)

    def first_prompts(self, kind: Kind) -> Prompts:
        """What is said of the objects at first."""
        if kind == "box":
            return Prompts(self.image, boxes=self.boxes)
        if kind == "mask":
            on_grid = [(boxes + 0.5) * self.scale - 0.5 for boxes in (self.tight_boxes, self.boxes)]
            rough = stretched(self.targets, *on_grid)
            return Prompts(self.image, masks=(2.0 * rough[:, None] - 1) * MASK_LOGIT)
        labels = torch.where(self.present, INSIDE, NO_POINT)
        return Prompts(self.image, points=self.points[:, None], labels=labels[:, None])

    def corrected(
        self, prompts: Prompts, answer: Float[Tensor, "N h w"], number: int, config: PromptConfig
    ) -> Prompts:
        """`prompts` with the answer and the corrective click `number` to it."""
        generators = [np.random.default_rng([*key, number]) for key in self.keys.tolist()]
        places = [config.place(generator) for generator in generators]
        masks = (answer > 0).cpu().numpy(), self.targets.cpu().numpy()
        found, labels = corrective_clicks(*masks, places)
        points = torch.from_numpy(rescaled(found, (1 / self.scale, 1 / self.scale)))
        clicked = prompts.clicked(points.to(answer.device), torch.from_numpy(labels).to(answer.device))
        return clicked.answered(answer)


class PromptedSegmenter(nn.Module):
    """A promptable SAM and its loss over a first prompt and corrective clicks."""

    def __init__(self, segmenter: nn.Module, prompts: PromptConfig) -> None:
        super().__init__()
        self.segmenter: Any = segmenter
        self.prompts = prompts

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, and `mask_loss` and `iou_loss` of which it is the sum, of a batch of `ObjectSlices`.

        Means over the answers and then over the objects that are not empty.
        """
        embeddings = self.segmenter.embed(batch["image"])
        objects = Objects.of_batch(batch, (4 * embeddings.shape[-2], 4 * embeddings.shape[-1]))
        losses, weights = [], []
        for kind in KINDS:
            group = objects.of_kind(kind)
            if len(group.image):
                answers = torch.stack([*self._answers(embeddings, group, kind)])
                losses.append(answers.mean(dim=0))
                weights.append(group.present)
        weight = torch.cat(weights).float()
        mask_loss, iou_loss = (torch.cat(losses, dim=1) * weight).sum(dim=1) / weight.sum().clamp(min=1)
        return {"loss": mask_loss + iou_loss, "mask_loss": mask_loss, "iou_loss": iou_loss}

    def _answers(self, embeddings: Tensor, objects: Objects, kind: Kind) -> Iterator[Float[Tensor, "2 N"]]:
        """Losses of the mask and of the IoU for each object, answer by answer."""
        prompts = objects.first_prompts(kind)
        for number in range(1 + self.prompts.corrections):
            logits, iou = self.segmenter.decode(embeddings, prompts, multimask=prompts.ambiguous)
            logits, iou = logits.float(), iou.float()
            by_mask = mask_losses(logits, objects.targets, self.prompts.focal_weight)
            error = (iou - true_iou(logits.detach(), objects.targets)).square()
            yield torch.stack([by_mask.amin(dim=1), error.mean(dim=1)])
            if number < self.prompts.corrections:
                answer = best_masks(logits, iou).detach()
                prompts = objects.corrected(prompts, answer, number, self.prompts)


def shrunk(masks: Bool[Tensor, "N H W"], shape: tuple[int, int]) -> Bool[Tensor, "N h w"]:
    """Masks at a lower resolution: where half a cell is covered, or as much as any cell of a small object."""
    covered = F.interpolate(masks[:, None].float(), shape, mode="area")[:, 0]
    most = covered.flatten(1).amax(dim=1)[:, None, None]
    return (covered > 0) & (covered >= most.clamp(max=0.5))


def mask_losses(
    logits: Float[Tensor, "N M h w"], targets: Bool[Tensor, "N h w"], focal_weight: float
) -> Float[Tensor, "N M"]:
    """Focal (alpha 0.25, gamma 2) and Dice loss of each answer to each object."""
    from torchvision.ops import sigmoid_focal_loss

    wanted = targets[:, None].expand_as(logits).float()
    focal = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0).mean(dim=(2, 3))
    found = logits.sigmoid()
    overlap, total = (found * wanted).sum(dim=(2, 3)), (found + wanted).sum(dim=(2, 3))
    return focal_weight * focal + 1 - (2 * overlap + 1) / (total + 1)


def true_iou(logits: Float[Tensor, "N M h w"], targets: Bool[Tensor, "N h w"]) -> Float[Tensor, "N M"]:
    """Intersection over union of each answer, cut at 0, with its object."""
    found, wanted = logits > 0, targets[:, None]
    return (found & wanted).sum(dim=(2, 3)) / (found | wanted).sum(dim=(2, 3)).clamp(min=1)


@dataclass
class PromptedDice:
    """Volume-level Dice of the validation cases from simulated prompts, as `evaluate` measures it."""

    stores: Sequence[SliceStore]
    segmenter: nn.Module
    asking: Asking
    context: RunContext

    def __post_init__(self) -> None:
        for store in self.stores:
            if not len(labelled_rows(store, "val", 1)):
                raise UserError(
                    f"The store {store.root} has no labelled voxels in the split val, by which training is "
                    "judged. Give more patients to split.val in prepare."
                )

    def validate(self, step: int) -> Validation:
        """The score is the mean over stores, cases, labels and numbers of clicks."""
        tables = [self._table(store) for store in self.stores]
        together = pd.concat(tables, ignore_index=True)
        score = float(np.mean([case_dice(click_rows(table)).mean() for table in tables]))
        shown = dialogues(self.segmenter, self.stores[0], "val", self.asking)
        self.context.picture(f"prompts/step_{step:06d}.png", prompts_picture(shown))
        self.context.picture(f"prompts/clicks_{step:06d}.png", click_curve(together))
        labels = label_dice(click_rows(together), "val/dice")
        metrics = {"val/dice": score, **labels, **prompt_dice(together, "val/dice")}
        return Validation(score, metrics, prompt_alarms(together) if step else {})

    def _table(self, store: SliceStore) -> pd.DataFrame:
        cases = prompted_cases(self.segmenter, store, store.cases("val"), self.asking)
        return pd.concat([case.table for _, case in cases], ignore_index=True)
