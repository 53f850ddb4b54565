"""Training on kept embeddings: a frozen encoder runs once for every view, before the first step."""

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float16
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from samssl.config import UserError
from samssl.data.datasets import LabelledSlices
from samssl.data.embeddings import EmbeddedSlices, EmbeddingsConfig, KeptEmbeddings
from samssl.models.backbones import token_side
from samssl.models.checkpoints import weights_digest
from samssl.models.sam import NORMALISATION
from samssl.train.context import RunContext
from samssl.train.feed import Batch
from samssl.train.memory import GIB
from samssl.train.optim import FitConfig, uses_bf16

View = tuple[int, int]
"""Row of the store, and number of the view."""


class FrozenEncoder:
    """The kept embeddings of a run's training and validation slices, and the encoder that makes them."""

    def __init__(
        self,
        segmenter: Any,
        train: LabelledSlices,
        settings: EmbeddingsConfig,
        variant: str,
        fit_config: FitConfig,
        context: RunContext,
    ) -> None:
        assert settings.folder is not None, "without a folder nothing is kept"
        trained = [p for p in segmenter.image_encoder.parameters() if p.requires_grad]
        assert not trained, "the encoder must not train"
        self.segmenter, self.settings, self.context = segmenter, settings, context
        self.fit_config = fit_config
        made_by = {
            "weights": weights_digest(segmenter.image_encoder.state_dict()),
            "variant": variant,
            "normalisation": getattr(segmenter.image_encoder, NORMALISATION, "sam"),
        }
        precision = "bf16" if uses_bf16(fit_config, context.device) else "fp32"
        val_rows = train.store.rows.rows(["val"])
        val = LabelledSlices(train.store, val_rows, train.image_size, train.augment, train.inputs)
        self.train = KeptEmbeddings(train, settings.folder, {**made_by, "precision": precision})
        # Validation and prediction work in float32 whatever the training does.
        self.val = KeptEmbeddings(val, settings.folder, {**made_by, "precision": "fp32"})
        side = train.image_size // token_side(segmenter.image_encoder)
        self.shape = (int(segmenter.prompt_encoder.embed_dim), side, side)

    @property
    def data(self) -> EmbeddedSlices:
        """What training reads in place of its images."""
        return EmbeddedSlices(self.train, self.settings.variants, self.shape)

    def fill(self) -> None:
        """Make what is missing, this rank its share, after saying how much it is.

        Raises:
            UserError: all of it together is above the limit, or does not fit on the disk.
        """
        parts = (
            (self.train, _views(self.train, self.settings.variants), "training"),
            (self.val, _views(self.val, 1), "validation"),
        )
        self._announce(sum(not kept.has(*view) for kept, views, _ in parts for view in views))
        self.segmenter.to(self.context.device)
        for kept, views, name in parts:
            # Shared out before looking: other ranks write while this one looks.
            share = views[self.context.rank :: self.context.world_size]
            self._fill(kept, [view for view in share if not kept.has(*view)], name)

    def complete(self, batch: Batch) -> Batch:
        """`batch` with the embeddings that could not be read, made and written anew."""
        lost = batch["missing"].nonzero()[:, 0]
        embeddings = batch["embedding"]
        if len(lost):
            rows, views = batch["row"][lost].tolist(), batch["view"][lost].tolist()
            made = self._make(self.train, [*zip(rows, views, strict=True)])
            embeddings = embeddings.index_copy(0, lost, made)
        return {"embedding": embeddings, "labels": batch["labels"]}

    def low_res_logits(self, rows: Sequence[int]) -> Float[Tensor, "B classes h w"]:
        """Of validation slices by their rows, from their embeddings."""
        found = {row: self.val.read(row, 0) for row in rows}
        lost = [(row, 0) for row, embedding in found.items() if embedding is None]
        if lost:
            found |= dict(zip([row for row, _ in lost], self._make(self.val, lost).cpu(), strict=True))
        embeddings = torch.stack([found[row] for row in rows])  # pyright: ignore[reportArgumentType]
        return self.segmenter.decode(embeddings.to(self.context.device).float())

    def _announce(self, missing: int) -> None:
        slices, views, held_out = len(self.train.slices), self.settings.variants, len(self.val.slices)
        each = 2 * self.shape[0] * self.shape[1] * self.shape[2]
        total = (slices * views + held_out) * each
        text = (
            f"{slices} slices x {views} views and {held_out} validation slices x {each / 1e6:.2f} MB = "
            f"{total / GIB:.2f} GiB of the limit of {self.settings.limit_gib:g} GiB"
        )
        if total > self.settings.limit_gib * GIB:
            raise UserError(
                f"The embeddings are too many: {text}. Raise data.embeddings.limit_gib, lower "
                "data.embeddings.variants or data.shots, or set data.embeddings.folder=null."
            )
        folder = self.settings.folder
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if missing * each > free:
            raise UserError(
                f"The embeddings do not fit on the disk: {text}, and {missing * each / GIB:.2f} GiB of them "
                f"are yet to be written to {folder}, which has {free / GIB:.2f} GiB free."
            )
        if self.context.rank == 0:
            print(f"embeddings: {text}; {missing} are to be written to {folder}", flush=True)

    def _fill(self, kept: KeptEmbeddings, views: list[View], name: str) -> None:
        share = self.fit_config.batch_size // self.context.world_size // self.fit_config.accumulate
        loader = DataLoader(
            _Images(kept, views), batch_size=share, num_workers=self.fit_config.loader_workers
        )
        hidden = self.context.rank > 0 or not views
        for numbers, images in tqdm(
            loader, desc=f"embed {name}", unit="batch", mininterval=2, disable=hidden
        ):
            self._embed(kept, [views[number] for number in numbers.tolist()], images)

    def _make(self, kept: KeptEmbeddings, views: list[View]) -> Float16[Tensor, "B C h w"]:
        return self._embed(kept, views, torch.stack([kept.image(*view) for view in views]))

    @torch.no_grad()
    def _embed(
        self, kept: KeptEmbeddings, views: list[View], images: Float[Tensor, "B C S S"]
    ) -> Float16[Tensor, "B C h w"]:
        """The embeddings of `images`, the views of these numbers; they are written, too."""
        self.segmenter.image_encoder.eval()
        device = self.context.device
        with torch.autocast(device.type, torch.bfloat16, enabled=kept.made_by["precision"] == "bf16"):
            embeddings = self.segmenter.embed(images.to(device)).half()
        for view, embedding in zip(views, embeddings.cpu(), strict=True):
            if not embedding.isfinite().all():
                raise UserError(
                    f"The embedding of slice {kept.slices.store.describe(view[0])} has values that are no "
                    "number in half precision. Set data.embeddings.folder=null to train without kept ones."
                )
            kept.write(*view, embedding)
        return embeddings


class _Images(Dataset):
    """What the encoder is to see, with its place in the list of views."""

    def __init__(self, kept: KeptEmbeddings, views: list[View]) -> None:
        self.kept, self.views = kept, views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return number, self.kept.image(*self.views[number])


def _views(kept: KeptEmbeddings, count: int) -> list[View]:
    return [(row, view) for row in kept.slices.rows.tolist() for view in range(count)]
