"""The slice store: an index with a row per slice, and the pixels in native resolution and units.

    <store>/index.parquet         one row a slice: where it comes from, what it shows, its split
    <store>/cases/<case>.zarr     `image` and `mask`, one read a slice (samssl/data/shards.py); case.json
    <store>/manifest.json         name, labels, the store's digest and the SHA-256 of every other file
    <store>/rejected.csv          the files that could not be used, and why

The manifest is written last: a folder without a fitting one is no store. Reading goes through fsspec.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from jaxtyping import Integer, Shaped

from samssl.config import UserError
from samssl.data.cases import content_digest
from samssl.data.sealed import seal, unseal
from samssl.data.shards import ShardedSlices
from samssl.files import write_bytes

INDEX_FILE, MANIFEST_FILE, REJECTED_FILE = "index.parquet", "manifest.json", "rejected.csv"

INDEX_COLUMNS = (
    *("case", "patient", "split", "modality", "z", "num_slices", "height", "width"),
    *("spacing_z_mm", "spacing_y_mm", "spacing_x_mm", "intensity_low", "intensity_high"),
    *("content_fraction", "foreground_fraction", "labels"),
    *("source", "source_sha256", "mask_source", "mask_source_sha256", "image_sha256", "mask_sha256"),
)
# Where a file lay says nothing of what it held, and its name may be a patient's.
_NOT_IN_DIGEST = ("source", "mask_source")
_OPEN_ARRAYS = 4096


class SliceStore:
    """A complete slice store, for reading; may be pickled and used in many processes."""

    def __init__(self, root: str | Path) -> None:
        """Open the store at a path or URL.

        Raises:
            UserError: there is no complete store at `root`.
        """
        self.root = str(root)
        self._filesystem, self._path = fsspec.url_to_fs(self.root)
        manifest = _read_manifest(self._filesystem, self._path, self.root)
        content = _read_index(self._filesystem, self._path, self.root, manifest["files"][INDEX_FILE])
        self.name: str = manifest["name"]
        self.labels = {int(label): name for label, name in manifest["labels"].items()}
        self.digest: str = manifest["digest"]
        self.index = pd.read_parquet(io.BytesIO(content))
        first = ~self.index["case"].duplicated().to_numpy()
        self._first_row = dict(zip(self.index["case"][first], np.flatnonzero(first).tolist(), strict=True))
        self._labelled = frozenset(self.index.loc[self.index["mask_sha256"] != "", "case"])
        self._arrays: dict[tuple[str, str], ShardedSlices] = {}

    def cases(self, split: str) -> list[str]:
        """The cases of one split, sorted."""
        return sorted(self.index.loc[self.index["split"] == split, "case"].unique())

    def info(self, case: str) -> pd.Series:
        """The facts of one case: the first of its rows in the index."""
        return self.index.iloc[self._row(case)]

    def image_slice(self, case: str, z: int) -> Shaped[np.ndarray, "H W"]:
        """One slice of the image, in native type and units."""
        with self._naming(case):
            return self._array(case, "image").read(z)

    def mask_slice(self, case: str, z: int) -> Integer[np.ndarray, "H W"] | None:
        """One slice of the label ids; None if the case has no mask."""
        if not self._has_mask(case):
            return None
        with self._naming(case):
            return self._array(case, "mask").read(z)

    def image(self, case: str) -> Shaped[np.ndarray, "Z H W"]:
        """The whole volume, in native type and units."""
        with self._naming(case):
            return self._array(case, "image").read_all()

    def mask(self, case: str) -> Integer[np.ndarray, "Z H W"] | None:
        """The label ids of the whole volume; None if the case has no mask."""
        if not self._has_mask(case):
            return None
        with self._naming(case):
            return self._array(case, "mask").read_all()

    def _row(self, case: str) -> int:
        if case not in self._first_row:
            raise UserError(f"The store {self.root} has no case '{case}'.")
        return self._first_row[case]

    def _has_mask(self, case: str) -> bool:
        self._row(case)
        return case in self._labelled

    def _array(self, case: str, name: str) -> ShardedSlices:
        key = (case, name)
        array = self._arrays.pop(key, None)
        if array is None:
            self._row(case)
            array = ShardedSlices(self._filesystem, f"{self._path}/cases/{case}.zarr/{name}")
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


def store_digest(name: str, labels: Mapping[int, str], index: pd.DataFrame) -> str:
    """SHA-256 of what a store holds, the same on any machine and in any folder."""
    digest = hashlib.sha256(json.dumps([name, sorted(labels.items())]).encode())
    columns = [column for column in INDEX_COLUMNS if column not in _NOT_IN_DIGEST]
    for row in index.sort_values(by=["case", "z"])[columns].itertuples(index=False):
        digest.update(json.dumps([_canonical(value) for value in row]).encode())
    return digest.hexdigest()


def write_index(
    root: Path, name: str, labels: Mapping[int, str], index: pd.DataFrame, files: Mapping[str, str]
) -> str:
    """Complete the store: write its index, then its manifest, unless they are there already.

    `files` are the digests of all other files. Returns the store's digest.
    """
    buffer = io.BytesIO()
    index.to_parquet(buffer, index=False)
    manifest = {
        "format": 1,
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
    filesystem, path = fsspec.url_to_fs(str(root))
    try:
        manifest = _read_manifest(filesystem, path, str(root))
    except UserError as error:
        return [str(error)]
    faults = [*_file_faults(filesystem, path, manifest["files"])]
    try:
        store = SliceStore(root)
    except UserError:
        return faults
    for case in sorted(store.index["case"].unique()):
        faults += _case_faults(store, case)
    if store_digest(store.name, store.labels, store.index) != store.digest:
        faults.append(f"{MANIFEST_FILE}: its digest is not that of the index.")
    return faults


def _read_manifest(filesystem: Any, path: str, root: str) -> dict[str, Any]:
    try:
        return unseal(filesystem.cat_file(f"{path}/{MANIFEST_FILE}"))
    except FileNotFoundError:
        reason = f"it has no {MANIFEST_FILE}. Run prepare to write the store, or check the path."
    except (OSError, ValueError) as error:
        reason = f"its {MANIFEST_FILE} is damaged ({error}). Run prepare again to mend it."
    raise UserError(f"{root} is no complete slice store: {reason}")


def _read_index(filesystem: Any, path: str, root: str, sha256: str) -> bytes:
    try:
        content = filesystem.cat_file(f"{path}/{INDEX_FILE}")
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{root} is no complete slice store: its {INDEX_FILE} is not the one that its "
            f"{MANIFEST_FILE} lists. Run prepare again to mend it."
        )
    return content


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
    for read, expected in ((store.image, info["image_sha256"]), (store.mask, info["mask_sha256"])):
        try:
            array = read(case)
        except UserError as error:
            yield str(error)
            continue
        if ("" if array is None else content_digest(array)) != expected:
            yield f"Case {case}: the voxels of its {read.__name__} are not those that were prepared."


def _canonical(value: Any) -> Any:
    """Floats to 6 digits, so that the last bit of a library's rounding does not make another digest."""
    if isinstance(value, np.ndarray | list):
        return [*map(int, value)]
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    return value.item() if isinstance(value, np.integer) else value


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
