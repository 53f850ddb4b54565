"""What the encoder's tokens are worth while it is pretrained: rank and spread, and a frozen-encoder probe.

At a validation, held-out slices give the effective rank and the spread of the tokens. Where the store has
labelled patients in `train` and in `val`, and no voxels to be ignored, a linear discriminant from tokens to
the classes in their patches is fitted on slices of the former and scored on slices of the latter. The encoder
does not learn from it, and nothing here draws random numbers. Every rank computes the same.
"""

import colorsys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import default_collate

from samssl.config import Count, PositiveInt, config
from samssl.data.datasets import Rows
from samssl.data.inputs import unit_images
from samssl.data.resize import fit_labels, unfit_square
from samssl.data.sampling import evenly
from samssl.data.slices import SliceStore
from samssl.metrics import LabelDice, dice_per_label, label_dice
from samssl.models.backbones import ImageEncoder, encode_tokens
from samssl.models.sam import normalise
from samssl.representation import (
    ClassSums,
    Discriminant,
    TokenSums,
    class_fractions,
    effective_rank,
    linear_discriminant,
)
from samssl.train.context import RunContext
from samssl.train.feed import KeyedDataset
from samssl.train.optim import FitConfig, uses_bf16

BATCH_SIZE = 8
"""Slices encoded at once, with no token hidden."""
SHOWN, SHOWN_SIDE = 4, 192
"""Slices in the picture, and the side of each in its pixels."""


@config
class ProbeConfig:
    """How often features are looked at, and on how many slices."""

    every: Count = 1
    """Validations from one look to the next (the last step always has one); 0 never looks."""
    train_slices: PositiveInt = 64
    """At most so many labelled slices of the split `train`, spread evenly, from which the probe learns."""
    val_slices: PositiveInt = 64
    """At most so many labelled slices of the split `val`, spread evenly, on which its Dice is measured."""


@dataclass
class Probe:
    """Measures an encoder's tokens at the validations of a run; changes neither the encoder nor any state."""

    store: SliceStore
    image_encoder: ImageEncoder
    held_out: KeyedDataset
    """Slices on which rank and spread are measured."""
    slices: Callable[[Rows], KeyedDataset]
    """Whole slices, as `unit_images` takes them."""
    config: ProbeConfig
    optim: FitConfig
    context: RunContext

    def __post_init__(self) -> None:
        self.train_rows = labelled_rows(self.store, "train", self.config.train_slices)
        self.val_rows = labelled_rows(self.store, "val", self.config.val_slices)
        self.has_labels = bool(len(self.train_rows) and len(self.val_rows)) and self.store.ignored is None
        if self.has_labels:
            self.train_slices, self.val_slices = self.slices(self.train_rows), self.slices(self.val_rows)
        elif self.config.every and self.context.rank == 0:
            missing = f"no patient in the split {'val' if len(self.train_rows) else 'train'} has labels"
            reason = missing if self.store.ignored is None else "masks have voxels to be ignored"
            print(f"pretrain: no probe/dice, as {reason}", flush=True)

    def measure(self, step: int) -> dict[str, float]:
        """Metrics of the encoder as it is at `step`; none where no look is due."""
        validation = -(-step // self.optim.validate_every)
        if not self.config.every or (validation % self.config.every and step != self.optim.steps):
            return {}
        started = time.monotonic()
        with evaluating(self.image_encoder), torch.no_grad():
            metrics = self._measure_features()
            if self.has_labels:
                metrics |= self._measure_dice(step)
        # Not among the returned metrics: they are part of the saved state, which a resumed run repeats.
        self.context.log({"probe/seconds": time.monotonic() - started}, step)
        return metrics

    def _measure_features(self) -> dict[str, float]:
        sums = None
        for _, tokens in self._encoded(self.held_out):
            tokens = tokens.flatten(1, 2)
            sums = sums or TokenSums.zeros(tokens.shape[1], tokens.shape[2], tokens.device)
            sums.add(tokens)
        assert sums is not None, "a run has held-out slices"
        return {"features/effective_rank": effective_rank(sums.products), "features/std": sums.spread()}

    def _measure_dice(self, step: int) -> dict[str, float]:
        sums = self._learn()
        scores = self._score(linear_discriminant(sums), step)
        names = [self.store.labels[label] for label in sorted(self.store.labels)]
        table = pd.DataFrame(scores).assign(label=names[1:])
        learnt = (sums.weights > 0).tolist()[1:]
        table = table[learnt].dropna(subset="dice")
        if table.empty:
            return {}
        return {"probe/dice": float(table["dice"].mean()), **label_dice(table, "probe/dice")}

    def _learn(self) -> ClassSums:
        num_classes, sums = len(self.store.labels), None
        rows = iter(self.train_rows.tolist())
        for images, tokens in self._encoded(self.train_slices):
            sums = sums or ClassSums.zeros(tokens.shape[-1], num_classes, tokens.device)
            for encoded in tokens:
                labels = fit_labels(class_numbers(self.store, next(rows))[None], images.shape[-1])[0]
                fractions = class_fractions(labels, (encoded.shape[0], encoded.shape[1]), num_classes)
                sums.add(encoded.flatten(0, 1), fractions.flatten(0, 1).to(encoded.device))
        assert sums is not None, "there are labelled slices"
        return sums

    def _score(self, discriminant: Discriminant, step: int) -> list[LabelDice]:
        """Dice by label over all pixels of the slices together; pictures a few of them."""
        picked = np.unique(((np.arange(SHOWN) + 0.5) / SHOWN * len(self.val_rows)).astype(int))
        predicted, reference, panels = [], [], []
        for images, tokens in self._encoded(self.val_slices):
            for image, scores in zip(images, discriminant(tokens).movedim(-1, 1), strict=True):
                labels = class_numbers(self.store, int(self.val_rows[len(reference)]))
                classes = native_classes(scores, (labels.shape[0], labels.shape[1]), image.shape[-1])
                if len(reference) in picked:
                    panels.append(panel(image, labels, classes))
                reference.append(labels.flatten().numpy())
                predicted.append(classes.flatten().numpy())
        self.context.picture(f"probe/step_{step:06d}.png", np.concatenate(panels))
        together = (np.concatenate(part)[None, None] for part in (predicted, reference))
        return dice_per_label(*together, num_labels=len(self.store.labels))

    def _encoded(
        self, slices: KeyedDataset
    ) -> Iterator[tuple[Float[Tensor, "B C S S"], Float[Tensor, "B h w D"]]]:
        device = self.context.device
        for first in range(0, len(slices), BATCH_SIZE):
            last = min(first + BATCH_SIZE, len(slices))
            batch = default_collate([slices[index, index] for index in range(first, last)])
            batch = unit_images({name: value.to(device) for name, value in batch.items()})
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(self.optim, device)):
                tokens = encode_tokens(self.image_encoder, normalise(batch["image"], self.image_encoder))
            yield batch["image"], tokens


def labelled_rows(store: SliceStore, split: str, count: int) -> Rows:
    """At most `count` slices with foreground of the split's patients, spread evenly over them in order."""
    index = store.rows.columns(("split", "patient", "case", "z", "foreground_fraction"))
    index = index[(index["split"] == split) & (index["foreground_fraction"] > 0)]
    index = index.sort_values(by=["patient", "case", "z"])
    return index.index.to_numpy(np.int32)[evenly(len(index), count)]


def class_numbers(store: SliceStore, row: int) -> Int[Tensor, "H W"]:
    """Ranks of the label ids of one slice, in native resolution."""
    case = store.rows.case_name(row)
    mask = store.mask_slice(case, int(store.rows.z[row]))
    assert mask is not None, f"case {case} has foreground"
    return torch.from_numpy(np.searchsorted(sorted(store.labels), mask))


def native_classes(
    scores: Float[Tensor, "K h w"], shape: tuple[int, int], size: int
) -> Int[Tensor, "height width"]:
    """The most likely class of every pixel of a slice of `shape`; scores, not classes, are resized."""
    return unfit_square(scores[None].float(), *shape, size).argmax(dim=1)[0].cpu()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every part of `module` in evaluation mode inside, in its own mode again outside."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def panel(
    image: Float[Tensor, "C S S"], reference: Int[Tensor, "H W"], predicted: Int[Tensor, "H W"]
) -> UInt8[np.ndarray, "side width 3"]:
    """The image, then the reference and the predicted classes over it, side by side."""
    grey = image[:1].float().clamp(0, 1).cpu().movedim(0, -1).expand(-1, -1, 3)
    square = fit_labels(torch.stack([reference, predicted]), image.shape[-1])
    tinted = [tint(grey, classes) for classes in square]
    pictures = torch.stack([grey, *tinted]).movedim(-1, 1)
    pictures = F.interpolate(pictures, (SHOWN_SIDE, SHOWN_SIDE), mode="nearest-exact")
    pictures = F.pad(pictures, (2, 2, 2, 2), value=1.0).permute(2, 0, 3, 1).flatten(1, 2)
    return (pictures * 255).round().to(torch.uint8).numpy()


def tint(grey: Float[Tensor, "S S 3"], classes: Int[Tensor, "S S"]) -> Float[Tensor, "S S 3"]:
    """Half the image, half the colour of its class; background stays as it is."""
    hues = (np.arange(int(classes.max()) + 1) * 0.382) % 1  # far apart for neighbouring numbers
    colors = torch.tensor([colorsys.hsv_to_rgb(hue, 0.9, 1.0) for hue in hues], dtype=grey.dtype)
    return torch.where(classes[..., None] > 0, 0.5 * (grey + colors[classes]), grey)
