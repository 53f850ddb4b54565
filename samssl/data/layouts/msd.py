"""The Medical Segmentation Decathlon: dataset.json, imagesTr, labelsTr, imagesTs."""

from pathlib import Path
from typing import Any

from samssl.config import UserError
from samssl.data.layouts.listing import Item, Listing, Tree, orphans, read_facts


def find_msd(tree: Tree) -> Listing:
    """Scans of imagesTr with the masks of the same names, and the unlabelled ones of imagesTs."""
    root = tree.root
    facts = _facts(root / "dataset.json")
    masks = {path.name: path for path in tree.scans(root / "labelsTr")}
    items = {path: Item(path, masks.get(path.name)) for path in tree.scans(root / "imagesTr")}
    # Files that dataset.json lists but that are not there become entries too, to be reported as missing.
    for listed in facts["training"]:
        image, mask = (root / str(listed[name]).removeprefix("./") for name in ("image", "label"))
        if tree.holds(image) and tree.holds(mask):
            items.setdefault(image, Item(image, mask))
    unlabelled = [Item(path) for path in tree.scans(root / "imagesTs")]
    found = [*items.values(), *unlabelled]
    rejected = [*orphans(masks.values(), found), *tree.rejected]
    return Listing("msd", found, facts["labels"], str(facts.get("modality", "")), rejected)


def _facts(path: Path) -> dict[str, Any]:
    facts = read_facts(path, "Decathlon data set's dataset.json")
    try:
        labels = {int(label): str(name) for label, name in facts.get("labels", {}).items()}
        training = facts.get("training", [])
        assert all({"image", "label"} <= set(entry) for entry in training)
    except (ValueError, AttributeError, TypeError, AssertionError):
        raise UserError(
            f"{path} is not a Decathlon dataset.json: "
            "it needs labels {id: name} and training [{image, label}]."
        ) from None
    return {**facts, "labels": labels, "training": training}
