"""Stage two: fine-tuning SAM on a few labelled cases, for segmentation that is automatic or prompted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from torch import Tensor, nn

from samssl.config import BelowOne, Count, NonNegative, UserError, config, derive, flatten
from samssl.data.datasets import AugmentConfig, LabelledSlices, Pooled, Rows, rows_of
from samssl.data.inputs import InputConfig, check_input
from samssl.data.mixture import Mixture
from samssl.data.objects import ObjectSlices
from samssl.data.slices import SliceStore
from samssl.data.splits import few_shot
from samssl.interactive import Asking
from samssl.losses import dice_and_cross_entropy
from samssl.metrics import case_dice, label_dice
from samssl.models.lora import count_trained
from samssl.models.sam import ModelConfig, build_sam
from samssl.models.strategies import (
    StrategyConfig,
    build_segmenter,
    check_name,
    follow_name,
    promptable_from,
)
from samssl.predict import score_cases
from samssl.prompts import PromptConfig
from samssl.train.context import RunContext, State
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig
from samssl.train.prompted import PromptedDice, PromptedSegmenter
from samssl.train.resources import ResourcesConfig


@config
class FinetuneDataConfig:
    """Which labelled cases are trained on."""

    store: Path
    """The slice store, as `prepare` writes it: a folder, or a URL that fsspec reads."""
    more_stores: tuple[Path, ...] = ()
    """Further stores that are learnt from together with it, whatever their labels; `mode` promptable only."""
    store_temperature: Annotated[float, Ge(1)] = 2.0
    """Stores are drawn from in proportion to their slices ** (1 / temperature); 1 balances nothing."""
    cache: Path | None = None
    """Local folder that keeps what is read of a remote store, each file fetched once."""
    shots: Count = 0
    """Patients or slices of the split `train` that are learnt from; 0 takes all of them."""
    shot_unit: Literal["patients", "slices"] = "patients"
    """What `shots` counts. Fewer shots are always among the more, for the same `shot_seed`."""
    shot_seed: Count = 0
    """Another seed, another draw of the shots."""
    input: InputConfig = InputConfig()
    """Channels and intensities; the same as in pretraining."""
    augment: AugmentConfig = AugmentConfig()
    """How training slices are varied."""


@config
class FinetuneFitConfig(FitConfig):
    """Optimisation with the defaults of fine-tuning: warm-up and poly, AdamW as in the official code."""

    steps: Count = 2000
    warmup_steps: Count = 200
    schedule: Literal["cosine", "poly"] = "poly"
    weight_decay: NonNegative = 0.1
    beta2: BelowOne = 0.999
    patience: Count = 10


@config
class FinetuneConfig:
    """Labelled cases and a SAM-format checkpoint to a model bundle."""

    out: Path
    """Folder of this run."""
    data: FinetuneDataConfig
    """What to learn from."""
    model: ModelConfig = ModelConfig()
    """What to start from: the checkpoint of `pretrain`, or SAM as published."""
    strategy: StrategyConfig = StrategyConfig()
    """What to train."""
    mode: Literal["automatic", "promptable"] = "automatic"
    """`automatic` segments whole slices into the classes of the store; `promptable` segments the objects
    that points, boxes or masks point out, whatever they are."""
    prompts: PromptConfig = PromptConfig()
    """Used where `mode` is promptable."""
    optim: FinetuneFitConfig = FinetuneFitConfig()
    """The optimisation; the score of a validation is the mean Dice of the cases in the split `val`."""
    resources: ResourcesConfig = ResourcesConfig()
    """Where to train."""

    def __post_init__(self) -> None:
        self.optim.check_workers(self.resources.workers)
        check_name(self.strategy, self.model.variant)
        if self.mode == "promptable" and self.strategy.head != "sam":
            raise ValueError("mode=promptable works with SAM's own heads: set strategy.head=sam")
        if self.mode == "automatic" and self.data.more_stores:
            raise ValueError(
                "data.more_stores needs mode=promptable: the labels of several stores make no common classes"
            )

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Derive what `strategy.name` names, and the heads that go with `mode`."""
        follow_name(tree)
        if tree.get("mode") == "promptable" and "strategy.head" not in flatten(tree):
            derive(tree, "strategy.head", "sam")


class SupervisedSegmenter(nn.Module):
    """A segmenter and its loss."""

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a batch with `image` [B, 1, S, S] in [0, 1] and `labels` [B, S, S] (class numbers)."""
        return {"loss": dice_and_cross_entropy(self.segmenter(batch["image"]), batch["labels"])}


def finetune(config: FinetuneConfig, context: RunContext) -> State:
    """Fine-tune on every rank of `context`; the result is what `fit` saved last."""
    if config.mode == "promptable":
        return finetune_promptable(config, context)
    store = SliceStore(config.data.store, config.data.cache)
    check_input(config.data.input, store)
    segmenter = build_segmenter(config.model, config.strategy, len(store.labels), config.optim.seed)
    model = SupervisedSegmenter(segmenter)
    rows, size = training_rows(store, config.data), config.model.image_size
    train = LabelledSlices(store, rows, size, config.data.augment, config.data.input)
    validation = CaseDice(store, config, segmenter, context)
    context.log({"trained_parameters": float(count_trained(segmenter))}, 0)
    return fit(model, train, validation.validate, config.optim, context)


def finetune_promptable(config: FinetuneConfig, context: RunContext) -> State:
    """As `finetune`, on objects of one or more stores that prompts point out."""
    data, size = config.data, config.model.image_size
    stores = stores_of(data)
    check_input(data.input, *stores)
    segmenter = promptable_from(build_sam(config.model), config.strategy, config.optim.seed)
    slices = Pooled(
        [LabelledSlices(store, object_rows(store, data), size, data.augment, data.input) for store in stores]
    )
    origin = np.repeat(np.arange(len(stores)), [len(part) for part in slices.parts])
    order = Mixture(origin, data.store_temperature) if len(stores) > 1 else None
    asking = Asking(size, data.input, config.prompts.validation_clicks, context.device)
    validation = PromptedDice(stores, segmenter, asking, context)
    context.log({"trained_parameters": float(count_trained(segmenter))}, 0)
    model, train = PromptedSegmenter(segmenter, config.prompts), ObjectSlices(slices, config.prompts)
    return fit(model, train, validation.validate, config.optim, context, order=order)


def stores_of(data: FinetuneDataConfig) -> list[SliceStore]:
    """All stores that are learnt from."""
    return [SliceStore(root, data.cache) for root in (data.store, *data.more_stores)]


def object_rows(store: SliceStore, data: FinetuneDataConfig) -> Rows:
    """Those of `training_rows` that show any object.

    Raises:
        UserError: there are none.
    """
    rows = training_rows(store, data)
    foreground = store.rows.columns(("foreground_fraction",))["foreground_fraction"].to_numpy()
    rows = rows[foreground[rows] > 0]
    if not len(rows):
        raise UserError(
            f"The slices of the store {store.root} that are learnt from show no object. Raise data.shots, or "
            "check the masks."
        )
    return rows


def learnt_slices(config: FinetuneConfig) -> list[str]:
    """The slices that are learnt from, as `case/z`."""
    rows_in = object_rows if config.mode == "promptable" else training_rows
    stores = stores_of(config.data)
    return [store.describe(row) for store in stores for row in rows_in(store, config.data).tolist()]


def training_rows(store: SliceStore, data: FinetuneDataConfig) -> Rows:
    """The slices that are learnt from: all of the split `train`, or the few shots of it."""
    if not data.shots:
        return rows_of(store, ["train"])
    facts = store.rows.columns(("case", "patient", "split", "z", "foreground_fraction"))
    shots = few_shot(facts, data.shots, data.shot_unit, data.shot_seed)
    return np.array([store.first_row(case) + z for case, z in shots], np.int32)


@dataclass
class CaseDice:
    """Volume-level Dice of the validation cases, as `evaluate` measures it on the test cases."""

    store: SliceStore
    config: FinetuneConfig
    segmenter: nn.Module
    context: RunContext

    def __post_init__(self) -> None:
        self.cases = self.store.cases("val")
        facts = self.store.rows.columns(("split", "foreground_fraction"))
        if not ((facts["split"] == "val") & (facts["foreground_fraction"] > 0)).any():
            raise UserError(
                f"The store {self.store.root} has no labelled voxels in the split val, by which training is "
                "judged. Give more patients to split.val in prepare."
            )

    def validate(self, step: int) -> Validation:
        """Mean over cases of the mean over labels."""
        size, inputs = self.config.model.image_size, self.config.data.input
        table = score_cases(self.segmenter, self.store, self.cases, size, self.context.device, inputs)
        score = float(case_dice(table).mean())
        return Validation(score=score, metrics={"val/dice": score, **label_dice(table, "val/dice")})
