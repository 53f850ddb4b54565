"""Where voxels lie in the patient, against SimpleITK, whatever the format, order of axes and rotation."""

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_support import save, series
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from samssl.config import UserError
from samssl.data.readers.masks import MaskRules
from samssl.data.scans import Scan, read_mask, read_scan

LABELS = {0: "background", 1: "liver"}
EXAMPLES = settings(max_examples=12, deadline=None)
ANGLES = st.tuples(*[st.integers(-1800, 1800).map(lambda tenths: tenths / 10)] * 3)
SPACINGS = st.tuples(*[st.integers(3, 60).map(lambda tenths: tenths / 10)] * 3)
FLIPS = st.tuples(*[st.sampled_from([-1, 1])] * 3)
ORDERS = st.permutations(range(3))


def itk_image(angles, spacing_mm, flips, order, shape=(4, 5, 6)) -> sitk.Image:
    """A volume in which every voxel has a value of its own, turned anyhow."""
    direction = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()[:, list(order)] * flips
    image = sitk.GetImageFromArray(np.arange(np.prod(shape), dtype=np.int16).reshape(shape))
    image.SetDirection(direction.ravel().tolist())
    image.SetSpacing(spacing_mm)
    image.SetOrigin((12.5, -40.0, 7.25))
    return image


def same_places(scan: Scan, image: sitk.Image) -> None:
    """Every voxel of the scan has the value that ITK finds at its place."""
    values = sitk.GetArrayFromImage(image)
    assert scan.voxels.size == values.size
    for index in np.ndindex(scan.voxels.shape):
        right, anterior, superior, _ = scan.affine @ [*index, 1]
        x, y, z = image.TransformPhysicalPointToContinuousIndex((-right, -anterior, superior))
        nearest = np.rint([z, y, x]).astype(int)
        assert np.abs(nearest - [z, y, x]).max() < 0.01
        assert scan.voxels[index] == values[tuple(nearest)]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
@EXAMPLES
@given(angles=ANGLES, spacing_mm=SPACINGS, flips=FLIPS, order=ORDERS)
def test_voxels_lie_where_itk_put_them(tmp_path_factory, suffix, angles, spacing_mm, flips, order):
    if suffix.startswith(".nii") and np.prod(flips) * np.linalg.det(np.eye(3)[list(order)]) < 0:
        flips = (-flips[0], *flips[1:])  # ITK itself writes such a NIfTI inexactly
    image = itk_image(angles, spacing_mm, flips, order)
    path = tmp_path_factory.mktemp("itk") / f"a{suffix}"
    sitk.WriteImage(image, str(path), useCompression=suffix in (".nrrd", ".mha"))
    same_places(read_scan(path, "MR"), image)


@EXAMPLES
@given(angles=ANGLES, spacing_mm=SPACINGS)
def test_a_dicom_series_lies_where_itk_reads_it(tmp_path_factory, angles, spacing_mm):
    matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    folder = tmp_path_factory.mktemp("dicom")
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    files = save(series(voxels, [*matrix[:, 0], *matrix[:, 1]], spacing_mm), folder, ["d", "a", "c", "b"])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    same_places(read_scan(folder, "CT", files=files), reader.Execute())


@EXAMPLES
@given(angles=ANGLES, flips=FLIPS, order=ORDERS)
def test_a_mask_in_another_order_of_axes_is_turned(tmp_path_factory, angles, flips, order):
    folder = tmp_path_factory.mktemp("itk")
    image = itk_image(angles, (1.0, 2.0, 3.0), (1, 1, 1), (0, 1, 2))
    sitk.WriteImage(image, str(folder / "image.nrrd"))
    drawn = sitk.Cast(image > 60, sitk.sitkUInt8)
    turned = sitk.PermuteAxes(drawn, [int(axis) for axis in order])
    turned = sitk.Flip(turned, [flip < 0 for flip in flips])
    sitk.WriteImage(turned, str(folder / "mask.nrrd"))
    scan = read_scan(folder / "image.nrrd", "MR")
    np.testing.assert_array_equal(read_mask(folder / "mask.nrrd", scan, LABELS), scan.voxels > 60)


def test_a_mask_on_another_grid_is_resampled_only_if_asked(tmp_path):
    shape = (8, 10, 12)
    image = itk_image((0, 0, 0), (1.0, 1.0, 1.0), (1, 1, 1), (0, 1, 2), shape)
    sitk.WriteImage(image, str(tmp_path / "image.nrrd"))
    scan = read_scan(tmp_path / "image.nrrd", "MR")
    coarse = sitk.Image([6, 5, 4], sitk.sitkUInt8)
    coarse.SetSpacing((2.0, 2.0, 2.0))
    coarse.SetOrigin(image.TransformContinuousIndexToPhysicalPoint((0.5, 0.5, 0.5)))
    coarse[2, 1, 3] = 1
    sitk.WriteImage(coarse, str(tmp_path / "coarse.nrrd"))
    with pytest.raises(UserError, match=r"\(4, 5, 6\).*\(8, 10, 12\).*share 100 %.*resample_masks=true"):
        read_mask(tmp_path / "coarse.nrrd", scan, LABELS)
    ids = read_mask(tmp_path / "coarse.nrrd", scan, LABELS, MaskRules(resample=True))
    nearest = sitk.Resample(coarse, image, sitk.Transform(), sitk.sitkNearestNeighbor)
    sitk.WriteImage(nearest, str(tmp_path / "fine.nrrd"))
    assert ids.sum() == 8
    np.testing.assert_array_equal(ids, read_mask(tmp_path / "fine.nrrd", scan, LABELS))


def test_a_mask_that_does_not_overlap_is_refused_even_then(tmp_path):
    image = itk_image((0, 0, 0), (1.0, 1.0, 1.0), (1, 1, 1), (0, 1, 2))
    sitk.WriteImage(image, str(tmp_path / "image.mha"))
    scan = read_scan(tmp_path / "image.mha", "MR")
    away = sitk.Cast(image > 60, sitk.sitkUInt8)
    away.SetOrigin((500.0, -40.0, 7.25))
    sitk.WriteImage(away, str(tmp_path / "away.mha"))
    with pytest.raises(UserError, match=r"487\.50 mm apart.*do not overlap at all"):
        read_mask(tmp_path / "away.mha", scan, LABELS, MaskRules(resample=True))


def test_slicers_cropped_segments_are_put_in_their_place(tmp_path):
    image = itk_image((0, 0, 0), (1.0, 2.0, 3.0), (1, 1, 1), (0, 1, 2))
    sitk.WriteImage(image, str(tmp_path / "image.nrrd"))
    scan = read_scan(tmp_path / "image.nrrd", "MR")
    drawn = sitk.Cast(image > 100, sitk.sitkUInt8)
    cropped = drawn[1:, 2:, 2:]
    assert sitk.GetArrayFromImage(cropped).sum() < sitk.GetArrayFromImage(drawn).sum()
    cropped.SetMetaData("Segment0_LabelValue", "1")
    sitk.WriteImage(cropped, str(tmp_path / "a.seg.nrrd"))
    ids = read_mask(tmp_path / "a.seg.nrrd", scan, LABELS)
    assert ids.sum() == sitk.GetArrayFromImage(cropped).sum()
    assert (scan.voxels[ids == 1] > 100).all()
    cropped.SetOrigin(image.TransformIndexToPhysicalPoint((3, 2, 2)))
    sitk.WriteImage(cropped, str(tmp_path / "b.seg.nrrd"))
    with pytest.raises(UserError, match="reaches beyond its scan"):
        read_mask(tmp_path / "b.seg.nrrd", scan, LABELS)


@pytest.mark.parametrize(("suffix", "name"), [(".mhd", "ElementDataFile = "), (".nhdr", "data file: ")])
@pytest.mark.parametrize("leads", ["/etc/hostname", "../a.raw", "sub/a.raw", "%03d.raw 1 4 1", "LIST", "b"])
def test_a_header_leads_to_no_other_place(tmp_path, suffix, name, leads):
    path = tmp_path / "scans" / f"a{suffix}"
    (tmp_path / "scans" / "sub").mkdir(parents=True)
    image = itk_image((0, 0, 0), (1.0, 1.0, 1.0), (1, 1, 1), (0, 1, 2))
    sitk.WriteImage(image, str(path), useCompression=False)
    assert read_scan(path, "MR").voxels.max() == 119
    voxels = path.with_suffix(".raw")
    for place in (tmp_path, path.parent / "sub"):
        (place / "a.raw").write_bytes(voxels.read_bytes())
    (path.parent / "b").symlink_to(voxels)
    text = path.read_text()
    assert f"{name}a.raw" in text
    path.write_text(text.replace(f"{name}a.raw", name + leads))
    with pytest.raises(UserError, match="elsewhere than in one file beside it"):
        read_scan(path, "MR")
