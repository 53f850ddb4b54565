"""DICOM SEG, as highdicom writes it, and RTSTRUCT, on the grid of their scan."""

from itertools import pairwise

import numpy as np
import pytest
from dicom_support import save, segmentation, series, structures

from samssl.config import UserError
from samssl.data.readers.masks import MaskRules
from samssl.data.readers.rtstruct import filled
from samssl.data.scans import read_mask, read_scan

LABELS = {0: "background", 3: "Liver", 7: "tumour"}
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


@pytest.fixture
def drawn():
    masks = np.zeros((4, 5, 6, 2), np.uint8)
    masks[1, 1:4, 2:5, 0] = 1
    masks[2:, 0, 0, 1] = 1
    return masks


@pytest.fixture(params=[None, OBLIQUE], ids=["axial", "oblique"])
def datasets(request):
    voxels = np.random.default_rng(0).permutation(120).reshape(4, 5, 6).astype(np.int16)
    return series(voxels, request.param) if request.param else series(voxels)


def _expected(datasets, drawn, scan):
    """Label ids on the scan, found through the values, of which each is there once."""
    assert len(np.unique(scan.voxels)) == scan.voxels.size
    values = np.stack([dataset.pixel_array for dataset in datasets])
    ids = np.zeros(scan.voxels.shape, np.uint8)
    for segment, label in enumerate((3, 7)):
        ids[np.isin(scan.voxels, values[drawn[..., segment] == 1])] = label
    return ids


def test_segments_are_found_by_name(tmp_path, datasets, drawn):
    scan = read_scan(tmp_path / "scan", "CT", files=save(datasets, tmp_path / "scan"))
    [seg] = save([segmentation(datasets, drawn)], tmp_path, ["seg"])
    ids = read_mask(seg, scan, LABELS)
    np.testing.assert_array_equal(ids, _expected(datasets, drawn, scan))
    assert set(np.unique(ids)) == {0, 3, 7}
    only = read_mask(seg, scan, {0: "background", 1: "TUMOUR"})
    np.testing.assert_array_equal(only == 1, ids == 7)


def test_label_maps_and_soft_segments(tmp_path, datasets, drawn):
    scan = read_scan(tmp_path / "scan", "CT", files=save(datasets, tmp_path / "scan"))
    [labelmap] = save([segmentation(datasets, drawn, "LABELMAP")], tmp_path, ["labelmap"])
    np.testing.assert_array_equal(read_mask(labelmap, scan, LABELS), _expected(datasets, drawn, scan))
    soft = drawn * np.array([0.9, 0.2])
    [fractional] = save([segmentation(datasets, soft, "FRACTIONAL")], tmp_path, ["fractional"])
    with pytest.raises(UserError, match=r"fractions.*data\.mask_threshold"):
        read_mask(fractional, scan, LABELS)
    ids = read_mask(fractional, scan, LABELS, MaskRules(threshold=0.5))
    np.testing.assert_array_equal(ids, _expected(datasets, drawn * [1, 0], scan))


def test_segments_that_do_not_fit_are_refused(tmp_path, drawn):
    voxels = np.random.default_rng(0).permutation(120).reshape(4, 5, 6).astype(np.int16)
    datasets = series(voxels)
    scan = read_scan(tmp_path / "scan", "CT", files=save(datasets, tmp_path / "scan"))
    [seg] = save([segmentation(datasets, drawn)], tmp_path, ["seg"])
    with pytest.raises(UserError, match=r"None of the 2 structures in .*: spleen"):
        read_mask(seg, scan, {0: "background", 1: "spleen"})
    drawn[2, 1:3, 1:3, 0] = drawn[2, 0, 0, 0] = 1
    [both] = save([segmentation(datasets, drawn)], tmp_path, ["both"])
    with pytest.raises(UserError, match="overlap"):
        read_mask(both, scan, LABELS)
    half = read_scan(tmp_path / "half", "CT", files=save(datasets[:2], tmp_path / "half"))
    with pytest.raises(UserError, match="reaches beyond its scan"):
        read_mask(seg, half, LABELS)
    moved = series(voxels, origin_mm=(10.4, -20.0, 30.0))
    shifted = read_scan(tmp_path / "moved", "CT", files=save(moved, tmp_path / "moved"))
    with pytest.raises(UserError, match="not on the grid of its scan"):
        read_mask(seg, shifted, LABELS)


def _outline(dataset, rows_columns):
    """Corners (row, column) in pixels of a slice, as LPS mm."""
    row, column = np.array(dataset.ImageOrientationPatient[:3]), np.array(dataset.ImageOrientationPatient[3:])
    between, along = dataset.PixelSpacing
    corner = np.array(dataset.ImagePositionPatient)
    return np.array([corner + r * between * column + c * along * row for r, c in rows_columns])


def _square(top, left, bottom, right):
    return [(top, left), (top, right), (bottom, right), (bottom, left)]


def test_contours_are_filled_with_holes(tmp_path, datasets):
    scan = read_scan(tmp_path / "scan", "CT", files=save(datasets, tmp_path / "scan"))
    outer, hole = _square(-0.5, 0.5, 4.5, 4.5), _square(1.5, 1.5, 2.5, 2.5)
    liver = [_outline(datasets[1], outer), _outline(datasets[1], hole)]
    tumour = [_outline(datasets[3], _square(0.6, 0.6, 1.4, 2.4))]
    dataset = structures(datasets[0], {"LIVER": liver, "BODY": liver, "tumour": tumour})
    [path] = save([dataset], tmp_path, ["rt"])
    ids = read_mask(path, scan, LABELS)
    drawn = np.zeros((4, 5, 6, 2), np.uint8)
    drawn[1, 0:5, 1:5, 0] = 1
    drawn[1, 2, 2, 0] = 0
    drawn[3, 1, 1:3, 1] = 1
    np.testing.assert_array_equal(ids, _expected(datasets, drawn, scan))


def test_contours_that_do_not_fit_are_refused(tmp_path):
    datasets = series(np.random.default_rng(0).permutation(120).reshape(4, 5, 6).astype(np.int16))
    scan = read_scan(tmp_path / "scan", "CT", files=save(datasets, tmp_path / "scan"))
    square = _outline(datasets[1], _square(0.5, 0.5, 2.5, 2.5))
    wrong = {
        "do not lie in slices": square + np.array([[0, 0, 0], [0, 0, 0], [0, 0, 9], [0, 0, 9]]),
        "reach beyond its scan": square + np.array([0, 0, 90]),
        "absurd length": square * np.array([1e8, 1e8, 1]),
        "at no place": np.full((4, 3), np.inf),
    }
    for sentence, outline in wrong.items():
        [path] = save([structures(datasets[0], {"liver": [outline]})], tmp_path, ["rt"])
        with pytest.raises(UserError, match=sentence):
            read_mask(path, scan, LABELS)
    [path] = save([structures(datasets[0], {"liver": [square], "tumour": [square]})], tmp_path, ["rt"])
    with pytest.raises(UserError, match="overlap"):
        read_mask(path, scan, LABELS)


def test_filling_agrees_with_a_test_of_every_pixel():
    from matplotlib.path import Path as Outline

    generator = np.random.default_rng(0)
    pixels = np.argwhere(np.ones((20, 30), bool))
    for _ in range(20):
        points = generator.uniform(-3, 30, (7, 2))
        expected = np.zeros(600, int)
        # matplotlib counts windings; of single triangles that is the same as even and odd.
        for second, third in pairwise(points[1:]):
            expected += Outline([points[0], second, third]).contains_points(pixels)
        np.testing.assert_array_equal(filled([points], (20, 30)).ravel(), expected % 2 == 1)
