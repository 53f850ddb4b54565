"""Masks of DICOM images as DICOM SEG: the same voxels as in NIfTI, on the images they were drawn on."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_support import enhanced, save, series

from samssl.config import UserError
from samssl.data.classes import Classes, run_classes
from samssl.data.scans import read_grid, read_mask, scan_of
from samssl.data.seg_output import write_seg

LABELS = {0: "background", 3: "Liver", 7: "tumour of it"}
CLASSES = run_classes(LABELS)
ORIENTATIONS = {
    "axial": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "rows flipped": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "columns flipped": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "oblique": (0.8, 0.6, 0.0, 0.0, 0.0, -1.0),
    "doubly oblique": (0.936293, 0.312098, -0.161127, -0.289629, 0.945702, 0.147487),
}
SECRETS: dict[str, Any] = {
    "ReferringPhysicianName": "House^Gregory",
    "InstitutionName": "Planted Hospital",
    "StationName": "PLANTEDSTATION",
    "DeviceSerialNumber": "PLANTEDSERIAL",
    "Manufacturer": "PLANTEDMAKER",
    "StudyDescription": "planted study",
    "SeriesDescription": "planted series",
    "ImageComments": "planted comment",
    "PatientComments": "planted remark",
    "OtherPatientIDs": "PLANTEDOTHER",
    "PatientAddress": "planted street",
    "OperatorsName": "Planted^Operator",
}


def voxels(shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(np.int16)


def drawn(shape: tuple[int, ...]) -> np.ndarray:
    """Both labels, in the order of the file's own voxels, and a slice without any."""
    mask = np.random.default_rng(1).choice([0, 3, 7], shape, p=[0.5, 0.3, 0.2]).astype(np.uint8)
    mask[:, :, 1] = 0
    return mask


def read_back(path: Path, files: list[Path], volume: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What our readers find in a SEG and in the same mask as NIfTI, on their scan."""
    grid = read_grid(files[0], files=files, volume=volume)
    mask = drawn(grid.array.shape)
    write_seg(path, mask, CLASSES, files, volume=volume)
    nib.save(nib.Nifti1Image(mask, grid.affine), path.with_suffix(".nii.gz"))
    scan = scan_of(grid, "CT", files[0])
    found, expected = (read_mask(each, scan, LABELS) for each in (path, path.with_suffix(".nii.gz")))
    assert set(np.unique(expected)) == {0, 3, 7}
    return found, expected


@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_a_seg_holds_the_voxels_of_the_nifti(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    datasets = series(voxels(), orientation)
    files = save(datasets, tmp_path / "scan", ["c", "a", "d", "b"])
    found, expected = read_back(tmp_path / "seg.dcm", sorted(files))
    np.testing.assert_array_equal(found, expected)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    of_place = {tuple(map(float, each.ImagePositionPatient)): each.SOPInstanceUID for each in datasets}
    assert len(seg.PerFrameFunctionalGroupsSequence) == 6  # two segments in three slices
    for group in seg.PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        place = tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        assert source.ReferencedSOPInstanceUID == of_place[place]
    (referred,) = seg.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == datasets[0].SeriesInstanceUID
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["Liver", "tumour of it"]


def test_frames_of_a_file_are_referred_to_in_its_own_order(tmp_path: Path) -> None:
    order = (2, 0, 3, 1)
    file = enhanced(series(voxels()), order)
    files = save([file], tmp_path / "scan")
    found, expected = read_back(tmp_path / "seg.dcm", files)
    np.testing.assert_array_equal(found, expected)
    for group in pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        number = int(np.atleast_1d(source.ReferencedFrameNumber)[0])
        own = file.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0]
        assert group.PlanePositionSequence[0].ImagePositionPatient == own.ImagePositionPatient


def test_of_several_volumes_the_images_of_the_chosen_one_are_referred_to(tmp_path: Path) -> None:
    first, second = series(voxels()), series(voxels() + 1)
    for dataset, other in zip(first, second, strict=True):
        dataset.TemporalPositionIdentifier, other.TemporalPositionIdentifier = 1, 2
        other.SeriesInstanceUID, other.StudyInstanceUID = dataset.SeriesInstanceUID, dataset.StudyInstanceUID
    files = save([*first, *second], tmp_path / "scan")
    found, expected = read_back(tmp_path / "seg.dcm", files, volume=1)
    np.testing.assert_array_equal(found, expected)
    referred: Any = (
        pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence[0].ReferencedInstanceSequence
    )
    assert {item.ReferencedSOPInstanceUID for item in referred} <= {each.SOPInstanceUID for each in second}


def test_regions_that_share_voxels_are_segments_that_overlap(tmp_path: Path) -> None:
    classes: Classes = run_classes({0: "no", 1: "a", 2: "b"}, {"whole": ["a", "b"], "core": ["b"]}, True)
    files = save(series(voxels()), tmp_path / "scan")
    grid = read_grid(files[0], files=files)
    mask = np.zeros((2, *grid.array.shape), bool)
    mask[0, 1:5, 1:4, 1:], mask[1, 2:4, 2:3, 2:] = True, True
    write_seg(tmp_path / "seg.dcm", mask, classes, files, drawn="SEMIAUTOMATIC")
    scan = scan_of(grid, "CT", files[0])
    for region, name in zip(mask, ("whole", "core"), strict=True):
        found = read_mask(tmp_path / "seg.dcm", scan, {0: "background", 1: name})
        nib.save(nib.Nifti1Image(region.astype(np.uint8), grid.affine), tmp_path / "one.nii.gz")
        np.testing.assert_array_equal(found, read_mask(tmp_path / "one.nii.gz", scan, {0: "no", 1: name}))
    first = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence[0]
    assert first.SegmentAlgorithmType == "SEMIAUTOMATIC"


def test_it_says_whose_it_is_and_nothing_more(tmp_path: Path) -> None:
    files = save(series(voxels(), PatientSex="F", StudyID="S1", **SECRETS), tmp_path / "scan")
    shape = read_grid(files[0], files=files).array.shape
    write_seg(tmp_path / "seg.dcm", drawn(shape), CLASSES, files)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (seg.PatientID, str(seg.PatientName), seg.PatientSex, seg.StudyID) == (
        "id-1",
        "Doe^Jane",
        "F",
        "S1",
    )
    assert seg.StudyInstanceUID == pydicom.dcmread(files[0]).StudyInstanceUID
    content = (tmp_path / "seg.dcm").read_bytes().lower()
    for name, secret in SECRETS.items():
        assert secret.lower().encode() not in content, name
    assert str(tmp_path).encode() not in content


def test_an_empty_mask_and_a_blanked_patient_are_no_problem(tmp_path: Path) -> None:
    datasets = series(voxels())
    for dataset in datasets:
        for name in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "AccessionNumber"):
            delattr(dataset, name)
    files = save(datasets, tmp_path / "scan")
    grid = read_grid(files[0], files=files)
    write_seg(tmp_path / "seg.dcm", np.zeros(grid.array.shape, np.uint8), CLASSES, files)
    assert not read_mask(tmp_path / "seg.dcm", scan_of(grid, "CT", files[0]), LABELS).any()


def test_images_of_which_no_seg_can_be_made_are_refused(tmp_path: Path) -> None:
    def refused(sentence: str, classes: Classes = CLASSES, **elements: Any) -> None:
        datasets = series(voxels(), **elements)
        for dataset in datasets:
            for name in [name for name, value in elements.items() if value is None]:
                delattr(dataset, name)
        files = save(datasets, tmp_path / "scan")
        mask = np.zeros(read_grid(files[0], files=files).array.shape, np.uint8)
        with pytest.raises(UserError, match=rf"{sentence}.*format=nifti") as caught:
            write_seg(tmp_path / "seg.dcm", mask, classes, files)
        assert "Doe" not in str(caught.value)
        assert not (tmp_path / "seg.dcm").exists()

    refused("does not say where in the patient", FrameOfReferenceUID=None)
    refused("lacks what a DICOM SEG must repeat", StudyInstanceUID=None)
    refused("at most 64 characters", run_classes({0: "background", 1: "x" * 65}))
