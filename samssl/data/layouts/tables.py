"""A CSV or Parquet file of pairs, with columns image and, if you like, mask and patient. It fits anything.

Of its other columns those are kept by which the user wants scores told apart, as site or sex.

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
_MOST_VALUES = 20
"""Of a subgroup column: with more, its values are measurements or names."""


def find_in_table(table: Path, tree: Tree, subgroups: tuple[str, ...] = ()) -> Listing:
    """The rows of a table; its paths are relative to its folder. `subgroups` are columns to be kept.

    Raises:
        UserError: it cannot be read, or lacks the column image or one of `subgroups`.
    """
    if not table.is_file():
        raise UserError(
            f"There is no CSV file {table}: make data.root the file, or data.csv its name below data.root."
        )
    columns = (*_COLUMNS, *subgroups)
    rows = (_of_parquet if table.suffix.lower() == ".parquet" else _of_csv)(table, columns)
    rows = [row for row in rows if (row["image"] or "").strip()]
    _check_subgroups(rows, subgroups)
    items = [_item(row, table.parent, subgroups) for row in rows]
    inside = [item for item in items if all([tree.holds(path) for path in (item.image, item.mask) if path])]
    return Listing("csv", inside, rejected=tree.rejected)


def _of_csv(table: Path, columns: tuple[str, ...]) -> list[_Row]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            first = next(csv.reader(file), [])
            named = not (first and is_scan_name(first[0].strip()))
            file.seek(0)
            rows = csv.DictReader(file, fieldnames=first if named else _COLUMNS)
            _check_columns(first if named else [*_COLUMNS], columns, table)
            return [{name: row.get(name) for name in columns} for row in rows][named:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read as a CSV file ({type(error).__name__}).") from None


def _of_parquet(table: Path, columns: tuple[str, ...]) -> list[_Row]:
    try:
        with pq.ParquetFile(table) as file:
            _check_columns(file.schema_arrow.names, columns, table)
            held = file.read([name for name in columns if name in file.schema_arrow.names])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{table} cannot be read as a Parquet file ({type(error).__name__}).") from None
    return [
        {name: None if value is None else str(value) for name, value in row.items()}
        for row in held.to_pylist()
    ]


def _check_columns(names: list[str], columns: tuple[str, ...], table: Path) -> None:
    required = [name for name in columns if name not in ("mask", "patient")]
    if missing := [name for name in required if name not in names]:
        raise UserError(f"{table} has no column '{missing[0]}'; its columns are {names}.")


def _check_subgroups(rows: list[_Row], subgroups: tuple[str, ...]) -> None:
    for name in subgroups:
        count = len({row[name] for row in rows})
        if count > max(1, min(_MOST_VALUES, len(rows) // 2)):
            raise UserError(
                f"data.subgroups: the column '{name}' has {count} different values in {len(rows)} rows. "
                f"Subgroups are shown in reports, so they must not name patients: at most {_MOST_VALUES} "
                "values, of two rows each on average. Bring measurements into a few ranges first."
            )


def _item(row: _Row, folder: Path, subgroups: tuple[str, ...]) -> Item:
    mask = (row.get("mask") or "").strip()
    image, patient = str(row["image"]).strip(), (row.get("patient") or "").strip()
    if "\0" in image + mask:
        raise UserError("The table of pairs has paths with null characters, so it is damaged.")
    of_case = {name: (row[name] or "").strip() or "unknown" for name in subgroups}
    return Item(folder / image, folder / mask if mask else None, patient, subgroups=of_case)
