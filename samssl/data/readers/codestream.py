"""Decoding the frames of a DICOM file, after what compressed ones say of their own size was checked.

Decoders are chosen by what fuzzing showed: GDCM's end the whole process on some damaged streams, and
pylibjpeg's for RLE raises what no `except Exception` catches.
"""

import struct
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import pixel_array
from pydicom.uid import RLELossless

from samssl.config import UserError

_DECODER, _OF_RUN_LENGTH = "pylibjpeg", "pydicom"
_JPEG2000 = b"\xff\x4f\xff\x51"
_JPEG = b"\xff\xd8"
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def decoded(dataset: Dataset, path: Path) -> np.ndarray:
    """The pixels of all frames, as pydicom shapes them.

    Raises:
        UserError: a compressed frame claims another size than the header.
    """
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return pixel_array(dataset)
    check_codestream(dataset, path)
    run_length = dataset.file_meta.TransferSyntaxUID == RLELossless
    return pixel_array(dataset, decoding_plugin=_OF_RUN_LENGTH if run_length else _DECODER)


def check_codestream(dataset: Dataset, path: Path) -> None:
    """Refuse JPEG and JPEG 2000 frames whose own size is not that of the header.

    Raises:
        UserError: a frame claims another size.
    """
    expected = int(dataset.Rows), int(dataset.Columns)
    count = int(dataset.get("NumberOfFrames") or 1)
    for frame in generate_frames(dataset.PixelData, number_of_frames=count):
        found = codestream_size(frame)
        if found is not None and found != expected:
            raise UserError(
                f"{path} is damaged: its header says {expected[0]} x {expected[1]} pixels, a compressed "
                f"frame in it {found[0]} x {found[1]}."
            )


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream claims; None for any other."""
    at = frame.find(_JPEG2000, 0, 4096)
    if at >= 0:
        width, height, left, top = struct.unpack_from(">4I", frame, at + 8)
        return height - top, width - left
    return _jpeg_size(frame) if frame.startswith(_JPEG) else None


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    """From the frame header (SOF), which stands before the image data."""
    at = 2
    while at + 9 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker in _FRAME_HEADERS:
            return struct.unpack_from(">2H", frame, at + 5)
        length = (
            0 if marker in _WITHOUT_LENGTH or marker == 0xFF else struct.unpack_from(">H", frame, at + 2)[0]
        )
        at += 1 if marker == 0xFF else 2 + length
    return None
