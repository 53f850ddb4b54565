"""Objects that a user points out in scans: points and boxes, from a CSV or JSON file to slices.

A CSV file has a row a prompt, a JSON file a list with an object a prompt; columns and keys are `COLUMNS`:

    scan        which scan, called as its file with or without the suffix; may be left out where there is one
    label       what the object is called; may be left out where the bundle knows a single label
    object      tells apart objects of one label in one slice; may be left out
    x, y, z     a point, or one corner of a box
    x2, y2, z2  the opposite corner; of a point left out or empty
    inside      of a point: 1 (default) lies in the object, 0 outside of it

Coordinates are indices of voxels as the scan's file orders them, from 0: (i, j, k) of NIfTI and its like,
(column, row, slice) of DICOM, where slices follow the normal of their plane, (column, row) of a 2D image; or
RAS mm. Whole numbers are centres of voxels; a box runs through the first and the last voxel of its object.
Prompts are asked slice by slice: a point belongs to the slice that is nearest to it, a box to each slice that
it reaches. Points of one object are clicks, in the order of their rows.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64

from samssl.config import UserError
from samssl.data.readers.geometry import IMAGE_AFFINE, Grid
from samssl.data.scans import Scan
from samssl.prompts import INSIDE, OUTSIDE

Space = Literal["voxels", "ras_mm"]
"""Of coordinates: voxels of the scan's own grid, or mm to the patient's right, front and top."""
COLUMNS = ("scan", "label", "object", "x", "y", "z", "x2", "y2", "z2", "inside")
_ANSWERS = {"": True, "1": True, "true": True, "0": False, "false": False}
_DIGITS = 4
"""Of voxels: turning a grid round leaves rounding errors behind."""


@dataclass(frozen=True)
class Pointer:
    """One point or box as a file has it."""

    source: str
    """File and row, for messages."""
    corners: Float[np.ndarray, "P 3"]
    """(x, y, z) of a point, or of two opposite corners of a box; z is NaN where the file leaves it out."""
    label: str = ""
    scan: str = ""
    name: str = ""
    """Which object of the label."""
    inside: bool = True


@dataclass(frozen=True)
class Pointing:
    """What is pointed out in one scan."""

    pointers: Sequence[Pointer]
    space: Space = "voxels"
    labels: Mapping[int, str] | None = None
    """Ids and names that pointers may name; None: those of the bundle."""


@dataclass(frozen=True)
class PointedObject:
    """What is pointed out in one slice; (x, y) in its pixels, whole numbers being centres of pixels."""

    z: int
    label: int
    """Label id."""
    box: Float32[np.ndarray, "4"] | None
    """Left, top, right, bottom."""
    points: Float32[np.ndarray, "P 2"]
    labels: Int64[np.ndarray, " P"]
    """Of the points, as in `samssl.prompts`."""


def read_pointers(path: Path) -> list[Pointer]:
    """The prompts of a file, in its order.

    Raises:
        UserError: naming the file and the row that cannot be used.
    """
    rows = _of_json(path) if path.suffix.lower() == ".json" else _of_csv(path)
    pointers = [_pointer(row, source) for row, source in rows]
    if not pointers:
        raise UserError(f"{path} holds no prompts. Its columns are {', '.join(COLUMNS)}.")
    return pointers


def pointed_objects(
    pointing: Pointing, labels: Mapping[int, str], grid: Grid, scan: Scan
) -> list[PointedObject]:
    """The prompts on the slices of `scan`, which is `grid` turned round; `labels` are ids to names.

    Raises:
        UserError: naming the row that lies outside of the scan, says no label, or gives a second box.
    """
    gathered: dict[tuple[int, int, str], _Gathered] = {}
    for pointer in pointing.pointers:
        label = _label(pointer, labels)
        found = _on_slices(pointer, grid, scan, pointing.space)
        (first_z, *_), (last_z, *_) = np.rint(found.min(axis=0)), np.rint(found.max(axis=0))
        for z in range(int(first_z), int(last_z) + 1):
            gathered.setdefault((z, label, pointer.name), _Gathered()).add(pointer, found)
    return [each.finished(z, label) for (z, label, _), each in sorted(gathered.items())]


@dataclass
class _Gathered:
    """What rows say of one object in one slice."""

    rows: list[str] = field(default_factory=list)
    box: Float32[np.ndarray, "4"] | None = None
    points: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, pointer: Pointer, found: Float[np.ndarray, "P 3"]) -> None:
        self.rows.append(pointer.source)
        if len(found) == 1:
            self.points.append(found[0, :0:-1])
            self.labels.append(INSIDE if pointer.inside else OUTSIDE)
            return
        if self.box is not None:
            raise UserError(
                f"{pointer.source} gives a second box of one object in one slice. Tell objects of one label "
                "apart by the column `object`."
            )
        (_, top, left), (_, bottom, right) = found.min(axis=0), found.max(axis=0)
        self.box = np.array([left, top, right, bottom], np.float32)

    def finished(self, z: int, label: int) -> PointedObject:
        if self.box is None and INSIDE not in self.labels:
            raise UserError(
                f"{self.rows[0]} says what an object is not, and no row what it is. Give it a point inside, "
                "or a box."
            )
        points = np.array(self.points, np.float32).reshape(-1, 2)
        return PointedObject(z, label, self.box, points, np.array(self.labels, np.int64))


def _label(pointer: Pointer, labels: Mapping[int, str]) -> int:
    foreground = {name: label for label, name in labels.items() if label}
    if pointer.label in foreground:
        return foreground[pointer.label]
    if not pointer.label and len(foreground) == 1:
        return next(iter(foreground.values()))
    raise UserError(f"{pointer.source} must say which label it points at: {', '.join(foreground)}.")


def _on_slices(pointer: Pointer, grid: Grid, scan: Scan, space: Space) -> Float[np.ndarray, "P 3"]:
    """(z, y, x) in voxels of the scan's slices."""
    flat = len(grid.array) == 1 and np.array_equal(grid.affine, IMAGE_AFFINE)
    if flat and space == "ras_mm":
        raise UserError("A 2D image has no place in the patient: point at it with prompt_space=voxels.")
    index = pointer.corners
    if flat or grid.array.shape[2] == 1:  # there is one slice, and z may be left out
        index = np.nan_to_num(index)
    if np.isnan(index).any():
        raise UserError(f"{pointer.source} must say z, since the scan has several slices.")
    if flat:
        index = index[:, [2, 1, 0]]
    to_slices = np.linalg.inv(scan.affine) @ (grid.affine if space == "voxels" else np.eye(4))
    found = np.round(index @ to_slices[:3, :3].T + to_slices[:3, 3], _DIGITS)
    if (found < -0.5).any() or (found > np.array(scan.voxels.shape) - 0.5).any():
        size = " x ".join(map(str, grid.array.shape))
        raise UserError(
            f"{pointer.source} points outside of the scan of {size} voxels. Coordinates are read as {space}: "
            "set prompt_space where they are not."
        )
    found[:, 0] = found[:, 0].clip(0, len(scan.voxels) - 1)  # half a voxel before the first slice is in it
    return found


def _of_csv(path: Path) -> Iterator[tuple[dict[str, str], str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            names = [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file of prompts ({type(error).__name__}).") from None
    if not {"x", "y"} <= set(names):
        raise UserError(
            f"{path} has no columns x and y in its first row; its columns may be {', '.join(COLUMNS)}."
        )
    for number, row in rows:
        source = f"Row {number} of {path}"
        if None in row or None in row.values():
            raise UserError(f"{source} has another number of cells than the first row.")
        yield dict(zip(names, map(str.strip, row.values()), strict=True)), source


def _of_json(path: Path) -> Iterator[tuple[dict[str, str], str]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as a JSON file of prompts ({type(error).__name__})."
        ) from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must hold a list of objects with the keys {', '.join(COLUMNS)}.")
    for number, entry in enumerate(entries, start=1):
        yield (
            {name: "" if value is None else str(value).strip() for name, value in entry.items()},
            (f"Entry {number} of {path}"),
        )


def _pointer(row: Mapping[str, Any], source: str) -> Pointer:
    if unknown := [name for name in row if name not in COLUMNS]:
        raise UserError(f"{source} has a column '{unknown[0]}'; columns may be {', '.join(COLUMNS)}.")
    corners = [_coordinates(row, ("x", "y", "z"), source)]
    if any(row.get(name) for name in ("x2", "y2", "z2")):
        corners.append(_coordinates(row, ("x2", "y2", "z2"), source))
    inside = _ANSWERS.get(row.get("inside", "").lower())
    if inside is None or (len(corners) == 2 and not inside):
        raise UserError(f"{source}: inside is 1 or 0 for a point, and 1 or nothing for a box.")
    return Pointer(
        source, np.array(corners), row.get("label", ""), row.get("scan", ""), row.get("object", ""), inside
    )


def _coordinates(row: Mapping[str, str], names: tuple[str, str, str], source: str) -> list[float]:
    """Numbers; z is NaN where it is left out, as of a 2D image."""
    found = []
    for name in names:
        text = row.get(name, "")
        try:
            found.append(float(text) if text or not name.startswith("z") else math.nan)
        except ValueError:
            raise UserError(f"{source}: {name} is not a number but '{text}'.") from None
        if text and not math.isfinite(found[-1]):
            raise UserError(f"{source}: {name} is not finite.")
    return found
