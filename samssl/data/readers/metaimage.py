"""MetaImage: `.mha` in one file, `.mhd` with its voxels in one beside it.

No library of ours reads it without ITK, and the header is a few lines of `Key = Value`
(https://itk.org/Wiki/ITK/MetaIO/Documentation). Only what is named here is used of it.
"""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from samssl.config import UserError
from samssl.data.readers.files import (
    MAX_SCAN_BYTES,
    SLACK_BYTES,
    check_held,
    check_voxels,
    inflated,
    naming,
    read_at_most,
    sibling,
    too_large,
)
from samssl.data.readers.geometry import LPS_TO_RAS, Grid, placed

_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4"},
    **{"MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4"},
    "MET_DOUBLE": "f8",
}
_MAX_LINES, _MAX_LINE_BYTES = 200, 1 << 16


def read_metaimage(path: Path, volume: int | None = None) -> Grid:
    """A volume in its stored order; `volume` chooses one of a 4D file.

    Raises:
        UserError: the file is damaged, or holds something other than one volume.
    """
    with naming(path), path.open("rb") as file:
        header = _header(file, path)
        array = _voxels(header, file, path)
        affine = _affine(header, array.ndim)
    if array.ndim == 4:
        count = array.shape[3]
        if count > 1 and (volume is None or volume >= count):
            raise UserError(
                f"{path} holds {count} volumes. Choose one volume with data.volume, 0 to {count - 1}."
            )
        array = array[..., (volume or 0) if count > 1 else 0]
    return placed(array if array.ndim == 3 else array[..., None], affine, path)


def _header(file: BinaryIO, path: Path) -> dict[str, str]:
    """The fields up to ElementDataFile, after which voxels may follow."""
    fields: dict[str, str] = {}
    for _ in range(_MAX_LINES):
        line = file.readline(_MAX_LINE_BYTES)
        key, equals, value = line.decode("latin-1").partition("=")
        if not equals:
            break
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields
    raise UserError(f"{path} is not a MetaImage file, or its header does not end.")


def _voxels(header: dict[str, str], file: BinaryIO, path: Path) -> np.ndarray:
    sizes = tuple(int(size) for size in header["DimSize"].split())
    kind = np.dtype(_TYPES.get(header["ElementType"], "V1"))
    if kind.kind not in "iuf" or len(sizes) != int(header["NDims"]) or not 2 <= len(sizes) <= 4:
        raise UserError(f"{path} holds {len(sizes)}D data of a kind that is no volume of grey values.")
    if int(header.get("ElementNumberOfChannels", "1")) != 1:
        raise UserError(f"{path} holds several values a voxel. Save one of them as a file.")
    big = _true(header, "BinaryDataByteOrderMSB") or _true(header, "ElementByteOrderMSB")
    promised = check_voxels(sizes, kind.itemsize, path)
    if header["ElementDataFile"] == "LOCAL":
        content = _content(file, header, promised, path)
    else:
        with sibling(path, header["ElementDataFile"]).open("rb") as beside:
            content = _content(beside, header, promised, path)
    check_held(promised, len(content), path)
    return np.frombuffer(content, kind.newbyteorder("big" if big else "little")).reshape(sizes, order="F")


def _content(file: BinaryIO, header: dict[str, str], promised: int, path: Path) -> bytes:
    skipped = int(header.get("HeaderSize", "0"))
    if skipped == -1 and not _true(header, "CompressedData"):
        file.seek(-promised, 2)
    elif 0 <= skipped <= SLACK_BYTES:
        file.read(skipped)
    else:
        raise UserError(f"{path} is damaged: its header does not say where its voxels begin.")
    if not _true(header, "CompressedData"):
        return read_at_most(file, promised, path)
    if os.fstat(file.fileno()).st_size > MAX_SCAN_BYTES:
        raise too_large(path, "is larger than that even compressed")
    return inflated(file.read(), promised, path)


def _true(header: dict[str, str], name: str) -> bool:
    return header.get(name, "False").lower() in ("true", "1")


def _affine(header: dict[str, str], ndim: int) -> np.ndarray:
    """To RAS mm; MetaImage says LPS, with the direction of each axis as a row."""
    axes = min(ndim, 3)

    def numbers(names: tuple[str, ...], default: np.ndarray) -> np.ndarray:
        found = next((header[name] for name in names if name in header), None)
        return default if found is None else np.array(found.split(), float)

    spacing = numbers(("ElementSpacing", "ElementSize"), np.ones(ndim))
    matrix = numbers(("TransformMatrix", "Rotation", "Orientation"), np.eye(ndim)).reshape(ndim, ndim)
    affine = np.eye(4)
    affine[:axes, :axes] = (matrix * spacing[:, None])[:axes, :axes].T
    affine[:axes, 3] = numbers(("Offset", "Origin", "Position"), np.zeros(ndim))[:axes]
    return LPS_TO_RAS @ affine
