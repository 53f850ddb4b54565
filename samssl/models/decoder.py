"""SAM's mask decoder over batches of images, and the prompt-free segmenter built on it.

`segment_anything` decodes many prompts of one image; here every image of a batch is decoded at once
with the same parameters, equal to Meta's code image by image.
"""

import copy

import torch
from jaxtyping import Float
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor, nn

from samssl.models.backbones import embed_images
from samssl.models.sam import normalise


def decode_masks(
    decoder: MaskDecoder,
    image_embeddings: Float[Tensor, "B C h w"],
    image_pe: Float[Tensor, "1 C h w"],
    sparse_embeddings: Float[Tensor, "B prompts C"],
    dense_embeddings: Float[Tensor, "B C h w"],
) -> tuple[Float[Tensor, "B M H W"], Float[Tensor, "B M"]]:
    """One decoding per image: `low_res_logits` of all M mask tokens and their predicted IoU."""
    batch, _, height, width = image_embeddings.shape
    own_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own_tokens.expand(batch, -1, -1), sparse_embeddings], dim=1)
    hidden, source = decoder.transformer(
        image_embeddings + dense_embeddings, image_pe.expand(batch, -1, -1, -1), tokens
    )
    mask_tokens = hidden[:, 1 : 1 + decoder.num_mask_tokens]
    upscaled = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, (height, width)))
    kernels = torch.stack(
        [network(mask_tokens[:, index]) for index, network in enumerate(decoder.output_hypernetworks_mlps)],
        dim=1,
    )
    logits = (kernels @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return logits, decoder.iou_prediction_head(hidden[:, 0])


def class_decoder(decoder: MaskDecoder, num_classes: int) -> MaskDecoder:
    """A copy of `decoder` with one mask token and hypernetwork per class, background included.

    Class c starts from the published mask token and hypernetwork `c % M`, so that resized heads keep
    what they learnt. The IoU head is resized too, and not used by automatic segmentation.
    """
    resized = copy.deepcopy(decoder)
    source = [label % decoder.num_mask_tokens for label in range(num_classes)]
    resized.num_mask_tokens = num_classes
    resized.num_multimask_outputs = num_classes - 1
    resized.mask_tokens = nn.Embedding.from_pretrained(
        decoder.mask_tokens.weight[source].clone(), freeze=False
    )
    resized.output_hypernetworks_mlps = nn.ModuleList(
        [copy.deepcopy(decoder.output_hypernetworks_mlps[index]) for index in source]
    )
    head = resized.iou_prediction_head.layers[-1]
    assert isinstance(head, nn.Linear)
    head.weight = nn.Parameter(head.weight[source].clone())
    head.bias = nn.Parameter(head.bias[source].clone())
    head.out_features = num_classes
    return resized


class SamModules(nn.Module):
    """SAM's own modules under SAM's names, so that keys of `state_dict()` are Meta's."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder

    def embed(self, images: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B C h w"]:
        """Image embeddings of images with intensities in [0, 1]: all that the encoder does."""
        return embed_images(self.image_encoder, normalise(images, self.image_encoder))


class AutomaticSam(SamModules):
    """Prompt-free segmentation into `num_classes` exclusive classes, class 0 being background.

    With `own_heads` the decoder keeps SAM's four mask tokens: of two classes, the foreground's logit is the
    mask that SAM gives with `multimask_output=False`, and the background's is 0.
    """

    def __init__(self, sam: Sam, num_classes: int, *, own_heads: bool = False) -> None:
        super().__init__(sam)
        assert not own_heads or num_classes == 2, f"SAM's own heads draw one mask, not {num_classes} classes"
        self.own_heads = own_heads
        if not own_heads:
            self.mask_decoder = class_decoder(sam.mask_decoder, num_classes)

    def forward(self, images: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B classes h w"]:
        """`low_res_logits` before softmax of images with intensities in [0, 1], at 4 x the token grid."""
        return self.decode(self.embed(images))

    def decode(self, image_embeddings: Float[Tensor, "B C h w"]) -> Float[Tensor, "B classes H W"]:
        """`low_res_logits` before softmax, at 4 x the token grid."""
        no_prompt = image_embeddings.new_zeros(image_embeddings.shape[0], 0, image_embeddings.shape[1])
        no_mask = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        image_pe = self.prompt_encoder.pe_layer(tuple(image_embeddings.shape[-2:]))[None]
        logits, _ = decode_masks(
            self.mask_decoder, image_embeddings, image_pe, no_prompt, no_mask.expand_as(image_embeddings)
        )
        if not self.own_heads:
            return logits
        foreground = logits[:, :1]
        return torch.cat([torch.zeros_like(foreground), foreground], dim=1)
