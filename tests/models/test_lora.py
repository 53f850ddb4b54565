"""LoRA and DoRA on a fused qkv: what is adapted moves by the asked rank, and the rest not at all."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from samssl.config import UserError
from samssl.models.decoder import AutomaticSam
from samssl.models.lora import LoraConfig, Target, count_trained
from samssl.models.strategies import StrategyConfig, apply_strategy

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
FIRST_BLOCK = {"micro_sam": "blocks.0", "micro_mobile_sam": "layers.2.blocks.1"}


def with_lora(sam: Sam, **settings: Any) -> Any:
    strategy = StrategyConfig(lora=replace(LoraConfig(rank=3, alpha=3), **settings))
    torch.manual_seed(0)
    return apply_strategy(AutomaticSam(copy.deepcopy(sam), 3), strategy, 3)


def two_steps(model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(IMAGES) - 1).square().mean().backward()
        optimizer.step()


def change(sam: Sam, model, layer: str) -> Tensor:
    """By how much merging moves a weight of the encoder."""
    merged = model.merge_and_unload().image_encoder.get_parameter(f"{layer}.weight")
    return (merged - sam.image_encoder.get_parameter(f"{layer}.weight")).detach()


def parts(fixture: str, sam: Sam, rows: Tensor) -> dict[str, Tensor]:
    """Rows of q, k and v, in the layout that the forward pass of each encoder reads."""
    attention: Any = sam.image_encoder.get_submodule(f"{FIRST_BLOCK[fixture]}.attn")
    if fixture == "micro_sam":
        return dict(zip("qkv", rows.unflatten(0, (3, -1)), strict=True))
    by_head = rows.unflatten(0, (attention.num_heads, 3, attention.key_dim))
    return {part: by_head[:, number].flatten(0, 1) for number, part in enumerate("qkv")}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("v", "q", "k")])
@pytest.mark.parametrize("fixture", list(FIRST_BLOCK))
def test_the_targets_move_by_the_asked_rank_and_nothing_else_moves(
    request: pytest.FixtureRequest, fixture: str, targets: tuple[Target, ...], dora: bool
) -> None:
    sam: Sam = request.getfixturevalue(fixture)
    model = with_lora(sam, targets=targets, dora=dora)
    two_steps(model)
    with torch.no_grad():
        wanted = model(IMAGES)
    moved = parts(fixture, sam, change(sam, model, f"{FIRST_BLOCK[fixture]}.attn.qkv"))
    with torch.no_grad():
        assert torch.allclose(model.base_model.model(IMAGES), wanted, atol=1e-5)  # now merged
    for part, delta in moved.items():
        if part not in targets:
            assert torch.count_nonzero(delta) == 0
        elif dora:
            assert delta.abs().max() > 1e-3
        else:
            assert torch.linalg.matrix_rank(delta) == 3


def test_the_attentions_output_and_the_mlp_can_be_adapted(micro_sam: Sam, micro_mobile_sam: Sam) -> None:
    for sam, layers in ((micro_sam, ("lin1", "lin2")), (micro_mobile_sam, ("fc1", "fc2"))):
        model = with_lora(sam, targets=("proj", "mlp"), blocks=(1,))
        adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
        adapted = {name.split("image_encoder.")[1] for name in adapted if "image_encoder" in name}
        block = "blocks.1" if sam is micro_sam else "layers.2.blocks.0"
        assert adapted == {f"{block}.attn.proj", *(f"{block}.mlp.{layer}" for layer in layers)}
        two_steps(model)
        assert torch.linalg.matrix_rank(change(sam, model, f"{block}.mlp.{layers[0]}")) == 3


def test_each_block_can_have_a_rank_of_its_own(micro_sam: Sam) -> None:
    model = with_lora(micro_sam, blocks=(0, 2), ranks=(1, 5), alpha=6)
    blocks = model.base_model.model.image_encoder.blocks
    assert blocks[0].attn.qkv.scaling["default"] == blocks[2].attn.qkv.scaling["default"] == 2
    two_steps(model)
    for number, rank in ((0, 1), (2, 5)):
        q, k, v = blocks[number].attn.qkv.get_delta_weight("default").chunk(3)
        assert torch.linalg.matrix_rank(q) == torch.linalg.matrix_rank(v) == rank
        assert torch.count_nonzero(k) == 0
    with pytest.raises(UserError, match="has 2 ranks for 4 adapted blocks"):
        with_lora(micro_sam, ranks=(1, 5))


def test_alpha_equal_to_rank_is_unscaled(micro_sam: Sam) -> None:
    model = with_lora(micro_sam)
    two_steps(model)
    fused = model.base_model.model.image_encoder.blocks[0].attn.qkv
    product = fused.lora_B["default"].weight @ fused.lora_A["default"].weight
    assert torch.allclose(fused.get_delta_weight("default"), product)


@pytest.mark.parametrize("dora", [False, True])
def test_trained_numbers_are_counted_without_those_that_take_no_part(micro_sam: Sam, dora: bool) -> None:
    """Blocks 0 and 2: A is [2r, 128], half of B's q and v rows [256, r] train, and DoRA's q and v rows."""
    only_decoder = StrategyConfig(scope="decoder", lora=LoraConfig(rank=3, alpha=3, dora=dora))
    with_encoder = count_trained(with_lora(micro_sam, blocks=(0, 2), dora=dora))
    without = count_trained(apply_strategy(AutomaticSam(micro_sam, 3), only_decoder, 3))
    assert with_encoder - without == 2 * (6 * 128 + 256 * 3 + (256 if dora else 0))


@pytest.mark.parametrize("dora", [False, True])
def test_untrained_lora_changes_nothing(micro_mobile_sam: Sam, dora: bool) -> None:
    with torch.no_grad():
        wanted = AutomaticSam(micro_mobile_sam, 3)(IMAGES)
        assert torch.equal(with_lora(micro_mobile_sam, dora=dora).eval()(IMAGES), wanted)


def test_no_targets_and_the_same_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="must name something, and nothing twice"):
        LoraConfig(targets=())
    with pytest.raises(ValueError, match="must name something, and nothing twice"):
        LoraConfig(targets=("q", "q"))
