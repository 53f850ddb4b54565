"""Prompts of several images and objects at once against `segment_anything`, image by image."""

import copy
from typing import Any

import pytest
import torch
from segment_anything.modeling import PromptEncoder, Sam
from torch import Tensor

from samssl.models.promptable import PromptableSam, Prompts

IMAGE = torch.tensor([0, 0, 0, 2, 2])
"""Of five objects; the image in the middle has none."""
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
KINDS = [
    ("points",),
    ("boxes",),
    ("masks",),
    ("points", "boxes"),
    ("points", "masks"),
    ("boxes", "masks"),
    ("points", "boxes", "masks"),
]


def drawn(grid: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(5, 2, 2, generator=generator) * 63
    return {
        "points": torch.rand(5, 3, 2, generator=generator) * 63,
        "labels": torch.tensor([[1, 0, 1], [1, 1, -1], [1, -1, -1], [0, 1, 1], [1, 0, 0]]),
        "boxes": torch.cat([corners.amin(1), corners.amax(1)], dim=1),
        "masks": torch.randn(5, 1, 4 * grid, 4 * grid, generator=generator) * 5,
    }


def chosen(given: dict[str, Tensor], kinds: tuple[str, ...]) -> dict[str, Tensor]:
    wanted = {*kinds, *(["labels"] if "points" in kinds else [])}
    return {name: value for name, value in given.items() if name in wanted}


def as_meta(sam: Sam, images: Tensor, given: dict[str, Tensor], multimask: bool) -> list[dict[str, Tensor]]:
    """`Sam.forward`, which takes the prompts of each image under names of its own."""
    names = {"points": "point_coords", "labels": "point_labels", "boxes": "boxes", "masks": "mask_inputs"}
    records: list[dict[str, Any]] = []
    for index in (0, 2):
        record = {"image": 255 * images[index].expand(3, -1, -1), "original_size": (64, 64)}
        records.append(record | {names[kind]: value[index == IMAGE] for kind, value in given.items()})
    return sam(records, multimask_output=multimask)


def compare(sam: Sam, official: Sam, grid: int, kinds: tuple[str, ...], multimask: bool) -> None:
    images = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    given = chosen(drawn(grid), kinds)
    logits, iou = PromptableSam(sam)(images, Prompts(IMAGE, **given), multimask=multimask)
    wanted = as_meta(official, images, given, multimask)
    torch.testing.assert_close(logits, torch.cat([part["low_res_logits"] for part in wanted]), **CLOSE)
    torch.testing.assert_close(iou, torch.cat([part["iou_predictions"] for part in wanted]), **CLOSE)
    assert logits.shape == (5, 3 if multimask else 1, 4 * grid, 4 * grid)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_a_batch_of_prompts_is_what_meta_answers_to_each(micro_sam: Sam, kinds, multimask: bool) -> None:
    compare(micro_sam, micro_sam, 16, kinds, multimask)


@torch.no_grad()
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_the_prompt_encoder_follows_the_image(micro_mobile_sam: Sam, kinds) -> None:
    """TinyViT has 4 x 4 tokens where the prompt encoder was built for 16 x 16."""
    official = copy.deepcopy(micro_mobile_sam)
    official.prompt_encoder = PromptEncoder(64, (4, 4), (64, 64), 16)
    official.prompt_encoder.load_state_dict(micro_mobile_sam.prompt_encoder.state_dict())
    official.image_encoder.img_size = 64
    compare(micro_mobile_sam, official, 4, kinds, multimask=True)
    assert micro_mobile_sam.prompt_encoder.image_embedding_size == (16, 16)


@torch.no_grad()
def test_smaller_images_are_decoded_at_their_own_size(micro_sam: Sam) -> None:
    embeddings = torch.randn(3, 64, 8, 8, generator=torch.Generator().manual_seed(6))
    prompts = Prompts(IMAGE, **chosen({**drawn(8), "boxes": drawn(8)["boxes"] / 2}, ("boxes",)))
    logits, iou = PromptableSam(micro_sam).decode(embeddings, prompts, multimask=True)
    smaller = PromptEncoder(64, (8, 8), (32, 32), 16)
    smaller.load_state_dict(micro_sam.prompt_encoder.state_dict())
    for index in range(5):
        assert prompts.boxes is not None
        sparse, dense = smaller(points=None, boxes=prompts.boxes[index : index + 1], masks=None)
        image = embeddings[IMAGE[index]][None]
        wanted = micro_sam.mask_decoder(image, smaller.get_dense_pe(), sparse, dense, multimask_output=True)
        torch.testing.assert_close(logits[index], wanted[0][0], **CLOSE)
        torch.testing.assert_close(iou[index], wanted[1][0], **CLOSE)


def test_clicks_and_answers_are_added() -> None:
    prompts = Prompts(torch.tensor([0]), points=torch.zeros(1, 1, 2), labels=torch.ones(1, 1).long())
    assert prompts.ambiguous
    more = prompts.clicked(torch.ones(1, 2), torch.zeros(1).long())
    assert more.points is not None
    assert more.points.tolist() == [[[0, 0], [1, 1]]]
    assert more.labels is not None
    assert more.labels.tolist() == [[1, 0]]
    assert not more.ambiguous
    assert not prompts.answered(torch.zeros(1, 8, 8)).ambiguous
    assert Prompts(torch.tensor([0]), boxes=torch.zeros(1, 4)).ambiguous is False
