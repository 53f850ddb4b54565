"""New scans in, masks out: on the scan's own voxels, and the same as `evaluate` finds."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import zarr
from dicom_support import save, series
from PIL import Image
from training_support import write_tuned_micro

from samssl import load_bundle
from samssl.bundle import read_bundle
from samssl.cli import main
from samssl.config import UserError
from samssl.data.cases import content_digest
from samssl.data.familiarity import take_fingerprint
from samssl.data.scans import read_mask, read_scan
from samssl.data.slices import SliceStore
from samssl.evaluate import EvaluateConfig, evaluate
from samssl.inference import InferenceConfig, LoadedBundle
from samssl.predicting import PredictConfig, run_predict


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> Path:
    """A folder with scans, their store, and a bundle that was fine-tuned a little on them."""
    root = tmp_path_factory.mktemp("predict")
    store = prepare_boxes(root, train=2, val=1, test=1)
    write_tuned_micro(root, store, steps=40)
    return root


@pytest.fixture(scope="module")
def bundle(root: Path) -> LoadedBundle:
    return load_bundle(root / "bundle")


@pytest.fixture
def scan(root: Path) -> Path:
    return root / "scans" / "imagesTr" / "scan_000.nii.gz"


def load(path: Path) -> Any:
    return nib.load(path)


def reoriented(path: Path, codes: str, out: Path) -> Any:
    image = load(path)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(change)
    nib.save(turned, out)
    return turned


def test_nothing_differs_from_what_evaluate_scored(root: Path, bundle: LoadedBundle, tmp_path: Path) -> None:
    store = SliceStore(root / "store")
    evaluate(EvaluateConfig(out=tmp_path, bundle=root / "bundle", store=root / "store"))
    (case,) = store.cases("test")
    paths = sorted((root / "scans" / "imagesTr").iterdir())
    digests = [content_digest(read_scan(path, "MR").voxels) for path in paths]
    path = paths[digests.index(store.info(case)["image_sha256"])]
    scored = np.asarray(zarr.open_array(tmp_path / "predictions.zarr" / case, mode="r")[:])
    assert len(np.unique(scored)) > 1
    found = bundle.predict(path, InferenceConfig(precision="fp32"))
    mask = nib.Nifti1Image(found.mask, found.affine)
    nib.save(mask, tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_scan(tmp_path / "mask.nii.gz", "MR").voxels, scored)
    assert found.warnings == ()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIL", "SAR", "ASL"])
def test_a_mask_lies_on_the_voxels_of_a_turned_scan(
    root: Path, bundle: LoadedBundle, scan: Path, tmp_path: Path, codes: str
) -> None:
    own = bundle.predict(scan)
    turned = reoriented(scan, codes, tmp_path / "turned.nii.gz")
    given = [str(root / "bundle"), str(tmp_path / "turned.nii.gz")]
    main(["predict", *given, "--out", str(tmp_path / "out"), "precision=fp32"])
    mask = load(tmp_path / "out" / "turned_mask.nii.gz")
    assert mask.shape == turned.shape
    np.testing.assert_array_equal(mask.affine, load(tmp_path / "turned.nii.gz").affine)
    nib.save(nib.Nifti1Image(own.mask, own.affine), tmp_path / "own.nii.gz")
    expected = reoriented(tmp_path / "own.nii.gz", codes, tmp_path / "expected.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(expected.dataobj))
    assert own.mask.any()


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_simpleitk_finds_scan_and_mask_on_one_grid(
    root: Path, scan: Path, tmp_path: Path, suffix: str
) -> None:
    image = sitk.ReadImage(str(scan))
    image.SetSpacing((0.7, 1.3, 3.1))
    image.SetOrigin((-31.5, 12.25, 100.0))
    turn, tilt = 0.3, 0.1
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    image.SetDirection((about_z @ about_x).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f"oblique{suffix}"))
    run_predict(
        PredictConfig(bundle=root / "bundle", scans=(tmp_path / f"oblique{suffix}",), out=tmp_path / "out")
    )
    mask = sitk.ReadImage(str(tmp_path / "out" / "oblique_mask.nii.gz"))
    assert mask.GetSize() == image.GetSize()
    for of_mask, of_scan in (
        (mask.GetSpacing(), image.GetSpacing()),
        (mask.GetOrigin(), image.GetOrigin()),
        (mask.GetDirection(), image.GetDirection()),
    ):
        np.testing.assert_allclose(of_mask, of_scan, atol=1e-4)


def test_one_volume_of_a_4d_file_is_segmented(bundle: LoadedBundle, scan: Path, tmp_path: Path) -> None:
    image = load(scan)
    voxels = np.asarray(image.dataobj)
    nib.save(
        nib.Nifti1Image(np.stack([voxels[::-1], voxels], axis=-1), image.affine), tmp_path / "four.nii.gz"
    )
    with pytest.raises(UserError, match="4D"):
        bundle.predict(tmp_path / "four.nii.gz")
    found = bundle.predict(tmp_path / "four.nii.gz", InferenceConfig(volume=1))
    np.testing.assert_array_equal(found.mask, bundle.predict(scan).mask)


def test_a_dicom_series_gets_a_mask_on_its_grid(root: Path, scan: Path, tmp_path: Path) -> None:
    voxels = read_scan(scan, "MR").voxels.round().astype(np.int16)
    save(series(voxels, Modality="MR"), tmp_path / "series")
    run_predict(PredictConfig(bundle=root / "bundle", scans=(tmp_path / "series",), out=tmp_path / "out"))
    (path,) = (tmp_path / "out").glob("*_mask.nii.gz")
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    expected, mask = sitk.ReadImage(names), sitk.ReadImage(str(path))
    assert mask.GetSize() == expected.GetSize()
    np.testing.assert_allclose(mask.GetSpacing(), expected.GetSpacing(), atol=1e-4)
    np.testing.assert_allclose(mask.GetOrigin(), expected.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(mask.GetDirection(), expected.GetDirection(), atol=1e-4)


def test_a_dicom_seg_holds_the_voxels_of_the_nifti(root: Path, scan: Path, tmp_path: Path) -> None:
    voxels = read_scan(scan, "MR").voxels.round().astype(np.int16)
    files = save(series(voxels, (0.8, 0.6, 0.0, 0.0, 0.0, -1.0), Modality="MR"), tmp_path / "series")
    given = [str(root / "bundle"), str(tmp_path / "series"), "--out", str(tmp_path / "out")]
    main(["predict", *given, "precision=fp32"])
    main(["predict", *given, "precision=fp32", "format=dicom_seg"])
    (seg,), (mask,) = ((tmp_path / "out").glob(f"*{end}") for end in ("_seg.dcm", "_mask.nii.gz"))
    own = read_scan(files[0], "MR", files=files)
    found, expected = (read_mask(path, own, read_bundle(root / "bundle").labels) for path in (seg, mask))
    assert set(np.unique(expected)) == {0, 1, 2}
    np.testing.assert_array_equal(found, expected)
    config = PredictConfig(bundle=root / "bundle", scans=(scan,), out=tmp_path / "no", format="dicom_seg")
    with pytest.raises(UserError, match="1 of 1 scans"):
        run_predict(config)
    assert "of DICOM images" in (tmp_path / "no" / "predictions.csv").read_text()


def test_2d_images_get_pngs_and_folders_are_gone_through(root: Path, scan: Path, tmp_path: Path) -> None:
    plane = np.asarray(load(scan).dataobj)[:, :, 2]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("one", "two"):
        Image.fromarray(plane.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    config = PredictConfig(bundle=root / "bundle", scans=(folder,), out=tmp_path / "out", entropy=True)
    run_predict(config)
    mask = np.asarray(Image.open(tmp_path / "out" / "two_mask.png"))
    assert mask.shape == plane.shape
    assert set(np.unique(mask)) <= {0, 1, 2}
    assert (tmp_path / "out" / "one_entropy.png").is_file()
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"1": "shell", "2": "core"}
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert table["scan"].tolist() == ["one", "two"]
    with pytest.raises(UserError, match="Choose another folder"):
        run_predict(replace(config, out=folder / "masks"))


def test_a_scan_that_cannot_be_read_leaves_the_others_alone(
    root: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jane_doe.nii.gz").write_bytes(b"no scan")
    scans = (tmp_path / "jane_doe.nii.gz", scan)
    config = PredictConfig(bundle=root / "bundle", scans=scans, out=tmp_path / "out", format="nifti")
    with pytest.raises(UserError, match="1 of 2 scans") as caught:
        run_predict(config)
    assert (tmp_path / "out" / "scan_000_mask.nii.gz").is_file()
    printed = capsys.readouterr()
    assert "jane_doe" not in printed.out + printed.err + str(caught.value)
    assert pd.read_csv(tmp_path / "out" / "predictions.csv")["problem"].notna().tolist() == [True, False]


def test_members_decide_together(root: Path, scan: Path, bundle: LoadedBundle, tmp_path: Path) -> None:
    one, two = bundle.predict(scan), load_bundle(root / "bundle", root / "bundle").predict(scan)
    np.testing.assert_array_equal(one.mask, two.mask)
    assert one.disagreement is None
    assert two.disagreement == 0
    assert 0 <= one.entropy.min() < one.entropy.max() <= 1
    settings = InferenceConfig(flips=("horizontal", "vertical"))
    flipped = bundle.predict(scan, settings)
    assert flipped.disagreement is not None
    assert 0 < flipped.disagreement <= 1
    image = load(scan)
    mirrored = nib.Nifti1Image(np.asarray(image.dataobj)[::-1, ::-1], image.affine)
    nib.save(mirrored, tmp_path / "mirrored.nii.gz")
    again = bundle.predict(tmp_path / "mirrored.nii.gz", settings)
    assert (again.mask[::-1, ::-1] == flipped.mask).mean() > 0.999


def test_small_parts_are_left_out(scan: Path, bundle: LoadedBundle) -> None:
    from scipy import ndimage

    plain = bundle.predict(scan)
    largest = bundle.predict(scan, InferenceConfig(largest_component=True))
    for class_id in plain.names:
        labelled: Any = ndimage.label(largest.inside(class_id), np.ones((3, 3, 3)))
        assert labelled[1] <= 1
        assert largest.volume_ml(class_id) <= plain.volume_ml(class_id)
    assert not bundle.predict(scan, InferenceConfig(min_component_ml=1e6)).mask.any()


def test_a_scan_unlike_the_training_data_is_told(
    root: Path, scan: Path, bundle: LoadedBundle, tmp_path: Path
) -> None:
    known = read_bundle(root / "bundle").fingerprint
    assert known == take_fingerprint(SliceStore(root / "store"))
    assert known is not None
    assert (known.cases, known.modalities, known.axis) == (2, ("MR",), "axial")
    image = load(scan)
    other = nib.Nifti1Image(5 * np.asarray(image.dataobj), np.diag([3.0, 3.0, 2.0, 1.0]))
    nib.save(other, tmp_path / "other.nii.gz")
    warnings = " ".join(bundle.predict(tmp_path / "other.nii.gz").warnings)
    for word in ("spacing y", "spacing x", "height", "intensity mean"):
        assert word in warnings
    assert "spacing z" not in warnings


def test_an_older_bundle_predicts_once_the_modality_is_told(root: Path, scan: Path, tmp_path: Path) -> None:
    old = tmp_path / "bundle"
    old.mkdir()
    tree = json.loads((root / "bundle" / "bundle.json").read_text())
    del tree["fingerprint"]
    (old / "bundle.json").write_text(json.dumps(tree))
    (old / "tuned.safetensors").write_bytes((root / "bundle" / "tuned.safetensors").read_bytes())
    bundle = load_bundle(old)
    with pytest.raises(UserError, match="set modality"):
        bundle.predict(scan)
    found = bundle.predict(scan, InferenceConfig(modality="MR"))
    np.testing.assert_array_equal(found.mask, load_bundle(root / "bundle").predict(scan).mask)


def test_the_package_stays_light_to_import() -> None:
    code = "import sys, samssl; samssl.load_bundle; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
