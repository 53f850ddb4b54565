"""Getting a public data set: its archives by HTTPS, each checked by its published checksum, then unpacked."""

import hashlib
import shutil
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

from tqdm import tqdm

from samssl.config import UserError
from samssl.data.recipe import Archive, read_recipe
from samssl.files import written_aside

_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60


def download(name: str, folder: Path) -> Path:
    """Put the data set of a recipe below `folder`, where nothing of it may lie yet; returns the folder.

    Raises:
        UserError: the recipe knows no archive, one cannot be had whole, or something is in its way.
    """
    recipe = read_recipe(name)
    if not recipe.download:
        raise UserError(f"{recipe.title} cannot be downloaded from here. {recipe.how_to_get}")
    print(f"{recipe.title}, licence: {recipe.licence}. To cite: {', '.join(recipe.doi)}", flush=True)
    for archive in recipe.download:
        fetch(archive, folder)
    return folder


def fetch(archive: Archive, folder: Path) -> None:
    """Download and unpack one archive.

    Raises:
        UserError: it cannot be reached, is not what was published, or would overwrite something.
    """
    name = archive.url.rpartition("/")[2]
    target = folder / archive.folder
    with written_aside(folder / f".{name}.unpacked") as aside:
        aside.mkdir(parents=True)
        _download(archive.url, aside / name)
        _check(aside / name, archive.checksum)
        _unpack(aside / name, aside / "content")
        _move_into(aside / "content", target)
    shutil.rmtree(folder / f".{name}.unpacked")


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            size = int(response.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(path.parent).free
            if 2 * size > free:
                raise UserError(
                    f"{url} has {size} bytes and is unpacked beside itself, but only {free} bytes are free "
                    f"in {path.parent.parent}. Choose another folder."
                )
            _copy(response, path, size)
    except (URLError, TimeoutError, ConnectionError, ValueError) as error:
        raise UserError(f"{url} could not be downloaded: {error}. Try again, or get it by hand.") from None


def _copy(response: object, path: Path, size: int) -> None:
    interval_s = 0.2 if sys.stderr.isatty() else 30
    bar = tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name, mininterval=interval_s)
    with path.open("wb") as file, bar:
        while block := response.read(_BLOCK_BYTES):  # pyright: ignore[reportAttributeAccessIssue]
            file.write(block)
            bar.update(len(block))


def _check(path: Path, checksum: str) -> None:
    kind, _, expected = checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        raise UserError(
            f"{path.name} is not the archive that was published: its {kind} is {found}, not {expected}. "
            "It was not unpacked. Try again; if it happens again, the archive has changed at its source."
        )


def _unpack(path: Path, folder: Path) -> None:
    """Unpack into a new folder; members that would leave it, links out of it and devices are refused."""
    try:
        if path.suffix == ".zip":
            shutil.unpack_archive(path, folder)  # leaves out absolute names and those with ..
        else:
            shutil.unpack_archive(path, folder, filter="data")
    except (shutil.ReadError, ValueError, OSError) as error:
        raise UserError(f"{path.name} could not be unpacked: {error}.") from None
    except Exception as error:
        if type(error).__module__ != "tarfile":
            raise
        raise UserError(f"{path.name} holds a file that may not be unpacked: {error}.") from None
    path.unlink()


def _move_into(content: Path, target: Path) -> None:
    entries = sorted(content.iterdir())
    taken = [entry.name for entry in entries if (target / entry.name).exists()]
    if taken:
        raise UserError(f"{target / taken[0]} is there already. Remove it, or choose another folder.")
    target.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        shutil.move(entry, target / entry.name)
