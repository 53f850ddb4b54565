"""The slice store: an index with a row per slice, and the pixels in native resolution and units.

    <store>/index.parquet         one row a slice: where it comes from, what it shows, its split
    <store>/cases/<case>.zarr     `image` and `mask`, one read a slice (samssl/data/shards.py); case.json
    <store>/manifest.json         name, labels, the store's digest and the SHA-256 of every other file
    <store>/rejected.csv          the files that could not be used, and why

The manifest is written last: a folder without a fitting one is no store. Reading goes through fsspec.
A slice is named by its case and z, or by its row number in the index.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec
import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, Integer, Shaped

from samssl.config import UserError, as_url
from samssl.data.cache import CachedFiles
from samssl.data.cases import CASE_FILE, content_digest
from samssl.data.ignoring import ignored_label, told_apart, without
from samssl.data.index import SliceIndex, store_digest
from samssl.data.intensity import CaseIntensity
from samssl.data.sealed import seal, unseal
from samssl.data.shards import ShardedSlices
from samssl.files import AnyPath, write_bytes

INDEX_FILE, MANIFEST_FILE, REJECTED_FILE = "index.parquet", "manifest.json", "rejected.csv"

_FORMATS = (1, 2)
"""Of the manifest. 2 has the statistics of each case in the index; 1 is read as it is, without them."""
_OPEN_ARRAYS = 16384


@runtime_checkable
class Rows(Protocol):
    """What a model's input needs of an index: `SliceIndex` has it, and so has a single scan."""

    @property
    def z(self) -> Int[np.ndarray, " rows"]:
        """Which slice of its case each row is."""
        ...

    def case_name(self, row: int) -> str:
        """The case of a row."""
        ...

    def num_slices(self, row: int) -> int:
        """How many slices the case of a row has."""
        ...

    def intensity(self, row: int) -> CaseIntensity:
        """What is known of the values of a row's case."""
        ...


@runtime_checkable
class Slices(Protocol):
    """Slices by their rows: a `SliceStore`, or a scan that is in none."""

    @property
    def rows(self) -> Rows:
        """Facts of each slice."""
        ...

    def image_slice(self, case: str, z: int) -> Shaped[np.ndarray, "H W"]:
        """One slice, in native type and units."""
        ...


class SliceStore:
    """A complete slice store, for reading; may be pickled and used in many processes."""

    def __init__(self, root: str | Path, cache: Path | None = None) -> None:
        """Open the store at a path or URL; `cache` is a local folder that keeps the files of a remote one.

        Raises:
            UserError: there is no complete store at `root`.
        """
        self.root = as_url(root)
        filesystem, self._path = fsspec.url_to_fs(self.root)
        manifest = _read_manifest(filesystem, self._path, self.root)
        self.name: str = manifest["name"]
        named = {int(label): name for label, name in manifest["labels"].items()}
        self.ignored = ignored_label(named)
        """Label id of voxels that nobody has labelled; None where masks have none."""
        self.labels = told_apart(named)
        """Names of all other label ids."""
        self.digest: str = manifest["digest"]
        self.rows = _read_index(filesystem, self._path, self.root, manifest["files"][INDEX_FILE])
        self._files = (
            filesystem if cache is None else CachedFiles(filesystem, self._path, cache / self.digest[:16])
        )
        self._arrays: dict[tuple[str, str], ShardedSlices] = {}

    @property
    def index(self) -> pd.DataFrame:
        """The whole index as a table; at 10^6 rows it takes seconds and most of a gigabyte."""
        return self.rows.frame

    def cases(self, split: str) -> list[str]:
        """The cases of one split, sorted."""
        return self.rows.cases(split)

    def info(self, case: str) -> pd.Series:
        """The facts of one case: the first of its rows in the index."""
        return self.index.iloc[self.first_row(case)]

    def first_row(self, case: str) -> int:
        """Where the rows of a case begin; slice z of it is in row `first_row(case) + z`.

        Raises:
            UserError: there is no such case.
        """
        row = self.rows.first_row(case)
        if row is None:
            raise UserError(f"The store {self.root} has no case '{case}'.")
        return row

    def describe(self, row: int) -> str:
        """A slice by its row as `case/z`."""
        return f"{self.rows.case_name(row)}/{self.rows.z[row]}"

    def image_slice(self, case: str, z: int) -> Shaped[np.ndarray, "H W"]:
        """One slice of the image, in native type and units."""
        with self._naming(case):
            return self._array(case, "image").read(z)

    def shape(self, case: str) -> tuple[int, int, int]:
        """Slices, rows and columns of the volume."""
        with self._naming(case):
            return self._array(case, "image").shape

    def affine(self, case: str) -> list[list[float]]:
        """From the (z, y, x) index of a case to RAS mm."""
        with self._naming(case):
            return unseal(self._files.cat_file(f"{self._path}/cases/{case}.zarr/{CASE_FILE}"))["affine"]

    def mask_slice(self, case: str, z: int) -> Integer[np.ndarray, "H W"] | None:
        """One slice of `mask`; None if the case has no mask."""
        if not self._has_mask(case):
            return None
        with self._naming(case):
            return self._known(self._array(case, "mask").read(z))

    def ignored_slice(self, case: str, z: int) -> Bool[np.ndarray, "H W"] | None:
        """True where a slice is to be ignored; None without a mask, or where masks have no such voxels."""
        if self.ignored is None or not self._has_mask(case):
            return None
        with self._naming(case):
            return self._array(case, "mask").read(z) == self.ignored

    def image(self, case: str) -> Shaped[np.ndarray, "Z H W"]:
        """The whole volume, in native type and units."""
        with self._naming(case):
            return self._array(case, "image").read_all()

    def mask(self, case: str) -> Integer[np.ndarray, "Z H W"] | None:
        """The label ids of the whole volume, 0 where it is to be ignored; None if the case has no mask."""
        stored = self.stored_mask(case)
        return None if stored is None else self._known(stored)

    def stored_mask(self, case: str) -> Integer[np.ndarray, "Z H W"] | None:
        """The mask as it was prepared, with the id of what is to be ignored."""
        if not self._has_mask(case):
            return None
        with self._naming(case):
            return self._array(case, "mask").read_all()

    def judged(
        self, case: str, prediction: Shaped[np.ndarray, "*K Z H W"], planes: Sequence[int] | None = None
    ) -> Shaped[np.ndarray, "*K Z H W"]:
        """A prediction of a case, or of these slices of it, with background where it is to be ignored."""
        if self.ignored is None or not self._has_mask(case):
            return prediction
        chosen = range(self.shape(case)[0]) if planes is None else planes
        ignored = [self.ignored_slice(case, z) for z in chosen]
        return without(prediction, np.array(ignored))

    def _known(self, stored: Integer[np.ndarray, "*Z H W"]) -> Integer[np.ndarray, "*Z H W"]:
        return stored if self.ignored is None else without(stored, stored == self.ignored)

    def _has_mask(self, case: str) -> bool:
        return self.rows.labelled(self.first_row(case))

    def _array(self, case: str, name: str) -> ShardedSlices:
        key = (case, name)
        array = self._arrays.pop(key, None)
        if array is None:
            self.first_row(case)
            array = ShardedSlices(self._files, f"{self._path}/cases/{case}.zarr/{name}")
            if len(self._arrays) >= _OPEN_ARRAYS:
                self._arrays.pop(next(iter(self._arrays)))
        # Put in last, so that the first is the one unused for longest.
        self._arrays[key] = array
        return array

    @contextmanager
    def _naming(self, case: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"Case {case} of the store {self.root} is damaged ({error}). Run prepare again to mend it."
            ) from None


def write_index(
    root: AnyPath, name: str, labels: Mapping[int, str], index: pd.DataFrame, files: Mapping[str, str]
) -> str:
    """Complete the store: write its index, then its manifest, unless they are there already.

    `files` are the digests of all other files. Returns the store's digest.
    """
    buffer = io.BytesIO()
    index.to_parquet(buffer, index=False)
    manifest = {
        "format": _FORMATS[-1],
        "name": name,
        "labels": {str(label): text for label, text in labels.items()},
        "cases": len(index["case"].unique()),
        "rows": len(index),
        "digest": store_digest(name, labels, index),
        "files": {**files, INDEX_FILE: hashlib.sha256(buffer.getvalue()).hexdigest()},
    }
    contents = {INDEX_FILE: buffer.getvalue(), MANIFEST_FILE: seal(manifest)}
    if any(_content(root / file) != content for file, content in contents.items()):
        # In between, the old manifest must not vouch for the new index.
        (root / MANIFEST_FILE).unlink(missing_ok=True)
        write_bytes(root / INDEX_FILE, contents[INDEX_FILE])
        write_bytes(root / MANIFEST_FILE, contents[MANIFEST_FILE])
    return manifest["digest"]


def verify_store(root: str | Path) -> list[str]:
    """Read every byte of a store again; a sentence for each file or case that is not as it was written."""
    filesystem, path = fsspec.url_to_fs(as_url(root))
    try:
        manifest = _read_manifest(filesystem, path, as_url(root))
    except UserError as error:
        return [str(error)]
    faults = [*_file_faults(filesystem, path, manifest["files"])]
    try:
        store = SliceStore(root)
    except UserError:
        return faults
    for case in sorted(store.index["case"].unique()):
        faults += _case_faults(store, case)
    labels = {int(label): name for label, name in manifest["labels"].items()}
    if store_digest(store.name, labels, store.index) != store.digest:
        faults.append(f"{MANIFEST_FILE}: its digest is not that of the index.")
    return faults


def _read_manifest(filesystem: Any, path: str, root: str) -> dict[str, Any]:
    try:
        manifest = unseal(filesystem.cat_file(f"{path}/{MANIFEST_FILE}"))
        if manifest["format"] in _FORMATS:
            return manifest
        reason = (
            f"it has format {manifest['format']}, and this version reads {_FORMATS}. Install a newer samssl."
        )
    except FileNotFoundError:
        reason = f"it has no {MANIFEST_FILE}. Run prepare to write the store, or check the path."
    except (OSError, ValueError) as error:
        reason = f"its {MANIFEST_FILE} is damaged ({error}). Run prepare again to mend it."
    raise UserError(f"{root} is no complete slice store: {reason}")


def _read_index(filesystem: Any, path: str, root: str, sha256: str) -> SliceIndex:
    try:
        content = filesystem.cat_file(f"{path}/{INDEX_FILE}")
    except OSError:
        content = b""
    reason = f"is not the one that its {MANIFEST_FILE} lists"
    if hashlib.sha256(content).hexdigest() == sha256:
        try:
            return SliceIndex(content)
        except ValueError as error:
            reason = f"cannot be used ({error})"
    raise UserError(
        f"{root} is no complete slice store: its {INDEX_FILE} {reason}. Run prepare again to mend it."
    )


def _file_faults(filesystem: Any, path: str, files: Mapping[str, str]) -> Iterator[str]:
    for name, digest in files.items():
        try:
            content = filesystem.cat_file(f"{path}/{name}")
        except OSError:
            yield f"{name} is missing."
            continue
        if hashlib.sha256(content).hexdigest() != digest:
            yield f"{name} is damaged: its bytes are not those that were written."
    for found in filesystem.find(f"{path}/cases"):
        name = "cases/" + found.rsplit("/cases/", 1)[-1]
        if name not in files:
            yield f"{name} does not belong to the store."


def _case_faults(store: SliceStore, case: str) -> Iterator[str]:
    info = store.info(case)
    parts = (("image", store.image, "image_sha256"), ("mask", store.stored_mask, "mask_sha256"))
    for name, read, digest in parts:
        try:
            array = read(case)
        except UserError as error:
            yield str(error)
            continue
        if ("" if array is None else content_digest(array)) != info[digest]:
            yield f"Case {case}: the voxels of its {name} are not those that were prepared."


def _content(path: AnyPath) -> bytes:
    return path.read_bytes() if path.is_file() else b""
