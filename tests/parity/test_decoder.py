"""Batched decoding against `segment_anything`'s decoder, image by image."""

import torch
from segment_anything.modeling import Sam

from samssl.models.decoder import AutomaticSam, class_decoder, decode_masks
from samssl.models.encoder import encode_images
from samssl.models.sam import normalise


@torch.no_grad()
def test_a_batch_of_images_with_prompts_decodes_as_meta_decodes_each(micro_sam: Sam) -> None:
    embeddings, points = torch.randn(3, 64, 16, 16), torch.rand(3, 2, 2) * 64
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]])
    sparse, dense = micro_sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    image_pe = micro_sam.prompt_encoder.get_dense_pe()
    logits, iou = decode_masks(micro_sam.mask_decoder, embeddings, image_pe, sparse, dense)
    for index in range(3):
        wanted_logits, wanted_iou = micro_sam.mask_decoder.predict_masks(
            embeddings[index : index + 1], image_pe, sparse[index : index + 1], dense[index : index + 1]
        )
        assert torch.allclose(logits[index], wanted_logits[0], atol=1e-5)
        assert torch.allclose(iou[index], wanted_iou[0], atol=1e-5)


@torch.no_grad()
def test_four_classes_without_prompt_are_the_four_published_masks(micro_sam: Sam) -> None:
    """With as many classes as SAM has mask tokens, the untuned segmenter is SAM without a prompt."""
    images = torch.rand(2, 1, 64, 64)
    logits = AutomaticSam(micro_sam, num_classes=4)(images)
    embeddings = encode_images(micro_sam.image_encoder, normalise(images, micro_sam.image_encoder))
    sparse, dense = micro_sam.prompt_encoder(points=None, boxes=None, masks=None)
    for index in range(2):
        wanted, _ = micro_sam.mask_decoder.predict_masks(
            embeddings[index : index + 1], micro_sam.prompt_encoder.get_dense_pe(), sparse[:1], dense
        )
        assert torch.allclose(logits[index], wanted[0], atol=1e-5)


def test_resized_heads_keep_published_weights(micro_sam: Sam) -> None:
    decoder = class_decoder(micro_sam.mask_decoder, num_classes=6)
    for label in range(6):
        source = micro_sam.mask_decoder.output_hypernetworks_mlps[label % 4].state_dict()
        for name, value in decoder.output_hypernetworks_mlps[label].state_dict().items():
            assert torch.equal(value, source[name])
        assert torch.equal(
            decoder.mask_tokens.weight[label], micro_sam.mask_decoder.mask_tokens.weight[label % 4]
        )
