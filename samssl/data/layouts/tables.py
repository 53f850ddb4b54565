"""A CSV or Parquet file of pairs, with columns image and, if you like, mask and patient. It fits anything.

A CSV may also begin with its first pair at once, as the lists of mazurowski-lab/finetune-SAM do.
"""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from samssl.config import UserError
from samssl.data.layouts.listing import Item, Listing, Tree, is_scan_name

TABLE_SUFFIXES = (".csv", ".parquet")
_COLUMNS = ("image", "mask", "patient")
_Row = dict[str, str | None]


def find_in_table(table: Path, tree: Tree) -> Listing:
    """The rows of a table; its paths are relative to its folder.

    Raises:
        UserError: it cannot be read, or has no column image.
    """
    if not table.is_file():
        raise UserError(
            f"There is no CSV file {table}: make data.root the file, or data.csv its name below data.root."
        )
    rows = _of_parquet(table) if table.suffix.lower() == ".parquet" else _of_csv(table)
    items = [_item(row, table.parent) for row in rows if (row["image"] or "").strip()]
    inside = [item for item in items if all([tree.holds(path) for path in (item.image, item.mask) if path])]
    return Listing("csv", inside, rejected=tree.rejected)


def _of_csv(table: Path) -> list[_Row]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            first = next(csv.reader(file), [])
            named = not (first and is_scan_name(first[0].strip()))
            file.seek(0)
            rows = csv.DictReader(file, fieldnames=first if named else _COLUMNS)
            _check_columns(first if named else [*_COLUMNS], table)
            return [{name: row.get(name) for name in _COLUMNS} for row in rows][named:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a CSV file ({type(error).__name__}).") from None


def _of_parquet(table: Path) -> list[_Row]:
    try:
        with pq.ParquetFile(table) as file:
            _check_columns(file.schema_arrow.names, table)
            held = file.read([name for name in _COLUMNS if name in file.schema_arrow.names])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{table} cannot be read as a Parquet file ({type(error).__name__}).") from None
    return [
        {name: None if value is None else str(value) for name, value in row.items()}
        for row in held.to_pylist()
    ]


def _check_columns(names: list[str], table: Path) -> None:
    if "image" not in names:
        raise UserError(f"{table} has no column 'image'; its columns are {names}.")


def _item(row: _Row, folder: Path) -> Item:
    mask = (row.get("mask") or "").strip()
    image, patient = str(row["image"]).strip(), (row.get("patient") or "").strip()
    if "\0" in image + mask:
        raise UserError("The table of pairs has paths with null characters, so it is damaged.")
    return Item(folder / image, folder / mask if mask else None, patient)
