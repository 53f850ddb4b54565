"""Reconstruction of held-out patients' slices, always the same slices under the same masks."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from samssl.data.datasets import Pooled
from samssl.data.inputs import unit_images
from samssl.data.sampling import evenly
from samssl.methods.mae import MaskedAutoencoder
from samssl.methods.simmim import SimMim
from samssl.train.context import RunContext
from samssl.train.feed import Batch, KeyedDataset
from samssl.train.optim import FitConfig, uses_bf16

SHOWN = 4
"""Slices in the picture."""


@dataclass
class Spread:
    """At most so many items of a dataset, spread evenly over it."""

    slices: Pooled
    places: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, draw: tuple[int, int]) -> Batch:
        return self.slices[self.places[draw[0]], draw[1]]


def spread(slices: Pooled, count: int) -> Spread:
    """At most `count` of the slices, evenly from the first to the last."""
    return Spread(slices, evenly(len(slices), count).tolist())


@dataclass
class HeldOut:
    """Measures the loss on slices that are not learnt from; each one's place is the key of its mask."""

    slices: KeyedDataset
    model: MaskedAutoencoder | SimMim
    optim: FitConfig
    context: RunContext

    def measure(self, step: int) -> float:
        """Mean loss over the slices; a picture of a few."""
        device, size = self.context.device, self.optim.batch_size
        losses = []
        for first in range(0, len(self.slices), size):
            places = range(first, min(first + size, len(self.slices)))
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(self.optim, device)):
                losses.append(self.model(self._batch(places))["loss"].item() * len(places))
        self._show(step)
        return sum(losses) / len(self.slices)

    def _batch(self, places: Iterable[int]) -> Batch:
        batch = default_collate([self.slices[place, place] for place in places])
        return unit_images({name: value.to(self.context.device) for name, value in batch.items()})

    def _show(self, step: int) -> None:
        picked = (np.arange(SHOWN) + 0.5) / SHOWN * len(self.slices)  # not the first and last of volumes
        shown = self.model.reconstruct(self._batch(np.unique(picked.astype(int)).tolist()))
        masked = torch.where(shown.hidden, 0.5, shown.images)
        columns = [shown.images, masked, shown.predicted]
        self.context.picture(f"reconstructions/step_{step:06d}.png", _tile(columns))


def _tile(columns: list[Tensor], gap: int = 2, at_least: int = 128) -> np.ndarray:
    """Columns of B grey images each, side by side as RGB [H, W, 3] of uint8; rows are images."""
    padded = [torch.nn.functional.pad(column.mean(1), (gap, gap, gap, gap), value=1.0) for column in columns]
    grid = torch.cat([torch.cat(list(column), dim=0) for column in padded], dim=1)
    zoom = max(1, -(-at_least // columns[0].shape[-1]))
    grey = (grid.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return np.repeat(np.repeat(grey, zoom, axis=0), zoom, axis=1)[..., None].repeat(3, axis=-1)
