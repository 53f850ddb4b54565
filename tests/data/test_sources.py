import json

import numpy as np
import pytest
from PIL import Image

from samssl.config import ConfigError, UserError, load_config
from samssl.data.readers.masks import united
from samssl.data.scans import read_mask, read_scan
from samssl.data.sources import DataSource, find_sources


def _touch_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.eye(3, dtype=np.uint8)).save(root / name)


def _facts(found):
    return {entry.source: (entry.case, entry.patient, entry.mask_source) for entry in found.entries}


def test_decathlon_gives_labels_modality_and_unlabelled_scans(decathlon):
    (decathlon / "imagesTr" / "._liver_1.nii.gz").write_bytes(b"shadow")
    found = find_sources(DataSource(root=decathlon, public_names=True), "tiny")
    assert found.modality == "CT"
    assert found.labels == {0: "background", 1: "liver", 2: "tumour"}
    assert len(found.entries) == 7
    assert _facts(found)["imagesTr/liver_3.nii.gz"] == ("liver_3", "liver_3", "labelsTr/liver_3.nii.gz")
    assert _facts(found)["imagesTs/liver_7.nii.gz"] == ("liver_7", "liver_7", "")


def test_scan_listed_but_missing_is_kept_to_be_reported(decathlon):
    facts = json.loads((decathlon / "dataset.json").read_text())
    listed = {"image": "./imagesTr/liver_99.nii.gz", "label": "./labelsTr/liver_99.nii.gz"}
    (decathlon / "dataset.json").write_text(json.dumps({**facts, "training": [listed]}))
    found = find_sources(DataSource(root=decathlon, public_names=True), "tiny")
    assert "imagesTr/liver_99.nii.gz" in _facts(found)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"labels": ["a"]}', '{"training": [{"image": "a"}]}', '{"labels": {"x": "y"}}']
)
def test_broken_dataset_json_is_named(decathlon, content):
    (decathlon / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        find_sources(DataSource(root=decathlon), "tiny")


def test_folders_match_by_stem_and_report_orphan_masks(tmp_path):
    _touch_images(tmp_path, "images/a.jpg", "images/sub/b.png", "images/c.png")
    _touch_images(tmp_path, "masks/a.png", "masks/sub/b.png", "masks/d.png")
    found = find_sources(DataSource(root=tmp_path, modality="XR", labels={1: "lung"}, public_names=True), "x")
    assert {name: facts[2] for name, facts in _facts(found).items()} == {
        "images/a.jpg": "masks/a.png",
        "images/sub/b.png": "masks/sub/b.png",
        "images/c.png": "",
    }
    assert found.rejected == [("masks/d.png", "There is no image of this mask's name.")]


def test_any_folder_of_images_is_unlabelled(tmp_path):
    _touch_images(tmp_path, "x/a.png", "y/b.png")
    found = find_sources(DataSource(root=tmp_path, modality="US"), "us")
    assert [entry.mask for entry in found.entries] == [None, None]
    assert found.labels == {0: "background"}


@pytest.mark.parametrize("point_at", ["file", "folder"])
def test_csv_names_images_masks_and_patients(tmp_path, point_at):
    _touch_images(tmp_path, "a.png", "b.png", "a_mask.png")
    (tmp_path / "list.csv").write_text("\ufeffimage,mask,patient\na.png,a_mask.png,007\nb.png,,007\n")
    root = {"root": tmp_path / "list.csv"} if point_at == "file" else {"root": tmp_path, "csv": "list.csv"}
    found = find_sources(DataSource(**root, modality="US", labels={1: "lesion"}, public_names=True), "us")
    assert _facts(found) == {"a.png": ("a", "007", "a_mask.png"), "b.png": ("b", "007", "")}


def test_subgroups_of_a_csv_are_kept_and_names_are_not_taken_for_them(tmp_path):
    _touch_images(tmp_path, *(f"{name}.png" for name in "abcd"))
    rows = ["image,site,doctor", "a.png,A,w", "b.png,A,x", "c.png,,y", "d.png,,z"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    source = {"root": tmp_path / "list.csv", "modality": "US", "public_names": True}
    found = find_sources(DataSource(**source, subgroups=("site",)), "us")
    assert [entry.subgroups for entry in found.entries] == [
        {"site": site} for site in ("A", "A", "unknown", "unknown")
    ]
    with pytest.raises(UserError, match="'doctor' has 4 different values in 4 rows"):
        find_sources(DataSource(**source, subgroups=("doctor",)), "us")
    with pytest.raises(UserError, match="no column 'sex'"):
        find_sources(DataSource(**source, subgroups=("sex",)), "us")
    with pytest.raises(UserError, match=r"layout of .* is folders"):
        find_sources(DataSource(root=tmp_path, modality="US", subgroups=("site",)), "us")
    with pytest.raises(ValueError, match="'patient' says whose"):
        DataSource(root=tmp_path, subgroups=("patient",))


def test_csv_without_image_column_says_what_it_has(tmp_path):
    (tmp_path / "list.csv").write_text("file,mask\na.png,b.png\n")
    with pytest.raises(UserError, match=r"no column 'image'.*\['file', 'mask'\]"):
        find_sources(DataSource(root=tmp_path / "list.csv", modality="US"), "us")


def test_names_are_pseudonymous_unless_public(decathlon):
    private = find_sources(DataSource(root=decathlon), "tiny").entries
    assert all("liver" not in entry.case + entry.patient for entry in private)
    assert all(entry.case.startswith("tiny-") for entry in private)
    assert len({entry.case for entry in private} | {entry.patient for entry in private}) == 14
    elsewhere = decathlon.rename(decathlon.with_name("moved"))
    moved = find_sources(DataSource(root=elsewhere), "tiny").entries
    assert [(entry.case, entry.patient) for entry in moved] == [
        (entry.case, entry.patient) for entry in private
    ]


def test_consecutive_numbers_are_one_person(decathlon):
    found = find_sources(DataSource(root=decathlon, cases_per_patient=2, public_names=True), "tiny")
    patients = [_facts(found)[f"imagesTr/liver_{number}.nii.gz"][1] for number in range(1, 7)]
    assert patients[0] == patients[1]
    assert patients[2] == patients[3]
    assert patients[4] == patients[5]
    assert len(set(patients)) == 3


def test_patient_pattern_takes_the_first_group_and_names_misfits(tmp_path):
    _touch_images(tmp_path, "p1_a.png", "p1_b.png", "p2_a.png")
    source = {"root": tmp_path, "modality": "US", "public_names": True}
    found = find_sources(DataSource(**source, patient_pattern=r"^(p\d)_"), "us")
    assert [entry.patient for entry in found.entries] == ["p1", "p1", "p2"]
    with pytest.raises(UserError, match=r"finds no patient in 'p1_a\.png'"):
        find_sources(DataSource(**source, patient_pattern=r"^(q\d)_"), "us")


def test_equal_case_ids_are_refused(tmp_path):
    _touch_images(tmp_path, "x/a.png", "y/a.png")
    with pytest.raises(UserError, match=r"case id 'a': x/a.png, y/a.png.*public_names=false"):
        find_sources(DataSource(root=tmp_path, modality="US", public_names=True), "us")
    assert len(find_sources(DataSource(root=tmp_path, modality="US"), "us").entries) == 2


def test_what_nothing_says_is_asked_for(tmp_path):
    _touch_images(tmp_path, "images/a.png", "masks/a.png")
    with pytest.raises(UserError, match=r"set data\.labels"):
        find_sources(DataSource(root=tmp_path, modality="US"), "us")
    with pytest.raises(UserError, match=r"set data\.modality"):
        find_sources(DataSource(root=tmp_path, labels={1: "lesion"}), "us")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no scans"):
        find_sources(DataSource(root=tmp_path / "none", modality="US"), "us")
    with pytest.raises(UserError, match=r"data\.root: there is no"):
        find_sources(DataSource(root=tmp_path / "nowhere", modality="US"), "us")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"window_hu": [100, 0]}, "lower end"),
        ({"patient_pattern": "p"}, "group"),
        ({"patient_pattern": "("}, "not a regular expression"),
        ({"patient_pattern": "(p)", "cases_per_patient": 2}, "not both"),
        ({"labels": {"-1": "a"}}, "65535"),
        ({"patients": "x"}, "patients"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(DataSource, None, {"root": ".", **settings})


def test_masks_of_one_scan_are_united_unless_they_clash(tmp_path):
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    for folder in ("benign", "malignant"):
        (tmp_path / folder).mkdir()
        Image.fromarray(image).save(tmp_path / folder / "x (1).png")
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(tmp_path / "benign" / "x (1)_mask.png")
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(tmp_path / "malignant" / "x (1)_mask.png")
    Image.fromarray(np.eye(4, dtype=np.uint8)[::-1] * 255).save(tmp_path / "malignant" / "x (1)_mask_1.png")
    found = find_sources(DataSource(root=tmp_path), "busi")
    masks = []
    for entry in found.entries:
        scan = read_scan(entry.image, found.modality)
        masks.append([read_mask(path, scan, found.labels) for path in entry.mask_files])
    whole = united(masks[1], list(found.entries[1].mask_files))
    np.testing.assert_array_equal(whole[0], np.eye(4) + np.eye(4)[::-1])
    with pytest.raises(UserError, match="another label on 4 voxels"):
        united([masks[0][0], masks[0][0] * 2], [tmp_path / "a", tmp_path / "b"])
