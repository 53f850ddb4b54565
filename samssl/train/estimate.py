"""What runs will cost before any of them is started: operations, parameters and bytes, from shapes alone."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from samssl.models.baselines import build_baseline
from samssl.models.lora import count_trained
from samssl.models.sam import ModelConfig, architecture
from samssl.models.strategies import StrategyConfig, segmenter_from
from samssl.train.catalogue import FusedAttention
from samssl.train.costs import FUSED_ON_CPU
from samssl.train.finetune import FinetuneConfig
from samssl.train.plan import make_plan
from samssl.train.pretrain import PretrainConfig

BYTES = 4.0
KEPT_IN_PRETRAINING = 5
"""Copies of the weights that pretraining leaves: the encoder, the registered one, and a state with both
moments of AdamW."""
KEPT_IN_FINETUNING = 2
"""Copies of what is tuned: at the best validation and at the last step."""


@dataclass(frozen=True)
class Estimate:
    """Of one run, or of several together."""

    flops: float
    """Floating-point operations of training; validation and evaluation are not in it."""
    bytes_kept: float
    """What lies in the run's folder in the end, without predictions."""

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.flops + other.flops, self.bytes_kept + other.bytes_kept)


NOTHING = Estimate(0.0, 0.0)


def estimate_finetune(config: FinetuneConfig) -> Estimate:
    """A fine-tuning of all its steps, for two classes; a promptable one as an automatic one."""
    model = replace(config.model, checkpoint=None, init_seed=0)
    flops, trained = _finetune_pass(model, replace(config.strategy, name=None))
    slices = config.optim.steps * config.optim.batch_size
    return Estimate(flops * slices, BYTES * KEPT_IN_FINETUNING * trained)


@cache
def _finetune_pass(model: ModelConfig, strategy: StrategyConfig) -> tuple[float, int]:
    """Operations of one slice forward and backward, and the numbers that learn."""
    if strategy.network == "sam":
        with torch.device("meta"):
            segmenter = segmenter_from(architecture(model.variant), strategy, num_classes=2, seed=0)
    else:  # MONAI reads numbers out of tensors while it builds
        segmenter = build_baseline(strategy.network, strategy.baseline, model, 2, 0).to("meta")
    images = torch.empty(1, 1, model.image_size, model.image_size, device="meta")
    segmenter.train()
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter, FusedAttention():
        segmenter(images).square().mean().backward()
    return float(counter.get_total_flops()), count_trained(segmenter)


def estimate_pretrain(config: PretrainConfig) -> Estimate:
    """A pretraining of all its steps; one step is measured in miniature, as `samssl plan` does."""
    model = replace(config.model, checkpoint=None, init_seed=0)
    plan = make_plan(replace(config, model=model, continue_from=None), gib=80.0, tflops=1.0)
    with torch.device("meta"):
        weights = sum(value.numel() for value in architecture(model.variant).parameters())
    flops = plan.flops * config.resources.workers * config.optim.steps
    return Estimate(flops, BYTES * KEPT_IN_PRETRAINING * weights)
