"""Which parts of SAM a fine-tuning trains (arXiv:2404.09957, figure 2)."""

from typing import Any, Literal

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samssl.config import config
from samssl.models.decoder import AutomaticSam
from samssl.models.lora import LoraConfig, inject_lora
from samssl.models.promptable import PromptableSam
from samssl.models.sam import ModelConfig, build_sam


@config
class StrategyConfig:
    """Method and scope of fine-tuning."""

    method: Literal["lora", "vanilla"] = "lora"
    """`lora` adds low-rank updates to frozen weights, `vanilla` trains the weights themselves."""
    scope: Literal["encoder_decoder", "decoder"] = "encoder_decoder"
    """Whether the image encoder is adapted too, or the mask decoder only."""
    lora: LoraConfig = LoraConfig()
    """Used where `method` is lora."""
    train_neck: bool = False
    """With LoRA in the encoder, train its neck (two convolutions after the blocks) too."""


def head_modules(num_classes: int) -> list[str]:
    """What of the decoder is shaped by the classes or draws the masks; trained in every strategy."""
    hypernetworks = [f"mask_decoder.output_hypernetworks_mlps.{label}" for label in range(num_classes)]
    return ["mask_decoder.mask_tokens", "mask_decoder.output_upscaling", *hypernetworks]


def build_segmenter(model: ModelConfig, strategy: StrategyConfig, num_classes: int, seed: int) -> Any:
    """The model of `model` for `num_classes` classes under `strategy`; `seed` draws the new layers."""
    return segmenter_from(build_sam(model), strategy, num_classes, seed)


def segmenter_from(sam: Sam, strategy: StrategyConfig, num_classes: int, seed: int) -> Any:
    """As `build_segmenter`, from a SAM that is built already; its modules are used, not copied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return apply_strategy(AutomaticSam(sam, num_classes), strategy, num_classes)


def promptable_from(sam: Sam, strategy: StrategyConfig, seed: int) -> Any:
    """A `PromptableSam` of these modules under `strategy`, whose IoU head trains too; `seed` as above.

    Its heads are SAM's own. The prompt encoder stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = apply_strategy(PromptableSam(sam), strategy, sam.mask_decoder.num_mask_tokens)
    model.mask_decoder.iou_prediction_head.requires_grad_(True)
    return model


def sam_weights(model: Any) -> dict[str, Tensor]:
    """The state dict of SAM itself of what `promptable_from` made, which is used up: LoRA is merged."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: value.detach().contiguous() for name, value in plain.state_dict().items()}


def apply_strategy(model: AutomaticSam | PromptableSam, strategy: StrategyConfig, num_classes: int) -> Any:
    """`model`, wrapped where the method asks for it, with `requires_grad` set on exactly what trains.

    The IoU head and the prompt encoder do not train: automatic segmentation does not use them.
    """
    model.requires_grad_(False)
    if strategy.method == "lora":
        in_encoder = strategy.scope == "encoder_decoder"
        neck = ["image_encoder.neck"] if in_encoder and strategy.train_neck else []
        return inject_lora(model, strategy.lora, [*head_modules(num_classes), *neck], in_encoder=in_encoder)
    model.mask_decoder.requires_grad_(True)
    model.mask_decoder.iou_prediction_head.requires_grad_(False)
    model.image_encoder.requires_grad_(strategy.scope == "encoder_decoder")
    return model
