"""Image embeddings of a frozen encoder on disk, so that it sees every view of a slice once.

    <folder>/<first two digits>/<key>.safetensors    `embedding` [C, h, w] float16, and its `crc32c`

The key is a SHA-256 over all that an embedding follows from, so whatever has changed is not found, and
nothing is ever out of date. Files are written aside and renamed: any number of runs may share a folder
without locks, and two that write the same key write the same. A damaged file counts as absent.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c
import torch
import torchvision
from jaxtyping import Float, Float16, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from samssl.config import PositiveFloat, PositiveInt, config
from samssl.data.datasets import LabelledSlices
from samssl.data.inputs import slices_seen, value_ranges
from samssl.files import write_bytes

_FORMAT = 1
"""Counts changes of this program after which the same slice gives another embedding."""


@config
class EmbeddingsConfig:
    """Embeddings kept on disk; for strategies that leave the image encoder as it is."""

    folder: Path | None = None
    """Folder of the embeddings, which runs may share; null keeps none and runs the encoder at every step."""
    limit_gib: PositiveFloat = 100.0
    """The most that the embeddings of one run may take."""
    variants: PositiveInt = 1
    """Views of each training slice: the first is the slice as it is, each further one a fixed draw of
    `data.augment`. 1 does not augment."""


class KeptEmbeddings:
    """The embeddings of labelled slices under one encoder, by row of the store and number of the view.

    View 0 is the slice as it is. The others are augmented, the same way for every encoder and seed.
    """

    def __init__(self, slices: LabelledSlices, folder: Path, made_by: Mapping[str, str]) -> None:
        """`made_by` says all that an embedding follows from besides its image: weights, precision, ..."""
        self.slices, self.folder = slices, folder
        self.made_by = {
            **made_by,
            "format": _FORMAT,
            "image_size": slices.image_size,
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
        }
        self._codes, self._images = slices.store.rows.groups("image_sha256")

    def image(self, row: int, view: int) -> Float[Tensor, "C S S"]:
        """What the encoder sees, with intensities in [0, 1]."""
        return self.slices.varied(row, self._draw(row, view))[0] if view else self.slices.fitted_image(row)

    def labels(self, row: int, view: int) -> Int[Tensor, "S S"]:
        """The class numbers that belong to `image`."""
        if view:
            return self.slices.varied_labels(row, self._draw(row, view))
        return self.slices.fitted_labels(row)[0].long()

    def has(self, row: int, view: int) -> bool:
        """Whether there is a file; only reading it tells whether it is whole."""
        return self._path(row, view).is_file()

    def read(self, row: int, view: int) -> Float16[Tensor, "C h w"] | None:
        """The embedding; None where it is absent or damaged."""
        try:
            tensors = load(self._path(row, view).read_bytes())
            embedding, checksum = tensors["embedding"], int(tensors["crc32c"])
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return embedding if _checksum(embedding) == checksum else None

    def write(self, row: int, view: int, embedding: Float16[Tensor, "C h w"]) -> None:
        """Keep an embedding, whole or not at all."""
        embedding = embedding.cpu().contiguous()
        checksum = torch.tensor(_checksum(embedding))
        write_bytes(self._path(row, view), save({"embedding": embedding, "crc32c": checksum}))

    def key(self, row: int, view: int) -> str:
        """SHA-256 over what the embedding follows from."""
        store, inputs = self.slices.store, self.slices.inputs
        seen = {
            "image_sha256": self._images[self._codes[row]],
            "z": slices_seen(inputs, store, row),
            "channels": inputs.channels,
            "ranges": value_ranges(inputs, store.rows.intensity(row)).tolist(),
            "view": view,
            "augment": asdict(self.slices.augment) if view else None,
        }
        return _digest(self.made_by | seen)

    def _path(self, row: int, view: int) -> Path:
        key = self.key(row, view)
        return self.folder / key[:2] / f"{key}.safetensors"

    def _draw(self, row: int, view: int) -> int:
        """The key of the augmentation's randomness, which the encoder has no part in."""
        slice_ = [self._images[self._codes[row]], int(self.slices.store.rows.z[row])]
        return int(_digest([*slice_, view])[:15], 16)


class EmbeddedSlices:
    """`embedding` [C, h, w] (float16), `labels` [S, S], `row` and `view` of training slices.

    The draw's key picks the view. Where the embedding is `missing` it is zero, for whoever has the encoder
    to put in.
    """

    def __init__(self, kept: KeptEmbeddings, views: int, shape: tuple[int, int, int]) -> None:
        self.kept, self.views, self.shape = kept, views, shape

    def __len__(self) -> int:
        return len(self.kept.slices)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        index, key = draw
        row, view = int(self.kept.slices.rows[index]), key % self.views
        found = self.kept.read(row, view)
        return {
            "embedding": torch.zeros(self.shape, dtype=torch.half) if found is None else found,
            "missing": torch.tensor(found is None),
            "labels": self.kept.labels(row, view),
            "row": torch.tensor(row),
            "view": torch.tensor(view),
        }

    def describe(self, index: int) -> str:
        """Item `index` as `case/z`, for messages."""
        return self.kept.slices.describe(index)


def _checksum(embedding: Tensor) -> int:
    return google_crc32c.value(embedding.numpy().tobytes())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
