"""Folders `images` and `masks` (or `labels`) with files of the same names; or any folder of images."""

from samssl.config import UserError
from samssl.data.layouts.listing import Item, Listing, Tree, orphans, relative_stem, without_mask_ending

_MASK_FOLDERS = ("masks", "labels")


def find_folders(tree: Tree) -> Listing:
    """Images with the masks of their names, without suffix and an ending as `_mask`.

    Raises:
        UserError: the root is not a folder.
    """
    root = tree.root
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder.")
    images = root / "images"
    if not images.is_dir():
        return Listing("folders", [Item(path) for path in tree.scans()], rejected=tree.rejected)
    folder = next((root / name for name in _MASK_FOLDERS if (root / name).is_dir()), root / "masks")
    masks = {relative_stem(path, folder): path for path in tree.scans(folder)}
    bare = {without_mask_ending(name): path for name, path in masks.items()}
    items = []
    for path in tree.scans(images):
        name = relative_stem(path, images)
        items.append(Item(path, masks.get(name, bare.get(name))))
    return Listing("folders", items, rejected=[*orphans(masks.values(), items), *tree.rejected])
