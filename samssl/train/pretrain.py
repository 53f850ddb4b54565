"""Stage one: masked autoencoding of SAM's image encoder on unlabelled slices."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from segment_anything.modeling import Sam

from samssl.config import Count, Fraction, PositiveFloat, PositiveInt, UserError, config
from samssl.data.datasets import Pooled, Rows, UnlabelledSlices, rows_of
from samssl.data.inputs import InputConfig, check_input, unit_images
from samssl.data.inspection import fill_from_fingerprint
from samssl.data.mixture import BalanceConfig, Mixture
from samssl.data.slices import SliceStore
from samssl.data.views import CropConfig, still
from samssl.masking import MaskingConfig
from samssl.methods.mae import MaeConfig, MaskedAutoencoder
from samssl.methods.simmim import SimMim
from samssl.methods.targets import TargetConfig
from samssl.models.checkpoints import put_weights
from samssl.models.sam import ModelConfig, build_sam
from samssl.train.context import RunContext, State
from samssl.train.continuation import read_state
from samssl.train.held_out import HeldOut, spread
from samssl.train.loop import Validation, fit
from samssl.train.optim import FitConfig
from samssl.train.probe import Probe, ProbeConfig
from samssl.train.registering import RegisterConfig
from samssl.train.resources import ResourcesConfig


@config
class PretrainDataConfig:
    """Which slices are pretrained on."""

    store: Path
    """The slice store, as `prepare` writes it: a folder, or a URL that fsspec reads."""
    more_stores: tuple[Path, ...] = ()
    """Further stores that are pretrained on together with it, of other modalities perhaps."""
    cache: Path | None = None
    """Local folder that keeps what is read of a remote store, each file fetched once."""
    splits: tuple[Literal["pool", "train", "val", "test"], ...] = ("pool", "train")
    """Splits whose slices are learnt from, masks unused; keep `val` and `test` out."""
    min_content: Fraction = 0.05
    """Slices with less of their area above air are left out."""
    held_out: PositiveInt = 64
    """At most so many slices of held-out patients, spread evenly, on which reconstruction is checked."""
    input: InputConfig = InputConfig()
    """Channels and intensities."""
    crop: CropConfig = CropConfig()
    """How slices are cropped and varied."""
    balance: BalanceConfig = BalanceConfig()
    """How often slices of a rare modality are shown."""

    def __post_init__(self) -> None:
        leaked = {"val", "test"} & set(self.splits)
        if leaked:
            raise ValueError(
                f"splits must not hold {' or '.join(sorted(leaked))}: results would not be held out"
            )


@config
class PretrainFitConfig(FitConfig):
    """Optimisation with the defaults of MAE."""

    steps: Count = 10_000
    batch_size: PositiveInt = 64
    lr: PositiveFloat = 1.5e-3
    warmup_steps: Count = 500
    validate_every: PositiveInt = 1000
    keep_best: bool = False


@config
class PretrainConfig:
    """Scans without labels to a SAM-format checkpoint."""

    out: Path
    """Folder of this run."""
    data: PretrainDataConfig
    """What to learn from."""
    model: ModelConfig = ModelConfig()
    """What to start from; with `continue_from`, its checkpoint is not read."""
    continue_from: Path | None = None
    """Folder of an earlier pretrain run to go on from: weights, decoder, optimizer, step and place in the
    stream of slices. `optim.steps` counts from its beginning."""
    method: Literal["mae", "simmim"] = "mae"
    """`mae` computes visible tokens only; `simmim` all of them, with mask tokens: slower, for any encoder."""
    masking: MaskingConfig = MaskingConfig()
    """What is hidden."""
    targets: TargetConfig = TargetConfig()
    """What is predicted."""
    mae: MaeConfig = MaeConfig()
    """Used where `method` is mae."""
    optim: PretrainFitConfig = PretrainFitConfig()
    """The optimisation."""
    register: RegisterConfig = RegisterConfig()
    """How the encoder is named in MLflow's model registry."""
    probe: ProbeConfig = ProbeConfig()
    """What is measured of the encoder at validations, besides the loss."""
    resources: ResourcesConfig = ResourcesConfig()
    """Where to train."""

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Derive what suits the store."""
        fill_from_fingerprint(tree, "pretrain")

    def __post_init__(self) -> None:
        self.optim.check_workers(self.resources.workers)
        if self.method == "mae" and self.model.variant == "vit_t":
            raise ValueError(
                "method mae leaves tokens out, which vit_t's convolutions cannot; set method=simmim"
            )


def pretrain(config: PretrainConfig, context: RunContext) -> State:
    """Pretrain on every rank of `context`; the result is what `fit` saved last."""
    data = config.data
    stores = [SliceStore(root, data.cache) for root in (data.store, *data.more_stores)]
    check_input(data.input, *stores)
    torch.manual_seed(config.optim.seed)
    model = build_method(config)
    size = config.model.image_size
    train, checked = pooled_slices(stores, data, size)

    def whole_slices(rows: Rows) -> UnlabelledSlices:
        return UnlabelledSlices(stores[0], rows, size, still(data.crop), data.input)

    held_out = HeldOut(spread(checked, data.held_out), model, config.optim, context)
    probe = Probe(
        stores[0], model.image_encoder, held_out.slices, whole_slices, config.probe, config.optim, context
    )

    def validate(step: int) -> Validation:
        loss, metrics = held_out.measure(step), probe.measure(step)
        return Validation(score=-loss, metrics={"val/loss": loss, **metrics})

    return fit(
        model,
        train,
        validate,
        config.optim,
        context,
        order=mixed_order(train, data.balance),
        on_device=unit_images,
        initial=read_state(config.continue_from) if config.continue_from else None,
    )


def pooled_slices(
    stores: Sequence[SliceStore], data: PretrainDataConfig, image_size: int
) -> tuple[Pooled, Pooled]:
    """Views of the slices to learn from, and unvaried ones of the slices to check on, of all stores."""
    pairs = [(store, *pretraining_rows(store, data)) for store in stores]
    learnt = [UnlabelledSlices(store, rows, image_size, data.crop, data.input) for store, rows, _ in pairs]
    crop = still(data.crop)
    checked = [UnlabelledSlices(store, rows, image_size, crop, data.input) for store, _, rows in pairs]
    return Pooled(learnt), Pooled(checked)


def mixed_order(slices: Pooled, balance: BalanceConfig) -> Mixture | None:
    """The order that balances groups of slices; None, each slice once an epoch, where there is one group."""
    groups = slices.groups(balance.by)
    return Mixture(groups, balance.temperature) if groups.max() > 0 else None


def build_method(config: PretrainConfig) -> MaskedAutoencoder | SimMim:
    """The self-supervised method around the initial encoder."""
    encoder, size = build_sam(config.model).image_encoder, config.model.image_size
    channels, masking, targets = config.data.input.num_channels, config.masking, config.targets
    if config.method == "simmim":
        return SimMim(encoder, image_size=size, channels=channels, masking=masking, targets=targets)
    return MaskedAutoencoder(
        encoder, config.mae, image_size=size, channels=channels, masking=masking, targets=targets
    )


def pretraining_rows(store: SliceStore, data: PretrainDataConfig) -> tuple[Rows, Rows]:
    """Slices to learn from, and slices of other patients to check on.

    The latter are those of the split `val`. A store without one, as of unlabelled scans only, gives up
    a tenth of its patients, chosen by their digests.

    Raises:
        UserError: nothing is left to learn from or to check on.
    """
    rows = rows_of(store, data.splits, data.min_content)
    if store.cases("val"):
        return rows, rows_of(store, ["val"], data.min_content)
    numbers, names = store.rows.groups("patient")
    patients = {names[number] for number in np.unique(numbers[rows])}
    ranked = sorted(patients, key=lambda patient: hashlib.sha256(patient.encode()).digest())
    if len(ranked) < 2:
        raise UserError(f"The store {store.root} has one patient; pretraining needs another to check on.")
    checked = set(ranked[: -(-len(ranked) // 10)])
    held_out = np.isin(numbers[rows], [number for number, name in enumerate(names) if name in checked])
    return rows[~held_out], rows[held_out]


def pretrained_sam(config: PretrainConfig, state: State) -> Sam:
    """SAM as before pretraining, but with the image encoder of `state`."""
    sam = build_sam(config.model)
    prefix = "image_encoder."
    encoder = {
        name.removeprefix(prefix): value
        for name, value in state["weights"].items()
        if name.startswith(prefix)
    }
    put_weights(sam.image_encoder, encoder)
    return sam
