"""What masked patches have to be predicted as, shared by all masked-image methods."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from samssl.config import Fraction, NonNegative, config
from samssl.models.encoder import patchify

VARIANCE_FLOOR = 1e-6


@config
class TargetConfig:
    """Targets of the masked patches, and how much each counts."""

    norm_pix_loss: bool = True
    """Normalise each target patch by its own mean and standard deviation; false predicts intensities."""
    flat_std: NonNegative = 0.02
    """Patches whose intensities (0 to 1) have a smaller standard deviation, as air has, are flat: normalised,
    they would be amplified noise."""
    flat_weight: Fraction = 0.0
    """Weight of a flat patch in the loss; 0 leaves flat patches out, 1 treats them like the others."""


@dataclass(frozen=True)
class Targets:
    """Patches of B images in raster order; each is flattened channel first, as a convolution's weight is."""

    patches: Float[Tensor, "B N CPP"]
    """Intensities in [0, 1]."""
    mean: Float[Tensor, "B N 1"]
    std: Float[Tensor, "B N 1"]
    """Standard deviation with the floor that the official MAE adds."""
    normalised: bool

    @property
    def values(self) -> Float[Tensor, "B N CPP"]:
        """What is to be predicted."""
        return (self.patches - self.mean) / self.std if self.normalised else self.patches

    def varies(self, flat_std: float) -> Bool[Tensor, "B N"]:
        """True where a patch is not flat: tissue, mostly."""
        return self.std[..., 0] > flat_std

    def intensities(
        self, predicted: Float[Tensor, "B M CPP"], index: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M CPP"]:
        """Predictions for the patches at raster `index` as intensities, at their own mean and contrast."""
        if not self.normalised:
            return predicted
        return predicted * take(self.std, index) + take(self.mean, index)


@dataclass(frozen=True)
class Reconstruction:
    """What a method shows of B images; intensities in [0, 1], True = hidden."""

    images: Float[Tensor, "B C H W"]
    predicted: Float[Tensor, "B C H W"]
    hidden: Bool[Tensor, "B C H W"]


def patch_targets(images: Float[Tensor, "B C H W"], patch: int, targets: TargetConfig) -> Targets:
    """The targets of images in [0, 1], each patch normalised over its pixels and channels together."""
    patches = patchify(images, patch)
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return Targets(patches, mean, (variance + VARIANCE_FLOOR).sqrt(), targets.norm_pix_loss)


def weighted_mean(
    errors: Float[Tensor, "B M"], varies: Bool[Tensor, "B M"], flat_weight: float
) -> Float[Tensor, ""]:
    """Mean error over patches, flat ones counting `flat_weight`."""
    weights = torch.where(varies, 1.0, flat_weight).to(errors.dtype)
    return (errors * weights).sum() / weights.sum().clamp(min=1)


def take(patches: Float[Tensor, "B N D"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M D"]:
    """The patches at raster `index` of each image."""
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))


def fill(
    images: Float[Tensor, "B C H W"],
    targets: Targets,
    predicted: Float[Tensor, "B M CPP"],
    index: Int[Tensor, "B M"],
    patch: int,
) -> Reconstruction:
    """Images with the hidden patches at `index` replaced by what was predicted for them."""
    place = index[..., None].expand_as(predicted)
    painted = targets.intensities(predicted, index).to(images.dtype)
    filled = targets.patches.scatter(1, place, painted)
    shown = torch.zeros_like(targets.patches).scatter(1, place, 1.0)
    return Reconstruction(images, unpatchify(filled, images, patch), unpatchify(shown, images, patch).bool())


def unpatchify(
    patches: Float[Tensor, "B N CPP"], like: Float[Tensor, "B C H W"], patch: int
) -> Float[Tensor, "B C H W"]:
    """The images whose `patchify` gives `patches`."""
    return F.fold(patches.transpose(1, 2), like.shape[-2:], kernel_size=patch, stride=patch)
