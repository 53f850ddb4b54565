"""The classes of a run: which labels of a store it tells apart, merges or leaves out.

Three numberings meet here. Masks hold label ids; `LabelledSlices` gives their ranks among the store's
labels; and a model has one output a class: the background and exclusive classes, of which the largest
logit wins, or regions that may overlap, each decided by the sign of its own logit.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from samssl.config import UserError

BACKGROUND = 0

ClassMap = Integer[np.ndarray, "Z H W"] | Bool[np.ndarray, "K Z H W"]
"""A volume of exclusive classes, by their ids, or of K regions, True inside."""


@dataclass(frozen=True)
class Classes:
    """How the labels of a store become what a model puts out; made by `run_classes`."""

    labels: dict[int, str]
    """Label id to name, as in the store; id 0 is background."""
    names: dict[int, str]
    """Id to name of every class of the run, background left out, in the order of the outputs."""
    members: dict[int, tuple[int, ...]]
    """Id of a class to the label ids that belong to it."""
    overlapping: bool
    """Whether the classes are regions that may share voxels."""

    @property
    def num_outputs(self) -> int:
        """Channels of the logits: a class each, and the background where classes are exclusive."""
        return len(self.names) + (not self.overlapping)

    def targets(self, labels: Int[Tensor, "B H W"]) -> Int[Tensor, "B H W"] | Bool[Tensor, "B K H W"]:
        """What the logits should say, from ranks of label ids, on their device.

        Exclusive classes: the number of the output that should win. Regions: True inside each.
        """
        if self.overlapping:
            return torch.from_numpy(self._inside).to(labels.device)[labels].movedim(-1, 1)
        if self._is_plain:
            return labels
        numbers = np.zeros(len(self.labels), np.int64)
        for number, inside in enumerate(self._inside.T, start=1):
            numbers[inside] = number
        return torch.from_numpy(numbers).to(labels.device)[labels]

    def reference(self, mask: Integer[np.ndarray, "*Z H W"]) -> np.ndarray:
        """Label ids to class ids in the same shape, or to K regions [K, ...], True inside."""
        if self._is_plain and not self.overlapping:
            return mask
        size = max(self.labels) + 1
        if self.overlapping:
            inside = np.zeros((len(self.names), size), np.bool_)
            inside[:, sorted(self.labels)] = self._inside.T
            return inside[:, mask]
        ids = np.zeros(size, np.uint8 if max(self.names) < 256 else np.int32)
        for class_id, members in self.members.items():
            ids[list(members)] = class_id
        return ids[mask]

    def decide(
        self, logits: Float[Tensor, "B outputs H W"]
    ) -> Integer[Tensor, "B H W"] | Bool[Tensor, "B outputs H W"]:
        """The id of the most likely class of every pixel, or every region's pixels."""
        if self.overlapping:
            return logits > 0
        ids = torch.tensor([BACKGROUND, *self.names], device=logits.device)
        winners = logits.max(dim=1).indices  # what argmax gives, in a twentieth of its time on a CPU
        return ids[winners].to(torch.uint8 if ids.max() < 256 else torch.int32)

    def mask_of(self, found: np.ndarray, class_id: int) -> Bool[np.ndarray, "*Z H W"]:
        """True inside one class of what `reference` or a prediction of a volume holds."""
        return found[list(self.names).index(class_id)] if self.overlapping else found == class_id

    def held(self, labels: Iterable[Int[np.ndarray, "_"]]) -> Bool[np.ndarray, "slices K"]:
        """Which classes each slice shows, from the label ids in it."""
        of_label = {label: inside for label, inside in zip(sorted(self.labels), self._inside, strict=True)}
        nothing = np.zeros(len(self.names), np.bool_)
        held = [np.any([nothing, *(of_label[int(label)] for label in present)], axis=0) for present in labels]
        return np.array(held, np.bool_).reshape(-1, len(self.names))

    @cached_property
    def _inside(self) -> Bool[np.ndarray, "labels K"]:
        """Whether the label of each rank belongs to each class."""
        return np.array(
            [[label in members for members in self.members.values()] for label in sorted(self.labels)]
        )

    @cached_property
    def _is_plain(self) -> bool:
        """Whether every label is a class of its own, under its own id."""
        return self.members == {label: (label,) for label in self.labels if label != BACKGROUND}


def run_classes(
    labels: Mapping[int, str],
    merged: Mapping[str, Sequence[str]] | None = None,
    overlapping: bool = False,
) -> Classes:
    """The classes that `merged` (class name to names of labels) makes of a store's `labels`.

    Without `merged` every label is a class under its own id. With it labels that are in no class become
    background, and classes are numbered from 1: by their lowest label id, the one of more labels first.
    The order in which they are given changes nothing, as neither JSON nor MLflow keeps it.

    Raises:
        UserError: a class is empty, has a label that there is not, or shares one without `overlapping`.
    """
    labels = dict(sorted(labels.items()))
    foreground = {name: label for label, name in labels.items() if label != BACKGROUND}
    if merged is None:
        names = {label: name for name, label in foreground.items()}
        return Classes(labels, names, {label: (label,) for label in names}, overlapping)
    _check(merged, foreground, labels[BACKGROUND], overlapping)
    inside = {name: tuple(sorted(foreground[label] for label in set(merged[name]))) for name in merged}
    ordered = sorted(inside, key=lambda name: (inside[name][0], -len(inside[name]), name))
    names = dict(enumerate(ordered, start=1))
    members = {class_id: inside[name] for class_id, name in names.items()}
    return Classes(labels, names, members, overlapping)


def _check(
    merged: Mapping[str, Sequence[str]], foreground: Mapping[str, int], background: str, overlapping: bool
) -> None:
    empty = [name for name, members in merged.items() if not members]
    if empty or not merged:
        what = f"The class '{empty[0]}' of data.classes has no labels" if empty else "data.classes is empty"
        raise UserError(f"{what}. The store has the labels {', '.join(foreground)}.")
    if background in merged:
        raise UserError(
            f"data.classes has a class '{background}', which is the background. Labels that are in no class "
            "become background by themselves: leave it out."
        )
    counts = Counter(label for members in merged.values() for label in dict.fromkeys(members))
    if unknown := [label for label in counts if label not in foreground]:
        raise UserError(
            f"data.classes names labels that the store does not have: {', '.join(unknown)}. It has: "
            f"{', '.join(foreground)}."
        )
    if shared := [label for label, count in counts.items() if count > 1 and not overlapping]:
        raise UserError(
            f"data.classes puts {', '.join(shared)} into more than one class. Put each label into one, or "
            "set data.overlapping=true for regions that share voxels."
        )
