import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from PIL import Image

from samssl.config import UserError
from samssl.data.readers import files
from samssl.data.readers.masks import MaskRules
from samssl.data.scans import read_mask, read_scan

LABELS = {0: "background", 1: "liver", 2: "tumour"}
RAMP = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def test_axial_voxels_run_up_back_and_left(write_nifti):
    # The stored axes run right, anterior, superior.
    scan = read_scan(write_nifti("a.nii.gz", RAMP, np.diag([1.0, 2.0, 2.5, 1.0])), "CT")
    np.testing.assert_array_equal(scan.voxels, RAMP.transpose(2, 1, 0)[:, ::-1, ::-1])
    assert scan.spacing_mm == (2.5, 2.0, 1.0)
    assert scan.voxels.dtype == np.int16
    z, y, x = 3, 0, 1
    np.testing.assert_allclose(scan.affine @ [z, y, x, 1], [0, 4, 7.5, 1])


@pytest.mark.parametrize("codes", ["LPS", "SAR", "AIL", "PRI"])
@pytest.mark.parametrize("axis", ["auto", "coronal", "sagittal"])
def test_storage_orientation_does_not_matter(write_nifti, codes, axis):
    affine = from_matvec(np.diag([1.0, 1.1, 3.0]), [5, -7, 11])
    canonical = nib.Nifti1Image(RAMP, affine)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    stored = canonical.as_reoriented(change.tolist())
    first = read_scan(write_nifti("canonical.nii.gz", RAMP, affine), "MR", axis)
    second = read_scan(write_nifti("stored.nii.gz", np.asarray(stored.dataobj), stored.affine), "MR", axis)
    np.testing.assert_array_equal(first.voxels, second.voxels)
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-5)


@pytest.mark.parametrize(
    ("spacing_mm", "shape"),
    [
        ((1, 1, 1), (4, 3, 2)),
        ((1, 1, 4), (4, 3, 2)),
        ((1, 4, 1), (3, 4, 2)),
        ((4, 1, 1), (2, 4, 3)),
        ((2, 1, 1.9), (4, 3, 2)),
    ],
)
def test_auto_slices_across_the_clearly_largest_spacing(write_nifti, spacing_mm, shape):
    path = write_nifti("a.nii", RAMP, np.diag([*map(float, spacing_mm), 1.0]))
    assert read_scan(path, "MR").voxels.shape == shape


def test_coronal_rows_run_from_head_to_feet(write_nifti):
    scan = read_scan(write_nifti("a.nii", RAMP), "MR", "coronal")
    np.testing.assert_array_equal(scan.voxels, RAMP.transpose(1, 2, 0)[::-1, ::-1, ::-1])


def test_2d_nifti_and_trailing_axes_are_one_slice_or_volume(write_nifti):
    assert read_scan(write_nifti("flat.nii", RAMP[0]), "XR").voxels.shape == (1, 4, 3)
    assert read_scan(write_nifti("long.nii", RAMP[..., None, None]), "MR").voxels.shape == (4, 3, 2)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(RAMP, np.eye(4))
    image.header.set_slope_inter(2, -1000)
    nib.save(image, tmp_path / "scaled.nii")
    raw = (tmp_path / "scaled.nii").read_bytes()
    stored = np.frombuffer(raw, np.int16, offset=352).reshape(RAMP.shape, order="F")
    voxels = read_scan(tmp_path / "scaled.nii", "CT").voxels
    assert voxels.dtype == np.float32
    np.testing.assert_allclose(voxels, (stored * 2.0 - 1000).transpose(2, 1, 0)[:, ::-1, ::-1])


def test_big_endian_becomes_native(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(RAMP, np.eye(4), header), tmp_path / "big.nii")
    voxels = read_scan(tmp_path / "big.nii", "CT").voxels
    assert voxels.dtype.isnative
    assert voxels.max() == 23


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((2, 3, 4), np.int16), "single value"),
        (np.array([[[0.0, np.nan]]]), "not finite"),
        (np.array([[[0.0, 1e300]]]), "not finite"),
        (np.arange(48, dtype=np.int16).reshape(2, 3, 4, 2), "Choose one volume"),
        (np.ones((2, 3, 4), np.complex64), "complex64"),
        (np.zeros((2, 0, 4), np.int16), "no voxels"),
    ],
)
def test_useless_scans_are_refused(write_nifti, array, sentence):
    path = write_nifti("a.nii", array)
    with pytest.raises(UserError, match=sentence) as error:
        read_scan(path, "MR")
    assert str(path) in str(error.value)


def test_truncated_and_corrupted_gzip_are_refused(write_nifti):
    noise = np.random.default_rng(0).integers(0, 9999, (9, 9, 9), dtype=np.int16)
    whole = write_nifti("a.nii.gz", noise).read_bytes()
    path = write_nifti("a.nii.gz", noise)
    path.write_bytes(whole[:-50])
    with pytest.raises(UserError, match="damaged"):
        read_scan(path, "MR")
    # The checksum at gzip's end is wrong, although all voxels can be decompressed.
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    with pytest.raises(UserError, match="damaged"):
        read_scan(path, "MR")


def test_header_that_promises_too_much_is_refused_before_memory_is_taken(write_nifti):
    path = write_nifti("a.nii.gz", RAMP)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([32767, 32767, 32767], np.int16).tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(UserError, match="promises 70362301923326 bytes"):
        read_scan(path, "MR")


def test_file_of_more_bytes_than_a_scan_may_have_is_refused(write_nifti, monkeypatch):
    monkeypatch.setattr(files, "MAX_SCAN_BYTES", 40)
    with pytest.raises(UserError, match="more than one scan may"):
        read_scan(write_nifti("a.nii.gz", RAMP), "MR")


@pytest.mark.parametrize("content", [b"", b"not an image", bytes(400)])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.png", "a.jpg"])
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_scan(tmp_path / name, "MR")


def test_missing_and_unknown_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*a\.nii"):
        read_scan(tmp_path / "a.nii", "MR")
    with pytest.raises(UserError, match="convert it to NIfTI"):
        read_scan(tmp_path / "a.mgh", "MR")


def _save_image(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


GREY = np.array([[0, 60, 120], [180, 240, 255]], np.uint8)


@pytest.mark.parametrize("mode", [None, "RGB", "RGBA", "P"])
def test_colour_images_become_grey(tmp_path, mode):
    scan = read_scan(_save_image(tmp_path / "a.png", GREY, mode), "US")
    np.testing.assert_array_equal(scan.voxels, GREY[None])
    assert scan.spacing_mm == (1, 1, 1)


def test_16_bit_png_keeps_its_depth(tmp_path):
    deep = np.array([[0, 70], [4000, 65535]], np.uint16)
    voxels = read_scan(_save_image(tmp_path / "a.png", deep), "XR").voxels
    assert voxels.dtype == np.uint16
    np.testing.assert_array_equal(voxels[0], deep)


def test_mask_follows_its_scan_whatever_its_own_storage(write_nifti):
    scan = read_scan(write_nifti("image.nii", RAMP), "MR")
    mask = np.zeros((2, 3, 4), np.float32)
    mask[1, 2, 3] = 2
    flipped = write_nifti("mask.nii", mask[::-1], from_matvec(np.diag([-1.0, 1, 1]), [1, 0, 0]))
    ids = read_mask(flipped, scan, LABELS)
    assert ids.dtype == np.uint8
    assert np.argwhere(ids == 2).tolist() == np.argwhere(scan.voxels == RAMP[1, 2, 3]).tolist()


def test_mask_scaled_to_just_below_one_is_one(tmp_path, write_nifti):
    scan = read_scan(write_nifti("image.nii", RAMP), "MR")
    content = bytearray(write_nifti("mask.nii", (RAMP > 20).astype(np.int16) * 5).read_bytes())
    content[112:116] = np.float32(0.99999997 / 5).tobytes()
    (tmp_path / "mask.nii").write_bytes(content)
    assert read_mask(tmp_path / "mask.nii", scan, LABELS).sum() == 3


def test_mask_on_another_grid_is_refused(write_nifti):
    scan = read_scan(write_nifti("image.nii", RAMP), "MR")
    with pytest.raises(UserError, match=r"\(4, 3, 1\).*\(4, 3, 2\)"):
        read_mask(write_nifti("short.nii", RAMP[:1] % 2), scan, LABELS)
    for moved in (np.diag([1, 1, 1.1, 1]), from_matvec(np.eye(3), [0.2, 0, 0])):
        with pytest.raises(UserError, match="mm apart"):
            read_mask(write_nifti("moved.nii", RAMP % 2, moved), scan, LABELS)
    rounded = from_matvec(np.eye(3), [0.004, 0, 0])
    assert read_mask(write_nifti("rounded.nii", RAMP % 2, rounded), scan, LABELS).sum() == 12


def test_mask_of_unknown_ids_or_fractions_is_refused(write_nifti):
    scan = read_scan(write_nifti("image.nii", RAMP), "MR")
    with pytest.raises(UserError, match="ids 3, 4, 5"):
        read_mask(write_nifti("mask.nii", RAMP % 6), scan, LABELS)
    with pytest.raises(UserError, match="fractions"):
        read_mask(write_nifti("mask.nii", (RAMP % 2).astype(np.float32) * 0.7), scan, LABELS)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1"])
def test_black_and_white_image_masks_are_the_single_foreground_label(tmp_path, mode):
    scan = read_scan(_save_image(tmp_path / "image.png", GREY), "US")
    black_white = np.array([[0, 0, 255], [0, 255, 255]], np.uint8)
    mask = read_mask(
        _save_image(tmp_path / "mask.png", black_white, mode), scan, {0: "background", 1: "lesion"}
    )
    np.testing.assert_array_equal(mask[0], black_white // 255)


def test_image_masks_hold_ids(tmp_path):
    scan = read_scan(_save_image(tmp_path / "image.png", GREY), "US")
    ids = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    np.testing.assert_array_equal(read_mask(_save_image(tmp_path / "mask.png", ids), scan, LABELS)[0], ids)
    palette = Image.fromarray(ids, "L").convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png", scan, LABELS)[0], ids)
    with pytest.raises(UserError, match="255"):
        read_mask(_save_image(tmp_path / "mask.png", ids // 2 * 255), scan, LABELS)
    red = np.stack([ids, 0 * ids, 0 * ids], axis=-1)
    with pytest.raises(UserError, match="colour"):
        read_mask(_save_image(tmp_path / "mask.png", red), scan, LABELS)


def test_colours_stand_for_labels_where_they_are_named(tmp_path):
    scan = read_scan(_save_image(tmp_path / "image.png", GREY), "US")
    ids = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    path = _save_image(tmp_path / "mask.png", palette[ids])
    rules = MaskRules(colours={"#ff0000": 1, "#00FF00": 2})
    np.testing.assert_array_equal(read_mask(path, scan, LABELS, rules)[0], ids)
    with pytest.raises(UserError, match=r"1 colours .* does not name, as #00ff00"):
        read_mask(path, scan, LABELS, MaskRules(colours={"#ff0000": 1}))


def test_a_soft_mask_is_cut_at_its_threshold(write_nifti, tmp_path):
    scan = read_scan(write_nifti("image.nii", RAMP), "MR")
    soft = write_nifti("soft.nii", RAMP / np.float32(23))
    liver = {0: "background", 3: "liver"}
    with pytest.raises(UserError, match=r"fractions.*data\.mask_threshold"):
        read_mask(soft, scan, liver)
    ids = read_mask(soft, scan, liver, MaskRules(threshold=0.5))
    np.testing.assert_array_equal(ids == 3, scan.voxels >= 11.5)
    with pytest.raises(UserError, match="one label"):
        read_mask(soft, scan, LABELS, MaskRules(threshold=0.5))


@pytest.mark.parametrize("name", ["a.tif", "a.tiff", "a.bmp"])
def test_tiff_and_bmp(tmp_path, name):
    np.testing.assert_array_equal(read_scan(_save_image(tmp_path / name, GREY), "XR").voxels[0], GREY)


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_deep_tiff_keeps_its_depth_and_pages_are_chosen(tmp_path, kind):
    pages = [(GREY.astype(kind) * 200 + page) for page in range(3)]
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    with pytest.raises(UserError, match="3 pages"):
        read_scan(tmp_path / "a.tif", "XR")
    for page in range(3):
        np.testing.assert_array_equal(read_scan(tmp_path / "a.tif", "XR", volume=page).voxels[0], pages[page])


def test_one_volume_of_a_4d_file_is_chosen(write_nifti):
    path = write_nifti("a.nii", np.stack([RAMP, RAMP + 100], axis=-1))
    with pytest.raises(UserError, match=r"2 volumes.*data\.volume, 0 to 1"):
        read_scan(path, "MR")
    assert read_scan(path, "MR", volume=1).voxels.min() == 100
    with pytest.raises(UserError, match="0 to 1"):
        read_scan(path, "MR", volume=2)
