"""Stage two: fine-tuning SAM on a few labelled cases, for segmentation that is automatic or prompted."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from torch import Tensor, nn

from samssl.config import BelowOne, Count, NonNegative, UserError, config, derive, flatten
from samssl.data.classes import BACKGROUND, Classes, run_classes
from samssl.data.datasets import AugmentConfig, LabelledSlices, Pooled, Rows, rows_of
from samssl.data.embeddings import EmbeddingsConfig
from samssl.data.ignoring import IGNORED
from samssl.data.inputs import InputConfig, check_input
from samssl.data.inspection import fill_from_fingerprint
from samssl.data.mixture import Mixture
from samssl.data.objects import ObjectSlices
from samssl.data.sampling import SamplingConfig, classes_in, evenly, sampled_order
from samssl.data.slices import SliceStore
from samssl.data.splits import few_shot
from samssl.data.vanishing import count_vanishing, say_vanishing
from samssl.interactive import Asking, refuse_ignored
from samssl.losses import LossConfig, segmentation_loss
from samssl.metrics import case_dice, label_dice, pooled_dice
from samssl.models.baselines import check_baseline
from samssl.models.lora import count_trained
from samssl.models.sam import ModelConfig, build_sam, patch_size
from samssl.models.strategies import (
    StrategyConfig,
    build_segmenter,
    check_name,
    follow_name,
    promptable_from,
)
from samssl.predict import LogitsOfRows, Predictor
from samssl.prompts import PromptConfig
from samssl.train.alarms import LOOKED_AT, is_looked_at, validation_alarms
from samssl.train.context import RunContext, State
from samssl.train.frozen import FrozenEncoder
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig
from samssl.train.prompted import PromptedDice, PromptedSegmenter
from samssl.train.registering import RegisterConfig
from samssl.train.resources import ResourcesConfig


@config
class FinetuneDataConfig:
    """Which labelled cases are trained on, and what of their labels."""

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
    classes: dict[str, tuple[str, ...]] | None = None
    """Name of each class, and the labels that it merges, as in {organ: [liver, spleen]}; labels in none
    become background. null: every label is a class of its own."""
    overlapping: bool = False
    """Classes are regions that may share voxels and labels, as a tumour and its core: each is decided by
    itself, and there is no background class."""
    sampling: SamplingConfig = SamplingConfig()
    """How often which slices are drawn."""
    input: InputConfig = InputConfig()
    """Channels and intensities; the same as in pretraining."""
    augment: AugmentConfig = AugmentConfig()
    """How training slices are varied."""
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    """Image embeddings kept on disk, where the encoder does not train."""

    def __post_init__(self) -> None:
        """Names of classes become names of MLflow params."""
        wrong = [name for name in self.classes or () if not re.fullmatch(r"\w[\w .:/-]*", name)]
        if wrong:
            raise ValueError(
                f"classes: '{wrong[0]}' cannot name a class; use letters, digits, spaces and any of _ . : / -"
            )


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
    """`automatic` segments whole slices into classes; `promptable` segments the objects that points, boxes
    or masks point out, whatever they are."""
    loss: LossConfig = LossConfig()
    """What is minimised where `mode` is automatic."""
    prompts: PromptConfig = PromptConfig()
    """Used where `mode` is promptable."""
    optim: FinetuneFitConfig = FinetuneFitConfig()
    """The optimisation; the score of a validation is the mean Dice of the cases in the split `val`."""
    register: RegisterConfig = RegisterConfig()
    """How the bundle is named in MLflow's model registry."""
    resources: ResourcesConfig = ResourcesConfig()
    """Where to train."""

    def __post_init__(self) -> None:
        self.optim.check_workers(self.resources.workers)
        check_name(self.strategy, self.model.variant)
        if self.loss.resolution > self.model.image_size:
            raise ValueError(
                f"loss.resolution {self.loss.resolution} is more than the {self.model.image_size} px of "
                "model.image_size, at which labels are known"
            )
        if self.mode == "promptable":
            self._check_promptable()
        elif self.data.more_stores:
            raise ValueError(
                "data.more_stores needs mode=promptable: the labels of several stores make no common classes"
            )
        if self.strategy.network != "sam":
            self._check_baseline()
        elif self.data.embeddings.folder:
            self._check_frozen()

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Derive what `strategy.name` names, the heads that go with `mode`, and what suits the store."""
        follow_name(tree)
        fill_from_fingerprint(tree, "finetune")
        if tree.get("mode") == "promptable" and "strategy.head" not in flatten(tree):
            derive(tree, "strategy.head", "sam")

    def _check_promptable(self) -> None:
        if self.strategy.network != "sam":
            raise ValueError(f"{self.strategy.network} takes no prompts: set mode=automatic")
        if self.strategy.head != "sam":
            raise ValueError("mode=promptable works with SAM's own heads: set strategy.head=sam")
        unused = {
            "data.classes": self.data.classes is not None,
            "data.overlapping": self.data.overlapping,
            "data.embeddings.folder": self.data.embeddings.folder is not None,
            "data.sampling": self.data.sampling != SamplingConfig(),
            "loss": self.loss != LossConfig(),
        }
        if given := [name for name, is_given in unused.items() if is_given]:
            raise ValueError(f"{given[0]} has no meaning where mode=promptable: leave it out")

    def _check_baseline(self) -> None:
        network = self.strategy.network
        check_baseline(network, self.model.image_size)
        if self.model.checkpoint not in (None, "random"):
            raise ValueError(f"strategy.network {network} starts from scratch: set model.checkpoint=null")
        if self.data.embeddings.folder:
            raise ValueError(f"{network} has no frozen encoder: set data.embeddings.folder=null")

    def _check_frozen(self) -> None:
        if self.strategy.scope != "decoder":
            raise ValueError(
                "data.embeddings keeps what a frozen encoder gives: set strategy.scope=decoder, or "
                "data.embeddings.folder=null"
            )
        if self.resources.strategy == "fsdp":
            raise ValueError(
                "data.embeddings leaves no encoder to be sharded: set resources.strategy=ddp, or "
                "data.embeddings.folder=null"
            )


class SupervisedSegmenter(nn.Module):
    """A segmenter and its loss; `targets` makes of the batch's labels what the logits should say."""

    def __init__(
        self,
        segmenter: Any,
        targets: Callable[[Tensor], Tensor] = lambda labels: labels,
        loss: LossConfig = LossConfig(),
        ignores: bool = False,
    ) -> None:
        super().__init__()
        self.segmenter, self.targets, self.loss, self.ignores = segmenter, targets, loss, ignores

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` of a batch with `labels` [B, S, S] (ranks of label ids) and what is to be segmented.

        With `ignores` there may be IGNORED among the labels, which is left out.
        That is `image` [B, 1 or 3, S, S] in [0, 1], or its `embedding` [B, C, h, w].
        """
        labels, ignored = batch["labels"], None
        if self.ignores:
            labels, ignored = labels.clamp(min=BACKGROUND), labels == IGNORED
        loss = segmentation_loss(self._low_res_logits(batch), self.targets(labels), self.loss, ignored)
        return {"loss": loss}

    def _low_res_logits(self, batch: dict[str, Tensor]) -> Tensor:
        if "embedding" in batch:
            return self.segmenter.decode(batch["embedding"].float())
        return self.segmenter(batch["image"])


def finetune(config: FinetuneConfig, context: RunContext) -> State:
    """Fine-tune on every rank of `context`; the result is what `fit` saved last."""
    if config.mode == "promptable":
        return finetune_promptable(config, context)
    store = SliceStore(config.data.store, config.data.cache)
    check_input(config.data.input, store)
    classes = classes_of(store, config.data)
    segmenter = build_segmenter(config.model, config.strategy, classes.num_outputs, config.optim.seed)
    model = SupervisedSegmenter(segmenter, classes.targets, config.loss, store.ignored is not None)
    rows, size = training_rows(store, config.data), config.model.image_size
    train = LabelledSlices(store, rows, size, config.data.augment, config.data.input, config.loss.keep_small)
    order = sampled_order(store, rows, classes, config.data.sampling)
    context.log({"trained_parameters": float(count_trained(segmenter))}, 0)
    if context.rank == 0 and not config.loss.keep_small:
        warn_of_vanishing(store, rows, classes, config)
    validation = CaseDice(store, config, classes, rows, segmenter, context)
    embeddings = config.data.embeddings
    if not embeddings.folder:
        return fit(model, train, validation.validate, config.optim, context, order=order)
    frozen = FrozenEncoder(segmenter, train, embeddings, config.model.variant, config.optim, context)
    validation.logits_of = frozen.low_res_logits
    frozen.fill()
    data, on_device = frozen.data, frozen.complete
    return fit(model, data, validation.validate, config.optim, context, order=order, on_device=on_device)


def classes_of(store: SliceStore, data: FinetuneDataConfig) -> Classes:
    """What a run tells apart in `store`.

    Raises:
        UserError: `data.classes` does not fit the labels of the store.
    """
    return run_classes(store.labels, data.classes, data.overlapping)


def finetune_promptable(config: FinetuneConfig, context: RunContext) -> State:
    """As `finetune`, on objects of one or more stores that prompts point out."""
    data, size = config.data, config.model.image_size
    stores = stores_of(data)
    check_input(data.input, *stores)
    for store in stores:
        refuse_ignored(store)
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
    """The slices that are learnt from: all of the split `train`, or the few shots of it.

    Shots are drawn among what shows any class of the run.
    """
    if not data.shots:
        return rows_of(store, ["train"])
    facts = store.rows.columns(("case", "patient", "split", "z", "foreground_fraction"))
    if data.classes is not None:
        held = classes_in(store, np.arange(len(facts)), classes_of(store, data))
        facts.loc[(~held).all(axis=1), "foreground_fraction"] = 0.0
    shots = few_shot(facts, data.shots, data.shot_unit, data.shot_seed)
    return np.array([store.first_row(case) + z for case, z in shots], np.int32)


def warn_of_vanishing(store: SliceStore, rows: Rows, classes: Classes, config: FinetuneConfig) -> None:
    """Print how many small objects of the training slices the loss will not see."""
    size = config.model.image_size
    of_sam = config.strategy.network == "sam"
    logits_side = 4 * size // patch_size(config.model.variant) if of_sam else size
    loss_side = config.loss.resolution or logits_side
    found = count_vanishing(store, rows, classes, size, loss_side)
    if warning := say_vanishing(found, size, loss_side):
        print(warning, flush=True)


@dataclass
class CaseDice:
    """Volume-level Dice of the validation cases, as `evaluate` measures it on the test cases."""

    store: SliceStore
    config: FinetuneConfig
    classes: Classes
    learnt: Rows
    """The slices that are learnt from."""
    segmenter: nn.Module
    context: RunContext
    logits_of: LogitsOfRows | None = None
    """Of validation slices whose embeddings are kept."""

    def __post_init__(self) -> None:
        self.cases = self.store.cases("val")
        rows = self.store.rows.rows(["val"])
        if not classes_in(self.store, rows, self.classes).any():
            raise UserError(
                f"The store {self.store.root} has no labelled voxels in the split val, by which training is "
                "judged. Give more patients to split.val in prepare."
            )
        self.num_slices = len(rows)
        size, inputs, device = self.config.model.image_size, self.config.data.input, self.context.device
        self.predictor = Predictor(self.segmenter, self.store, size, device, inputs, self.classes)

    def validate(self, step: int) -> Validation:
        """Mean over cases of the mean over classes; and, now and then, whether slices are learnt by heart."""
        table = replace(self.predictor, logits_of=self.logits_of).score_cases(self.cases)
        score = float(case_dice(table).mean())
        metrics = {"val/dice": score, **label_dice(table, "val/dice")}
        if step <= self.config.optim.warmup_steps:
            return Validation(score=score, metrics=metrics)
        learnt = None
        if is_looked_at(step, self.config.optim):
            rows = self.learnt[evenly(len(self.learnt), min(self.num_slices, LOOKED_AT))]
            learnt = self.predictor.score_slices(rows)
            metrics |= {"val/dice_pooled": pooled_dice(table), "train/dice_pooled": pooled_dice(learnt)}
        return Validation(score=score, metrics=metrics, alarms=validation_alarms(table, learnt))
