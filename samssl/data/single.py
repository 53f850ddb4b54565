"""One scan in the role of a slice store: for a model to look at it, nothing needs to be prepared."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from samssl.data.cases import intensity_range, intensity_statistics
from samssl.data.intensity import CaseIntensity
from samssl.data.scans import Scan


@dataclass(frozen=True)
class ScanSlices:
    """The slices of a scan; row and z are the same number, and the case has no name."""

    scan: Scan
    values: CaseIntensity
    """As `prepare` would have noted them."""

    @property
    def rows(self) -> "ScanSlices":
        """Facts of each slice."""
        return self

    @property
    def z(self) -> Int[np.ndarray, " rows"]:
        """Which slice of the scan each row is."""
        return np.arange(len(self.scan.voxels), dtype=np.int32)

    def case_name(self, row: int) -> str:
        """Nothing: a scan that somebody hands over is not called by what it is named."""
        return ""

    def num_slices(self, row: int) -> int:
        """How many slices the scan has."""
        return len(self.scan.voxels)

    def intensity(self, row: int) -> CaseIntensity:
        """What is known of the scan's values."""
        return self.values

    def image_slice(self, case: str, z: int) -> Shaped[np.ndarray, "H W"]:
        """One slice, in native type and units."""
        return self.scan.voxels[z]


def scan_slices(scan: Scan, window_hu: tuple[float, float]) -> ScanSlices:
    """The slices of a scan, with what `prepare` notes of its values, for CT with this window."""
    low, high = intensity_range(scan, window_hu)
    return ScanSlices(scan, CaseIntensity(scan.modality, low, high, *intensity_statistics(scan.voxels)))
