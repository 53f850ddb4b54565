import pickle

import fsspec
import numpy as np
import pytest
import zarr

from samssl.config import UserError
from samssl.data.cases import content_digest, intensity_range
from samssl.data.index import INDEX_COLUMNS
from samssl.data.prepare import prepare
from samssl.data.scans import Scan, read_mask, read_scan
from samssl.data.slices import SliceStore, verify_store


@pytest.fixture
def store(prepare_config):
    config = prepare_config(public_names=True)
    prepare(config)
    return SliceStore(config.out)


def test_store_gives_back_what_was_read(store, decathlon):
    scan = read_scan(decathlon / "imagesTr" / "liver_1.nii.gz", "CT")
    mask = read_mask(decathlon / "labelsTr" / "liver_1.nii.gz", scan, store.labels)
    np.testing.assert_array_equal(store.image("liver_1"), scan.voxels)
    np.testing.assert_array_equal(store.mask("liver_1"), mask)
    for z in range(scan.voxels.shape[0]):
        np.testing.assert_array_equal(store.image_slice("liver_1", z), scan.voxels[z])
        np.testing.assert_array_equal(store.mask_slice("liver_1", z), mask[z])
    assert store.image_slice("liver_1", 0).dtype == np.int16
    assert store.image_slice("liver_1", 0).flags.writeable


def test_any_zarr_reader_sees_the_same(store):
    image, mask = (
        zarr.open_array(f"{store.root}/cases/liver_1.zarr/{name}", mode="r") for name in ("image", "mask")
    )
    np.testing.assert_array_equal(image[:], store.image("liver_1"))
    np.testing.assert_array_equal(mask[2], store.mask_slice("liver_1", 2))
    assert image.chunks == (1, 5, 6)
    assert image.shards == image.shape


def test_index_has_a_row_per_slice_with_its_facts(store):
    index = store.index
    assert tuple(index.columns) == INDEX_COLUMNS
    assert list(zip(index["case"], index["z"], strict=True)) == sorted(
        zip(index["case"], index["z"], strict=True)
    )
    assert len(index) == 7 * 4
    row = index[(index["case"] == "liver_1") & (index["z"] == 2)].iloc[0]
    assert list(row["labels"]) == [1, 2]
    assert row["foreground_fraction"] == pytest.approx(6 / 30)
    assert (row["num_slices"], row["height"], row["width"], row["modality"]) == (4, 5, 6, "CT")
    assert (row["intensity_low"], row["intensity_high"]) == (-160, 240)
    image = store.image_slice("liver_1", 2)
    assert row["content_fraction"] == pytest.approx((image > -140).mean())
    assert row["source"] == "imagesTr/liver_1.nii.gz"
    assert row["image_sha256"] == content_digest(store.image("liver_1"))


def test_unlabelled_case_has_no_mask(store):
    assert store.mask("liver_7") is None
    assert store.mask_slice("liver_7", 0) is None
    rows = store.index[store.index["case"] == "liver_7"]
    assert rows["foreground_fraction"].isna().all()
    assert set(rows["mask_sha256"]) == set(rows["mask_source"]) == {""}


def test_unknown_case_is_named(store):
    with pytest.raises(UserError, match="no case 'liver_8'"):
        store.image_slice("liver_8", 0)
    with pytest.raises(UserError, match="no case 'liver_8'"):
        store.mask("liver_8")


def test_store_survives_pickling(store):
    store.image_slice("liver_1", 0)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.image_slice("liver_1", 1), store.image_slice("liver_1", 1))


def test_store_is_read_from_any_filesystem(store):
    remote = fsspec.filesystem("memory")
    remote.put(f"{store.root}/", "/bucket/", recursive=True)
    elsewhere = SliceStore("memory://bucket")
    assert elsewhere.digest == store.digest
    np.testing.assert_array_equal(elsewhere.image_slice("liver_1", 3), store.image_slice("liver_1", 3))
    assert verify_store("memory://bucket") == []
    remote.rm("/bucket", recursive=True)


def test_folder_without_fitting_manifest_is_no_store(store, tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        SliceStore(tmp_path / "nothing")
    index = tmp_path / "store" / "index.parquet"
    index.write_bytes(index.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"index\.parquet is not the one"):
        SliceStore(store.root)
    index.unlink()
    with pytest.raises(UserError, match=r"index\.parquet"):
        SliceStore(store.root)


def test_whole_store_verifies(store):
    assert verify_store(store.root) == []


def test_one_changed_byte_anywhere_is_found(store, tmp_path):
    generator = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert len(files) == 7 * 6 - 2 + 2
    for path in files:
        whole = path.read_bytes()
        for position in {0, len(whole) - 1, *generator.integers(0, len(whole), 3).tolist()}:
            damaged = bytearray(whole)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            name = path.relative_to(tmp_path / "store").as_posix()
            assert any(name in fault for fault in verify_store(store.root)), (name, position)
        path.write_bytes(whole)
    assert verify_store(store.root) == []


def test_missing_and_foreign_files_are_found(store, tmp_path):
    case = tmp_path / "store" / "cases" / "liver_1.zarr"
    (case / "mask" / "c" / "0" / "0" / "0").unlink()
    (case / "image" / "extra").write_text("")
    faults = verify_store(store.root)
    assert "cases/liver_1.zarr/mask/c/0/0/0 is missing." in faults
    assert "cases/liver_1.zarr/image/extra does not belong to the store." in faults


@pytest.mark.parametrize("position", [30, -3])
def test_damaged_shard_is_never_read_as_pixels(store, tmp_path, position):
    shard = tmp_path / "store" / "cases" / "liver_1.zarr" / "image" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[position] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"Case liver_1 .* is damaged.*Run prepare again"):
        store.image("liver_1")


def test_content_digest_depends_on_type_shape_and_values_only():
    array = np.arange(6, dtype=np.int16)
    assert content_digest(array) == content_digest(array.astype(">i2"))
    assert content_digest(array.reshape(2, 3)) == content_digest(np.asfortranarray(array.reshape(2, 3)))
    others = [array.reshape(2, 3), array.reshape(3, 2), array.astype(np.int32), array[::-1]]
    assert len({content_digest(other) for other in [array, *others]}) == 5


def test_intensity_range_leaves_the_background_out():
    voxels = np.zeros((1, 50, 50), np.int16)
    voxels[0, :10, :10] = 100 + np.arange(100).reshape(10, 10)
    scan = Scan(voxels, (1.0, 1.0, 1.0), np.eye(4), "MR")
    assert intensity_range(scan, (-1.0, 1.0)) == pytest.approx((100.495, 198.505))
    assert intensity_range(Scan(voxels, (1.0, 1.0, 1.0), np.eye(4), "CT"), (-1.0, 1.0)) == (-1, 1)
    two_values = Scan((voxels > 0).astype(np.uint8), (1.0, 1.0, 1.0), np.eye(4), "US")
    assert intensity_range(two_values, (-1.0, 1.0)) == (0, 1)
