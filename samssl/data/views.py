"""Views of a slice for self-supervised learning; each follows from the key of its draw alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import v2

from samssl.config import BelowOne, Fraction, NonNegative, config
from samssl.data.resize import fit_square


@config
class CropConfig:
    """Views of a slice for self-supervised pretraining."""

    kind: Literal["resized", "native"] = "resized"
    """`resized`: a part of the slice, resized to the model's input. `native`: a window of as many pixels as
    the input has, at native resolution, with black below and right of smaller slices."""
    smallest: Fraction = 0.5
    """Smallest share of a slice's area that a resized crop keeps; 1 does not crop."""
    flip: Fraction = 0.5
    """Share of the views that are mirrored left to right."""
    degrees: NonNegative = 0.0
    """Largest rotation, in degrees."""
    intensity: BelowOne = 0.0
    """Largest relative change of brightness and of contrast."""
    gamma: NonNegative = 0.0
    """Largest change of gamma: its exponent lies between exp(-gamma) and exp(gamma)."""


def still(crop: CropConfig) -> CropConfig:
    """The same kind of view without any variation but, for native windows, the place."""
    return replace(crop, smallest=1.0, flip=0.0, degrees=0.0, intensity=0.0, gamma=0.0)


@contextmanager
def keyed_randomness(key: int) -> Iterator[None]:
    """Everything torch draws on the CPU inside depends on `key` alone; outside nothing has changed."""
    state = torch.get_rng_state()
    # torch.manual_seed would seed the accelerators too, and is slow at it.
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def draw_view(
    image: Float[Tensor, "C H W"], size: int, crop: CropConfig
) -> tuple[Float[Tensor, "C size size"], Float[Tensor, "3"] | None]:
    """A view of `image` (0: black) as a square of `size` pixels, and its shade where views are shaded.

    The shade is brightness, contrast and gamma, as `samssl.data.inputs.unit_images` takes them.
    """
    native = crop.kind == "native"
    part = native_window(image, size) if native else random_crop(image, crop.smallest)
    part = part.flip(-1) if torch.rand(()) < crop.flip else part
    view = part if native else fit_square(part[None], size)[0]
    if crop.degrees:
        angle = crop.degrees * (2 * torch.rand(()).item() - 1)
        view = v2.functional.rotate(view, angle, interpolation=v2.InterpolationMode.BILINEAR)
    return view, draw_shade(crop) if crop.intensity or crop.gamma else None


def draw_shade(crop: CropConfig) -> Float[Tensor, "3"]:
    """Factors of brightness and contrast around 1, and the exponent of gamma."""
    brightness, contrast, gamma = 2 * torch.rand(3) - 1
    return torch.stack(
        [1 + crop.intensity * brightness, 1 + crop.intensity * contrast, (crop.gamma * gamma).exp()]
    )


def random_crop(image: Float[Tensor, "C H W"], smallest: float) -> Float[Tensor, "C h w"]:
    """A part of the same proportions that keeps between `smallest` and all of the area."""
    side = (smallest + (1 - smallest) * torch.rand(()).item()) ** 0.5
    return _somewhere(image, [max(1, round(length * side)) for length in image.shape[1:]])


def native_window(image: Float[Tensor, "C H W"], size: int) -> Float[Tensor, "C size size"]:
    """A window of `size` x `size` pixels, padded with zeros below and to the right where there are fewer."""
    part = _somewhere(image, [min(size, length) for length in image.shape[1:]])
    return F.pad(part, (0, size - part.shape[2], 0, size - part.shape[1]))


def _somewhere(image: Float[Tensor, "C H W"], shape: list[int]) -> Float[Tensor, "C h w"]:
    room = [length - part for length, part in zip(image.shape[1:], shape, strict=True)]
    top, left = (int(torch.randint(free + 1, ()).item()) for free in room)
    return image[:, top : top + shape[0], left : left + shape[1]]
