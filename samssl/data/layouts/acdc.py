"""ACDC, cine MRI of the heart: `patientNNN/patientNNN_frameNN.nii.gz` and `..._frameNN_gt.nii.gz`."""

import re
from pathlib import Path

from samssl.data.layouts.listing import Item, Listing, Rejected, Tree, orphans, stem

LABELS = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
_FRAME = re.compile(r"(patient\d+)_frame\d+")


def is_acdc(root: Path) -> bool:
    """Whether `patientNNN` folders with frames lie in `root`, its subfolders or theirs."""
    patterns = (f"{'*/' * depth}patient*/patient*_frame*.nii*" for depth in range(3))
    return any(next(root.glob(pattern), None) for pattern in patterns)


def find_acdc(tree: Tree) -> Listing:
    """The labelled frames, and any others; not the films that they are from."""
    scans = {stem(path): path for path in tree.scans()}
    items = [
        Item(path, scans.get(f"{name}_gt"), patient=match[1])
        for name, path in scans.items()
        if (match := _FRAME.fullmatch(name))
    ]
    films: Rejected = [
        (path, "Is the film of which the labelled frames are taken.")
        for name, path in scans.items()
        if name.endswith("_4d")
    ]
    masks = [path for name, path in scans.items() if name.endswith("_gt")]
    return Listing("acdc", items, LABELS, "MR", [*orphans(masks, items), *films, *tree.rejected])
