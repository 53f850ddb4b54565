"""Scans out of requests, counted while they arrive, and refused in words that say nothing of them.

Names that come with a file are not looked at: what it is, its first bytes say.
"""

import struct
from pathlib import Path

import anyio
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from samssl.config import UserError
from samssl.data.readers.nifti import read_shape

KINDS = ".nii, .nii.gz or PNG"
_HEAD_BYTES = 348
_PNG = b"\x89PNG\r\n\x1a\n"
_BLOCK_BYTES = 1 << 20


class Refusal(UserError):
    """A request that is not answered, with the status that says why."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def receive_scan(request: Request, folder: Path, max_bytes: int) -> Path:
    """Write the scan that a request brings, as its body or in a form, below `folder`; returns its path.

    Raises:
        Refusal: there is none or several, it is too large, or of another kind than these.
    """
    _check_announced(request, max_bytes)
    path = folder / "upload"
    try:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            await _write_form(Request(request.scope, _counted(request.receive, max_bytes)), path)
        else:
            await _write_body(Request(request.scope, _counted(request.receive, max_bytes)), path)
    except ClientDisconnect:
        raise Refusal(400, "The upload ended before the file was whole. Send it again.") from None
    return _named(path)


def check_voxels(path: Path, most: float) -> None:
    """Refuse a scan that would be too large once it is unpacked, before it is.

    Raises:
        UserError: it has more than `most` voxels, or cannot be read.
    """
    count = 1
    for size in _shape(path):
        count *= int(size)
    if count > most:
        raise Refusal(
            413,
            f"The scan has {count / 1e6:.1f} million voxels, and this server takes {most / 1e6:g}: "
            "crop it, or start the server with a larger max_megavoxels.",
        )


def _check_announced(request: Request, max_bytes: int) -> None:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)


def _counted(receive: Receive, max_bytes: int) -> Receive:
    """`receive`, until more than `max_bytes` have come."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise _too_large(max_bytes)
        return message

    return counted


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(
        413,
        f"The upload is larger than the {max_bytes / 1e6:g} MB that this server takes. Compress or crop the "
        "scan, or start the server with a larger max_megabytes.",
    )


async def _write_body(request: Request, path: Path) -> None:
    async with await anyio.open_file(path, "wb") as file:
        async for block in request.stream():
            await file.write(block)


async def _write_form(request: Request, path: Path) -> None:
    """The one file of a form; on its way Starlette keeps it in a file of its own that has no name."""
    try:
        async with request.form(max_files=1, max_fields=0) as form:
            found = [value for value in form.values() if isinstance(value, UploadFile)]
            if not found:
                raise Refusal(400, f"The form holds no file. Send one: {KINDS}.")
            async with await anyio.open_file(path, "wb") as file:
                while block := await found[0].read(_BLOCK_BYTES):
                    await file.write(block)
    except HTTPException:
        raise Refusal(
            400, f"The form cannot be read, or holds more than a single file. Send one: {KINDS}."
        ) from None


def _named(path: Path) -> Path:
    """The file under a name that says what its first bytes are."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise Refusal(400, f"The request brings no scan. Send one as its body or in a form: {KINDS}.")
    if head[:2] == b"\x1f\x8b":
        suffix = ".nii.gz"
    elif head.startswith(_PNG):
        suffix = ".png"
    elif head[344:347] == b"n+1" or head[4:7] == b"n+2":
        suffix = ".nii"
    else:
        raise Refusal(415, f"The upload is neither NIfTI nor PNG. Send {KINDS}.")
    if head[128:132] == b"DICM":  # which readers go by, whatever a file is named
        raise Refusal(415, f"The upload looks like DICOM, which is not taken here. Send {KINDS}.")
    return path.rename(path.with_name(f"scan{suffix}"))


def _shape(path: Path) -> tuple[int, ...]:
    if path.suffix != ".png":
        return read_shape(path)
    with path.open("rb") as file:
        head = file.read(24)
    return struct.unpack(">II", head[16:]) if len(head) == 24 else ()
