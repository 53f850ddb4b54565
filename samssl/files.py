"""Files that are whole or absent, and their digests."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    import pandas as pd
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"
"""A place on this machine, or one behind a URL that fsspec knows."""

_BLOCK_BYTES = 1 << 20


def sha256_file(path: AnyPath) -> str:
    """SHA-256 of the bytes of one file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path]) -> str:
    """SHA-256 of one file; of several, of their digests: neither names nor order change it."""
    return sha256_together([sha256_file(path) for path in paths])


def sha256_together(digests: Sequence[str]) -> str:
    """One digest for several; a single one stays what it is."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def sha256_tree(root: Path) -> str:
    """SHA-256 over the relative names and digests of every file below `root`."""
    files = sorted(cast("Iterator[Path]", files_below(root)))
    lines = [f"{path.relative_to(root).as_posix()} {sha256_file(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def files_below(root: AnyPath) -> Iterator[AnyPath]:
    """Every regular file below `root`."""
    return (path for path in root.rglob("*") if path.is_file())


def name_below(path: AnyPath, root: AnyPath) -> str:
    """Where a path lies below `root`, with slashes."""
    return path.relative_to(root).as_posix()  # pyright: ignore[reportArgumentType]


def remove_folder(folder: AnyPath) -> None:
    """Delete a folder and what is in it."""
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.fs.rm(folder.path, recursive=True)


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Write `content` beside `path`, then rename, so that `path` is whole or untouched."""
    with written_aside(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write text as `write_bytes` does."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_table(stem: Path, table: "pd.DataFrame", shown: "pd.DataFrame | None" = None) -> None:
    """Write a table as `<stem>.csv`, `.md` and `.tex` (booktabs); `shown` is how the last two say it."""
    read = table if shown is None else shown
    write_text(stem.with_name(f"{stem.name}.csv"), table.to_csv(index=False))
    write_text(stem.with_name(f"{stem.name}.md"), read.to_markdown(index=False, floatfmt=".4g") + "\n")
    write_text(
        stem.with_name(f"{stem.name}.tex"), read.to_latex(index=False, escape=True, float_format="%.4g")
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file that this program wrote."""
    return json.loads(path.read_text())


@contextmanager
def written_aside(path: AnyPath) -> Iterator[Path]:
    """Yield a free path beside `path`; on success it replaces `path`, on failure it is removed.

    The body makes either a file or a folder there. An existing folder at `path` is replaced whole.
    Behind a URL the free path is a temporary one of this machine, and its files are put one by one.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as scratch:
            partial = Path(scratch) / path.name
            yield partial
            _put(partial, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _put(local: Path, remote: "UPath") -> None:
    if local.is_file():
        remote.parent.mkdir(parents=True, exist_ok=True)
        remote.fs.put_file(str(local), remote.path)
        return
    if remote.exists():
        remove_folder(remote)
    for path in sorted(path for path in local.rglob("*") if path.is_file()):
        _put(path, remote / path.relative_to(local).as_posix())
