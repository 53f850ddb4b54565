"""Slices as tensors at the model's input size, varied by each draw's key."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from samssl.config import BelowOne, Fraction, NonNegative, UserError, config
from samssl.data.ignoring import IGNORED
from samssl.data.inputs import InputConfig, input_slice, scaled
from samssl.data.resize import fit_labels, fit_square
from samssl.data.slices import SliceStore
from samssl.data.views import CropConfig, draw_view, keyed_randomness

CACHE_BYTES = 1 << 30
"""Decoded slices that one dataset keeps in memory."""

Rows = Int[np.ndarray, " rows"]
"""Slices by their row numbers in the index of their store."""


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
    """Rows of a store, read once and kept in memory as they are stored, up to `CACHE_BYTES`."""

    def __init__(self, store: SliceStore, rows: Rows, image_size: int, inputs: InputConfig) -> None:
        self.store, self.rows, self.image_size, self.inputs = store, rows, image_size, inputs
        self.kept: dict[tuple[str, int], np.ndarray] = {}
        self.kept_bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": {}, "kept_bytes": 0}  # every reading process keeps its own

    def describe(self, index: int) -> str:
        """Item `index` as `case/z`, for messages."""
        return self.store.describe(int(self.rows[index]))

    def image(self, row: int) -> tuple[Float[Tensor, "C H W"], Float[Tensor, "R 2"]]:
        """What `samssl.data.inputs.input_slice` gives, by way of what is kept in memory."""
        return input_slice(self.store, row, self.inputs, self._plane)

    def _plane(self, case: str, z: int) -> Shaped[np.ndarray, "H W"]:
        if (case, z) in self.kept:
            return self.kept[case, z]
        plane = self.store.image_slice(case, z)
        if self.kept_bytes + plane.nbytes <= CACHE_BYTES:
            self.kept[case, z] = plane
            self.kept_bytes += plane.nbytes
        return plane


class UnlabelledSlices(_Slices):
    """Views of slices for self-supervised learning, with their `key` and `index`.

    `image` [C, S, S], `range` [R, 2] and, where views are shaded, `shade` [3] are as
    `samssl.data.inputs.unit_images` takes them.
    """

    def __init__(
        self,
        store: SliceStore,
        rows: Rows,
        image_size: int,
        crop: CropConfig,
        inputs: InputConfig = InputConfig(),
    ) -> None:
        super().__init__(store, rows, image_size, inputs)
        self.crop = crop

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        image, ranges = self.image(int(self.rows[index]))
        with keyed_randomness(key):
            view, shade = draw_view(image, self.image_size, self.crop)
        item = {"image": view, "range": ranges, "key": torch.tensor(key), "index": torch.tensor(index)}
        return item if shade is None else item | {"shade": shade}


class LabelledSlices(_Slices):
    """`image` [C, S, S] in [0, 1], `labels` [S, S] (class numbers: ranks of the label ids), and `index`.

    Where nobody has labelled the slice, `labels` is `samssl.data.ignoring.IGNORED`.

    Augmentation works on intensities in [0, 1], so these few slices are scaled here, on the CPU.
    """

    def __init__(
        self,
        store: SliceStore,
        rows: Rows,
        image_size: int,
        augment: AugmentConfig,
        inputs: InputConfig = InputConfig(),
        keep_small: bool = False,
    ) -> None:
        super().__init__(store, rows, image_size, inputs)
        self.augment, self.keep_small = augment, keep_small
        self.move = v2.RandomAffine(
            degrees=(-augment.degrees, augment.degrees),
            translate=(augment.translate, augment.translate),
            scale=(1 - augment.scale, 1 + augment.scale),
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        self.flip = v2.RandomHorizontalFlip(augment.flip)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        image, labels = self.varied(int(self.rows[index]), key)
        return {"image": image, "labels": labels, "index": torch.tensor(index)}

    def varied(self, row: int, key: int) -> tuple[Float[Tensor, "C S S"], Int[Tensor, "S S"]]:
        """Image and labels of a row as the draw `key` augments them."""
        image, labels = tv_tensors.Image(self.fitted_image(row)), tv_tensors.Mask(self.fitted_labels(row))
        with keyed_randomness(key):
            image, labels = self.flip(*self.move(image, labels))
            image = self._shade(image.as_subclass(Tensor))
        return image, labels.as_subclass(Tensor)[0].long()

    def varied_labels(self, row: int, key: int) -> Int[Tensor, "S S"]:
        """The labels of `varied` without the work for its image."""
        with keyed_randomness(key):
            labels = self.flip(self.move(tv_tensors.Mask(self.fitted_labels(row))))
        return labels.as_subclass(Tensor)[0].long()

    def fitted_image(self, row: int) -> Float[Tensor, "C S S"]:
        """Intensities in [0, 1] at the model's input size, not augmented."""
        image, ranges = self.image(row)
        return scaled(fit_square(image[None], self.image_size), ranges[None])[0]

    def fitted_labels(self, row: int) -> Float[Tensor, "1 S S"]:
        """Class numbers at the model's input size, not augmented."""
        return fit_labels(self.labels(row), self.image_size, self.keep_small).float()

    def labels(self, row: int) -> Int[Tensor, "1 H W"]:
        """Class numbers of one slice in native resolution, and IGNORED."""
        mask = self.store.mask_slice(self.store.rows.case_name(row), int(self.store.rows.z[row]))
        assert mask is not None, "only labelled patients are in the split train"
        numbers = np.searchsorted(sorted(self.store.labels), mask)
        ignored = self.store.ignored_slice(self.store.rows.case_name(row), int(self.store.rows.z[row]))
        return torch.from_numpy(numbers if ignored is None else np.where(ignored, IGNORED, numbers))[None]

    def _shade(self, image: Float[Tensor, "C S S"]) -> Float[Tensor, "C S S"]:
        brightness, contrast = 1 + self.augment.intensity * (2 * torch.rand(2) - 1)
        centre = image.mean()
        shaded = brightness * (centre + contrast * (image - centre))
        return (shaded + self.augment.noise * torch.rand(()) * torch.randn_like(image)).clamp(0, 1)


class Pooled:
    """Slices of several stores as one dataset, one part after another."""

    def __init__(self, parts: Sequence[UnlabelledSlices | LabelledSlices]) -> None:
        self.parts = list(parts)
        self._stops = [*accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        part, place = self._find(index)
        return self.parts[part][place, key] | {"index": torch.tensor(index)}

    def describe(self, index: int) -> str:
        """Item `index` as `case/z`; case ids begin with the name of their data set."""
        part, place = self._find(index)
        return self.parts[part].describe(place)

    def groups(self, column: str) -> Int[np.ndarray, " items"]:
        """For each item the number of its value in a text column of the index, the same in all stores."""
        numbers: dict[str, int] = {}
        found = []
        for part in self.parts:
            codes, names = part.store.rows.groups(column)
            shared = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
            found.append(shared[codes[part.rows]])
        return np.concatenate(found)

    def _find(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._stops, index)
        return part, index - (self._stops[part - 1] if part else 0)


def unit_slice(
    store: SliceStore, case: str, z: int, inputs: InputConfig = InputConfig()
) -> Float[Tensor, "C H W"]:
    """One slice in native resolution with intensities in [0, 1]."""
    image, ranges = input_slice(store, store.first_row(case) + z, inputs)
    return scaled(image[None], ranges[None])[0]


def rows_of(store: SliceStore, splits: Sequence[str], min_content: float = 0.0) -> Rows:
    """Slices of the splits of which at least the share `min_content` is not air.

    Raises:
        UserError: there are none.
    """
    rows = store.rows.rows(splits, min_content)
    if not len(rows):
        raise UserError(
            f"The store {store.root} has no slices in split {' or '.join(splits)} with content of at least "
            f"{min_content:g}. Change the splits in prepare, or lower min_content."
        )
    return rows
