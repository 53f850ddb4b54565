"""BUSI, breast ultrasound: `benign (1).png` with `benign (1)_mask.png`, `..._mask_1.png` and so on."""

import re
from collections import defaultdict
from pathlib import Path

from samssl.data.layouts.listing import Item, Listing, Tree, orphans

LABELS = {1: "lesion"}
_MASK = re.compile(r"(.+)_mask(?:_(\d+))?")


def is_busi(root: Path) -> bool:
    """Whether `root` has the folders `benign` and `malignant` with masks beside images."""
    folders = (root / "benign", root / "malignant")
    return all(next(folder.glob("*_mask.png"), None) for folder in folders)


def find_busi(tree: Tree) -> Listing:
    """Images with their masks; those of several lesions are one mask together."""
    masks: dict[Path, list[Path]] = defaultdict(list)
    images = []
    for path in tree.scans():
        match = _MASK.fullmatch(path.stem)
        if match:
            masks[path.with_name(match[1] + path.suffix)].append(path)
        else:
            images.append(path)
    items = [_item(path, sorted(masks[path], key=_number)) for path in images]
    every = [path for group in masks.values() for path in group]
    return Listing("busi", items, LABELS, "US", [*orphans(every, items), *tree.rejected])


def _item(image: Path, masks: list[Path]) -> Item:
    return Item(image, masks[0] if masks else None, further_masks=tuple(masks[1:]))


def _number(path: Path) -> int:
    match = _MASK.fullmatch(path.stem)
    return int(match[2] or 0) if match else 0
