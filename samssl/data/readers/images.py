"""2D images: PNG, JPEG, TIFF and BMP, through Pillow."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps

from samssl.config import UserError
from samssl.data.readers.files import naming
from samssl.data.readers.geometry import IMAGE_AFFINE, Grid

# What Pillow logs for those who mend it quotes a file's tags.
logging.getLogger("PIL").setLevel(logging.WARNING)

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
MAX_PIXELS = 1 << 27
"""A mammogram has 2^24; more than this is an image of another kind, or a bomb."""


def read_grey(path: Path, volume: int | None = None) -> Grid:
    """A 2D image as grey values: colour becomes luminance, transparency is left out.

    Raises:
        UserError: it is damaged, too large, or one of several pages without `volume` to choose one.
    """
    with naming(path):
        image = _opened(path, volume)
        if image.mode.startswith(("I", "F")):
            array = np.asarray(image)
        else:
            array = np.asarray((image.convert("RGB") if image.mode == "P" else image).convert("L"))
    return Grid(array[None], IMAGE_AFFINE)


def read_values(path: Path, colours: Mapping[str, int]) -> Grid:
    """The values of a 2D mask, of bit depth 1 to 16; palette images stand for their indices.

    With `colours` (as in {"#ff0000": 1}) each pixel is the id of its colour; black is 0.

    Raises:
        UserError: it is damaged, or in colours of which nothing says what they mean.
    """
    with naming(path):
        image = _opened(path, None)
        if colours:
            array = _of_colours(np.asarray(image.convert("RGB")), colours, path)
        else:
            array = _of_grey(image, path)
    return Grid(array[None], IMAGE_AFFINE)


def _opened(path: Path, volume: int | None) -> Image.Image:
    with Image.open(path, formats=FORMATS) as file:
        pages = getattr(file, "n_frames", 1)
        if pages > 1 and (volume is None or volume >= pages):
            raise UserError(f"{path} holds {pages} pages. Choose one with data.volume, 0 to {pages - 1}.")
        if pages > 1:
            file.seek(volume or 0)
        if file.width * file.height > MAX_PIXELS:
            raise UserError(f"{path} is too large an image to read: {file.width} x {file.height} pixels.")
        covered = [extents[2:] for _, extents, *_ in file.tile if extents]
        if not covered or not (np.max(covered, axis=0) >= file.size).all():
            raise UserError(f"{path} is damaged: it has fewer rows or columns than its header says.")
        file.load()
        return ImageOps.exif_transpose(file)


def _of_grey(image: Image.Image, path: Path) -> np.ndarray:
    ids = np.asarray(image.convert("RGB") if image.mode == "RGBA" else image)
    if image.mode == "LA":
        ids = ids[..., 0]
    if ids.ndim == 3:
        if (ids != ids[..., :1]).any():
            raise UserError(
                f"The mask {path} is in colour. Say what its colours mean with data.mask_colours, as in "
                "{'#ff0000': 1}, or save it as grey label ids (0, 1, 2, ...)."
            )
        ids = ids[..., 0]
    return ids.astype(np.uint8) if ids.dtype == bool else ids


def _of_colours(
    pixels: Shaped[np.ndarray, "H W 3"], colours: Mapping[str, int], path: Path
) -> Shaped[np.ndarray, "H W"]:
    """Ids by colour."""
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    meant = {0: 0} | {int(colour.lstrip("#"), 16): label for colour, label in colours.items()}
    found, places = np.unique(codes, return_inverse=True)
    unknown = [f"#{code:06x}" for code in found.tolist() if code not in meant]
    if unknown:
        raise UserError(
            f"The mask {path} has {len(unknown)} colours that data.mask_colours does not name, as "
            f"{unknown[0]}. Name them, or save the mask without smoothing or loss."
        )
    return np.array([meant[code] for code in found.tolist()], np.uint16)[places].reshape(codes.shape)
