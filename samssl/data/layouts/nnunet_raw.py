"""nnU-Net's raw data, `Task` folders of version 1 and `Dataset` folders of version 2.

A case is `imagesTr/CASE_0000.nii.gz`, `_0001` and so on for each channel, and `labelsTr/CASE.nii.gz`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samssl.config import UserError
from samssl.data.layouts.listing import Item, Listing, Tree, orphans, read_facts, stem

_CHANNEL = re.compile(r"(.+)_(\d{4})")


def is_nnunet(root: Path) -> bool:
    """Whether a folder with a dataset.json is nnU-Net's and not the Decathlon's."""
    folder = root / "imagesTr"
    names = [stem(path) for path in sorted(folder.iterdir())[:100]] if folder.is_dir() else []
    names = [name for name in names if not name.startswith(".")]
    return bool(names) and all(_CHANNEL.fullmatch(name) for name in names)


def find_nnunet(tree: Tree, channel: int | None) -> Listing:
    """One channel of each case, with its mask.

    Raises:
        UserError: dataset.json is broken, has labels that cannot be kept, or several channels to choose from.
    """
    root = tree.root
    path = root / "dataset.json"
    facts = read_facts(path, "nnU-Net data set's dataset.json")
    channels = _channels(facts, path)
    if len(channels) > 1 and channel is None:
        listed = ", ".join(f"{number} ({name})" for number, name in sorted(channels.items()))
        raise UserError(f"The cases have {len(channels)} channels. Set data.volume to one: {listed}.")
    chosen = channel or 0
    if channels and chosen not in channels:
        raise UserError(f"data.volume={chosen}: the data set has only the channels {sorted(channels)}.")
    masks = {stem(mask): mask for mask in tree.scans(root / "labelsTr")}
    items = [
        Item(image, masks.get(case), name=case)
        for image, case in _of_channel(tree, root / "imagesTr", chosen)
    ]
    items += [Item(image, name=case) for image, case in _of_channel(tree, root / "imagesTs", chosen)]
    rejected = [*orphans(masks.values(), items), *tree.rejected]
    return Listing("nnunet", items, _labels(facts, path), channels.get(chosen, ""), rejected)


def _of_channel(tree: Tree, folder: Path, channel: int) -> list[tuple[Path, str]]:
    """(file, case) of each case's channel."""
    found = [(path, _CHANNEL.fullmatch(stem(path))) for path in tree.scans(folder)]
    return [(path, match[1]) for path, match in found if match and int(match[2]) == channel]


def _channels(facts: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names by number: `channel_names` in version 2, `modality` in version 1."""
    try:
        named = facts.get("channel_names", facts.get("modality", {}))
        return {int(number): str(name) for number, name in named.items()}
    except (AttributeError, ValueError):
        raise UserError(f"{path}: channel_names has to be {{number: name}}.") from None


def _labels(facts: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names by id, from {name: id} of version 2 or {id: name} of version 1."""
    given = facts.get("labels", {})
    if not isinstance(given, dict):
        raise UserError(f"{path}: labels has to be {{name: id}}.")
    try:
        if all(str(key).isdigit() for key in given):
            return {int(key): str(name) for key, name in given.items()}
        return {int(label): str(name) for name, label in given.items()}
    except (TypeError, ValueError):
        raise UserError(
            f"{path} has regions of several ids. Name each id in data.labels, and make the regions with "
            "data.classes and data.overlapping when fine-tuning."
        ) from None
