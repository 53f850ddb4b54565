"""The index of a slice store: a row per slice, a few of its columns in memory, the rest when asked for.

At 10^6 rows the parquet file has some 20 MB. It is kept as it is, and what training needs of each row is
kept beside it as numpy columns, 17 bytes a row; forked readers share both. No Python object exists per row.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from samssl.data.intensity import CaseIntensity
from samssl.scores import SUBGROUP, subgroup_columns

_OF_FORMAT_1 = (
    *("case", "patient", "split", "modality", "z", "num_slices", "height", "width"),
    *("spacing_z_mm", "spacing_y_mm", "spacing_x_mm", "intensity_low", "intensity_high"),
    *("content_fraction", "foreground_fraction", "labels"),
    *("source", "source_sha256", "mask_source", "mask_source_sha256", "image_sha256", "mask_sha256"),
)
STATISTICS = ("intensity_mean", "intensity_std", "intensity_min", "intensity_max")
"""Mean and standard deviation above the background, lowest and highest value; not in format 1."""
# Beside them there are columns that begin with `SUBGROUP`, where `data.subgroups` asked for some.
INDEX_COLUMNS = (*_OF_FORMAT_1, *STATISTICS)

_TEXT = (
    *("case", "patient", "split", "modality", "source", "source_sha256", "mask_source"),
    *("mask_source_sha256", "image_sha256", "mask_sha256"),
)
# Where a file lay says nothing of what it held, and its name may be a patient's.
_NOT_IN_DIGEST = ("source", "mask_source")
_RANGE = ("intensity_low", "intensity_high", *STATISTICS)


class SliceIndex:
    """The rows of a store, sorted by case and z; a slice is named by its row number."""

    def __init__(self, parquet: bytes) -> None:
        """Take in the content of an index file.

        Raises:
            ValueError: it is no such file.
        """
        self._parquet = parquet
        held = pq.read_schema(pa.BufferReader(parquet)).names
        subgroups = [name for name in held if name.startswith(SUBGROUP)]
        self.names = (*(name for name in INDEX_COLUMNS if name in held), *subgroups)
        if missing := set(_OF_FORMAT_1) - set(self.names):
            raise ValueError(f"the index has no column {', '.join(sorted(missing))}")
        changes = np.diff(_codes(self._read(["case"]), "case"), prepend=-1) != 0
        self.first_rows: Int[np.ndarray, " cases"] = np.flatnonzero(changes)
        self.case_numbers: Int[np.ndarray, " rows"] = np.cumsum(changes, dtype=np.int32) - 1
        self.z: Int[np.ndarray, " rows"] = self._read(["z"])["z"].to_numpy().astype(np.int32)
        self.content_fraction = self._read(["content_fraction"])["content_fraction"].to_numpy().copy()
        codes, self._split_names = self.groups("split")
        self._splits = codes.astype(np.int8)
        self._facts_of_cases()
        self._check_order()

    def _facts_of_cases(self) -> None:
        self._case_names = self._of_cases("case").cast(pa.string())
        modality = self._of_cases("modality")
        self._modalities = modality.indices.to_numpy().astype(np.int8)
        self._modality_names = modality.dictionary.to_pylist()
        self._labelled = pc.call_function("not_equal", [self._of_cases("mask_sha256"), ""]).to_numpy(False)
        nothing = np.full(len(self.first_rows), np.nan)
        known = [self._of_cases(name).to_numpy(False) if name in self.names else nothing for name in _RANGE]
        self._intensity = np.stack(known, axis=1)

    def _of_cases(self, column: str) -> Any:
        """A column in the first row of each case. One column at a time is read, to keep the peak low."""
        return self._read([column])[column].combine_chunks().take(pa.array(self.first_rows))

    def _check_order(self) -> None:
        names, places = self._case_names, np.arange(len(self)) - self.first_rows[self.case_numbers]
        follow = pc.call_function("less", [names[:-1], names[1:]]).to_numpy(zero_copy_only=False)
        if not (follow.all() and (places == self.z).all()):
            raise ValueError("the index is not sorted by case and z, or lacks slices")

    def __len__(self) -> int:
        return len(self.case_numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "frame"}

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Every column of every row, read when it is asked for first."""
        return self.columns(self.names)

    def columns(self, names: Sequence[str]) -> pd.DataFrame:
        """The columns `names` of every row."""
        table = self._read([*names])
        for name in set(names) & set(_TEXT):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, table[name].cast(pa.string()))
        return table.select([*names]).to_pandas()

    def case_name(self, row: int) -> str:
        """The case of a row."""
        return self._case_names[int(self.case_numbers[row])].as_py()

    def first_row(self, case: str) -> int | None:
        """The first row of a case; None if there is no such case. Names are sorted, so it is bisected."""
        low, high = 0, len(self._case_names)
        while low < high:
            middle = (low + high) // 2
            if self._case_names[middle].as_py() < case:
                low = middle + 1
            else:
                high = middle
        found = low < len(self._case_names) and self._case_names[low].as_py() == case
        return int(self.first_rows[low]) if found else None

    def num_slices(self, row: int) -> int:
        """How many slices the case of a row has."""
        case = int(self.case_numbers[row])
        stop = self.first_rows[case + 1] if case + 1 < len(self.first_rows) else len(self)
        return int(stop - self.first_rows[case])

    def labelled(self, row: int) -> bool:
        """Whether the case of a row has a mask."""
        return bool(self._labelled[self.case_numbers[row]])

    def intensity(self, row: int) -> CaseIntensity:
        """What is known of the values of a row's case."""
        case = int(self.case_numbers[row])
        modality = self._modality_names[self._modalities[case]]
        return CaseIntensity(modality, *self._intensity[case].tolist())

    def cases(self, split: str) -> list[str]:
        """The cases of one split, sorted."""
        chosen = np.flatnonzero(np.array(self._split_names)[self._splits[self.first_rows]] == split)
        return self._case_names.take(pa.array(chosen)).to_pylist()

    def modalities(self) -> set[str]:
        """The modalities that there are."""
        return set(self._modality_names)

    def rows(self, splits: Sequence[str], min_content: float = 0.0) -> Int[np.ndarray, " rows"]:
        """The rows of these splits of which at least the share `min_content` is not air."""
        numbers = [number for number, name in enumerate(self._split_names) if name in splits]
        wanted = np.isin(self._splits, numbers)
        return np.flatnonzero(wanted & (self.content_fraction >= min_content)).astype(np.int32)

    def groups(self, column: str) -> tuple[Int[np.ndarray, " rows"], list[str]]:
        """For each row the number of its value in a text column, and the values by number."""
        table = self._read([column])
        return _codes(table, column), table[column].combine_chunks().dictionary.to_pylist()

    def _read(self, names: list[str]) -> pa.Table:
        text = [name for name in names if name in _TEXT]
        return pq.read_table(
            pa.BufferReader(self._parquet), columns=names, read_dictionary=text
        ).unify_dictionaries()


def store_digest(name: str, labels: Mapping[int, str], index: pd.DataFrame) -> str:
    """SHA-256 of what a store holds, the same on any machine and in any folder."""
    digest = hashlib.sha256(json.dumps([name, sorted(labels.items())]).encode())
    columns = [column for column in INDEX_COLUMNS if column in index and column not in _NOT_IN_DIGEST]
    columns += subgroup_columns(index)
    for row in index.sort_values(by=["case", "z"])[columns].itertuples(index=False):
        digest.update(json.dumps([_canonical(value) for value in row]).encode())
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    """Floats to 6 digits, so that the last bit of a library's rounding does not make another digest."""
    if isinstance(value, np.ndarray | list):
        return [*map(int, value)]
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    return value.item() if isinstance(value, np.integer) else value


def _codes(table: pa.Table, column: str) -> Int[np.ndarray, " rows"]:
    return table[column].combine_chunks().indices.to_numpy()
