"""Image encoder and mask decoder as ONNX, each of which gives what torch gives, or is not written.

    image_encoder.onnx   images [batch, channels, S, S] with intensities in [0, 1] -> image_embeddings
    mask_decoder.onnx    image_embeddings -> low_res_logits, of automatic segmenters; of promptable ones, for
                         one object of each image, image_embeddings, point_coords [batch, points, 2],
                         point_labels [batch, points], mask_input and has_mask_input [batch] ->
                         low_res_logits [batch, masks, h, w] and iou_predictions [batch, masks]

Prompts are those of SAM's own ONNX export: (x, y) in pixels of the input, labels 1 inside, 0 outside, 2 and 3
the corners of a box, -1 no point; where there is no box, one point of -1 is added. Batches and numbers of
points may be any.

They are made by `torch.onnx.export(dynamo=True)`, the exporter that torch maintains: the older one traces,
and would keep the batch size with which it was called.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from samssl.config import UserError
from samssl.models.backbones import embed_images, token_side
from samssl.models.decoder import AutomaticSam, SamModules, decode_masks
from samssl.models.promptable import PromptableSam, resized
from samssl.models.sam import normalise

ENCODER_FILE, DECODER_FILE = "image_encoder.onnx", "mask_decoder.onnx"
MOST_DIFFERENT = 1e-3
"""The largest difference of a value from torch's with which a file is written."""
_ONE_FILE_BYTES = 1900 << 20
"""ONNX files hold less than 2 GiB; beyond, weights lie in a file beside them."""
_CHECKED = (1, 3)
"""Batch sizes; it is exported with another one."""
_EXPORTED = 2


class _Encoder(nn.Module):
    def __init__(self, sam: SamModules) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder

    def forward(self, images: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B C h w"]:
        return embed_images(self.image_encoder, normalise(images, self.image_encoder))


class _AutomaticDecoder(nn.Module):
    def __init__(self, sam: AutomaticSam) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, image_embeddings: Float[Tensor, "B C h w"]) -> Float[Tensor, "B classes H W"]:
        return self.sam.decode(image_embeddings)


class _PromptedDecoder(nn.Module):
    """`PromptableSam.decode` of one object an image, without choices that depend on values."""

    def __init__(self, sam: PromptableSam, grid: tuple[int, int]) -> None:
        super().__init__()
        self.mask_decoder = sam.mask_decoder
        self.prompt_encoder = resized(sam.prompt_encoder, grid, token_side(sam.image_encoder))

    def forward(
        self,
        image_embeddings: Float[Tensor, "B C h w"],
        point_coords: Float[Tensor, "B P 2"],
        point_labels: Int[Tensor, "B P"],
        mask_input: Float[Tensor, "B 1 H W"],
        has_mask_input: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B M H W"], Float[Tensor, "B M"]]:
        encoder = self.prompt_encoder
        places = encoder.pe_layer.forward_with_coords(point_coords + 0.5, encoder.input_image_size)
        labels = point_labels[..., None]
        sparse = torch.where(labels == -1, encoder.not_a_point_embed.weight, places)
        for label, embedding in enumerate(encoder.point_embeddings):
            assert isinstance(embedding, nn.Embedding)
            sparse = sparse + (labels == label) * embedding.weight
        no_mask = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        dense = torch.where(
            has_mask_input[:, None, None, None], encoder.mask_downscaling(mask_input), no_mask
        )
        return decode_masks(self.mask_decoder, image_embeddings, encoder.get_dense_pe(), sparse, dense)


@dataclass(frozen=True)
class _Part:
    """One file to write."""

    file: str
    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    """Something to compute, of a batch size."""
    outputs: tuple[str, ...]


def write_onnx(folder: Path, sam: Any, image_size: int, num_channels: int) -> dict[str, float]:
    """Write both files of `sam`, an `AutomaticSam` or `PromptableSam` without LoRA, into `folder`.

    Returns the largest difference of each from torch, by the name of the file.

    Raises:
        UserError: packages are missing, or a file would not give what torch gives; it is not left behind.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX files need pip install 'samssl[onnx]': {error.name} is missing.") from None
    return {part.file: _write(folder / part.file, part) for part in _parts(sam, image_size, num_channels)}


def _parts(sam: Any, image_size: int, num_channels: int) -> Iterator[_Part]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    encoder = _Encoder(sam).eval()
    images = lambda batch: {"images": drawn(batch, num_channels, image_size, image_size)}  # noqa: E731
    with torch.no_grad():
        *_, height, width = encoder(**images(1)).shape
    yield _Part(ENCODER_FILE, encoder, images, ("image_embeddings",))

    def embeddings(batch: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"image_embeddings": encoder(**images(batch))}

    def prompted(batch: int) -> dict[str, Tensor]:
        points = batch + 1
        return {
            **embeddings(batch),
            "point_coords": image_size * drawn(batch, points, 2),
            "point_labels": torch.randint(-1, 4, (batch, points), generator=generator),
            "mask_input": drawn(batch, 1, 4 * height, 4 * width) - 0.5,
            "has_mask_input": torch.arange(batch) % 2 == 1,
        }

    if isinstance(sam, AutomaticSam):
        yield _Part(DECODER_FILE, _AutomaticDecoder(sam).eval(), embeddings, ("low_res_logits",))
    else:
        decoder = _PromptedDecoder(sam, (height, width)).eval()
        yield _Part(DECODER_FILE, decoder, prompted, ("low_res_logits", "iou_predictions"))


def _write(path: Path, part: _Part) -> float:
    given = part.inputs(_EXPORTED)
    with torch.no_grad():
        part.module(**given)  # layouts that do not depend on values are found now, and are constants below
        program = torch.onnx.export(
            part.module,
            kwargs=given,
            input_names=list(given),
            output_names=list(part.outputs),
            dynamic_shapes={name: _free(name) for name in given},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _forget_source(program.model)
    size = sum(value.nbytes for value in part.module.state_dict().values())
    program.save(path, external_data=size > _ONE_FILE_BYTES)
    different = max(_difference(path, part, part.inputs(batch)) for batch in _CHECKED)
    if not different <= MOST_DIFFERENT:
        for written in path.parent.glob(f"{path.name}*"):
            written.unlink()
        raise UserError(
            f"{path.name} gives values that differ from torch's by {different:.2g}, and more than "
            f"{MOST_DIFFERENT:g} is not accepted. It was not written: use the bundle as it is."
        )
    return different


def _free(name: str) -> dict[int, Any]:
    """Which sizes of an input may be any."""
    free = torch.export.Dim.DYNAMIC
    return {0: free, 1: free} if name.startswith("point_") else {0: free}


def _forget_source(model: Any) -> None:
    """Leave out where in which file of this machine each node comes from."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for part in (node, *node.outputs):
                part.metadata_props.clear()
                part.doc_string = None


def _difference(path: Path, part: _Part, given: dict[str, Tensor]) -> float:
    """The largest one between onnxruntime and torch; NaN where either has none."""
    import onnxruntime

    with torch.no_grad():
        expected = part.module(**given)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(list(part.outputs), {name: value.numpy() for name, value in given.items()})
    expected = [expected] if isinstance(expected, Tensor) else expected
    return float(np.max([np.abs(a - b.numpy()).max() for a, b in zip(found, expected, strict=True)]))
