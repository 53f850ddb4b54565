"""What both families of image encoders do: SAM's ViTs and MobileSAM's TinyViT."""

from jaxtyping import Bool, Float
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samssl.models import encoder as vit
from samssl.models.tinyvit import STRIDE, TinyViT

ImageEncoder = ImageEncoderViT | TinyViT


def embed_images(encoder: ImageEncoder, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
    """Image embeddings of normalised `images` of any size that is a multiple of the patch size."""
    return vit.encode_images(encoder, images) if isinstance(encoder, ImageEncoderViT) else encoder(images)


def encode_tokens(encoder: ImageEncoder, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w D"]:
    """All tokens of normalised `images` before the neck, which pretraining does not reach."""
    if isinstance(encoder, ImageEncoderViT):
        return vit.encode_all(encoder, images)
    return encoder.encode(images).permute(0, 2, 3, 1)


def token_side(encoder: ImageEncoder) -> int:
    """Side in pixels of what one token stands for."""
    return vit.patch_side(encoder) if isinstance(encoder, ImageEncoderViT) else STRIDE


def token_width(encoder: ImageEncoder) -> int:
    """Channels of a token before the neck."""
    return encoder.patch_embed.proj.out_channels if isinstance(encoder, ImageEncoderViT) else encoder.width


def mask_width(encoder: ImageEncoder) -> int:
    """Numbers in the mask token of `encode_masked`."""
    return token_width(encoder) if isinstance(encoder, ImageEncoderViT) else 3


def encode_masked(
    encoder: ImageEncoder,
    images: Float[Tensor, "B 3 H W"],
    hidden: Bool[Tensor, "B hw"],
    mask_token: Float[Tensor, " M"] | nn.Parameter,
) -> Float[Tensor, "B hw D"]:
    """All tokens of normalised `images` before the neck, in raster order, without sight of hidden patches.

    In a ViT `mask_token` takes the place of a hidden patch's embedding, before positions are added.
    TinyViT's stem mixes neighbouring pixels, so that there it is a colour painted over the hidden patch.
    """
    if isinstance(encoder, ImageEncoderViT):
        return vit.encode_all(encoder, images, hidden, mask_token).flatten(1, 2)
    rows, columns = (side // STRIDE for side in images.shape[-2:])
    covered = hidden.unflatten(1, (rows, columns))
    covered = covered.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
    painted = images.where(~covered[:, None], mask_token[:, None, None])
    return encoder.encode(painted).flatten(2).transpose(1, 2)
