"""The images of a public data set, found by the rules of its recipe."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from samssl.config import UserError
from samssl.data.layouts.dicom_tree import series_files
from samssl.data.layouts.listing import Item, Listing, Tree
from samssl.data.layouts.path_rules import Matched, match_rules
from samssl.data.recipe import Table, read_recipe


def find_by_recipe(tree: Tree, name: str, variant: str) -> Listing:
    """Every image that the recipe `name` knows, in the variant asked for (empty: its first).

    Raises:
        UserError: nothing is where the recipe expects it, or its table is not there.
    """
    if not name:
        raise UserError("The layout 'recipe' needs data.recipe: the name of a public data set.")
    recipe = read_recipe(name)
    paths = _paths_of(tree)
    found = list(match_rules(recipe.rules(variant), paths))
    if not found:
        raise UserError(
            f"{tree.root} is not laid out as the recipe {name} expects: no file is like "
            f"{recipe.rules(variant)[0].image}. {recipe.how_to_get}"
        )
    if recipe.table:
        found = _with_table(found, tree.root, paths, recipe.table)
    items = [item for entry in found for item in _items(tree.root, entry)]
    return Listing(name, items, recipe.labels, recipe.modality, tree.rejected)


def _paths_of(tree: Tree) -> list[str]:
    """Every file, and every folder that holds one, relative to the root; folders end in a slash."""
    files = [path.relative_to(tree.root) for path in tree.all_files()]
    folders = {folder.as_posix() + "/" for file in files for folder in file.parents if folder.name}
    return sorted({file.as_posix() for file in files} | folders)


def _items(root: Path, found: Matched) -> Iterator[Item]:
    """The image, or each series in a folder of DICOM files."""
    masks = tuple(root / path for path in ([found.mask] if found.mask else [path for _, path in found.parts]))
    whole = Item(
        root / found.image,
        masks[0] if masks else None,
        found.patient,
        found.case,
        further_masks=masks[1:],
        part_labels=tuple(label for label, _ in found.parts),
        split=found.split,
    )
    if not found.image.endswith("/"):
        yield whole
        return
    for series, files in series_files(whole.image).items():
        yield replace(whole, series=series, files=files)


def _with_table(found: list[Matched], root: Path, paths: list[str], table: Table) -> list[Matched]:
    """`found` with the patients and splits that the table says."""
    rows = _read_table(root, paths, table)
    missing = [entry.row for entry in found if entry.row not in rows]
    if missing:
        raise UserError(
            f"{table.file} has no row for {len(missing)} of {len(found)} images. "
            "Get the table that belongs to these images, or list them in a CSV of your own (data.csv)."
        )
    return [
        replace(
            entry,
            patient=rows[entry.row][table.patient] if table.patient else entry.patient,
            split=_split_of(rows[entry.row][table.split]) if table.split else entry.split,
        )
        for entry in found
    ]


def _split_of(text: str) -> str:
    return text if text in ("val", "test") else ""


def _read_table(root: Path, paths: list[str], table: Table) -> Mapping[str, Mapping[str, str]]:
    """The rows by their key."""
    files = [path for path in paths if path.rpartition("/")[2] == table.file]
    if not files:
        raise UserError(f"There is no {table.file} in {root}, which says whose the images are.")
    needed = {table.key, table.patient, table.split} - {""}
    try:
        with (root / files[0]).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=table.separator)
            absent = needed - set(reader.fieldnames or ())
            rows = {} if absent else {row[table.key]: row for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{root / files[0]} cannot be read as a CSV file: {error}.") from None
    if absent:
        raise UserError(f"{root / files[0]} has no column {', '.join(sorted(absent))}.")
    return rows
