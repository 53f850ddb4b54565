"""BIDS: `sub-XX/[ses-YY/]anat/*`, with masks in `derivatives/` (bids-specification.readthedocs.io).

A file name is entities and a suffix, as `sub-01_ses-1_acq-fast_T1w`. A mask (`dseg`, `mask` or `roi`) belongs
to the scan of its subject and session with whose entities its own agree.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from samssl.data.layouts.listing import Item, Listing, Tree, orphans, stem

_MASKS = ("dseg", "mask", "roi", "seg")
# They say how the mask was made, not which scan it is of.
_OF_MASKS = ("space", "desc", "label", "atlas", "res", "seg", "from", "hemi")


@dataclass(frozen=True)
class _Name:
    entities: dict[str, str]
    suffix: str

    def of_scan(self) -> dict[str, str]:
        return {key: value for key, value in self.entities.items() if key not in _OF_MASKS}


def find_bids(tree: Tree, images: str = "") -> Listing:
    """Anatomical scans, each a case of its subject, with the mask that fits it alone.

    With `images` only scans whose path fits that pattern are there to be fitted.
    """
    scans, masks = [], []
    for path in tree.scans():
        name = _name(path)
        if "sub" in name.entities and "anat" in path.relative_to(tree.root).parts:
            (masks if name.suffix in _MASKS else scans).append((path, name))
    scans = [scan for scan in scans if "derivatives" not in scan[0].relative_to(tree.root).parts]
    if images:
        scans = [scan for scan in scans if fnmatchcase(scan[0].relative_to(tree.root).as_posix(), images)]
    fitting = {mask: [path for path, scan in scans if _fits(name, scan)] for mask, name in masks}
    of_scan: dict[Path, list[Path]] = {}
    for mask, paths in fitting.items():
        if len(paths) == 1:
            of_scan.setdefault(paths[0], []).append(mask)
    items = [_item(path, name, of_scan.get(path, [])) for path, name in scans]
    rejected = [
        (mask, f"Fits {len(paths)} scans by its name. Choose scans with data.images, or list pairs in a CSV.")
        for mask, paths in fitting.items()
        if len(paths) > 1
    ]
    alone = [mask for mask, paths in fitting.items() if len(paths) <= 1]
    return Listing("bids", items, {}, "MR", [*rejected, *orphans(alone, items), *tree.rejected])


def _name(path: Path) -> _Name:
    *pairs, suffix = stem(path).split("_")
    return _Name(dict(pair.split("-", 1) for pair in pairs if "-" in pair), suffix)


def _fits(mask: _Name, scan: _Name) -> bool:
    wanted = mask.of_scan()
    same = all(scan.entities.get(key) == value for key, value in wanted.items())
    return same and scan.entities.get("ses") == mask.entities.get("ses")


def _item(path: Path, name: _Name, masks: list[Path]) -> Item:
    return Item(
        path, masks[0] if masks else None, f"sub-{name.entities['sub']}", further_masks=tuple(masks[1:])
    )
