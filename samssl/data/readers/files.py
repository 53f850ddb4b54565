"""What every reader shares: names of formats, how much one file may hold, and errors that name the file.

A reading library's own words are never passed on: they may quote a header, and with it a patient.
"""

import bz2
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import igzip

from samssl.config import UserError

MAX_SCAN_BYTES = 4 << 30
"""The most voxel data that one scan may hold, and so the most that a lying header can claim."""
SLACK_BYTES = 16 << 20
"""What a file may hold besides its voxels: header, extensions, padding."""
_BLOCK_BYTES = 1 << 20

NIFTI_SUFFIXES = (".nii", ".nii.gz")
NRRD_SUFFIXES = (".nrrd", ".nhdr")
METAIMAGE_SUFFIXES = (".mha", ".mhd")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUME_SUFFIXES = NIFTI_SUFFIXES + NRRD_SUFFIXES + METAIMAGE_SUFFIXES

_DICOM_PREAMBLE_BYTES = 128


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM; DICOM files may be named anything."""
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_PREAMBLE_BYTES + 4)[_DICOM_PREAMBLE_BYTES:] == b"DICM"
    except OSError:
        return False


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever a reading library raises on a broken file into a sentence that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(
            f"{path} is damaged or cannot be read ({error.strerror or type(error).__name__})."
        ) from None
    # What a library raises on bytes that are no such file is not to be foreseen.
    except Exception as error:
        raise UserError(f"{path} is damaged or not what its name says ({type(error).__name__}).") from error


def check_voxels(shape: tuple[int, ...], item_bytes: int, path: Path) -> int:
    """Bytes of an array that a header promises.

    Raises:
        UserError: it would be empty, or more than one scan may hold.
    """
    sizes = [int(size) for size in shape]
    if not sizes or min(sizes) <= 0:
        raise UserError(f"{path} holds no voxels: its shape is {tuple(sizes)}.")
    # Python integers: a lying header must not overflow its way past this check.
    promised = item_bytes * int(np.prod(sizes, dtype=object))
    if promised > MAX_SCAN_BYTES:
        raise too_large(path, f"promises {promised} bytes of voxels")
    return promised


def too_large(path: Path, what: str) -> UserError:
    """The error for a file that `what`, which is more than a scan may hold."""
    return UserError(
        f"{path} {what}, and more than {MAX_SCAN_BYTES >> 30} GiB is more than one scan may hold. "
        "If that is true, crop or split it."
    )


def check_held(promised: int, held: int, path: Path) -> None:
    """Refuse a file that holds fewer bytes of voxels than its header promises."""
    if held < promised:
        raise UserError(
            f"{path} is damaged: its header promises {promised} bytes of voxels, it holds {held}."
        )


def decompressing(file: BinaryIO, encoding: str, path: Path) -> BinaryIO:
    """`file` from here on, read through `raw`, `gzip` or `bzip2`."""
    if encoding == "raw":
        return file
    if encoding == "gzip":
        return igzip.IGzipFile(fileobj=file)  # pyright: ignore[reportReturnType]
    if encoding == "bzip2":
        return bz2.BZ2File(file)  # pyright: ignore[reportReturnType]
    raise UserError(f"{path} is compressed in a way that is not read here. Save it uncompressed or as gzip.")


def read_at_most(file: BinaryIO, num_bytes: int, path: Path) -> bytes:
    """`num_bytes`, or fewer where the file ends, without room being made for what is not there.

    The stream is then read to its end, where compressed files have their checksum.

    Raises:
        UserError: far more follows than a file of these voxels has, as in a decompression bomb.
    """
    parts, missing = [], num_bytes
    while missing and (block := file.read(min(missing, _BLOCK_BYTES))):
        parts.append(block)
        missing -= len(block)
    beyond = 0
    while block := file.read(_BLOCK_BYTES):
        beyond += len(block)
        if beyond > SLACK_BYTES:
            raise UserError(
                f"{path} holds over {SLACK_BYTES >> 20} MiB more than the voxels that its header promises. "
                "Save it again without them."
            )
    return b"".join(parts)


def inflated(content: bytes, num_bytes: int, path: Path) -> bytes:
    """The first `num_bytes` of what zlib compressed.

    Raises:
        UserError: it holds fewer or more.
    """
    inflate = zlib.decompressobj()
    found = inflate.decompress(content, num_bytes + 1)
    if len(found) > num_bytes:
        raise UserError(f"{path} is damaged: it holds more voxels than its header promises.")
    check_held(num_bytes, len(found), path)
    return found


def sibling(path: Path, name: str) -> Path:
    """The file of voxels beside a header, which may name it by nothing but a plain file name.

    Raises:
        UserError: the name leads elsewhere, through folders, a pattern, a list or a link.
    """
    plain = Path(name).name == name and name not in ("", ".", "..", "LIST")
    found = path.parent / name if plain and not set(name) & set("%\\:*?\0 \t") else None
    if found is None or found.is_symlink():
        raise UserError(
            f"{path} keeps its voxels elsewhere than in one file beside it. Save header and voxels as one "
            "file, or beside each other."
        )
    return found
