"""ONNX files of encoder and decoder give what torch gives, for any batch."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from torch import Tensor
from training_support import train_two_steps

from samssl.config import UserError
from samssl.models import onnx_files
from samssl.models.decoder import AutomaticSam
from samssl.models.onnx_files import DECODER_FILE, ENCODER_FILE, write_onnx
from samssl.models.promptable import PromptableSam, Prompts
from samssl.models.strategies import StrategyConfig, segmenter_from

SIZE = 32


def run(path: Path, **given: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {n: v.numpy() for n, v in given.items()})]


@pytest.fixture
def shallow_sam(micro_sam: Sam) -> Sam:
    """With one block of windows and one of global attention: exporting takes its time."""
    micro_sam.image_encoder.blocks = micro_sam.image_encoder.blocks[:2]
    return micro_sam


def test_automatic_segmenters_with_adapters(shallow_sam: Sam, tmp_path: Path) -> None:
    segmenter = segmenter_from(shallow_sam, StrategyConfig(method="adapter"), 3, 0)
    train_two_steps(segmenter, torch.rand(2, 1, SIZE, SIZE))
    images = torch.rand(5, 1, SIZE, SIZE)
    with torch.no_grad():
        expected = segmenter(images)
    differing = write_onnx(tmp_path, segmenter, SIZE, 1)
    assert set(differing) == {ENCODER_FILE, DECODER_FILE}
    assert 0 <= max(differing.values()) <= 1e-3
    for batch in (1, 5):
        (embeddings,) = run(tmp_path / ENCODER_FILE, images=images[:batch])
        (logits,) = run(tmp_path / DECODER_FILE, image_embeddings=embeddings)
        torch.testing.assert_close(logits, expected[:batch], atol=1e-3, rtol=0)
    assert {path.name for path in tmp_path.iterdir()} == set(differing)
    for path in tmp_path.iterdir():
        assert b".py" not in path.read_bytes()  # no stack traces, which have paths of this machine


def test_promptable_segmenters_take_prompts_as_sams_own_export_does(shallow_sam: Sam, tmp_path: Path) -> None:
    sam = PromptableSam(shallow_sam).eval()
    write_onnx(tmp_path, sam, 64, 1)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 1, 64, 64, generator=generator)
    (embeddings,) = run(tmp_path / ENCODER_FILE, images=images)
    corners, point = torch.tensor([[4.0, 8.0], [40.0, 50.0]]), torch.tensor([[20.0, 30.0]])
    earlier = torch.randn(2, 1, 64, 64, generator=generator)
    given = {
        "image_embeddings": embeddings,
        "point_coords": torch.cat([point, corners]).expand(2, -1, -1).contiguous(),
        "point_labels": torch.tensor([[1, 2, 3]]).expand(2, -1).contiguous(),
        "mask_input": earlier,
        "has_mask_input": torch.tensor([True, True]),
    }
    logits, iou = run(tmp_path / DECODER_FILE, **given)
    prompts = Prompts(
        torch.arange(2),
        points=point.expand(2, 1, 2),
        labels=torch.ones(2, 1, dtype=torch.int64),
        boxes=corners.flatten().expand(2, 4),
        masks=earlier,
    )
    with torch.no_grad():
        for multimask, shown in ((False, slice(0, 1)), (True, slice(1, None))):
            expected, quality = sam.decode(embeddings, prompts, multimask=multimask)
            torch.testing.assert_close(logits[:, shown], expected, atol=1e-3, rtol=0)
            torch.testing.assert_close(iou[:, shown], quality, atol=1e-3, rtol=0)
    only = given | {
        "point_coords": torch.cat([point, torch.zeros(1, 2)])[None].expand(2, -1, -1).contiguous(),
        "point_labels": torch.tensor([[1, -1]]).expand(2, -1).contiguous(),
        "has_mask_input": torch.tensor([False, False]),
    }
    logits, iou = run(tmp_path / DECODER_FILE, **only)
    official = SamOnnxModel(shallow_sam, return_single_mask=False)
    official.img_size = 64
    with torch.no_grad():
        for number in range(2):
            _, quality, expected = official(
                embeddings[number : number + 1],
                only["point_coords"][:1],
                only["point_labels"][:1].float(),
                torch.zeros(1, 1, 64, 64),
                torch.zeros(1),
                torch.tensor([64.0, 64.0]),
            )
            torch.testing.assert_close(logits[number : number + 1], expected, atol=1e-3, rtol=0)
            torch.testing.assert_close(iou[number : number + 1], quality, atol=1e-3, rtol=0)


def test_a_file_that_differs_is_not_left_behind(
    shallow_sam: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit below the rounding errors of fp32 stands for an export that went wrong."""
    monkeypatch.setattr(onnx_files, "MOST_DIFFERENT", 1e-12)
    with pytest.raises(UserError, match=r"image_encoder\.onnx gives values that differ from torch's by \d"):
        write_onnx(tmp_path, AutomaticSam(shallow_sam, 2).eval(), SIZE, 1)
    assert not list(tmp_path.iterdir())
