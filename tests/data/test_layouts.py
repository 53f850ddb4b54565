"""The layouts of public data sets are recognised, and their masks and patients found."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicom_support import image, save, series, structures
from pydicom.fileset import FileSet
from pydicom.uid import BasicTextSRStorage

from samssl.config import UserError
from samssl.data.sources import DataSource, Found, find_sources

VOXELS = np.random.default_rng(0).integers(0, 2000, (3, 4, 5), dtype=np.int16)


def touch(root: Path, *names: str) -> None:
    """Empty files: layouts look at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def find(root: Path, **settings) -> Found:
    return find_sources(DataSource(root=root, public_names=True, **settings), "x")


def facts(found: Found) -> dict[str, tuple[str, str]]:
    return {entry.case: (entry.patient, entry.mask_source) for entry in found.entries}


@pytest.fixture
def nnunet(tmp_path):
    touch(tmp_path, *[f"imagesTr/liver_{case}_000{channel}.nii.gz" for case in "12" for channel in "01"])
    touch(tmp_path, "labelsTr/liver_1.nii.gz", "labelsTr/liver_2.nii.gz", "imagesTs/liver_3_0001.nii.gz")

    def write(**content):
        names = {"channel_names": {"0": "T1", "1": "CT"}, "labels": {"background": 0, "liver": 1}}
        (tmp_path / "dataset.json").write_text(json.dumps(names | content))
        return tmp_path

    return write


def test_nnunet_of_both_versions(nnunet):
    version_1 = {
        "channel_names": None,
        "modality": {"0": "T1", "1": "CT"},
        "labels": {"0": "background", "1": "liver"},
    }
    for content in ({}, {name: value for name, value in version_1.items() if value}):
        found = find(nnunet(**content), volume=1)
        assert (found.layout, found.modality, found.labels) == ("nnunet", "CT", {0: "background", 1: "liver"})
        assert facts(found) == {
            "liver_1": ("liver_1", "labelsTr/liver_1.nii.gz"),
            "liver_2": ("liver_2", "labelsTr/liver_2.nii.gz"),
            "liver_3": ("liver_3", ""),
        }
        assert {entry.image.name for entry in found.entries} == {
            f"liver_{case}_0001.nii.gz" for case in "123"
        }


def test_nnunets_ignore_label_is_one_by_name(nnunet):
    labels = {"background": 0, "liver": 1, "ignore": 2}
    assert find(nnunet(labels=labels), volume=0).labels == {id_: name for name, id_ in labels.items()}


@pytest.mark.parametrize(
    ("content", "settings", "sentence"),
    [
        ({}, {}, r"2 channels\. Set data\.volume to one: 0 \(T1\), 1 \(CT\)"),
        ({}, {"volume": 2}, r"only the channels \[0, 1\]"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, {"volume": 0}, "regions of several ids"),
        ({"labels": [1]}, {"volume": 0}, "labels has to be"),
        ({"channel_names": ["CT"]}, {"volume": 0}, "channel_names has to be"),
    ],
)
def test_what_nnunet_has_and_we_have_not_is_refused(nnunet, content, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        find(nnunet(**content), **settings)


def test_bids_masks_belong_to_the_scan_whose_entities_fit(tmp_path):
    touch(tmp_path, "dataset_description.json")
    touch(tmp_path, "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz")
    touch(tmp_path, *[f"sub-02/anat/sub-02_acq-{kind}_T1w.nii.gz" for kind in ("fast", "slow")])
    touch(tmp_path, "sub-02/func/sub-02_bold.nii.gz", "sub-03/anat/sub-03_T1w.nii.gz")
    touch(tmp_path, "derivatives/manual/sub-01/ses-b/anat/sub-01_ses-b_space-orig_dseg.nii.gz")
    touch(tmp_path, "derivatives/manual/sub-02/anat/sub-02_acq-slow_label-lesion_mask.nii.gz")
    touch(tmp_path, "derivatives/manual/sub-02/anat/sub-02_desc-both_dseg.nii.gz")
    touch(tmp_path, "derivatives/manual/sub-09/anat/sub-09_dseg.nii.gz")
    found = find(tmp_path, labels={1: "lesion"})
    assert (found.layout, found.modality) == ("bids", "MR")
    manual = "derivatives/manual"
    assert facts(found) == {
        "sub-01_ses-a_T1w": ("sub-01", ""),
        "sub-01_ses-b_T1w": ("sub-01", f"{manual}/sub-01/ses-b/anat/sub-01_ses-b_space-orig_dseg.nii.gz"),
        "sub-02_acq-fast_T1w": ("sub-02", ""),
        "sub-02_acq-slow_T1w": ("sub-02", f"{manual}/sub-02/anat/sub-02_acq-slow_label-lesion_mask.nii.gz"),
        "sub-03_T1w": ("sub-03", ""),
    }
    reasons = {Path(source).name: reason for source, reason in found.rejected}
    assert "Fits 2 scans" in reasons["sub-02_desc-both_dseg.nii.gz"]
    assert "no image" in reasons["sub-09_dseg.nii.gz"]
    assert set(facts(find(tmp_path, labels={1: "lesion"}, images="*acq-slow_T1w*"))) == {
        "sub-02_acq-slow_T1w"
    }


def test_acdc_frames_with_masks_and_patients(tmp_path):
    patient = "training/patient007"
    touch(tmp_path, f"{patient}/patient007_4d.nii.gz", f"{patient}/Info.cfg")
    for frame in ("01", "12"):
        touch(tmp_path, *[f"{patient}/patient007_frame{frame}{end}.nii.gz" for end in ("", "_gt")])
    touch(tmp_path, "training/patient008/patient008_frame03_gt.nii.gz")
    found = find(tmp_path)
    assert (found.layout, found.modality, found.labels[3]) == ("acdc", "MR", "left ventricle")
    assert facts(found) == {
        f"patient007_frame{frame}": ("patient007", f"{patient}/patient007_frame{frame}_gt.nii.gz")
        for frame in ("01", "12")
    }
    assert [Path(source).name for source, _ in found.rejected] == [
        "patient008_frame03_gt.nii.gz",
        "patient007_4d.nii.gz",
    ]


def test_busi_lesions_of_one_image_are_one_mask(tmp_path):
    touch(tmp_path, "benign/benign (1).png", "benign/benign (1)_mask.png", "normal/normal (1).png")
    touch(tmp_path, *[f"malignant/malignant (1){end}.png" for end in ("", "_mask", "_mask_1", "_mask_2")])
    found = find(tmp_path)
    assert (found.layout, found.modality, found.labels) == ("busi", "US", {0: "background", 1: "lesion"})
    masks = {entry.case: [path.name for path in entry.mask_files] for entry in found.entries}
    assert masks["malignant-1"] == [f"malignant (1)_mask{end}.png" for end in ("", "_1", "_2")]
    assert (masks["benign-1"], masks["normal-1"]) == (["benign (1)_mask.png"], [])
    assert any("burnt into" in note for note in found.notes)


def test_masks_may_be_called_so(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png", "labels/a_mask.png", "labels/b.png")
    found = find(tmp_path, modality="XR", labels={1: "lung"})
    assert {case: mask for case, (_, mask) in facts(found).items()} == {
        "a": "labels/a_mask.png",
        "b": "labels/b.png",
    }


def test_tables_override_every_layout(tmp_path):
    touch(tmp_path, "benign/a_mask.png", "malignant/b_mask.png", "benign/a.png")
    pairs = {"image": ["benign/a.png"], "mask": ["benign/a_mask.png"], "patient": [7]}
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    (tmp_path / "bare.csv").write_text("benign/a.png,benign/a_mask.png,7\n")
    for table in ("pairs.parquet", "bare.csv"):
        found = find(tmp_path, csv=table, modality="US", labels={1: "lesion"})
        assert found.layout == "csv"
        assert facts(found) == {"a": ("7", "benign/a_mask.png")}


def test_paths_that_lead_out_are_refused_unless_that_is_meant(tmp_path):
    touch(tmp_path, "set/a.png", "other/b.png", "other/sub/c.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "other" / "b.png")
    (tmp_path / "set" / "folder").symlink_to(tmp_path / "other" / "sub")
    (tmp_path / "set" / "pairs.csv").write_text(f"image\na.png\n../other/b.png\n{tmp_path}/other/sub/c.png\n")
    for settings in ({}, {"csv": "pairs.csv"}):
        found = find(tmp_path / "set", modality="US", **settings)
        assert set(facts(found)) == {"a"}
        assert all("Leads out of data.root" in reason for _, reason in found.rejected)
        outside = find(tmp_path / "set", modality="US", outside=True, **settings)
        assert set(facts(outside)) == {"a", "c"} | ({"b"} if settings else {"link"})


def test_decathlon_entries_do_not_lead_out(decathlon):
    content = json.loads((decathlon / "dataset.json").read_text())
    content["training"] = [{"image": "../../x.nii.gz", "label": "./labelsTr/liver_1.nii.gz"}]
    (decathlon / "dataset.json").write_text(json.dumps(content))
    found = find(decathlon)
    assert not any("x.nii.gz" in entry.source for entry in found.entries)
    assert "Leads out" in found.rejected[0][1]


@pytest.fixture
def tree(tmp_path):
    """Two series of one patient in one folder, one of another elsewhere, a projection, masks and a report."""
    first, second, other = series(VOXELS), series(VOXELS + 1), series(VOXELS, PatientID="id-2", Modality="MR")
    save([*first, *second], tmp_path / "a" / "b", [f"x{number}" for number in range(6)])
    save(other, tmp_path / "c")
    save([image(VOXELS[0].astype(np.uint16), Modality="DX", PatientID="id-3")], tmp_path / "d", ["view.dcm"])
    corner = np.array(first[0].ImagePositionPatient)
    outline = corner + np.array([[0.5, 1, 0], [3.5, 1, 0], [3.5, 5, 0], [0.5, 5, 0]])
    save([structures(second[0], {"liver": [outline]})], tmp_path / "masks", ["rt"])
    save(
        [structures(image(VOXELS[0].view(np.uint16)), {"liver": [outline]})], tmp_path / "masks", ["of_none"]
    )
    report = image(VOXELS[0].view(np.uint16), BasicTextSRStorage, Modality="SR")
    for name in ("Rows", "PixelData"):
        delattr(report, name)
    save([report], tmp_path, ["report"])
    (tmp_path / "readme.txt").write_text("not DICOM")
    return tmp_path, first, second


def test_a_dicom_tree_is_told_apart_by_series(tree):
    root, first, second = tree
    found = find(root, labels={1: "liver"})
    assert found.layout == "dicom"
    kinds = {entry.case: (entry.patient, entry.modality, len(entry.image_files)) for entry in found.entries}
    names = sorted([first[0].SeriesInstanceUID, second[0].SeriesInstanceUID])
    masked = f"a-b-{names.index(second[0].SeriesInstanceUID) + 1}"
    assert kinds == {
        "a-b-1": ("id-1", "CT", 3),
        "a-b-2": ("id-1", "CT", 3),
        "c": ("id-2", "MR", 3),
        "view": ("id-3", "XR", 1),
    }
    assert {entry.case: entry.mask_source for entry in found.entries if entry.mask} == {masked: "masks/rt"}
    reasons = dict(found.rejected)
    assert reasons == {"report": "Holds no image.", "masks/of_none": reasons["masks/of_none"]}
    assert "0 scans are here" in reasons["masks/of_none"]
    only = find(root, labels={1: "liver"}, modality="MR")
    assert [entry.case for entry in only.entries] == ["c"]
    assert ("d/view.dcm", "Is XR, and data.modality asks for MR.") in only.rejected


def test_copies_of_a_series_in_two_folders_are_two_scans(tmp_path):
    datasets = series(VOXELS)
    save(datasets, tmp_path / "one")
    save(datasets, tmp_path / "two")
    assert {entry.case: len(entry.files) for entry in find(tmp_path).entries} == {"one": 3, "two": 3}


def test_series_without_uids_are_told_apart_by_folders(tmp_path):
    for folder in ("one", "two"):
        blanked = series(VOXELS, PatientID="", StudyInstanceUID="", SeriesInstanceUID="")
        save(blanked, tmp_path / folder)
    assert facts(find(tmp_path)) == {"one": ("one", ""), "two": ("two", "")}


def test_what_a_dicomdir_lists_is_looked_for(tmp_path):
    files = FileSet()
    for dataset in series(VOXELS):
        dataset.StudyDate, dataset.StudyTime, dataset.SeriesNumber = "20200101", "120000", 1
        dataset.StudyID = "1"
        files.add(dataset)
    files.write(tmp_path / "disc")
    found = find(tmp_path / "disc")
    assert len(found.entries[0].files) == 3
    assert found.rejected == []
    found.entries[0].files[1].unlink()
    [(source, reason)] = find(tmp_path / "disc").rejected
    assert source.endswith(found.entries[0].files[1].name)
    assert "listed in a DICOMDIR" in reason


def test_a_csv_may_name_the_folder_of_a_series(tmp_path):
    save(series(VOXELS), tmp_path / "one")
    save([*series(VOXELS), *series(VOXELS)], tmp_path / "both")
    (tmp_path / "pairs.csv").write_text("image,patient\none,p\n")
    [entry] = find(tmp_path, csv="pairs.csv", modality="CT").entries
    assert (entry.patient, len(entry.files)) == ("p", 3)
    (tmp_path / "pairs.csv").write_text("image,patient\nboth,p\n")
    with pytest.raises(UserError, match="folder of 2 DICOM series"):
        find(tmp_path, csv="pairs.csv", modality="CT")
