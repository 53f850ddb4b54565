"""The table of strategies beside the models that it describes."""

import copy

import pytest
import torch
from segment_anything.modeling import Sam

from samssl.cli import main
from samssl.models import attention
from samssl.models.lora import count_trained
from samssl.models.sam import architecture
from samssl.models.strategies import StrategyConfig, segmenter_from
from samssl.train.catalogue import activation_bytes, combinations, measure


def test_the_command_lists_the_18(capsys: pytest.CaptureFixture[str]) -> None:
    main(["strategies"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "/" in line.split(" ")[0]]
    names = [
        f"{variant}/{scope}/{method}"
        for variant in ("vit_h", "vit_b", "vit_t")
        for scope in ("decoder", "encoder_decoder")
        for method in ("vanilla", "adapter", "lora")
    ]
    assert [row[0] for row in rows] == names
    for row in rows:
        trained, total = (int(number.replace(",", "")) for number in row[1:3])
        assert 0 < trained <= total
        assert float(row[4]) > 0.7
    assert "attention and MLP of blocks 0-11 and the decoder" in lines[names.index(rows[10][0]) + 2]


def test_all_is_every_variant_and_method_of_the_profile() -> None:
    assert len(list(combinations(True, "fixed"))) == 5 * 2 * 5
    assert len(list(combinations(True, "paper"))) == 5 * 2 * 3
    assert len(list(combinations(False, "paper"))) == 18


def test_the_paper_adapts_four_blocks_of_vit_b() -> None:
    entry = measure("vit_b", "encoder_decoder", "lora", "paper")
    assert "blocks 0, 1, 10, 11 and" in entry.placement
    whole = measure("vit_b", "encoder_decoder", "lora", "fixed")
    assert 0.7e9 < entry.memory < whole.memory
    iou_token = 256
    of_a_block = 4 * (2 * 768 + 2 * 768)  # A and B of q and v, rank 4
    assert whole.trained - entry.trained == 8 * of_a_block - iou_token


def test_counts_are_those_of_a_model_with_weights() -> None:
    for method in ("vanilla", "adapter", "lora"):
        entry = measure("micro", "encoder_decoder", method, "fixed")
        strategy = StrategyConfig(method=method)
        model = segmenter_from(architecture("micro"), strategy, 2, seed=0)
        assert entry.trained == count_trained(model)


@pytest.mark.parametrize("method", ["vanilla", "adapter", "lora"])
def test_estimated_activations_are_those_that_a_real_step_keeps(
    micro_sam: Sam, monkeypatch: pytest.MonkeyPatch, method
) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)  # fused here too, as on a GPU
    strategy = StrategyConfig(method=method)
    real = segmenter_from(copy.deepcopy(micro_sam), strategy, 2, seed=0)
    shapes = segmenter_from(micro_sam, strategy, 2, seed=0).to("meta")
    wanted = activation_bytes(real, torch.rand(1, 1, 64, 64))
    assert activation_bytes(shapes, torch.empty(1, 1, 64, 64, device="meta")) == pytest.approx(
        wanted, rel=0.1
    )
