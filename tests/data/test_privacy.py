"""What identifies a patient is planted wherever it can be, and searched for wherever anything is written."""

import base64
import gzip
import json
import logging
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import nrrd
import numpy as np
import pandas as pd
import pytest
import tifffile
from dicom_support import save, series
from PIL import Image, PngImagePlugin
from privacy_support import NAME, found_in, plant_nifti

from samssl.config import UserError
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.pseudonyms import KEY_VARIABLE, open_key, read_listing
from samssl.data.slices import SliceStore, verify_store
from samssl.data.sources import DataSource
from samssl.data.splits import SplitConfig

VOXELS = np.random.default_rng(0).integers(0, 2000, (6, 5, 4), dtype=np.int16)
GREY = np.random.default_rng(1).integers(0, 255, (8, 9), dtype=np.uint8)


def dicom(folder: Path) -> None:
    datasets = series(VOXELS, PatientID=NAME, PatientName=f"{NAME}^Jane", StudyDescription=NAME)
    for dataset in datasets:
        dataset.InstitutionName = dataset.ImageComments = dataset.ReferringPhysicianName = NAME
        dataset.ProtocolName = dataset.SeriesDescription = dataset.AccessionNumber = NAME
        block = dataset.private_block(0x0011, NAME, create=True)
        block.add_new(0x01, "LO", NAME)
    save(datasets, folder, [f"{NAME}_{number}" for number in range(len(datasets))])


def images(folder: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", NAME)
    text.add_itxt("Comment", NAME, zip=True)
    Image.fromarray(GREY).save(folder / f"{NAME}_1.png", pnginfo=text)
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = NAME  # ImageDescription, Artist
    Image.fromarray(GREY).save(folder / f"{NAME}_2.jpg", exif=exif, comment=NAME)
    tags = [(65000, "s", 0, NAME, True)]
    tifffile.imwrite(folder / f"{NAME}_3.tif", GREY, description=NAME, software=NAME, extratags=tags)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A CSV of scans and masks in every format, and broken ones of each."""
    root = tmp_path / "scans"
    folder = root / NAME
    folder.mkdir(parents=True)
    mask = (VOXELS > 1000).astype(np.uint8)
    plant_nifti(folder / f"{NAME}.nii.gz", VOXELS)
    plant_nifti(folder / f"{NAME}_mask.nii.gz", mask)
    header = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": [0, 0, 0]}
    nrrd.write(str(folder / f"{NAME}.nrrd"), VOXELS, header | {"content": NAME, "patient": NAME})
    text = (folder / f"{NAME}.nrrd").read_bytes()
    (folder / f"{NAME}.nrrd").write_bytes(text.replace(b"\n\n", b"\n# " + NAME.encode() + b"\n\n", 1))
    mha = "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\n"
    mha += f"Comment = {NAME}\nElementDataFile = LOCAL\n"
    (folder / f"{NAME}.mha").write_bytes(mha.encode() + VOXELS.tobytes())
    images(folder)
    dicom(folder / f"{NAME}_dicom")
    rows = [f"{NAME}/{NAME}.nii.gz,{NAME}/{NAME}_mask.nii.gz,{NAME}-0"]
    rows += [
        f"{NAME}/{NAME}{end},,{NAME}{end}"
        for end in (".nrrd", ".mha", "_1.png", "_2.jpg", "_3.tif", "_dicom")
    ]
    for end in (".nii.gz", ".nrrd", ".mha", "_1.png", "_2.jpg", "_3.tif"):
        content = (folder / f"{NAME}{end}").read_bytes()
        (folder / f"{NAME}_cut{end}").write_bytes(content[: len(content) // 2])
        rows.append(f"{NAME}/{NAME}_cut{end},,")
    plant_nifti(folder / f"{NAME}_short.nii.gz", mask[1:])
    plant_nifti(folder / f"{NAME}_again.nii.gz", VOXELS + 1)
    rows += [f"{NAME}/{NAME}_again.nii.gz,{NAME}/{NAME}_short.nii.gz,", f"{NAME}/{NAME}.absent.nii,,"]
    (root / "pairs.csv").write_text("\n".join(["image,mask,patient", *rows]) + "\n")
    return root / "pairs.csv"


def config(tmp_path: Path, root: Path, **settings) -> PrepareConfig:
    data = DataSource(**{"root": root, "modality": "MR", "labels": {1: "organ"}} | settings)
    split = SplitConfig(train=1.0, val=0.0, test=0.0)
    return PrepareConfig(name="private", out=tmp_path / "store", data=data, split=split, workers=1)


def test_the_search_finds_what_is_packed(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Comment", NAME, zip=True)
    Image.fromarray(GREY).save(tmp_path / "text.png", pnginfo=text)
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"of " + NAME.encode()))
    with zipfile.ZipFile(tmp_path / "text.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.gz", (tmp_path / "text.gz").read_bytes())
    pd.DataFrame({"value": [f"of {NAME}"] * 9}).to_parquet(tmp_path / "text.parquet", compression="zstd")
    page = (
        f'<img src="data:image/png;base64,{base64.b64encode((tmp_path / "text.png").read_bytes()).decode()}">'
    )
    (tmp_path / "text.html").write_text(page)
    with closing(sqlite3.connect(tmp_path / "text.db")) as database, database:
        database.execute("create table notes (value text)")
        database.execute("insert into notes values (?)", (f"of {NAME}",))
    (tmp_path / "text.txt").write_bytes(NAME.upper().encode("utf-16-le"))
    (tmp_path / "nothing.txt").write_text(NAME[:-1])
    assert {path.name.partition(".")[0] for path in found_in(tmp_path)} == {"text"}
    assert len(found_in(tmp_path)) == 7


def test_no_identifier_reaches_the_store_its_reasons_or_the_output(tmp_path, planted, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    summary = prepare(config(tmp_path, planted))
    assert (summary.cases, summary.rejected) == (7, 8)
    assert verify_store(tmp_path / "store") == []
    assert found_in(tmp_path / "store") == []
    out = capfd.readouterr()
    assert NAME not in out.out + out.err + caplog.text
    assert out.out.startswith("prepare: layout csv: 15 MR scans")
    index = SliceStore(tmp_path / "store").index
    assert not index.map(lambda cell: NAME in str(cell)).to_numpy().any()
    assert NAME in (tmp_path / "scans" / "pairs.csv").read_text()  # the search itself finds what is there
    assert len(found_in(tmp_path / "scans")) > 20


def test_the_private_list_tells_the_user_which_file_a_reason_is_about(tmp_path, planted):
    summary = prepare(config(tmp_path, planted))
    assert summary.private_list is not None
    reasons = (tmp_path / "store" / "rejected.csv").read_text().splitlines()[1:]
    pseudonyms = [line.partition(",")[0] for line in reasons]
    listed = read_listing(summary.private_list)
    files = sorted(listed[pseudonym][0] for pseudonym in pseudonyms)
    assert f"{NAME}/{NAME}_cut.nrrd" in files
    assert len(files) == 8
    assert not summary.private_list.is_relative_to(tmp_path / "store")


def test_the_key_is_in_no_file_of_the_store(tmp_path, planted, capfd):
    summary = prepare(config(tmp_path, planted))
    key = open_key()
    written = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(key.secret in content or key.secret.hex().encode() in content for content in written)
    assert key.secret.hex() not in capfd.readouterr().out
    assert summary.key_fingerprint == key.fingerprint


def test_another_key_gives_other_names_to_everything(tmp_path, planted, monkeypatch):
    first = prepare(config(tmp_path, planted))
    names = set(SliceStore(tmp_path / "store").index["case"])
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "another.key"))
    second = prepare(config(tmp_path, planted))
    assert (second.wrote, second.removed) == (first.cases, first.cases)
    assert not names & set(SliceStore(tmp_path / "store").index["case"])
    by_setting = prepare(config(tmp_path, planted, key_file=tmp_path / "another.key"))
    assert (by_setting.wrote, by_setting.digest) == (0, second.digest)


def test_a_tree_of_dicom_is_private_too(tmp_path, capfd):
    root = tmp_path / "scans"
    dicom(root / NAME / "one")
    save(series(VOXELS, Modality=NAME, PatientID=NAME), root / NAME / "two", [f"{NAME}{n}" for n in range(6)])
    [*_, cut] = save(series(VOXELS), root / NAME / "cut", [f"{NAME}{n}" for n in range(6)])
    cut.write_bytes(cut.read_bytes()[:-20])
    gap = [dataset for number, dataset in enumerate(series(VOXELS)) if number != 2]
    [*_, headless] = save([*gap, gap[0]], root / NAME / "gap", [f"{NAME}{n}" for n in range(6)])
    headless.write_bytes(headless.read_bytes()[:400])
    prepare(config(tmp_path, root, modality="CT"))
    rejected = (tmp_path / "store" / "rejected.csv").read_text()
    assert "missing slices" in rejected
    assert "damaged" in rejected
    assert "Holds no image" in rejected
    assert "not read here" in rejected
    assert found_in(tmp_path / "store") == []
    out = capfd.readouterr()
    assert NAME not in out.out + out.err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"patient_pattern": r"^(\d+)$"}, "number 1 of 2 in order of names"),
        ({"cases_per_patient": 2}, "number 1 of 2 in order of names"),
    ],
)
def test_errors_about_names_do_not_show_them(tmp_path, settings, sentence):
    for end in ("a", "b"):
        (tmp_path / "scans").mkdir(exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / "scans" / f"{NAME}{end}.png")
    with pytest.raises(UserError, match=sentence) as error:
        prepare(config(tmp_path, tmp_path / "scans", **settings))
    assert NAME not in str(error.value)


def test_a_decathlon_description_is_not_carried(tmp_path, decathlon):
    facts = json.loads((decathlon / "dataset.json").read_text())
    facts |= {"name": NAME, "description": NAME, "reference": NAME}
    (decathlon / "dataset.json").write_text(json.dumps(facts))
    prepare(config(tmp_path, decathlon, labels=None))
    assert found_in(tmp_path / "store") == []
