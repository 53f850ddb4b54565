import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samssl.models.checkpoints import put_weights, trained_tensors
from samssl.models.decoder import AutomaticSam
from samssl.models.lora import LoraConfig, count_trained
from samssl.models.strategies import StrategyConfig, apply_strategy

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
LORA = StrategyConfig(lora=LoraConfig(rank=3, alpha=3))


def two_steps(model: torch.nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(IMAGES) - 1).square().mean().backward()
        optimizer.step()


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("scope", ["encoder_decoder", "decoder"])
@pytest.mark.parametrize("method", ["lora", "vanilla"])
def test_exactly_the_intended_tensors_change(micro_sam: Sam, method, scope) -> None:
    plain = AutomaticSam(micro_sam, 3)
    with torch.no_grad():
        wanted = plain(IMAGES)
    model = apply_strategy(plain, StrategyConfig(method=method, scope=scope), 3)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), wanted)
    before, trained = state(model), trained_tensors(model).keys()
    two_steps(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trained)
    assert any("image_encoder" in name for name in trained) == (scope == "encoder_decoder")
    assert any("output_hypernetworks_mlps.2" in name for name in trained)
    assert not any("iou_prediction_head" in name or "prompt_encoder" in name for name in trained)
    if method == "lora":
        encoder = [name for name in trained if "image_encoder" in name]
        assert all("attn.qkv.lora_" in name for name in encoder)
        decoder = [name for name in trained if "transformer" in name]
        assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in decoder)


def test_lora_moves_q_and_v_by_the_asked_rank_and_never_k(micro_sam: Sam) -> None:
    model = apply_strategy(AutomaticSam(micro_sam, 3), LORA, 3)
    two_steps(model)
    fused = model.base_model.model.image_encoder.blocks[0].attn.qkv
    q, k, v = fused.get_delta_weight("default").chunk(3)
    assert torch.linalg.matrix_rank(q) == 3
    assert torch.linalg.matrix_rank(v) == 3
    assert torch.count_nonzero(k) == 0


def test_alpha_equal_to_rank_is_unscaled(micro_sam: Sam) -> None:
    model = apply_strategy(AutomaticSam(micro_sam, 3), LORA, 3)
    two_steps(model)
    fused = model.base_model.model.image_encoder.blocks[0].attn.qkv
    product = fused.lora_B["default"].weight @ fused.lora_A["default"].weight
    assert torch.allclose(fused.get_delta_weight("default"), product)


def test_trained_numbers_are_counted_without_the_masked_ones(micro_sam: Sam) -> None:
    """Blocks 0 and 2 of the encoder: A is [2r, 128] and half of B's q and v rows [256, r] train."""
    everything = StrategyConfig(lora=LoraConfig(rank=3, alpha=3, blocks=(0, 2)))
    only_decoder = StrategyConfig(scope="decoder", lora=LoraConfig(rank=3, alpha=3))
    import copy

    with_encoder = count_trained(apply_strategy(AutomaticSam(copy.deepcopy(micro_sam), 3), everything, 3))
    without = count_trained(apply_strategy(AutomaticSam(micro_sam, 3), only_decoder, 3))
    assert with_encoder - without == 2 * (6 * 128 + 256 * 3)


def test_tuned_tensors_bring_another_model_to_the_same_output(micro_sam: Sam) -> None:
    import copy

    other = apply_strategy(AutomaticSam(copy.deepcopy(micro_sam), 3), LORA, 3)
    model = apply_strategy(AutomaticSam(micro_sam, 3), LORA, 3)
    two_steps(model)
    put_weights(other, trained_tensors(model))
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))
