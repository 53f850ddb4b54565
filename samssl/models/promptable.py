"""SAM with prompts over batches: several images, and several objects in each.

`segment_anything` decodes the prompts of one image at a time; here those of all images of a batch are
decoded at once with the same parameters, equal to Meta's code image by image and object by object.
Points are (x, y) and boxes (left, top, right, bottom), in pixels of the model's input, whole numbers
being centres of pixels.
"""

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from segment_anything.modeling import PromptEncoder
from torch import Tensor

from samssl.models.backbones import token_side
from samssl.models.decoder import SamModules, decode_masks


@dataclass(frozen=True)
class Prompts:
    """What is said of N objects; all of them have the same kinds of prompts, at least one."""

    image: Int[Tensor, " N"]
    """Place in the batch of the image that the object is in."""
    points: Float[Tensor, "N P 2"] | None = None
    labels: Int[Tensor, "N P"] | None = None
    """Of the points: 1 lies inside the object, 0 outside, -1 is no point at all."""
    boxes: Float[Tensor, "N 4"] | None = None
    masks: Float[Tensor, "N 1 H W"] | None = None
    """Logits of an earlier answer, as large as `low_res_logits`."""

    def clicked(self, points: Float[Tensor, "N 2"], labels: Int[Tensor, " N"]) -> "Prompts":
        """With one more point for each object."""
        points, labels = points[:, None], labels[:, None]
        if self.points is not None and self.labels is not None:
            points, labels = torch.cat([self.points, points], 1), torch.cat([self.labels, labels], 1)
        return replace(self, points=points, labels=labels)

    def answered(self, masks: Float[Tensor, "N H W"]) -> "Prompts":
        """With the logits of the last answer in place of any earlier one's."""
        return replace(self, masks=masks[:, None])

    @property
    def ambiguous(self) -> bool:
        """Whether a single point is all that is said, for which SAM has three answers."""
        only_points = self.boxes is None and self.masks is None
        return only_points and self.points is not None and self.points.shape[1] == 1


class PromptableSam(SamModules):
    """SAM's own modules, asked about objects."""

    def forward(
        self, images: Float[Tensor, "B channels H W"], prompts: Prompts, *, multimask: bool
    ) -> tuple[Float[Tensor, "N M h w"], Float[Tensor, "N M"]]:
        """`low_res_logits` and predicted IoU of the prompted objects in images of [0, 1].

        M is 3 with `multimask` and else 1; h and w are 4 x the token grid.
        """
        return self.decode(self.embed(images), prompts, multimask=multimask)

    def decode(
        self, image_embeddings: Float[Tensor, "B C h w"], prompts: Prompts, *, multimask: bool
    ) -> tuple[Float[Tensor, "N M H W"], Float[Tensor, "N M"]]:
        """As `forward`, from the embeddings."""
        height, width = image_embeddings.shape[-2:]
        prompt_encoder = resized(self.prompt_encoder, (height, width), token_side(self.image_encoder))
        with torch.autocast(image_embeddings.device.type, enabled=False):  # places need all their digits
            sparse, dense = encode_prompts(prompt_encoder, prompts)
            image_pe = prompt_encoder.get_dense_pe()
        of_objects = image_embeddings.index_select(0, prompts.image)
        logits, iou = decode_masks(self.mask_decoder, of_objects, image_pe, sparse, dense)
        shown = slice(1, None) if multimask else slice(0, 1)
        return logits[:, shown], iou[:, shown]


def resized(prompt_encoder: PromptEncoder, grid: tuple[int, int], patch: int) -> PromptEncoder:
    """The same modules, for images of `grid` tokens of `patch` pixels; the one given is left as it is."""
    other = copy.copy(prompt_encoder)
    other.image_embedding_size = grid
    other.input_image_size = (grid[0] * patch, grid[1] * patch)
    return other


def encode_prompts(
    prompt_encoder: PromptEncoder, prompts: Prompts
) -> tuple[Float[Tensor, "N tokens C"], Float[Tensor, "N C h w"]]:
    """Tokens of points and boxes, and what is added to the image embeddings."""
    given = (prompts.points, prompts.boxes, prompts.masks)
    assert any(part is not None for part in given), "an object without any prompt"
    points = None if prompts.points is None else (prompts.points.float(), prompts.labels)
    masks = None if prompts.masks is None else prompts.masks.float()
    return prompt_encoder(points=points, boxes=prompts.boxes, masks=masks)


def best_masks(
    logits: Float[Tensor, "N M h w"], predicted_iou: Float[Tensor, "N M"]
) -> Float[Tensor, "N h w"]:
    """Of each object's answers the one that SAM itself holds to be the best."""
    return logits[torch.arange(len(logits), device=logits.device), predicted_iou.argmax(dim=1)]
