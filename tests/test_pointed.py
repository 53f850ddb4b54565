"""Points and boxes of a file are asked as `evaluate` asks its own, wherever the scan's axes point."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_support import save, series
from PIL import Image

from samssl import load_bundle
from samssl.bundle import write_bundle
from samssl.config import UserError
from samssl.data.cases import content_digest
from samssl.data.pointed import Pointing, read_pointers
from samssl.data.scans import Scan, read_grid, read_mask, read_scan
from samssl.data.slices import SliceStore
from samssl.inference import InferenceConfig, LoadedBundle
from samssl.interactive import Answer, Asking, case_answers, prompted_case
from samssl.models.checkpoints import trained_tensors
from samssl.models.sam import ModelConfig, build_sam
from samssl.models.strategies import StrategyConfig, promptable_from
from samssl.predicting import PredictConfig, run_predict
from samssl.prompts import NO_POINT
from samssl.train.finetune import FinetuneConfig, FinetuneDataConfig

CLICKS = 2
FP32 = InferenceConfig(precision="fp32")
Objects = list[tuple[int, int]]


@dataclass(frozen=True)
class Asked:
    """A promptable bundle, one of its scans, and what `evaluate` asked about it and was told."""

    root: Path
    path: Path
    scan: Scan
    clicks: list[tuple[Objects, Answer]]
    boxes: list[tuple[Objects, Answer]]
    clicked: np.ndarray
    """Label ids after the last click, in the slices of the store."""

    @property
    def bundle(self) -> LoadedBundle:
        return load_bundle(self.root / "bundle", prompted=True)

    def rows(self, grid_affine: np.ndarray) -> list[dict[str, Any]]:
        """The clicks as rows of a file, in the voxels that `grid_affine` takes to RAS mm."""
        to_grid = np.linalg.inv(grid_affine) @ self.scan.affine
        found = []
        for objects, answer in self.clicks:
            for (z, label), points, inside in zip(objects, answer.points, answer.labels, strict=True):
                for (x, y), each in zip(points, inside, strict=True):
                    place = (to_grid @ [z, y, x, 1])[:3]
                    row = dict(zip("xyz", (float(f"{value:.6f}") for value in place), strict=True))
                    found.append({"label": ("", "shell", "core")[label], **row, "inside": int(each)})
        return found


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> Asked:
    root = tmp_path_factory.mktemp("pointed")
    store = prepare_boxes(root, train=2, val=1, test=1)
    config = FinetuneConfig(
        out=root / "run",
        mode="promptable",
        strategy=StrategyConfig(head="sam"),
        data=FinetuneDataConfig(store=root / "store"),
        model=ModelConfig(variant="micro", image_size=32),
    )
    segmenter = promptable_from(build_sam(config.model), config.strategy, config.optim.seed)
    generator = torch.Generator().manual_seed(0)
    tuned = {
        name: value.detach() + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in trained_tensors(segmenter).items()
    }
    write_bundle(root / "bundle", config, store, tuned)
    bundle = load_bundle(root / "bundle", prompted=True)
    (case,) = store.cases("test")
    paths = sorted((root / "scans" / "imagesTr").iterdir())
    digests = [content_digest(read_scan(path, "MR").voxels) for path in paths]
    path = paths[digests.index(store.info(case)["image_sha256"])]
    asking = Asking(32, bundle.bundles[0].input, CLICKS, torch.device("cpu"))
    reference = store.mask(case)
    assert reference is not None
    with torch.no_grad():
        told = list(case_answers(bundle.segmenters[0], store, case, reference, asking))
    clicked = prompted_case(bundle.segmenters[0], store, case, asking).prediction
    clicks = [pair for pair in told if pair[1].clicks == CLICKS]
    assert not any((answer.labels == NO_POINT).any() for _, answer in clicks)
    assert {0, 1, 2} == set(np.unique(clicked))
    return Asked(
        root, path, read_scan(path, "MR"), clicks, [each for each in told if not each[1].clicks], clicked
    )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
    return path


def on_slices(mask: Path, scan: Scan) -> np.ndarray:
    return read_mask(mask, scan, {0: "background", 1: "shell", 2: "core"})


@pytest.mark.parametrize("codes", ["RAS", "PIL", "ASR"])
def test_clicks_in_voxels_of_a_turned_scan_get_the_answers_of_evaluate(
    asked: Asked, tmp_path: Path, codes: str
) -> None:
    image: Any = nib.load(asked.path)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(change), tmp_path / "turned.nii.gz")
    prompts = write_csv(tmp_path / "prompts.csv", asked.rows(read_grid(tmp_path / "turned.nii.gz").affine))
    config = PredictConfig(
        bundle=asked.root / "bundle",
        scans=(tmp_path / "turned.nii.gz",),
        out=tmp_path / "out",
        prompts=prompts,
        precision="fp32",
    )
    run_predict(config)
    found = on_slices(tmp_path / "out" / "turned_mask.nii.gz", asked.scan)
    np.testing.assert_array_equal(found, asked.clicked)


def test_clicks_in_mm_and_as_json_get_them_too(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(asked.rows(np.eye(4))))
    pointing = Pointing(read_pointers(tmp_path / "prompts.json"), space="ras_mm")
    found = asked.bundle.predict(asked.path, FP32, pointing=pointing)
    nib.save(nib.Nifti1Image(found.mask, found.affine), tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(on_slices(tmp_path / "mask.nii.gz", asked.scan), asked.clicked)
    assert found.entropy[..., 0].max() == 0  # a slice in which nothing was pointed at
    assert found.uncertainty is not None
    assert 0 < found.uncertainty < 1


def test_a_box_is_asked_in_each_slice_that_it_reaches(asked: Asked) -> None:
    """One box over several slices, as the boxes of each slice by themselves in `evaluate`."""
    boxes = {
        key: (box, mask)
        for objects, answer in asked.boxes
        for key, box, mask in zip(objects, answer.boxes, answer.masks, strict=True)  # pyright: ignore[reportArgumentType]
        if key[1] == 2
    }
    (first, _), (last, _) = min(boxes), max(boxes)
    assert len({tuple(box) for box, _ in boxes.values()}) == 1 < len(boxes)
    left, top, right, bottom = boxes[first, 2][0]
    to_file = np.linalg.inv(read_grid(asked.path).affine) @ asked.scan.affine
    corners = [
        (to_file @ [*corner, 1])[:3].tolist() for corner in ((last, top, right), (first, bottom, left))
    ]
    row = dict(zip(("x", "y", "z", "x2", "y2", "z2"), [*corners[0], *corners[1]], strict=True))
    path = write_csv(asked.root / "box.csv", [row | {"label": "core"}])
    found = asked.bundle.predict(asked.path, FP32, pointing=Pointing(read_pointers(path)))
    nib.save(nib.Nifti1Image(found.mask, found.affine), asked.root / "box.nii.gz")
    slices = on_slices(asked.root / "box.nii.gz", asked.scan)
    assert slices.any()
    for z, plane in enumerate(slices):
        expected = boxes[z, 2][1] if (z, 2) in boxes else np.zeros_like(plane, bool)
        np.testing.assert_array_equal(plane == 2, expected)


def test_several_scans_of_several_kinds_each_get_their_own_prompts(asked: Asked, tmp_path: Path) -> None:
    """A DICOM series and a picture; labels of the user's own."""
    voxels = asked.scan.voxels.round().astype(np.int16)
    save(series(voxels[:1], Modality="MR"), tmp_path / "one", ["slice.dcm"])
    Image.fromarray(asked.scan.voxels[2].clip(0, 255).astype(np.uint8)).save(tmp_path / "picture.png")
    rows = [
        {"scan": "slice.dcm", "label": "lump", "object": "a", "x": 4, "y": 5, "inside": 1},
        {"scan": "picture", "label": "lump", "object": "a", "x": 19, "y": 7, "inside": 1},
        {"scan": "picture.png", "label": "lump", "object": "b", "x": 3, "y": 15, "inside": "true"},
    ]
    config = PredictConfig(
        bundle=asked.root / "bundle",
        scans=(tmp_path / "one/slice.dcm", tmp_path / "picture.png"),
        out=tmp_path / "out",
        prompts=write_csv(tmp_path / "prompts.csv", rows),
        prompt_labels={5: "lump"},
    )
    run_predict(config)
    assert json.loads((tmp_path / "out/labels.json").read_text()) == {"5": "lump"}
    mask = np.asarray(Image.open(tmp_path / "out/picture_mask.png"))
    assert mask.shape == asked.scan.voxels.shape[1:]
    assert set(np.unique(mask)) <= {0, 5}
    assert (tmp_path / "out/slice_mask.nii.gz").is_file()
    config = PredictConfig(**{**vars(config), "scans": config.scans[1:], "out": tmp_path / "other"})
    with pytest.raises(UserError, match=r"^Row 2 of .*prompts\.csv must say in the column `scan`"):
        run_predict(config)


HEAD = "label,object,x,y,z,x2,y2,z2,inside\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("label,x\nshell,1\n", "has no columns x and y"),
        (HEAD, "holds no prompts"),
        (HEAD + "shell,,1,2\n", "^Row 2 of .* another number of cells"),
        (HEAD + "shell,,1,2,3,,,,1\nshell,,a,2,3,,,,1\n", "^Row 3 of .*: x is not a number but 'a'"),
        (HEAD + "shell,,1,,3,,,,1\n", "^Row 2 of .*: y is not a number but ''"),
        (HEAD + "shell,,1,inf,3,,,,1\n", "^Row 2 of .*: y is not finite"),
        (HEAD + "shell,,1,2,3,4,,6,1\n", "^Row 2 of .*: y2 is not a number"),
        (HEAD + "shell,,1,2,3,,,,maybe\n", "^Row 2 of .*: inside is 1 or 0"),
        (HEAD + "shell,,1,2,3,4,5,3,0\n", "^Row 2 of .*: inside is 1 or 0 for a point, and 1"),
        ("label,x,y,z,weight\nshell,1,2,3,4\n", "^Row 2 of .* a column 'weight'"),
        (HEAD + "kidney,,1,2,3,,,,1\n", "^Row 2 of .* which label it points at: shell, core"),
        (HEAD + ",,1,2,3,,,,1\n", "^Row 2 of .* which label it points at"),
        (HEAD + "shell,,1,2,,,,,1\n", "^Row 2 of .* must say z"),
        (HEAD + "shell,,1,2,3,,,,1\nshell,,1,2,60,,,,1\n", "^Row 3 of .* outside of the scan of 24 x 20 x 6"),
        (HEAD + "shell,,1,2,3,,,,0\n", "^Row 2 of .* what an object is not"),
        (HEAD + "shell,,1,2,3,4,5,3,1\nshell,,5,6,3,9,9,3,1\n", "^Row 3 of .* a second box"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(asked: Asked, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        asked.bundle.predict(asked.path, FP32, pointing=Pointing(read_pointers(tmp_path / "prompts.csv")))
    assert "prompts.csv" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", '{"x": 1}', "[1]", "[" * 100_000], ids=["cut", "no list", "number", "deep"]
)
def test_json_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(UserError, match=r"prompts\.json"):
        read_pointers(tmp_path / "prompts.json")


def test_prompts_go_with_promptable_bundles_only(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give predict its prompts"):
        load_bundle(asked.root / "bundle")
    with pytest.raises(UserError, match="needs prompts"):
        asked.bundle.predict(asked.path)
    with pytest.raises(UserError, match="leave more_bundles out"):
        load_bundle(asked.root / "bundle", asked.root / "bundle", prompted=True)
    prompts = write_csv(tmp_path / "prompts.csv", asked.rows(read_grid(asked.path).affine))
    pointing = Pointing(read_pointers(prompts))
    with pytest.raises(UserError, match="leave flips out"):
        asked.bundle.predict(asked.path, InferenceConfig(flips=("vertical",)), pointing=pointing)
    image = tmp_path / "image.png"
    Image.fromarray(asked.scan.voxels[2].clip(0, 255).astype(np.uint8)).save(image)
    with pytest.raises(UserError, match="prompt_space=voxels"):
        asked.bundle.predict(image, FP32, pointing=Pointing(pointing.pointers, space="ras_mm"))
