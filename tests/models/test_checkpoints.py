"""Checkpoints of exactly Meta's format, made here."""

import pickle
from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from samssl.models.checkpoints import (
    CheckpointError,
    load_weights,
    read_weights,
    save_weights,
    weights_digest,
)
from samssl.models.sam import ModelConfig, build_micro, build_sam


def test_an_official_format_vit_b_loads_here_and_ours_loads_there(tmp_path: Path) -> None:
    official = sam_model_registry["vit_b"]()
    torch.save(official.state_dict(), tmp_path / "sam_vit_b_01ec64.pth")
    sam = build_sam(ModelConfig(variant="vit_b", checkpoint=tmp_path / "sam_vit_b_01ec64.pth"))
    assert weights_digest(sam.state_dict()) == weights_digest(official.state_dict())
    save_weights(sam, tmp_path / "ours.pth")
    back = sam_model_registry["vit_b"](checkpoint=str(tmp_path / "ours.pth"))  # strict, as Meta loads it
    assert weights_digest(back.state_dict()) == weights_digest(sam.state_dict())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_come_back_from_either_format(micro_sam: Sam, tmp_path: Path, name: str) -> None:
    save_weights(micro_sam, tmp_path / name)
    other = build_micro()
    load_weights(other, read_weights(tmp_path / name), source=name)
    assert weights_digest(other.state_dict()) == weights_digest(micro_sam.state_dict())


def test_the_same_weights_give_the_same_file(micro_sam: Sam, tmp_path: Path) -> None:
    for name in ("one.pth", "two.pth"):
        save_weights(micro_sam, tmp_path / name)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()


def test_a_wrong_checkpoint_is_explained_key_by_key_and_nothing_is_loaded(micro_sam: Sam) -> None:
    weights = dict(micro_sam.state_dict())
    before = weights_digest(weights)
    weights["image_encoder.pos_embed"] = torch.zeros(1, 64, 64, 768)
    weights["extra.weight"] = weights.pop("mask_decoder.iou_token.weight") + 1
    with pytest.raises(CheckpointError) as caught:
        load_weights(micro_sam, weights, source="sam.pth")
    message = str(caught.value)
    assert "missing (1): mask_decoder.iou_token.weight" in message
    assert "unexpected (1): extra.weight" in message
    assert "image_encoder.pos_embed is 1x64x64x768, needs 1x16x16x128" in message
    assert "as wide as vit_b" in message
    assert weights_digest(micro_sam.state_dict()) == before


class Trap:
    """Does something when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_with_code_in_it_is_refused_unrun(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="cannot be read as model weights"):
        read_weights(tmp_path / "evil.pth")
    torch.save({"model": Trap()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read as model weights"):
        read_weights(tmp_path / "evil.pth")


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sam.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sam\.pth"):
        read_weights(tmp_path / "sam.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*sam\.pth"):
        read_weights(tmp_path / "sam.pth")


def test_random_weights_follow_their_seed() -> None:
    digests = [
        weights_digest(build_sam(ModelConfig(variant="micro", image_size=64, init_seed=seed)).state_dict())
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]
