"""Images that look like copies of each other: a perceptual hash finds pairs, a correlation confirms them.

The hash is the usual one of 64 bits (Zauner 2010; what `imagehash.phash` computes): the lowest 8 x 8 terms of
the discrete cosine transform of 32 x 32 greys against their median. The library is not used, as it would
bring PyWavelets along for these lines. Crops of one organ have like hashes without being copies, which is why
the greys themselves are correlated too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from samssl.data.fingerprint import CaseFingerprint

NEAR_BITS = 8
NEAR_CORRELATION = 0.99
_BLOCK = 512


@dataclass(frozen=True)
class Pair:
    """Two cases that may be one."""

    first: str
    second: str
    same_voxels: bool
    correlation: float
    """Of their middle slices in 32 x 32 greys."""
    splits: tuple[str, str]
    patients: tuple[str, str]

    @property
    def across(self) -> bool:
        """Whether they lie in different splits."""
        return self.splits[0] != self.splits[1]


def find_copies(cases: Sequence[CaseFingerprint]) -> list[Pair]:
    """Every pair of cases of one modality whose middle slices look the same, the likest first."""
    if len(cases) < 2:
        return []
    greys = np.array([entry.tiny for entry in cases], np.float32)
    hashes, normed = phash(greys), _normed(greys)
    pairs = []
    for start in range(0, len(cases), _BLOCK):
        bits = np.bitwise_count(np.bitwise_xor(hashes[start : start + _BLOCK, None], hashes[None])).sum(
            axis=2
        )
        for row, column in zip(*np.nonzero(bits <= NEAR_BITS), strict=True):
            first, second = start + int(row), int(column)
            correlation = float(normed[first] @ normed[second])
            if first < second and correlation >= NEAR_CORRELATION:
                pairs.append(_pair(cases[first], cases[second], correlation))
    return sorted(
        (pair for pair in pairs if pair is not None),
        key=lambda pair: (not pair.across, not pair.same_voxels, -pair.correlation, pair.first),
    )


def phash(greys: Float[np.ndarray, "N 1024"]) -> Integer[np.ndarray, "N 8"]:
    """The hash of each image, as 8 bytes."""
    from scipy.fft import dctn

    low = np.asarray(dctn(greys.reshape(-1, 32, 32), axes=(1, 2)))[:, :8, :8].reshape(-1, 64)
    return np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)


def _normed(greys: Float[np.ndarray, "N 1024"]) -> Float[np.ndarray, "N 1024"]:
    centred = greys - greys.mean(axis=1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-6)


def _pair(one: CaseFingerprint, other: CaseFingerprint, correlation: float) -> Pair | None:
    if one.modality != other.modality:
        return None
    same = one.image_sha256 == other.image_sha256
    return Pair(
        one.case,
        other.case,
        same,
        correlation,
        (one.split, other.split),
        (one.patient, other.patient),
    )
