"""Broken and hostile files: a scan or a `UserError`, in bounded time and memory, and nothing else."""

import gzip
import io
import json
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_support import image, save, series
from hostile_support import LABELS, VOXELS, dicom_masks, read_either_way, valid_files
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag
from pydicom.uid import SegmentationStorage

from samssl.config import UserError
from samssl.data.index import SliceIndex
from samssl.data.readers.dicom_seg import SEG_TAGS
from samssl.data.readers.masks import MaskRules
from samssl.data.readers.rtstruct import RTSTRUCT_TAGS
from samssl.data.scans import Scan, read_mask, read_scan
from samssl.data.sources import DataSource, find_sources

FILES = valid_files()
EXAMPLES = settings(max_examples=40, deadline=None)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(max_size=8)
    ),
    min_size=1,
    max_size=6,
)


def mutated(content: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    """`content` with bytes replaced, inserted, deleted or cut off, at shares of its length."""
    for kind, share, given_bytes in mutations:
        # Most of what a file can lie about is at its beginning: places are drawn closer to it.
        at = int(share**3 * len(content))
        if kind == "cut":
            content = content[:at]
        else:
            skipped = 0 if kind == "insert" else len(given_bytes)
            inserted = b"" if kind == "delete" else given_bytes
            content = content[:at] + inserted + content[at + skipped :]
    return content


@contextmanager
def bounded(seconds: float = 5, mebibytes: int = 128) -> Iterator[None]:
    """Fail where the body takes longer, or has more memory at a time than that."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < seconds
    assert peak < mebibytes << 20


@pytest.mark.parametrize("name", FILES)
@EXAMPLES
@given(mutations=MUTATIONS)
def test_a_broken_file_is_a_scan_or_a_user_error(tmp_path_factory, name, mutations):
    path = tmp_path_factory.mktemp("broken", numbered=True) / name
    path.write_bytes(mutated(FILES[name], mutations))
    read_either_way(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_never_a_scan(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    if name != "structures.dcm":
        assert read_scan(path, "MR").voxels.size
    content = FILES[name].rstrip(b"\0")
    for share in (0.0, 0.2, 0.5, 0.8):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=name):
            read_scan(path, "MR")


@pytest.mark.parametrize("name", [*FILES, "a.nhdr", "a.mhd", "a.nii"])
@EXAMPLES
@given(content=st.binary(max_size=600))
def test_rubbish_under_any_name_is_a_user_error(tmp_path_factory, name, content):
    path = tmp_path_factory.mktemp("rubbish", numbered=True) / name
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_scan(path, "MR")


def test_one_format_under_the_name_of_another_is_refused(tmp_path):
    for name in ("scan.png", "scan.nii.gz", "raw.nrrd", "scan.mha"):
        for other in ("scan.png", "scan.nii", "raw.nrrd", "scan.mha"):
            path = tmp_path / f"x{Path(other).suffix}"
            path.write_bytes(FILES[name])
            if Path(name).suffix != path.suffix:
                with pytest.raises(UserError, match="x"):
                    read_scan(path, "MR")


def nifti_bomb(version: int) -> bytes:
    """A header of one small volume, and 256 MiB of zeros behind it, in a quarter of one."""
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    plain = kind(VOXELS, np.eye(4)).to_bytes()
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as file:
        file.write(plain)
        for _ in range(16):
            file.write(bytes(16 << 20))
    return packed.getvalue()


@pytest.mark.parametrize("version", [1, 2])
def test_a_gzip_bomb_is_given_up_early(tmp_path, version):
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(nifti_bomb(version))
    assert path.stat().st_size < 1 << 20
    with bounded(), pytest.raises(UserError, match="over 16 MiB more than the voxels"):
        read_scan(path, "MR")


def test_a_bomb_in_metaimage_and_nrrd_is_given_up_early(tmp_path):
    zeros = zlib.compress(bytes(256 << 20))
    head = "NDims = 3\nDimSize = 3 4 5\nElementType = MET_SHORT\n"
    head += "CompressedData = True\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes(head.encode() + zeros)
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 3 4 5\nencoding: gzip\nendian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + gzip.compress(bytes(256 << 20)))
    for name in ("a.mha", "a.nrrd"):
        with bounded(), pytest.raises(UserError, match=r"than (its header|the voxels)"):
            read_scan(tmp_path / name, "MR")


def terabytes(name: str) -> bytes:
    """A small file whose header promises a volume of terabytes."""
    content = bytearray(FILES[name])
    if name == "scan.nii":
        content[42:48] = struct.pack("<3h", 32767, 32767, 32767)
    elif name == "nifti2.nii":
        content[24:48] = struct.pack("<3q", 1 << 40, 1 << 40, 1 << 40)
    elif name.endswith(".nrrd"):
        return bytes(content).replace(b"sizes: 3 4 5", b"sizes: 99999 99999 99999")
    else:
        return bytes(content).replace(b"DimSize = 3 4 5", b"DimSize = 99999 99999 99999")
    return bytes(content)


@pytest.mark.parametrize("name", ["scan.nii", "nifti2.nii", "raw.nrrd", "gzip.nrrd", "scan.mha"])
def test_a_header_of_terabytes_is_refused_before_memory_is_taken(tmp_path, name):
    (tmp_path / name).write_bytes(terabytes(name))
    with bounded(), pytest.raises(UserError, match="more than 4 GiB is more than one scan may hold"):
        read_scan(tmp_path / name, "MR")


def test_dicom_of_absurd_sizes_is_refused_before_memory_is_taken(tmp_path):
    pixels = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    absurd = image(pixels, Rows=65535, Columns=65535, NumberOfFrames=2_000_000_000)
    groups = [Dataset() for _ in range(3)]
    lying = image(pixels, NumberOfFrames=3_000_000, PerFrameFunctionalGroupsSequence=Items(groups))
    segments = image(pixels, SegmentationStorage, NumberOfFrames=3_000_000, SegmentSequence=Items([]))
    for number in range(3):
        item = Dataset()
        item.SegmentNumber, item.SegmentLabel = 65535 - number, "liver"
        segments.SegmentSequence.append(item)
    [first, second, third] = save([absurd, lying, segments], tmp_path)
    with bounded(), pytest.raises(UserError, match=r"promises .* bytes"):
        read_scan(first, "CT")
    with bounded(), pytest.raises(UserError, match="3000000 frames and describes 3"):
        read_scan(second, "CT")
    scan = Scan(VOXELS, (1.0, 1.0, 1.0), np.eye(4), "CT")
    with bounded(), pytest.raises(UserError, match="3000000 frames and describes 0"):
        read_mask(third, scan, {0: "background", 1: "liver"})


def test_an_image_of_absurd_size_is_refused(tmp_path):
    Image.fromarray(np.eye(5, dtype=np.uint8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">2I", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with bounded(), pytest.raises(UserError, match=r"damaged|too large"):
        read_scan(tmp_path / "a.png", "XR")


def test_a_tiff_that_lacks_rows_is_refused(tmp_path):
    content = FILES["scan.tif"]
    entry = struct.pack("<HH", 257, 4)  # ImageLength, a long
    at = content.index(entry) + 8
    (tmp_path / "a.tif").write_bytes(content[:at] + struct.pack("<I", 9_000_000) + content[at + 4 :])
    with bounded(), pytest.raises(UserError, match="fewer rows"):
        read_scan(tmp_path / "a.tif", "XR")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.mha", "a.tif"])
def test_values_that_are_no_numbers_are_refused(tmp_path, name, value):
    voxels = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    voxels[1, 2, 3] = value
    if name == "a.nii":
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / name)
    elif name == "a.nrrd":
        head = "NRRD0004\ntype: float\ndimension: 3\nsizes: 5 4 3\nencoding: raw\nendian: little\n\n"
        (tmp_path / name).write_bytes(head.encode() + voxels.tobytes())
    elif name == "a.mha":
        head = "NDims = 3\nDimSize = 5 4 3\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n"
        (tmp_path / name).write_bytes(head.encode() + voxels.tobytes())
    else:
        Image.fromarray(voxels[1]).save(tmp_path / name)
    with pytest.raises(UserError, match="not finite"):
        read_scan(tmp_path / name, "MR")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("suffix", ["", "_0000"])
@settings(max_examples=60, deadline=None)
@given(
    facts=st.dictionaries(st.sampled_from(["labels", "training", "modality", "channel_names"]), JSON) | JSON
)
def test_a_description_of_wrong_types_is_a_user_error(tmp_path_factory, suffix, facts):
    root = tmp_path_factory.mktemp("json", numbered=True)
    (root / "imagesTr").mkdir()
    (root / "imagesTr" / f"a{suffix}.nii").touch()
    (root / "dataset.json").write_text(json.dumps(facts))
    with suppress(UserError):
        find_sources(DataSource(root=root, public_names=True), "x")


def test_a_description_nested_without_end_is_a_user_error(tmp_path):
    (tmp_path / "dataset.json").write_text("[" * 100_000)
    with bounded(), pytest.raises(UserError, match=r"dataset\.json"):
        find_sources(DataSource(root=tmp_path), "x")


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.parquet"])
@EXAMPLES
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: ("image\n" + text).encode()))
def test_a_broken_table_is_a_user_error(tmp_path_factory, name, content):
    root = tmp_path_factory.mktemp("table", numbered=True)
    (root / name).write_bytes(content)
    with suppress(UserError):
        find_sources(DataSource(root=root / name, modality="MR"), "x")


def test_a_dicomdir_leads_nowhere_else(tmp_path):
    files = FileSet()
    for dataset in series(VOXELS):
        dataset.StudyDate, dataset.StudyTime, dataset.SeriesNumber, dataset.StudyID = "20200101", "12", 1, "1"
        files.add(dataset)
    files.write(tmp_path / "disc")
    directory = tmp_path / "disc" / "DICOMDIR"
    content = directory.read_bytes()
    leads = b"..\\..\\..\\etc\\hosts"
    at = content.index(b"CS", content.index(b"\x04\x00\x00\x15")) + 2
    length = int.from_bytes(content[at : at + 2], "little")
    directory.write_bytes(content[: at + 2] + leads[:length].ljust(length) + content[at + 2 + length :])
    found = find_sources(DataSource(root=tmp_path / "disc", public_names=True), "x")
    assert len(found.entries[0].files) == 3
    assert any("DICOMDIR" in reason for _, reason in found.rejected)
    assert all(path.is_relative_to(tmp_path / "disc") for path in found.entries[0].files)


SERIES, DICOM_MASKS = dicom_masks()
UNLIKELY = (
    {"US": 0, "IS": 0, "DS": 0.0, "FD": 0.0},
    {"US": 65535, "IS": 2147483647, "DS": -1e30, "FD": 1e300},
)
"""By the kind of an element, values that a file may hold and none should."""
READ = {
    *(*SEG_TAGS, *RTSTRUCT_TAGS, "PixelData", "SegmentNumber", "SegmentLabel", "ReferencedSegmentNumber"),
    *("PixelMeasuresSequence", "PixelSpacing", "PlaneOrientationSequence", "ImageOrientationPatient"),
    *("PlanePositionSequence", "ImagePositionPatient", "SegmentIdentificationSequence", "ROINumber"),
    *("ROIName", "ReferencedROINumber", "ContourSequence", "ContourGeometricType", "ContourData"),
}
"""Elements of masks that readers look at."""


@pytest.fixture(scope="module")
def masked_scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    folder = tmp_path_factory.mktemp("masked")
    return read_scan(folder, "CT", files=save(SERIES, folder))


def read_mask_or_refuse(path: Path, scan: Scan) -> bool:
    """Whether the file is still a mask; anything but label ids and a `UserError` that names it fails."""
    refused = ""
    try:
        mask = read_mask(path, scan, LABELS, MaskRules(threshold=0.5))
        assert mask.shape == scan.voxels.shape
        assert set(np.unique(mask)) <= set(LABELS)
    except UserError as error:
        refused = str(error)
    assert not refused or str(path) in refused
    return not refused


@pytest.mark.parametrize("name", DICOM_MASKS)
@EXAMPLES
@given(mutations=MUTATIONS)
def test_a_broken_dicom_mask_is_label_ids_or_a_user_error(tmp_path_factory, masked_scan, name, mutations):
    path = tmp_path_factory.mktemp("broken", numbered=True) / name
    path.write_bytes(mutated(DICOM_MASKS[name], mutations))
    read_mask_or_refuse(path, masked_scan)


def elements_of(dataset: Dataset) -> Iterator[tuple[Dataset, BaseTag]]:
    """Every element that is read, with the data set that it is in, at any depth."""
    for element in [element for element in dataset if element.keyword in READ]:
        yield dataset, element.tag
        for item in element.value if element.VR == "SQ" else ():
            yield from elements_of(item)


@pytest.mark.parametrize("name", DICOM_MASKS)
def test_a_dicom_mask_without_any_one_of_its_elements_is_read_or_refused(tmp_path, masked_scan, name):
    """Each element in turn is left out, and each that is a number is one that no file should have."""
    path = tmp_path / "mask"
    path.write_bytes(DICOM_MASKS[name])
    assert read_mask_or_refuse(path, masked_scan)
    kept = []
    for number in range(len([*elements_of(pydicom.dcmread(path))])):
        for values in ({}, *UNLIKELY):
            dataset = pydicom.dcmread(io.BytesIO(DICOM_MASKS[name]))
            parent, tag = [*elements_of(dataset)][number]
            element = parent[tag]
            if not values:
                del parent[tag]
            elif element.VR in values:
                element.value = [values[element.VR]] * max(1, element.VM)
            else:
                continue
            dataset.save_as(path)
            kept.append(read_mask_or_refuse(path, masked_scan))
    assert 0 < sum(kept) < len(kept)


@EXAMPLES
@given(mutations=MUTATIONS)
def test_a_broken_dicom_tree_is_listed_or_a_user_error(tmp_path_factory, mutations):
    root = tmp_path_factory.mktemp("tree", numbered=True)
    for name in ("slice.dcm", "frames.dcm", "structures.dcm"):
        (root / name).write_bytes(mutated(FILES[name], mutations))
    with suppress(UserError):
        find_sources(DataSource(root=root, labels={1: "liver"}, public_names=True), "x")


@EXAMPLES
@given(content=st.binary(max_size=300))
def test_a_broken_index_is_a_value_error(content):
    with pytest.raises((ValueError, OSError)):
        SliceIndex(content)
