"""Networks to compare SAM with, trained from scratch: a U-Net as nnU-Net plans it, and Swin UNETR.

Both are MONAI's, in 2D. They see what SAM sees and give logits at the resolution of their input, so that
loss, bundle, prediction and evaluation are the same.
"""

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from samssl.config import PositiveInt, config
from samssl.models.sam import NORMALISATION, ModelConfig, normalise

NetworkName = Literal["sam", "unet", "swin_unetr"]

DEEPEST_SIDE = 4
"""A U-Net halves its grid for as long as no fewer pixels than this are left a side (arXiv:1904.08128)."""
SWIN_STRIDE = 32
"""Input pixels for one token of Swin UNETR's last stage, in each direction."""


@config
class UNetConfig:
    """Size of the U-Net; its depth follows from the image size."""

    features: PositiveInt = 32
    """Channels at full resolution; doubled with every halving of the grid."""
    most_features: PositiveInt = 512
    """Channels are not doubled beyond this."""


@config
class SwinUnetrConfig:
    """Size of Swin UNETR (arXiv:2201.01266)."""

    features: Annotated[int, Ge(12)] = 48
    """Channels of the first stage, a multiple of 12; doubled with every stage."""
    depths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (2, 2, 2, 2)
    """Blocks of each of the four stages."""

    def __post_init__(self) -> None:
        if self.features % 12:
            raise ValueError(f"features {self.features} is not a multiple of 12; choose one, as 24 or 48")


@config
class BaselineConfig:
    """Sizes of the networks that SAM is compared with."""

    unet: UNetConfig = UNetConfig()
    """Used where `strategy.network` is unet."""
    swin_unetr: SwinUnetrConfig = SwinUnetrConfig()
    """Used where `strategy.network` is swin_unetr."""


class Baseline(nn.Module):
    """A network of three input channels as a segmenter."""

    def __init__(self, network: nn.Module, normalisation: str) -> None:
        super().__init__()
        self.network = network
        setattr(network, NORMALISATION, normalisation)

    def forward(self, images: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B classes H W"]:
        """Logits before softmax of images with intensities in [0, 1], pixel by pixel."""
        return self.network(normalise(images, self.network))


def check_baseline(name: NetworkName, image_size: int) -> None:
    """Refuse images that do not fit the network `name`.

    Raises:
        ValueError: MONAI's U-Net needs three resolutions; Swin UNETR's strides have to divide the image, and
            its last instance norm needs more than one token.
    """
    if name == "unet" and unet_levels(image_size) < 3:
        raise ValueError(f"unet cannot halve model.image_size {image_size} twice; choose a multiple of 16")
    if name == "swin_unetr" and (image_size % SWIN_STRIDE or image_size == SWIN_STRIDE):
        raise ValueError(
            f"swin_unetr takes a model.image_size that is a multiple of {SWIN_STRIDE}, from "
            f"{2 * SWIN_STRIDE} on, not {image_size}"
        )


def build_baseline(
    name: NetworkName, sizes: BaselineConfig, model: ModelConfig, num_classes: int, seed: int
) -> Baseline:
    """The network `name` for images of `model.image_size`, drawn from `seed`; all of it trains."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "unet":
            network = build_unet(sizes.unet, model.image_size, num_classes)
        else:
            network = build_swin_unetr(sizes.swin_unetr, num_classes)
    return Baseline(network, model.normalisation or "sam")


def build_unet(sizes: UNetConfig, image_size: int, num_classes: int) -> nn.Module:
    """nnU-Net's plain U-Net: two 3 x 3 convolutions a level, instance norm, leaky ReLU."""
    from monai.networks.nets.dynunet import DynUNet

    levels = unet_levels(image_size)
    return DynUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=num_classes,
        kernel_size=[3] * levels,
        strides=[1, *[2] * (levels - 1)],
        upsample_kernel_size=[2] * (levels - 1),
        filters=[min(sizes.features * 2**level, sizes.most_features) for level in range(levels)],
    )


def unet_levels(image_size: int) -> int:
    """Resolutions of the U-Net: the full one, and one for each halving."""
    levels, side = 1, image_size
    while side % 2 == 0 and side // 2 >= DEEPEST_SIDE:
        levels, side = levels + 1, side // 2
    return levels


def build_swin_unetr(sizes: SwinUnetrConfig, num_classes: int) -> nn.Module:
    """Swin UNETR with instance norms."""
    from monai.networks.nets.swin_unetr import SwinUNETR

    return SwinUNETR(
        in_channels=3,
        out_channels=num_classes,
        depths=sizes.depths,
        feature_size=sizes.features,
        spatial_dims=2,
    )
