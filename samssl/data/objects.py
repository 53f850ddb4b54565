"""Labelled slices as objects to be pointed out: a few of each slice, each with a first prompt."""

import numpy as np
import torch
from torch import Tensor

from samssl.data.datasets import LabelledSlices, Pooled
from samssl.prompts import KINDS, Mask, PromptConfig, box_around, jittered, objects_in


class ObjectSlices:
    """`image` [C, S, S] in [0, 1] and `key` of a slice, with K of its objects.

    `objects` [K, S, S] is True inside; `points` [K, 2], `boxes` [K, 4] (jittered) and `tight_boxes` [K, 4]
    are in pixels of the image, and `kinds` [K] says which of `KINDS` is to be the first prompt. Where a
    slice shows nothing, as after augmentation, `objects` is False throughout.
    """

    def __init__(self, slices: LabelledSlices | Pooled, prompts: PromptConfig) -> None:
        self.slices, self.prompts = slices, prompts

    def __len__(self) -> int:
        return len(self.slices)

    def describe(self, index: int) -> str:
        """Item `index` as `case/z`, for messages."""
        return self.slices.describe(index)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        item, generator = self.slices[draw], np.random.default_rng(draw[1])
        labels = item["labels"].numpy()
        found = objects_in(labels, self.prompts.objects, self.prompts.largest)
        found = found or [np.zeros(labels.shape, bool)]
        order = generator.permutation(len(found))
        chosen = [found[order[place % len(found)]] for place in range(self.prompts.objects_per_slice)]
        return {
            "image": item["image"],
            "index": item["index"],
            "key": torch.tensor(draw[1]),
            "objects": torch.from_numpy(np.stack(chosen)),
            **first_prompts(chosen, self.prompts, generator),
        }


def first_prompts(
    objects: list[Mask], prompts: PromptConfig, generator: np.random.Generator
) -> dict[str, Tensor]:
    """`points`, `boxes`, `tight_boxes` and `kinds` of objects; zeros where an object is empty."""
    weights = np.array([getattr(prompts, kind) for kind in KINDS])
    shares, place = weights / weights.sum(), prompts.place(generator)
    points = np.zeros((len(objects), 2), np.float32)
    boxes, tight = np.zeros((2, len(objects), 4), np.float32)
    for number, mask in enumerate(objects):
        if mask.any():
            points[number], tight[number] = place(mask), box_around(mask)
            height, width = mask.shape
            boxes[number] = jittered(tight[number], prompts.box_jitter, (height, width), generator)
    kinds = generator.choice(len(KINDS), len(objects), p=shares)
    named = {"points": points, "boxes": boxes, "tight_boxes": tight, "kinds": kinds}
    return {name: torch.from_numpy(value) for name, value in named.items()}
