import json

import nibabel as nib
import numpy as np
import pytest

from samssl.config import UserError
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.recipes.simulated import (
    LABELS,
    SimulateConfig,
    jacobian_determinant,
    random_warp,
    simulate,
    simulate_subject,
)
from samssl.data.slices import SliceStore
from samssl.data.sources import DataSource
from samssl.data.splits import SplitConfig

SPACING_MM = 6.0


def _settings(tmp_path, **changes):
    return SimulateConfig(
        **{"out": tmp_path / "cohort", "subjects": 3, "spacing_mm": SPACING_MM, "workers": 1} | changes
    )


def test_cohort_is_a_decathlon_that_says_what_it_is(tmp_path):
    cohort = simulate(_settings(tmp_path))
    facts = json.loads((cohort.root / "dataset.json").read_text())
    assert facts["description"].startswith("SIMULATED")
    assert "Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre" in facts["description"]
    assert facts["labels"] == {
        "0": "background",
        "1": "grey matter",
        "2": "white matter",
        "3": "cerebrospinal fluid",
    }
    assert len(list((cohort.root / "imagesTr").iterdir())) == 3
    split = SplitConfig(train=1.0, val=1.0, test=1.0)
    prepared = prepare(
        PrepareConfig(name="sim", out=tmp_path / "store", data=DataSource(root=cohort.root), split=split)
    )
    assert (prepared.cases, prepared.rejected) == (3, 0)
    assert SliceStore(tmp_path / "store").labels == LABELS


def test_same_cohort_is_left_alone_and_another_replaces_it(tmp_path):
    assert simulate(_settings(tmp_path)).wrote
    path = tmp_path / "cohort" / "imagesTr" / "simulated_002.nii.gz"
    content, mtime = path.read_bytes(), path.stat().st_mtime_ns
    assert not simulate(_settings(tmp_path)).wrote
    assert path.stat().st_mtime_ns == mtime
    path.write_bytes(content[:-1])
    assert simulate(_settings(tmp_path)).wrote
    assert path.read_bytes() == content
    assert simulate(_settings(tmp_path, seed=1)).wrote
    assert path.read_bytes() != content
    assert simulate(_settings(tmp_path, seed=1, subjects=2)).wrote
    assert len(list((tmp_path / "cohort" / "imagesTr").iterdir())) == 2


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="Choose another folder"):
        simulate(_settings(tmp_path))
    assert (tmp_path / "cohort" / "thesis.txt").exists()


def test_subjects_differ_and_are_the_same_each_time():
    first, mask, affine = simulate_subject(1, seed=0, spacing_mm=SPACING_MM)
    again, _, _ = simulate_subject(1, seed=0, spacing_mm=SPACING_MM)
    other, other_mask, _ = simulate_subject(2, seed=0, spacing_mm=SPACING_MM)
    np.testing.assert_array_equal(first, again)
    assert first.shape == other.shape == mask.shape
    assert 2 * ((mask > 0) & (other_mask > 0)).sum() / ((mask > 0).sum() + (other_mask > 0).sum()) < 0.97
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    assert 0.8e6 < (mask > 0).sum() * SPACING_MM**3 < 2.5e6


@pytest.mark.parametrize("subject", [1, 2, 3])
def test_tissues_have_the_brightness_of_t1(subject):
    image, mask, _ = simulate_subject(subject, seed=0, spacing_mm=SPACING_MM)
    means = [image[mask == label].mean() for label in (0, 3, 1, 2)]
    assert means == sorted(means)
    assert image.dtype == np.int16
    assert set(np.unique(mask)) == set(LABELS)


def test_warps_move_by_millimetres_and_never_fold():
    axes = [np.arange(0.0, 170, SPACING_MM)] * 3
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    for seed in range(5):
        warped = random_warp(points, SPACING_MM, np.random.default_rng(seed))
        assert jacobian_determinant(warped, SPACING_MM).min() > 0.2
        assert 2 < np.linalg.norm(warped - points, axis=0).mean() < 20


def test_jacobian_tells_folding():
    points = np.stack(np.meshgrid(*[np.arange(0.0, 12, 3)] * 3, indexing="ij"))
    np.testing.assert_allclose(jacobian_determinant(2 * points, 3.0), 8)
    np.testing.assert_allclose(
        jacobian_determinant(points * np.array([-1, 1, 1])[:, None, None, None], 3.0), -1
    )
