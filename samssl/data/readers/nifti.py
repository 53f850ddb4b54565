"""NIfTI-1 and NIfTI-2 in one file, through nibabel."""

import logging
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip

from samssl.config import UserError
from samssl.data.readers.files import SLACK_BYTES, check_held, check_voxels, naming, read_at_most
from samssl.data.readers.geometry import Grid, placed

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it tells of every header that it mends

_HEADER_BYTES = 540  # of NIfTI-2, the longer one


def read_nifti(path: Path, volume: int | None = None) -> Grid:
    """A volume in its stored order, scaled as its header says; `volume` chooses one of a 4D file.

    Raises:
        UserError: the file is damaged, or holds something other than one volume.
    """
    with naming(path):
        content = _content(path)
        image = _image_class(content, path).from_bytes(content)
        chosen = _chosen(image.header.get_data_shape(), volume, path)
        array = np.asanyarray(image.dataobj if chosen is None else image.dataobj[..., chosen])
        affine = np.asarray(image.affine, dtype=float)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise UserError(
            f"{path} holds {array.ndim}D data of shape {array.shape}. Save one volume of it as a 3D file."
        )
    return placed(array, affine, path)


def read_shape(path: Path) -> tuple[int, ...]:
    """The sizes that a header claims, without reading any voxel.

    Raises:
        UserError: the file is damaged or no NIfTI.
    """
    with naming(path), _opened(path) as file:
        shape = _header(file.read(_HEADER_BYTES), path).get_data_shape()
    return tuple(int(size) for size in shape)


def _chosen(shape: tuple[int, ...], volume: int | None, path: Path) -> int | None:
    """Which volume of a 4D file is meant; None for a file of one."""
    if len(shape) != 4 or shape[3] == 1:
        return None
    if volume is None or volume >= shape[3]:
        raise UserError(
            f"{path} holds 4D data of shape {shape}, {shape[3]} volumes (times or contrasts). "
            f"Choose one volume with data.volume, 0 to {shape[3] - 1}."
        )
    return volume


def _content(path: Path) -> bytes:
    """Header and voxels, read to the file's very end, where gzip has its checksum."""
    with _opened(path) as file:
        head = file.read(_HEADER_BYTES)
        promised, offset = _promised(_header(head, path), path)
        body = read_at_most(file, max(0, promised + offset - len(head)), path)
    check_held(promised, len(head) + len(body) - offset, path)
    return head + body


def _opened(path: Path) -> BinaryIO:
    file: Any = igzip.IGzipFile(path) if path.name.lower().endswith(".gz") else path.open("rb")
    return file


def _header(head: bytes, path: Path) -> Any:
    return _image_class(head, path).header_class(head[: _size_of(head)], check=False)


def _size_of(content: bytes) -> int:
    return 348 if 348 in _first_numbers(content) else 540


def _first_numbers(content: bytes) -> set[int]:
    return {struct.unpack(f"{order}i", content[:4].ljust(4, b"\0"))[0] for order in "<>"}


def _image_class(content: bytes, path: Path) -> type[nib.Nifti1Image]:
    if 348 in _first_numbers(content) and content[344:347] == b"n+1":
        return nib.Nifti1Image
    if 540 in _first_numbers(content) and len(content) >= 540 and content[4:7] == b"n+2":
        return nib.Nifti2Image
    raise UserError(f"{path} is not a NIfTI file of one piece, or damaged, whatever its name says.")


def _promised(header: Any, path: Path) -> tuple[int, int]:
    """Bytes of voxels, and where they begin."""
    kind = header.get_data_dtype()
    if kind.kind not in "iuf":
        raise UserError(f"{path} holds {kind} values. Save it as grey numbers first.")
    if int(header["dim"][0]) > 5:
        raise UserError(f"{path} is damaged or not one volume: it claims {int(header['dim'][0])} dimensions.")
    offset = float(header["vox_offset"])
    if not math.isfinite(offset) or not 0 <= offset <= SLACK_BYTES:
        raise UserError(f"{path} is damaged: its header does not say where its voxels begin.")
    return check_voxels(header.get_data_shape(), kind.itemsize, path), int(offset)
