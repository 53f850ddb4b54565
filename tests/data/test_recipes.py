"""Every recipe against a small tree in the official layout of its data set."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from official_trees import TREES, Tree
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from samssl.config import UserError, build_config
from samssl.data.entries import Entry
from samssl.data.masks import read_labels
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.recipe import read_recipe, recipe_names, recipe_tree
from samssl.data.scans import read_scan
from samssl.data.slices import SliceStore
from samssl.data.sources import DataSource, Found, find_sources
from samssl.data.splits import SplitConfig


class Case(NamedTuple):
    image: str
    patient: str
    split: str
    masks: tuple[str, ...]


def cases_of(tree: Tree) -> list[Case]:
    lines = [line.strip() for line in tree.text.splitlines() if "|" in line]
    parts = [[part.strip() for part in line.split("|")] for line in lines]
    return [
        Case(image, patient, split, tuple(mask.strip() for mask in masks.split("+") if mask.strip()))
        for image, patient, split, masks in parts
    ]


def write_image(path: Path, values: tuple[int, ...], row: int | None = None) -> None:
    """A volume or image of these values, or of zeros but for one row; other kinds of file stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    array = np.resize(np.array(values, np.int16), (16, 16) if kind in (".png", ".jpg") else (4, 5, 3))
    if row is not None:
        array[[other for other in range(len(array)) if other != row]] = 0
    if kind in (".nii", ".nii.gz"):
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    elif kind in (".png", ".jpg"):
        Image.fromarray(array.astype(np.uint8)).save(path)
    elif kind in (".nrrd", ".mhd"):
        sitk.WriteImage(sitk.GetImageFromArray(array), path)
    elif kind == ".dcm":
        write_dicom(path, array[..., 0].astype(np.uint16))
    else:
        path.touch()


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    """A series of one slice."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
    dataset.Modality = "MR"
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [1, 1], 1
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def build(root: Path, name: str) -> Tree:
    tree = TREES[name]
    for case in cases_of(tree):
        file = f"{case.image}1-01.dcm" if case.image.endswith("/") else case.image
        write_image(root / file, (3, 90, 7, 200))
        for row, mask in enumerate(case.masks):
            write_image(root / mask, tree.values, row if len(case.masks) > 1 else None)
    for line in map(str.strip, tree.text.splitlines()):
        if line.startswith("- "):
            write_image(root / line[2:], (5, 6))
        if line.startswith("= "):
            file, rows = line[2:].split(" = ")
            (root / file).write_text("\n".join(rows.split("/")))
    if read_recipe(name).layout == "msd":
        facts = {"labels": {str(label): f"label {label}" for label in tree.ids}, "modality": {"0": "MRI"}}
        (root / "dataset.json").write_text(json.dumps(facts))
    return tree


def settings(root: Path, name: str, **data: object) -> PrepareConfig:
    tree = {"name": "set", "out": str(root.parent / "store")}
    data = {"root": str(root), "recipe": name, "public_names": True, **data}
    return build_config(PrepareConfig, {**tree, "data": data, "workers": 1}, "the test")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_reads_the_official_layout(tmp_path: Path, name: str) -> None:
    root = tmp_path / "set"
    tree = build(root, name)
    config = settings(root, name, **({"variant": tree.variant} if tree.variant else {}))
    found = find_sources(config.data, "set")
    assert sorted(
        Case(
            entry.source.partition("::")[0],
            entry.patient,
            entry.split,
            tuple(sorted(path.relative_to(root).as_posix() for path in entry.mask_files)),
        )
        for entry in found.entries
    ) == sorted(
        case._replace(image=case.image.rstrip("/"), masks=tuple(sorted(case.masks)))
        for case in cases_of(tree)
    )
    # The one slice of a DICOM series here is not the grid of its mask.
    masked = [entry for entry in found.entries if entry.mask and not entry.files]
    masks = [ids_of(entry, found, config.data) for entry in masked]
    assert all(ids <= set(tree.ids) for ids in masks)
    assert not masks or masks[0] == set(tree.ids)


def ids_of(entry: Entry, found: Found, source: DataSource) -> set[int]:
    scan = read_scan(entry.image, found.modality, files=entry.files)
    mask = read_labels(
        entry.mask_files,
        scan,
        found.labels,
        source.mask_rules(),
        values=source.mask_values,
        part_labels=entry.part_labels,
    )
    assert mask is not None
    return set(np.unique(mask).tolist())


def test_every_recipe_has_a_tree_and_there_are_many() -> None:
    assert set(TREES) == set(recipe_names())
    modalities = {read_recipe(name).modality for name in recipe_names()}
    assert modalities == {"MR", "CT", "XR", "US", "PT"}
    assert len(recipe_names()) >= 25


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_where_its_facts_come_from(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.verified_with
    assert recipe.labels_from
    assert recipe.homepage.startswith("http")
    assert all(re.fullmatch(r"10\.\d{4,}/\S+", doi) for doi in recipe.doi)
    assert recipe_tree(name)["title"] == recipe.title


def test_what_the_user_sets_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "set", "msd_liver")
    mine = settings(tmp_path / "set", "msd_liver", window_hu=[0, 100])
    assert mine.data.window_hu == (0, 100)
    assert mine.data.modality == "CT"
    assert "from the recipe msd_liver" in capsys.readouterr().out
    assert settings(tmp_path / "set", "msd_liver").data.window_hu == (-45, 105)


def test_a_csv_overrides_the_layout_of_a_recipe(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (1, 2))
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "mask", "patient"], ["a.png", "", "p"]])
    found = find_sources(settings(tmp_path, "busi", csv="list.csv").data, "set")
    assert [entry.source for entry in found.entries] == ["a.png"]
    assert found.modality == "US"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("acdcc", {}, "no recipe 'acdcc'.*acdc"),
        ("acdc", {"variant": "t1"}, "none, as this data set has one kind"),
        ("brats2021", {"variant": "t9"}, "flair, t1, t1ce, t2"),
    ],
)
def test_what_does_not_exist_is_named(tmp_path: Path, name: str, data: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(tmp_path, name, **data)


def test_another_layout_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "a.png", (1, 2))
    with pytest.raises(UserError, match=r"not laid out as the recipe acdc expects.*data\.root is"):
        find_sources(settings(tmp_path / "set", "acdc").data, "set")


def test_a_table_without_a_row_or_column_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "set"
    build(root, "covid_cxr")
    config = settings(root, "covid_cxr")
    (root / "cases.csv").write_text("image,patientid\nother.png,1\n")
    with pytest.raises(UserError, match="no row for 2 of 2 images"):
        find_sources(config.data, "set")
    (root / "cases.csv").write_text("image\nother.png\n")
    with pytest.raises(UserError, match="no column patientid"):
        find_sources(config.data, "set")
    (root / "cases.csv").unlink()
    with pytest.raises(UserError, match=r"no cases\.csv"):
        find_sources(config.data, "set")


def test_the_official_test_patients_are_the_test_split(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(1, 7):
        folder = "training" if number < 5 else "testing"
        for frame in ("01", "09"):
            stem = f"{folder}/patient10{number}/patient10{number}_frame{frame}"
            # Voxels of their own: scans that are equal count as one patient's.
            write_image(root / f"{stem}.nii.gz", (number, int(frame), 3, 4 * number))
            write_image(root / f"{stem}_gt.nii.gz", (0, 1, 2, 3))
    prepare(settings(root, "acdc"))
    index = SliceStore(tmp_path / "store").index
    splits = index.groupby("patient")["split"].agg(set).to_dict()
    assert splits["patient105"] == splits["patient106"] == {"test"}
    drawn = [next(iter(splits[f"patient10{number}"])) for number in range(1, 5)]
    assert sorted(drawn) == ["train", "train", "train", "val"]


@pytest.mark.parametrize("official", [False, "false"])
def test_unofficial_splits_are_drawn_where_asked_for(tmp_path: Path, official: object) -> None:
    data = {"root": str(tmp_path), "recipe": "acdc"}
    tree = {"name": "a", "out": "b", "data": data, "split": {"official": official}}
    assert build_config(PrepareConfig, tree, "the test").split == SplitConfig()
    assert settings(tmp_path, "acdc").split == SplitConfig(official=True, train=0.8, val=0.2)


@pytest.mark.parametrize(
    ("values", "parts"), [((0, 1), ("liver", "spleen")), ((0, 255), ("spleen",)), ((0, 0), ("liver",))]
)
def test_a_file_for_each_label_is_painted_in_the_order_of_ids(
    tmp_path: Path, values: tuple[int, ...], parts: tuple[str, ...]
) -> None:
    root = tmp_path / "set"
    write_image(root / "s0001" / "mri.nii.gz", (1, 2, 3))
    for part in parts:
        write_image(root / "s0001" / "segmentations" / f"{part}.nii.gz", values)
    config = settings(root, "totalsegmentator_mr")
    found = find_sources(config.data, "set")
    expected = {0} if values == (0, 0) else {0, {"spleen": 1, "liver": 5}[parts[0]]}
    assert ids_of(found.entries[0], found, config.data) == expected


def test_masks_that_have_changed_their_labels_are_read_again(tmp_path: Path) -> None:
    root = tmp_path / "set"
    build(root, "totalsegmentator_ct")
    write_image(root / "s0011/ct.nii.gz", (1, 2, 3))  # scans that are equal count as one patient's
    config = replace(
        settings(root, "totalsegmentator_ct"), split=SplitConfig(train=1, val=0, test=1, official=False)
    )
    first = prepare(config)
    assert prepare(config).wrote == 0
    liver, sternum = (root / f"s0000/segmentations/{label}.nii.gz" for label in ("liver", "sternum"))
    contents = liver.read_bytes(), sternum.read_bytes()
    liver.write_bytes(contents[1])
    sternum.write_bytes(contents[0])
    second = prepare(config)
    assert second.wrote == 1
    assert second.digest != first.digest
