"""One scan after the other through the bundles, in a thread beside the event loop."""

import asyncio
import io
import logging
import threading
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from samssl.config import UserError
from samssl.data.entries import plain_name
from samssl.data.scans import is_image
from samssl.inference import LoadedBundle, Prediction
from samssl.predicting import save_prediction
from samssl.serving.settings import ServeConfig
from samssl.serving.uploads import Refusal, check_voxels

MEDIA = {".gz": "application/gzip", ".png": "image/png", ".zip": "application/zip"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """The mask of a scan as a file, and what is known of it."""

    name: str
    content: bytes
    about: dict[str, Any]
    """Warnings, uncertainty, disagreement and volumes, as `samssl predict` has them in its table."""

    @property
    def media(self) -> str:
        """The type of the content."""
        return MEDIA[Path(self.name).suffix]


class _Unwanted(Exception):
    """Nobody waits for the answer any more."""


class Segmenter:
    """The bundles of one process, and the thread that runs them."""

    def __init__(self, bundle: LoadedBundle, folder: Path) -> None:
        """Masks lie below `folder` for as long as they are made."""
        self.bundle, self.folder = bundle, folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segmenting")

    async def segment(self, path: Path, settings: ServeConfig) -> Answer:
        """The mask of the scan at `path`; cancelled, it ends after the next few slices.

        Raises:
            Refusal: the scan cannot be segmented; it is called "the file".
        """
        unwanted = threading.Event()
        try:
            return await asyncio.wrap_future(self._thread.submit(self._answer, path, settings, unwanted))
        finally:
            unwanted.set()

    def _answer(self, path: Path, settings: ServeConfig, unwanted: threading.Event) -> Answer:
        def check_wanted() -> None:
            if unwanted.is_set():
                raise _Unwanted

        check_wanted()
        try:
            check_voxels(path, settings.max_megavoxels * 1e6)
            found = self.bundle.predict(path, settings, between=check_wanted)
            with TemporaryDirectory(dir=self.folder) as folder:
                return _files(found, Path(folder), as_png=is_image(path))
        except (Refusal, _Unwanted):
            raise
        except UserError as error:
            said = str(error).replace(str(path), "The file").replace("data.volume", "?volume=")
            raise Refusal(422, said) from None
        except Exception as error:
            raise unexpected(error) from None


def unexpected(error: Exception) -> Refusal:
    """The answer to an error in the program. Its own words, which may quote a scan, are not logged."""
    kind, place = type(error).__name__, traceback.extract_tb(error.__traceback__)[-1]
    _log.error("predict: %s in %s, line %s", kind, Path(place.filename).name, place.lineno)
    return Refusal(500, f"The scan could not be segmented: an error in the program ({kind}).")


def _files(found: Prediction, folder: Path, *, as_png: bool) -> Answer:
    """What `samssl predict` writes: the one mask, or a zip of one for each class where they overlap."""
    save_prediction(found, folder / "scan", as_png=as_png)
    volumes = {} if as_png else {name: found.volume_ml(number) for number, name in found.names.items()}
    about = {
        "warnings": list(found.warnings),
        "uncertainty": found.uncertainty,
        "disagreement": found.disagreement,
        "volumes_ml": volumes,
    }
    ending = ".png" if as_png else ".nii.gz"
    if not found.classes.overlapping:
        return Answer(f"mask{ending}", (folder / f"scan_mask{ending}").read_bytes(), about)
    files = {number: f"{plain_name(name)}{ending}" for number, name in found.names.items()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in files.values():
            archive.write(folder / f"scan_{name}", name)
    return Answer("masks.zip", packed.getvalue(), about | {"files": files})
