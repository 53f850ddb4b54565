"""Every method, scope and profile on both families of encoders: what trains, and nothing else changes."""

import copy
import re
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from training_support import train_two_steps

from samssl.config import ConfigError, UserError, build_config
from samssl.models.checkpoints import put_weights, trained_tensors
from samssl.models.decoder import AutomaticSam
from samssl.models.strategies import StrategyConfig, apply_strategy, segmenter_from
from samssl.train.finetune import FinetuneConfig

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
HEADS = r"mask_decoder\.(mask_tokens|output_upscaling|output_hypernetworks_mlps)\."
LORA = r"mask_decoder\.transformer\..*\.(q|v)_proj\.lora_[AB]\."
ADAPTERS = r"mask_decoder\.transformer\.layers\.[01]\.(self_attn\.out_proj|mlp)\.adapter\."
NORMS = r"mask_decoder\.(transformer\..*norm\w*\.|output_upscaling\.1\.)"
IN_DECODER = {
    ("vanilla", "fixed"): r"mask_decoder\.(?!iou_prediction_head)",
    ("vanilla", "paper"): r"mask_decoder\.(?!iou_prediction_head)",
    ("lora", "fixed"): f"{HEADS}|{LORA}",
    ("lora", "paper"): rf"{HEADS}|{LORA}|mask_decoder\.iou_token\.",
    ("adapter", "fixed"): f"{HEADS}|{ADAPTERS}",
    ("adapter", "paper"): ADAPTERS,
    ("bitfit", "fixed"): rf"{HEADS}|mask_decoder\.(?!iou_prediction_head).*\.bias$",
    ("norm", "fixed"): f"{HEADS}|{NORMS}",
}
"""Names of what is to train in the decoder, written down apart from the code."""
BLOCK = {"micro": r"blocks\.\d\.", "mobile": r"layers\.[123]\.blocks\.\d\."}
FIRST_TWO = {"micro": r"blocks\.[01]\.", "mobile": r"layers\.(1\.blocks\.0|2\.blocks\.0)\."}
IN_BLOCK = {"lora": r"attn\.qkv\.lora_[AB]\.", "adapter": r"(attn\.proj|mlp)\.adapter\."}
IN_ENCODER = {
    "vanilla": r"image_encoder\.",
    "bitfit": r"image_encoder\..*\.bias$",
    "norm": r"image_encoder\.(.*\.(norm\d?|bn)|neck\.[13])\.",
}


def plain(name: str) -> str:
    """A name without what PEFT wraps around modules."""
    return re.sub(r"^base_model\.model\.|\.modules_to_save\.default", "", name)


def intended(names: set[str], family: str, strategy: StrategyConfig) -> set[str]:
    pattern = IN_DECODER[strategy.method, strategy.profile]
    if strategy.scope == "encoder_decoder":
        blocks = (FIRST_TWO if strategy.profile == "paper" else BLOCK)[family]
        in_block = IN_BLOCK.get(strategy.method)
        pattern += "|" + (IN_ENCODER.get(strategy.method) or rf"image_encoder\.{blocks}{in_block}")
    return {name for name in names if re.match(pattern, plain(name)) and "original_module" not in name}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["micro", "mobile"])
@pytest.mark.parametrize("scope", ["encoder_decoder", "decoder"])
@pytest.mark.parametrize(("method", "profile"), IN_DECODER)
def test_exactly_the_intended_tensors_train(
    request: pytest.FixtureRequest, method, profile, scope, family
) -> None:
    sam: Sam = request.getfixturevalue({"micro": "micro_sam", "mobile": "micro_mobile_sam"}[family])
    untuned = AutomaticSam(copy.deepcopy(sam), 3).eval()
    with torch.no_grad():
        wanted = untuned(IMAGES)
    strategy = StrategyConfig(method=method, scope=scope, profile=profile)
    model = segmenter_from(copy.deepcopy(sam), strategy, 3, seed=0).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), wanted)
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == intended(set(parameters), family, strategy)
    before = state(model)
    train_two_steps(model, IMAGES)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed & parameters.keys() == trained
    assert changed <= trained_tensors(model).keys()
    other = segmenter_from(copy.deepcopy(sam), strategy, 3, seed=0).eval()
    put_weights(other, trained_tensors(model))
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))


def test_the_neck_trains_where_that_is_asked_for(micro_sam: Sam) -> None:
    for method in ("lora", "adapter"):
        strategy = StrategyConfig(method=method, profile="paper", train_neck=True)
        model = segmenter_from(copy.deepcopy(micro_sam), strategy, 3, seed=0)
        trained = {plain(name) for name in trained_tensors(model)}
        assert {name for name in trained if "neck" in name} == {
            f"image_encoder.neck.{part}"
            for part in ("0.weight", "1.weight", "1.bias", "2.weight", "3.weight", "3.bias")
        }


@pytest.mark.parametrize("method", ["vanilla", "lora", "bitfit"])
def test_sams_own_heads_draw_the_foreground_and_only_they_train(micro_sam: Sam, method) -> None:
    sam = copy.deepcopy(micro_sam)
    model = segmenter_from(sam, StrategyConfig(method=method, head="sam"), 2, seed=0)
    with torch.no_grad():
        logits = model(IMAGES)
        four_classes = AutomaticSam(micro_sam, 4)(IMAGES)
    assert torch.count_nonzero(logits[:, 0]) == 0
    assert torch.equal(logits[:, 1], four_classes[:, 0])
    before, trained = state(model), trained_tensors(model)
    train_two_steps(model, IMAGES)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained.keys()
    networks = {plain(name).split(".")[2] for name in trained if "output_hypernetworks_mlps" in name}
    assert networks == {"0"}


def test_sams_own_heads_refuse_several_labels(micro_sam: Sam) -> None:
    with pytest.raises(UserError, match=r"there are 2 labels.*strategy\.head=classes"):
        segmenter_from(micro_sam, StrategyConfig(head="sam"), 3, seed=0)


def test_the_paper_profile_refuses_what_the_paper_does_not_have() -> None:
    with pytest.raises(ValueError, match="the paper has no bitfit"):
        StrategyConfig(method="bitfit", profile="paper")


TREE = {"out": "/out", "data": {"store": "/store"}}


def build(**groups: dict[str, object]) -> FinetuneConfig:
    return build_config(FinetuneConfig, copy.deepcopy({**TREE, **groups}), source="test")


def test_a_name_sets_variant_scope_and_method() -> None:
    config = build(strategy={"name": "vit_t/decoder/adapter"}, model={"image_size": 512})
    assert (config.model.variant, config.model.image_size) == ("vit_t", 512)
    assert (config.strategy.scope, config.strategy.method) == ("decoder", "adapter")
    assert build(strategy={"name": "vit_b/decoder/lora", "scope": "decoder"}).model.variant == "vit_b"


def test_a_name_that_contradicts_other_settings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"contradicts what model\.variant, strategy\.method says"):
        build(strategy={"name": "vit_t/decoder/lora", "method": "vanilla"}, model={"variant": "vit_b"})
    with pytest.raises(ConfigError, match=r"is no strategy\. Write VARIANT/SCOPE/METHOD"):
        build(strategy={"name": "vit_b/lora"})
    with pytest.raises(ValueError, match="settings are those of vit_b/encoder_decoder/lora"):
        FinetuneConfig(
            out=Path("/out"),
            data=build().data,
            strategy=StrategyConfig(name="vit_h/encoder_decoder/lora"),
        )


def test_a_name_in_a_study_sets_the_studys_model() -> None:
    from samssl.cluster.study_design import StudyConfig

    tree = {
        "name": "tiny",
        "out": "/study",
        "prepare": {"data": {"root": "/scans"}},
        "pretrain": {},
        "finetune": {"strategy": {"name": "micro/decoder/vanilla"}},
        "model": {"image_size": 32},
    }
    study = build_config(StudyConfig, copy.deepcopy(tree), source="test")
    assert study.model == study.finetune.model == study.pretrain.model
    assert (study.model.variant, study.finetune.strategy.method) == ("micro", "vanilla")
    tree["model"] = {"variant": "vit_b"}
    with pytest.raises(ConfigError, match=r"contradicts what model\.variant says"):
        build_config(StudyConfig, tree, source="test")


def test_blocks_that_the_encoder_does_not_have_are_named(micro_sam: Sam) -> None:
    for method in ("lora", "adapter"):
        tree = {"method": method, method: {"blocks": [1, 7]}}
        strategy = build_config(StrategyConfig, tree, source="test")
        with pytest.raises(UserError, match=rf"strategy\.{method}\.blocks names \[7\].*blocks 0 to 3"):
            apply_strategy(AutomaticSam(copy.deepcopy(micro_sam), 2), strategy, 2)
