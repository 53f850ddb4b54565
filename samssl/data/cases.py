"""One case of a slice store: a Zarr group with `image` and `mask`, and `case.json` with its facts."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped

from samssl.data.ignoring import without
from samssl.data.scans import Scan
from samssl.data.sealed import seal, unseal
from samssl.data.shards import write_slices
from samssl.files import AnyPath, files_below, name_below, sha256_file, write_bytes, written_aside

CASE_FILE = "case.json"
_TUPLES = ("shape", "spacing_mm", "intensity", "statistics")


@dataclass(frozen=True)
class CaseFacts:
    """What the store knows of one case besides its voxels; holds no name and no path of its source."""

    case: str
    modality: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: list[list[float]]
    """From the (z, y, x) index to RAS mm."""
    intensity: tuple[float, float]
    """The low and high end of the values worth seeing."""
    statistics: tuple[float, float, float, float]
    """Mean and standard deviation above the background; lowest and highest value."""
    content_fraction: list[float]
    """Per slice: the share of pixels that are not air."""
    foreground_fraction: list[float | None]
    """Per slice: the share of pixels with a label; None without a mask."""
    labels: list[list[int]]
    """Per slice: the label ids present."""
    source_sha256: str
    mask_source_sha256: str
    settings_sha256: str
    """Of the settings that the voxels depend on."""
    image_sha256: str
    mask_sha256: str
    files: dict[str, str]
    """SHA-256 of each file of the group, by its path inside the group."""
    remote_version: str = ""
    """What its files behind a URL were told by, and the settings; empty for local files."""


@dataclass(frozen=True)
class Origin:
    """What a case is made of: while these stay the same, so does the case."""

    source_sha256: str
    mask_source_sha256: str
    """Empty without a mask."""
    settings_sha256: str
    remote_version: str = ""


def case_folder(root: AnyPath, case: str) -> AnyPath:
    """Where a store keeps a case."""
    return root / "cases" / f"{case}.zarr"


def content_digest(array: Shaped[np.ndarray, "..."]) -> str:
    """SHA-256 over dtype, shape and the little-endian C-order bytes of an array."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{array.dtype.name} {list(array.shape)}\n".encode())
    digest.update(little.data)
    return digest.hexdigest()


def intensity_range(scan: Scan, window_hu: tuple[float, float]) -> tuple[float, float]:
    """The window for CT; else the 0.5 and 99.5 percentiles over the voxels above the background.

    The background is the lowest value of the scan, which air, padding and black borders share.
    """
    if scan.modality == "CT":
        return float(window_hu[0]), float(window_hu[1])
    lowest, highest = float(scan.voxels.min()), float(scan.voxels.max())
    low, high = np.percentile(scan.voxels[scan.voxels > lowest], [0.5, 99.5]).tolist()
    return (low, high) if low < high else (lowest, highest)


def intensity_statistics(voxels: Shaped[np.ndarray, "Z H W"]) -> tuple[float, float, float, float]:
    """Mean and standard deviation over the voxels above the background; the lowest and highest of all."""
    lowest, highest = float(voxels.min()), float(voxels.max())
    above = voxels[voxels > lowest].astype(np.float64)
    mean, std = (float(above.mean()), float(above.std())) if len(above) else (lowest, 0.0)
    return mean, std, lowest, highest


def content_fractions(voxels: Shaped[np.ndarray, "Z H W"], low: float, high: float) -> list[float]:
    """For each slice the share of pixels more than 5 % of the range above its low end."""
    return (voxels > low + 0.05 * (high - low)).mean(axis=(1, 2)).tolist()


def write_case(
    root: AnyPath,
    case: str,
    scan: Scan,
    mask: Integer[np.ndarray, "Z H W"] | None,
    *,
    origin: Origin,
    window_hu: tuple[float, float],
    ignored: int | None = None,
) -> CaseFacts:
    """Write one case into the store at `root`, whole or not at all: `case.json` comes last.

    Voxels that are `ignored` count as background in its facts.
    """
    low, high = intensity_range(scan, window_hu)
    arrays = {"image": scan.voxels} | ({} if mask is None else {"mask": mask})
    known = None if mask is None else without(mask, None if ignored is None else mask == ignored)
    with written_aside(case_folder(root, case)) as folder:
        write_slices(str(folder), arrays)
        facts = CaseFacts(
            case=case,
            modality=scan.modality,
            shape=scan.voxels.shape,
            spacing_mm=scan.spacing_mm,
            affine=scan.affine.tolist(),
            intensity=(low, high),
            statistics=intensity_statistics(scan.voxels),
            content_fraction=content_fractions(scan.voxels, low, high),
            foreground_fraction=_foreground_fractions(known, scan.voxels.shape[0]),
            labels=_labels_present(known, scan.voxels.shape[0]),
            **asdict(origin),
            image_sha256=content_digest(scan.voxels),
            mask_sha256="" if mask is None else content_digest(mask),
            files={name_below(path, folder): sha256_file(path) for path in files_below(folder)},
        )
    write_bytes(case_folder(root, case) / CASE_FILE, seal(_named(facts)))
    return facts


def reusable_case(root: AnyPath, case: str, origin: Origin) -> CaseFacts | None:
    """The facts of the case as it is stored, if it was made of `origin` and all its files are whole."""
    facts = _whole_case(root, case)
    if facts is None:
        return None
    stored = Origin(
        facts.source_sha256, facts.mask_source_sha256, facts.settings_sha256, facts.remote_version
    )
    return facts if stored == origin else None


def unfetched_case(root: AnyPath, case: str, remote_version: str) -> CaseFacts | None:
    """As `reusable_case`, for files behind a URL that were not fetched again."""
    facts = _whole_case(root, case)
    return facts if facts and facts.remote_version == remote_version else None


def _whole_case(root: AnyPath, case: str) -> CaseFacts | None:
    """The facts of a case whose files are all there, and on this machine as they were written."""
    folder = case_folder(root, case)
    try:
        facts = _read_facts(folder / CASE_FILE)
        found = {name_below(path, folder): path for path in files_below(folder)}
        if set(found) != {*facts.files, CASE_FILE}:
            return None
        if isinstance(folder, Path) and any(
            sha256_file(found[name]) != facts.files[name] for name in facts.files
        ):
            return None
    except (OSError, TypeError, ValueError, KeyError):
        return None
    return facts


def files_of(root: AnyPath, facts: CaseFacts) -> Mapping[str, str]:
    """SHA-256 of every file of a case, by its path inside the store."""
    folder = case_folder(root, facts.case)
    prefix = name_below(folder, root)
    own = {f"{prefix}/{CASE_FILE}": sha256_file(folder / CASE_FILE)}
    return own | {f"{prefix}/{name}": digest for name, digest in facts.files.items()}


def _named(facts: CaseFacts) -> dict[str, Any]:
    """What `case.json` says; of local files nothing of a URL."""
    return {name: value for name, value in asdict(facts).items() if name != "remote_version" or value}


def _read_facts(path: AnyPath) -> CaseFacts:
    content = unseal(path.read_bytes())
    tuples: dict[str, Any] = {name: tuple(content[name]) for name in _TUPLES}
    return CaseFacts(**(content | tuples))


def _foreground_fractions(mask: np.ndarray | None, num_slices: int) -> list[float | None]:
    return [None] * num_slices if mask is None else (mask > 0).mean(axis=(1, 2)).tolist()


def _labels_present(mask: np.ndarray | None, num_slices: int) -> list[list[int]]:
    if mask is None:
        return [[] for _ in range(num_slices)]
    return [[label for label in np.unique(plane).tolist() if label != 0] for plane in mask]
