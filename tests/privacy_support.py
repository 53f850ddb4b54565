"""What identifies a patient, planted in scans, and the search for it in whatever was written."""

import base64
import io
import json
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
from nibabel.nifti1 import Nifti1Extension
from PIL import Image

NAME = "Zyxwvutsrq"
"""Stands for everything that identifies: no other text contains it."""


def plant_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write an array as NIfTI with the name in every text of its header."""
    scan = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    scan.header["descrip"], scan.header["aux_file"], scan.header["intent_name"] = NAME, NAME, NAME
    scan.header["db_name"] = NAME
    scan.header.extensions.append(Nifti1Extension("comment", NAME.encode()))
    nib.save(scan, path)


def plant_decathlon(root: Path) -> Path:
    """Put the name into the file names, headers and descriptions of a Decathlon-style data set."""
    for path in [*root.glob("images*/*.nii.gz"), *root.glob("labels*/*.nii.gz")]:
        scan = nib.load(path)
        plant_nifti(path.with_name(f"{NAME}_{path.name}"), np.asanyarray(scan.dataobj), scan.affine)  # pyright: ignore
        path.unlink()
    facts = json.loads((root / "dataset.json").read_text().replace("scan_", f"{NAME}_scan_"))
    facts |= {"name": NAME, "description": NAME, "reference": NAME, "licence": NAME, "tensorImageSize": NAME}
    (root / "dataset.json").write_text(json.dumps(facts))
    return root


def found_in(*folders: Path) -> list[Path]:
    """Files, or names of files, that have the planted name in them, packed or not."""
    paths = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    inside = [path for path in paths if path.is_file() and _holds_name(path.read_bytes())]
    return inside + [path for path in paths if NAME.lower() in path.name.lower()]


def _holds_name(content: bytes) -> bool:
    needles = (NAME.lower().encode(), NAME.lower().encode("utf-16-le"))
    return any(needle in text.lower() for text in _layers(content) for needle in needles)


def _layers(content: bytes) -> Iterator[bytes]:
    """The content, and what is packed in it: gzip, zip, Parquet, PNG, SQLite and data URIs, nested too."""
    yield content
    packed: list[bytes] = []
    if content.startswith(b"\x1f\x8b"):
        packed = [zlib.decompressobj(wbits=31).decompress(content)]  # also of a file that was cut
    elif content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = [archive.read(name) for name in archive.namelist()]
    elif content.startswith(b"PAR1"):
        table = pq.read_table(io.BytesIO(content))
        packed = [str(table.schema).encode(), json.dumps(table.to_pylist(), default=str).encode()]
    elif content.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(content)) as picture:
            packed = [repr(picture.info).encode()]
    elif content.startswith(b"SQLite format 3\0"):
        with closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(content)
            packed = ["\n".join(database.iterdump()).encode()]
    else:
        packed = [base64.b64decode(found) for found in re.findall(rb";base64,([A-Za-z0-9+/]+=*)", content)]
    for part in packed:
        yield from _layers(part)
