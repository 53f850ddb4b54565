"""A data set behind a URL: its names are listed here, its scans fetched one case at a time.

Finding scans needs names and small files beside them (dataset.json, CSV files), so the tree is made again in
a temporary folder, in which scans are empty files. DICOM alone is fetched whole for it, as nothing but its
headers says which files belong together. Whoever reads a case fetches its files, and deletes them after.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from samssl.config import UserError, as_url
from samssl.data.entries import Entry, Remote
from samssl.data.layouts.listing import is_scan_name, stem


@dataclass(frozen=True)
class Listed:
    """The names behind a URL, in a folder of this machine."""

    url: Path
    folder: Path
    versions: Mapping[str, str]
    """Of each file, by its relative name: what its filesystem tells changed content by."""
    sizes: Mapping[str, int]
    """In bytes."""
    further: Mapping[Path, Sequence[str]]
    """Names without their suffix to the files that are no scans: voxels that lie beside a header."""

    def entry(self, entry: Entry) -> Entry:
        """The entry of a listed scan, as one to fetch."""
        own = {path.relative_to(self.folder) for path in (*entry.image_files, *entry.mask_files)}
        parts = (self.further.get(_without_suffix(path), ()) for path in own)
        names = sorted({path.as_posix() for path in own}.union(*parts))
        version = hashlib.sha256("\n".join(f"{name} {self.versions[name]}" for name in names).encode())
        sizes = tuple(self.sizes[name] for name in names)
        remote = Remote(as_url(self.url), tuple(names), sizes, version.hexdigest())
        return replace(_moved(entry, self.folder, self.url), remote=remote)


@contextmanager
def listed(url: Path) -> Iterator[Listed]:
    """The tree behind a URL as a temporary folder without the content of its scans.

    Raises:
        UserError: nothing is there, or it cannot be reached.
    """
    filesystem, root = _open(url)
    try:
        infos = filesystem.find(root, detail=True)
    except (OSError, ValueError) as error:
        raise UserError(f"data.root: {as_url(url)} cannot be listed ({type(error).__name__}).") from None
    if not infos:
        raise UserError(f"data.root: there is nothing at {as_url(url)}.")
    if set(infos) == {root}:
        raise UserError(f"data.root: {as_url(url)} is a file. Give its folder, and a CSV's name as data.csv.")
    names = {path: name for path in infos if (name := _relative(path, root))}
    with tempfile.TemporaryDirectory(prefix="samssl_") as temporary:
        folder = Path(temporary)
        whole = {}
        for path, name in names.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if _is_dicom_name(name) or not is_scan_name(name):
                whole[path] = str(folder / name)
            else:
                (folder / name).touch()
        filesystem.get(list(whole), list(whole.values()))
        versions = {name: filesystem.ukey(path) for path, name in names.items()}
        sizes = {name: int(infos[path].get("size") or 0) for path, name in names.items()}
        further: dict[Path, list[str]] = {}
        for name in names.values():
            if not is_scan_name(name):
                further.setdefault(_without_suffix(Path(name)), []).append(name)
        yield Listed(url, folder, versions, sizes, further)


@contextmanager
def at_hand(entry: Entry) -> Iterator[Entry]:
    """The entry with its files on this machine, as long as they are needed.

    Raises:
        UserError: a file cannot be fetched; or what the body raises, with the URL in place of the copies.
    """
    if entry.remote is None:
        yield entry
        return
    url = Path(entry.remote.url)
    filesystem, root = _open(url)
    with tempfile.TemporaryDirectory(prefix="samssl_") as temporary:
        folder = Path(temporary)
        try:
            for name in entry.remote.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(f"{root}/{name}", str(folder / name))
        except (OSError, ValueError) as error:
            raise UserError(f"{entry.image} cannot be fetched ({type(error).__name__}).") from None
        try:
            yield replace(_moved(entry, url, folder), remote=None)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(url))) from None


def _open(url: Path) -> tuple[Any, str]:
    try:
        filesystem, root = fsspec.url_to_fs(as_url(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"data.root: {as_url(url)} cannot be opened: {error}") from None
    return filesystem, root.rstrip("/")


def _relative(path: str, root: str) -> str:
    """The name of a listed file below the root; empty for one that would lie elsewhere."""
    name = path.removeprefix(root).lstrip("/")
    return "" if ".." in PurePosixPath(name).parts or path == root else name


def _is_dicom_name(name: str) -> bool:
    return name.lower().endswith((".dcm", ".dicom", ".ima"))


def _without_suffix(path: Path) -> Path:
    """What a header in one file and its voxels in another have in common."""
    return path.with_name(stem(path))


def _moved(entry: Entry, old: Path, new: Path) -> Entry:
    """The entry with its files in another folder."""

    def to_new(path: Path) -> Path:
        return new / path.relative_to(old)

    return replace(
        entry,
        image=to_new(entry.image),
        mask=to_new(entry.mask) if entry.mask else None,
        files=tuple(map(to_new, entry.files)),
        further_masks=tuple(map(to_new, entry.further_masks)),
    )
