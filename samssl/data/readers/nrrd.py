"""NRRD, in one file or with its voxels in one beside it; the header is parsed by pynrrd.

Of the header only sizes, type, encoding and place are used. Slicer's `.seg.nrrd` keeps just the part of the
grid in which segments lie.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import nrrd
import numpy as np

from samssl.config import UserError
from samssl.data.readers.files import (
    SLACK_BYTES,
    check_held,
    check_voxels,
    decompressing,
    naming,
    read_at_most,
    sibling,
)
from samssl.data.readers.geometry import LPS_TO_RAS, Grid, placed

_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), LPS_TO_RAS),
    **dict.fromkeys(("right-anterior-superior", "ras"), np.eye(4)),
    **dict.fromkeys(("left-anterior-superior", "las"), np.diag([-1.0, 1.0, 1.0, 1.0])),
}
_MAX_HEADER_BYTES = 1 << 20


def read_nrrd(path: Path, volume: int | None = None) -> Grid:
    """A volume in its stored order; `volume` chooses one where an axis that is not of space has several.

    Raises:
        UserError: the file is damaged, or holds something other than one volume.
    """
    with naming(path), path.open("rb") as file:
        _check_header_length(file, path)
        header = nrrd.read_header(file)
        array = _voxels(header, file, path)
        spatial, affine = _place(header, array.ndim, path)
    array = _one_volume(array, spatial, volume, path)
    while array.ndim < 3:
        array = array[..., None]
    return replace(placed(array, affine, path), cropped="Segment0_LabelValue" in header)


def _check_header_length(file: BinaryIO, path: Path) -> None:
    """Headers are lines of text that end in an empty one; a file without it is not read whole for one."""
    start = file.read(_MAX_HEADER_BYTES)
    file.seek(0)
    if not start.startswith(b"NRRD000"):
        raise UserError(f"{path} is not a NRRD file, whatever its name says.")
    if path.suffix.lower() != ".nhdr" and not any(end in start for end in (b"\n\n", b"\n\r\n")):
        raise UserError(f"{path} is damaged: its header does not end.")
    if path.suffix.lower() == ".nhdr" and len(start) == _MAX_HEADER_BYTES:
        raise UserError(f"{path} is too long for a header.")


def _voxels(header: Mapping[str, Any], file: BinaryIO, path: Path) -> np.ndarray:
    """The whole array, first axis fastest as NRRD has it."""
    kind = np.dtype(_TYPES.get(str(header["type"]).lower(), "V1"))
    sizes = tuple(int(size) for size in header["sizes"])
    if kind.kind not in "iuf" or len(sizes) != int(header["dimension"]) or not 2 <= len(sizes) <= 4:
        raise UserError(f"{path} holds {header['type']} values in {len(sizes)} dimensions: not one volume.")
    kind = kind.newbyteorder("big" if header.get("endian") == "big" else "little")
    promised = check_voxels(sizes, kind.itemsize, path)
    encoding = _ENCODINGS.get(str(header["encoding"]).lower(), "other")
    detached = header.get("data file", header.get("datafile"))
    if detached is None:
        content = _content(file, encoding, promised, header, path)
    else:
        with naming(path), sibling(path, str(detached)).open("rb") as beside:
            content = _content(beside, encoding, promised, header, path)
    check_held(promised, len(content), path)
    return np.frombuffer(content, kind).reshape(sizes, order="F")


def _content(file: BinaryIO, encoding: str, promised: int, header: Mapping[str, Any], path: Path) -> bytes:
    lines, skipped = (
        int(header.get(name, header.get(name.replace(" ", ""), 0))) for name in ("line skip", "byte skip")
    )
    if not 0 <= lines <= 1000 or not -1 <= skipped <= SLACK_BYTES:
        raise UserError(f"{path} is damaged: its header does not say where its voxels begin.")
    for _ in range(lines):
        file.readline(_MAX_HEADER_BYTES)
    if skipped == -1 and encoding == "raw":
        file.seek(-promised, 2)
        skipped = 0
    stream = decompressing(file, encoding, path)
    stream.read(max(0, skipped))
    return read_at_most(stream, promised, path)


def _place(header: Mapping[str, Any], ndim: int, path: Path) -> tuple[list[int], np.ndarray]:
    """The axes of space, and the affine from them to RAS mm."""
    directions = header.get("space directions")
    if directions is None:
        spacings = np.asarray(header.get("spacings", np.ones(ndim)), float)
        spatial = [axis for axis in range(ndim) if np.isfinite(spacings[axis])][-3:]
        vectors = np.diag(spacings[spatial])
    else:
        rows = [np.asarray(np.nan if row is None else row, float) for row in directions]
        spatial = [axis for axis, row in enumerate(rows) if np.isfinite(row).all()]
        vectors = np.array([rows[axis] for axis in spatial]).T
    space = str(header.get("space", "left-posterior-superior")).lower()
    if space not in _SPACES or len(spatial) not in (2, 3) or len(vectors) != len(spatial):
        raise UserError(f"{path} does not say in a way known here where its voxels lie in the patient.")
    affine = np.eye(4)
    affine[: len(vectors), : len(spatial)] = vectors
    affine[: len(vectors), 3] = np.nan_to_num(
        np.asarray(header.get("space origin", np.zeros(len(vectors))), float)
    )
    return spatial, _SPACES[space] @ affine


def _one_volume(array: np.ndarray, spatial: list[int], volume: int | None, path: Path) -> np.ndarray:
    others = [axis for axis in range(array.ndim) if axis not in spatial]
    if not others:
        return array
    count = array.shape[others[0]]
    if count > 1 and (volume is None or volume >= count):
        raise UserError(
            f"{path} holds {count} volumes (times, contrasts or layers of segments). Choose one volume with "
            f"data.volume, 0 to {count - 1}."
        )
    return np.take(array, 0 if count == 1 else volume or 0, axis=others[0])
