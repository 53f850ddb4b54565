import numpy as np
import pytest
from scipy.ndimage import zoom

from samssl.data.copies import find_copies, phash
from samssl.data.fingerprint import CaseFingerprint, fingerprint, label_totals
from samssl.data.scans import Scan


def scan_of(voxels: np.ndarray, affine: np.ndarray | None = None) -> Scan:
    affine = (
        np.array([[0, 0, -1, 0], [0, -1, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]]) if affine is None else affine
    )
    return Scan(voxels, (2.0, 1.0, 1.0), affine, "MR")


def picture(seed: int, side: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(seed).normal(100, 30, (8, 8))
    return np.asarray(zoom(blocks, side / 8, order=1))[None]


def seen(name: str, voxels: np.ndarray) -> CaseFingerprint:
    return fingerprint(scan_of(voxels), None, case=name, patient=name)


def test_labels_are_counted_slice_by_slice() -> None:
    mask = np.zeros((2, 64, 64), np.uint8)
    mask[0, 3:20, 3:20], mask[0, 40:50, 40:50], mask[1, 5:7, 5] = 1, 1, 2
    facts = fingerprint(scan_of(picture(0).repeat(2, 0)), mask, case="a", patient="p").labels
    assert (facts[1].voxels, facts[1].slices, facts[1].objects, facts[1].specks) == (389, 1, 2, 0)
    assert (facts[2].voxels, facts[2].slices, facts[2].objects, facts[2].specks) == (2, 1, 1, 1)
    assert facts[1].vanish == {"256": 0, "512": 0, "1024": 0}


def test_small_objects_vanish_in_small_inputs_only() -> None:
    mask = np.zeros((1, 1024, 1024), np.uint8)
    mask[0, 501, 501], mask[0, 100:200, 100:200] = 1, 1
    facts = fingerprint(scan_of(picture(1, 1024)), mask, case="a", patient="p").labels[1]
    assert facts.objects == 2
    assert facts.vanish["256"] == 1


@pytest.mark.parametrize(("column", "plane"), [(2, "axial"), (1, "coronal"), (0, "sagittal")])
def test_planes_follow_from_the_affine(column: int, plane: str) -> None:
    affine = np.eye(4)[:, [column, *(other for other in range(3) if other != column), 3]]
    made = fingerprint(scan_of(picture(0).repeat(3, 0), affine), None, case="a", patient="p")
    assert (made.plane, made.tilt_degrees) == (plane, 0)


def test_copies_are_found_whatever_their_size_and_grey_scale() -> None:
    one = picture(1)
    cases = [
        seen("one", one),
        seen("larger", np.asarray(zoom(one, (1, 2, 2), order=1))),
        seen("darker", one * 0.3 + 7),
        *(seen(f"other{number}", picture(number)) for number in range(2, 30)),
    ]
    pairs = find_copies(cases)
    assert {frozenset((pair.first, pair.second)) for pair in pairs} == {
        frozenset(("one", "larger")),
        frozenset(("one", "darker")),
        frozenset(("larger", "darker")),
    }
    assert not any(pair.same_voxels for pair in pairs)


def test_hashes_of_unlike_images_are_far_apart() -> None:
    hashes = phash(np.array([seen("a", picture(number)).tiny for number in range(20)], np.float32))
    bits = np.bitwise_count(np.bitwise_xor(hashes[:, None], hashes[None])).sum(axis=2)
    assert bits[~np.eye(20, dtype=bool)].min() > 8


def test_totals_add_up() -> None:
    mask = np.zeros((1, 64, 64), np.uint8)
    mask[0, 3:20, 3:20] = 1
    made = fingerprint(scan_of(picture(0)), mask, case="a", patient="p")
    assert label_totals([made, made])[1].voxels == 2 * made.labels[1].voxels
