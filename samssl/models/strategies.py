"""Which parts of SAM a fine-tuning trains: the strategies of arXiv:2404.09957 (figure 2) and two more."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from samssl.config import ConfigError, UserError, config, derive, flatten
from samssl.models.adapter import AdapterConfig, insert_adapters
from samssl.models.baselines import Baseline, BaselineConfig, NetworkName, build_baseline
from samssl.models.decoder import AutomaticSam
from samssl.models.lora import LoraConfig, inject_lora
from samssl.models.placement import published_blocks
from samssl.models.promptable import PromptableSam
from samssl.models.sam import ModelConfig, Variant, build_sam

Method = Literal["lora", "vanilla", "adapter", "bitfit", "norm"]
Scope = Literal["encoder_decoder", "decoder"]
Profile = Literal["fixed", "paper"]
Placed = TypeVar("Placed", LoraConfig, AdapterConfig)

PUBLISHED_METHODS: tuple[Method, ...] = ("vanilla", "adapter", "lora")
NAMED = ("model.variant", "strategy.scope", "strategy.method")
"""Fields of a fine-tuning that the name of a strategy stands for."""
NORMS = (nn.LayerNorm, nn.BatchNorm2d, LayerNorm2d)


@config
class StrategyConfig:
    """Method and scope of fine-tuning."""

    name: str | None = None
    """The strategy in one word, VARIANT/SCOPE/METHOD as in vit_b/encoder_decoder/lora: it sets
    `model.variant`, `strategy.scope` and `strategy.method`. `samssl strategies` lists them."""
    method: Method = "lora"
    """`lora` adds low-rank updates to frozen weights, `adapter` small layers between and beside them;
    `vanilla` trains the weights themselves, `bitfit` their biases only, `norm` the norms' scale and shift."""
    scope: Scope = "encoder_decoder"
    """Whether the image encoder is adapted too, or the mask decoder only."""
    profile: Profile = "fixed"
    """`fixed`: what is shaped by the classes and draws the masks always trains, and every encoder block is
    adapted. `paper`: what trains, and in which blocks, is as in the paper's official code."""
    head: Literal["classes", "sam"] = "classes"
    """`classes`: a mask token and a small network for each class. `sam`: SAM's own, which draw one
    foreground, so that the result can be merged into a plain SAM checkpoint."""
    lora: LoraConfig = LoraConfig()
    """Used where `method` is lora."""
    adapter: AdapterConfig = AdapterConfig()
    """Used where `method` is adapter."""
    train_neck: bool = False
    """Train the encoder's neck (two convolutions after the blocks) where the encoder is adapted but its
    weights are frozen."""
    network: NetworkName = "sam"
    """`sam`, or what it is compared with: `unet` or `swin_unetr`, all of it trained from scratch."""
    baseline: BaselineConfig = BaselineConfig()
    """Used where `network` is not sam."""

    def __post_init__(self) -> None:
        if self.profile == "paper" and self.method not in PUBLISHED_METHODS:
            raise ValueError(
                f"the paper has no {self.method}; profile=paper goes with {', '.join(PUBLISHED_METHODS)}"
            )


def strategy_name(variant: str, scope: str, method: str) -> str:
    """What `StrategyConfig.name` calls a strategy."""
    return f"{variant}/{scope}/{method}"


def follow_name(tree: dict[str, Any], strategy: str = "strategy") -> None:
    """Set in `tree` what the name of the group `strategy` stands for, if there is one.

    Raises:
        ConfigError: it is no strategy's name, or `tree` says something else.
    """
    name = flatten(tree).get(f"{strategy}.name")
    if name is None:
        return
    parts = str(name).split("/")
    known = (get_args(Variant), get_args(Scope), get_args(Method))
    if len(parts) != 3 or not all(part in among for part, among in zip(parts, known, strict=True)):
        choices = ", ".join("|".join(among) for among in known)
        raise ConfigError(
            f"{strategy}.name: '{name}' is no strategy. Write VARIANT/SCOPE/METHOD, as in "
            f"vit_b/encoder_decoder/lora, out of {choices}."
        )
    fields = (NAMED[0], f"{strategy}.scope", f"{strategy}.method")
    wrong = [field for field, part in zip(fields, parts, strict=True) if derive(tree, field, part)]
    if wrong:
        raise ConfigError(
            f"{strategy}.name={name} contradicts what {', '.join(wrong)} says. Leave that out, or give the "
            "name that goes with it."
        )


def named_fields(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` of a fine-tuning, with what `strategy.name` stands for beside it.

    Raises:
        ConfigError: it is no strategy's name, or the overrides say something else.
    """
    name = overrides.get("strategy.name")
    if name is None:
        return dict(overrides)
    tree: dict[str, Any] = {}
    for field, value in overrides.items():
        derive(tree, field, value)
    follow_name(tree)
    return {**overrides, **{field: flatten(tree)[field] for field in NAMED}}


def check_name(strategy: StrategyConfig, variant: Variant) -> None:
    """Refuse a strategy whose name stands for something else than it and `variant` are."""
    name = strategy_name(variant, strategy.scope, strategy.method)
    if strategy.name not in (None, name):
        raise ValueError(f"strategy.name is {strategy.name}, but the settings are those of {name}")


def head_modules(num_heads: int) -> list[str]:
    """What of the decoder draws the masks; shaped by the classes, unless they are SAM's own heads."""
    hypernetworks = [f"mask_decoder.output_hypernetworks_mlps.{head}" for head in range(num_heads)]
    return ["mask_decoder.mask_tokens", "mask_decoder.output_upscaling", *hypernetworks]


def build_segmenter(model: ModelConfig, strategy: StrategyConfig, num_classes: int, seed: int) -> Any:
    """The model of `model` for `num_classes` classes under `strategy`; `seed` draws the new layers."""
    return segmenter_from(build_base(model, strategy, num_classes, seed), strategy, num_classes, seed)


def build_base(model: ModelConfig, strategy: StrategyConfig, num_classes: int, seed: int) -> nn.Module:
    """What fine-tuning starts from: SAM, or a baseline drawn from `seed`."""
    if strategy.network == "sam":
        return build_sam(model)
    return build_baseline(strategy.network, strategy.baseline, model, num_classes, seed)


def segmenter_from(base: nn.Module, strategy: StrategyConfig, num_classes: int, seed: int) -> Any:
    """As `build_segmenter`, from what `build_base` gave; its modules are used, not copied.

    Raises:
        UserError: SAM's own heads are to draw more than one foreground, or blocks are asked for that the
            encoder does not have.
    """
    if isinstance(base, Baseline):
        return base
    assert isinstance(base, Sam), "what is no baseline is SAM"
    own_heads = strategy.head == "sam"
    if own_heads and num_classes != 2:
        raise UserError(
            f"strategy.head=sam draws one foreground, but there are {num_classes - 1} labels. Give a store "
            "with one label, or strategy.head=classes."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return apply_strategy(AutomaticSam(base, num_classes, own_heads=own_heads), strategy, num_classes)


def promptable_from(sam: Sam, strategy: StrategyConfig, seed: int) -> Any:
    """SAM with prompts under `strategy`, from these modules; its heads are SAM's own, the IoU head included.

    The IoU head trains under every strategy. `seed` draws the new layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = apply_strategy(PromptableSam(sam), strategy, sam.mask_decoder.num_mask_tokens)
    model.mask_decoder.iou_prediction_head.requires_grad_(True)
    return model


def apply_strategy(model: AutomaticSam | PromptableSam, strategy: StrategyConfig, num_classes: int) -> Any:
    """`model`, wrapped where the method asks for it, with `requires_grad` set on exactly what trains.

    Neither the prompt encoder trains, nor what automatic segmentation does not use: the IoU head, and the
    other masks where the heads are SAM's own.
    """
    num_heads = 1 if isinstance(model, AutomaticSam) and model.own_heads else num_classes
    in_encoder = strategy.scope == "encoder_decoder"
    whole = _whole_modules(strategy, num_heads)
    model.requires_grad_(False)
    if strategy.method == "lora":
        return inject_lora(model, _placed(strategy.lora, strategy, model), whole, in_encoder=in_encoder)
    if strategy.method == "adapter":
        insert_adapters(model, _placed(strategy.adapter, strategy, model), in_encoder=in_encoder)
    unused = ["mask_decoder.iou_prediction_head"]
    unused += head_modules(model.mask_decoder.num_mask_tokens)[2 + num_heads :]
    scope = ["mask_decoder", "image_encoder"] if in_encoder else ["mask_decoder"]
    trained = _of_method(model, strategy.method)
    for name, parameter in model.named_parameters():
        by_method = name in trained and _below(name, scope) and not _below(name, unused)
        parameter.requires_grad_(by_method or _below(name, whole))
    return model


def _whole_modules(strategy: StrategyConfig, num_heads: int) -> list[str]:
    """Modules that train beside what the method itself trains.

    The official code freezes all that is no adapter, but with LoRA only the transformer of the decoder.
    """
    neck = ["image_encoder.neck"] if strategy.train_neck and strategy.scope == "encoder_decoder" else []
    if strategy.profile == "fixed":
        return [*head_modules(num_heads), *neck]
    if strategy.method == "adapter":
        return neck
    return [*head_modules(num_heads), "mask_decoder.iou_token", *neck]


def _placed(settings: Placed, strategy: StrategyConfig, model: AutomaticSam | PromptableSam) -> Placed:
    """`settings` with the published blocks where the profile asks for them."""
    if strategy.profile == "fixed" or settings.blocks is not None:
        return settings
    return replace(settings, blocks=published_blocks(model.image_encoder))


def _of_method(model: nn.Module, method: Method) -> set[str]:
    """Names of the parameters that `method` trains, wherever in the model."""
    names = {name for name, _ in model.named_parameters()}
    if method == "adapter":
        return {name for name in names if ".adapter." in name}
    if method == "bitfit":
        return {name for name in names if name.endswith(".bias")}
    if method == "norm":
        norms = {name for name, module in model.named_modules() if isinstance(module, NORMS)}
        return {name for name in names if name.rpartition(".")[0] in norms}
    return names


def _below(name: str, modules: Iterable[str]) -> bool:
    """Whether the parameter `name` belongs to one of `modules`."""
    return name.startswith(tuple(f"{module}." for module in modules))
