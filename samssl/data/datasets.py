"""Slices as tensors: intensities in [0, 1] at the model's input size, augmented by each draw's key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from samssl.config import BelowOne, Fraction, NonNegative, UserError, config
from samssl.data.intensity import to_unit
from samssl.data.resize import fit_square
from samssl.data.slices import SliceStore

CACHE_BYTES = 1 << 30
"""Decoded slices that one dataset keeps in memory."""

Row = tuple[str, int]
"""A slice: its case and z index."""


@config
class CropConfig:
    """Views of a slice for self-supervised pretraining."""

    smallest: Fraction = 0.5
    """Smallest share of a slice's area that a crop keeps; 1 does not crop."""
    flip: Fraction = 0.5
    """Share of the views that are mirrored left to right."""


@config
class AugmentConfig:
    """Random changes of a labelled slice that anatomy and scanners could have made."""

    degrees: NonNegative = 15.0
    """Largest rotation, in degrees."""
    translate: Fraction = 0.1
    """Largest shift, as a share of the side."""
    scale: BelowOne = 0.2
    """Largest relative change of size."""
    flip: Fraction = 0.0
    """Share of slices mirrored left to right; leave at 0 where sides are different labels."""
    intensity: Fraction = 0.2
    """Largest relative change of brightness and contrast."""
    noise: NonNegative = 0.02
    """Largest standard deviation of added noise; intensities run from 0 to 1."""


class _Slices:
    """Rows of a store as unit-intensity slices, kept in memory up to `CACHE_BYTES`."""

    def __init__(self, store: SliceStore, rows: list[Row], image_size: int) -> None:
        self.store, self.rows, self.image_size = store, rows, image_size
        self.kept: dict[Row, Tensor] = {}
        self.kept_bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": {}, "kept_bytes": 0}  # every reading process keeps its own

    def image(self, row: Row) -> Float[Tensor, "1 H W"]:
        """One slice in native resolution with intensities in [0, 1]."""
        if row in self.kept:
            return self.kept[row]
        image = unit_slice(self.store, *row)
        if self.kept_bytes + image.nbytes <= CACHE_BYTES:
            self.kept[row] = image
            self.kept_bytes += image.nbytes
        return image


class UnlabelledSlices(_Slices):
    """`image` [1, S, S] and `key` of crops of slices, for masked autoencoding."""

    def __init__(self, store: SliceStore, rows: list[Row], image_size: int, crop: CropConfig | None) -> None:
        super().__init__(store, rows, image_size)
        self.crop = crop

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        image = self.image(self.rows[index])
        if self.crop:
            with keyed_randomness(key):
                image = random_crop(image, self.crop.smallest)
                image = image.flip(-1) if torch.rand(()) < self.crop.flip else image
        return {"image": fit_square(image[None], self.image_size)[0], "key": torch.tensor(key)}


class LabelledSlices(_Slices):
    """`image` [1, S, S] and `labels` [S, S] (class numbers: ranks of the label ids) of augmented slices."""

    def __init__(self, store: SliceStore, rows: list[Row], image_size: int, augment: AugmentConfig) -> None:
        super().__init__(store, rows, image_size)
        self.augment = augment
        self.move = v2.RandomAffine(
            degrees=(-augment.degrees, augment.degrees),
            translate=(augment.translate, augment.translate),
            scale=(1 - augment.scale, 1 + augment.scale),
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        self.flip = v2.RandomHorizontalFlip(augment.flip)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        labels = self.labels(self.rows[index])
        image = fit_square(self.image(self.rows[index])[None], self.image_size)[0]
        labels = fit_square(labels[None].float(), self.image_size, mode="nearest-exact")[0]
        with keyed_randomness(key):
            image, labels = self.flip(*self.move(tv_tensors.Image(image), tv_tensors.Mask(labels)))
            image = self._shade(image.as_subclass(Tensor))
        return {"image": image, "labels": labels.as_subclass(Tensor)[0].long()}

    def labels(self, row: Row) -> Int[Tensor, "1 H W"]:
        """Class numbers of one slice in native resolution."""
        mask = self.store.mask_slice(*row)
        assert mask is not None, "only labelled patients are in the split train"
        return torch.from_numpy(np.searchsorted(sorted(self.store.labels), mask))[None]

    def _shade(self, image: Float[Tensor, "1 S S"]) -> Float[Tensor, "1 S S"]:
        brightness, contrast = 1 + self.augment.intensity * (2 * torch.rand(2) - 1)
        centre = image.mean()
        shaded = brightness * (centre + contrast * (image - centre))
        return (shaded + self.augment.noise * torch.rand(()) * torch.randn_like(image)).clamp(0, 1)


@contextmanager
def keyed_randomness(key: int) -> Iterator[None]:
    """Everything torch draws inside depends on `key` alone; outside nothing has changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        yield


def unit_slice(store: SliceStore, case: str, z: int) -> Float[Tensor, "1 H W"]:
    """One slice in native resolution with intensities in [0, 1], by the range stored for its case."""
    info = store.info(case)
    pixels = to_unit(store.image_slice(case, z), info["intensity_low"], info["intensity_high"])
    return torch.from_numpy(pixels)[None]


def rows_of(store: SliceStore, splits: list[str], min_content: float = 0.0) -> list[Row]:
    """Slices of the splits of which at least the share `min_content` is not air.

    Raises:
        UserError: there are none.
    """
    index = store.index
    chosen = index[index["split"].isin(splits) & (index["content_fraction"] >= min_content)]
    if chosen.empty:
        raise UserError(
            f"The store {store.root} has no slices in split {' or '.join(splits)} with content of at least "
            f"{min_content:g}. Change the splits in prepare, or lower min_content."
        )
    return list(zip(chosen["case"], chosen["z"].astype(int), strict=True))


def random_crop(image: Float[Tensor, "1 H W"], smallest: float) -> Float[Tensor, "1 h w"]:
    """A part of the same proportions that keeps between `smallest` and all of the area."""
    side = (smallest + (1 - smallest) * torch.rand(()).item()) ** 0.5
    shape = [max(1, round(length * side)) for length in image.shape[1:]]
    room = [length - part for length, part in zip(image.shape[1:], shape, strict=True)]
    top, left = (int(torch.randint(free + 1, ()).item()) for free in room)
    return image[:, top : top + shape[0], left : left + shape[1]]
