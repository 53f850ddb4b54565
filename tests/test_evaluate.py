"""Scores of known predictions over a real store: masks moved, missed and made up."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from samssl.data.classes import Classes, run_classes
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.slices import SliceStore, verify_store
from samssl.data.sources import DataSource
from samssl.data.splits import SplitConfig
from samssl.evaluate import class_scores, write_scores
from samssl.metrics import case_dice, dice_per_label
from samssl.scores import ALL_CLASSES
from samssl.shapes import compare_shapes

TOLERANCE_MM = 1.5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, prepare_boxes: Callable[..., SliceStore]) -> SliceStore:
    """Boxes (core in shell) of six slices, 2 mm apart."""
    return prepare_boxes(tmp_path_factory.mktemp("scored"), train=1, val=1, test=3)


def moved(store: SliceStore, case: str) -> np.ndarray:
    mask = store.mask(case)
    assert mask is not None
    return np.roll(mask, 1, axis=2)


def scored(
    store: SliceStore, predicted: Iterable[tuple[str, np.ndarray]], classes: Classes | None = None
) -> pd.DataFrame:
    return pd.concat([table for *_, table in class_scores(store, predicted, TOLERANCE_MM, classes)])


def test_rows_hold_what_their_own_modules_say_of_the_masks(store: SliceStore) -> None:
    cases = store.cases("test")
    table = scored(store, ((case, moved(store, case)) for case in cases))
    for case, rows in table.groupby("case"):
        mask, found = store.mask(str(case)), moved(store, str(case))
        assert mask is not None
        dice = pd.DataFrame(dice_per_label(found, mask, 3))
        pd.testing.assert_frame_equal(rows[dice.columns].reset_index(drop=True), dice)
        for label, row in rows.set_index("label_id").iterrows():
            shapes = compare_shapes(found == label, mask == label, (2.0, 1.0, 1.0), TOLERANCE_MM)
            assert row[list(shapes)].to_dict() == pytest.approx(shapes)
            assert row["hd95_mm"] == pytest.approx(1.0)  # moved by one pixel of 1 mm
            volumes = row["predicted_voxels"] - row["reference_voxels"]
            assert row["volume_error_ml"] == pytest.approx(volumes * 2.0 / 1000)
    assert set(table["surface_tolerance_mm"]) == {TOLERANCE_MM}


def test_regions_are_scored_by_their_own_masks(store: SliceStore) -> None:
    (case, *_) = store.cases("test")
    mask = store.mask(case)
    assert mask is not None
    regions = run_classes(store.labels, {"core": ["core"], "box": ["shell", "core"]}, overlapping=True)
    found = np.stack([mask > 0, np.zeros_like(mask, np.bool_)])
    rows = scored(store, [(case, found)], regions).set_index("label")
    assert rows["nsd"].to_dict() == rows["dice"].to_dict() == {"core": 0.0, "box": 1.0}
    assert rows["missed"].to_dict() == {"core": True, "box": False}
    assert rows["hd95_mm"]["core"] == pytest.approx(np.hypot(np.hypot(6 * 2, 24), 20))


def test_subgroups_of_the_store_become_those_of_the_scores(
    tmp_path: Path, make_scans: Callable[..., Path]
) -> None:
    scans = make_scans(tmp_path / "scans", cases=6)
    lines = [
        f"imagesTr/scan_{n:03}.nii.gz,labelsTr/scan_{n:03}.nii.gz,{'A' if n % 2 else 'B'}" for n in range(6)
    ]
    (scans / "pairs.csv").write_text("\n".join(["image,mask,site", *lines]))
    labels, split = {1: "shell", 2: "core"}, SplitConfig(train=1, val=1, test=4)
    stores = {}
    for subgroups in ((), ("site",)):
        source = DataSource(
            root=scans / "pairs.csv", modality="MR", labels=labels, subgroups=subgroups, public_names=True
        )
        out = tmp_path / f"store{len(subgroups)}"
        prepare(PrepareConfig(name="sites", out=out, data=source, split=split, workers=1))
        stores[subgroups] = SliceStore(out)
    plain, told_apart = stores.values()
    assert plain.digest != told_apart.digest
    assert verify_store(told_apart.root) == []
    cases = told_apart.cases("test")
    table = scored(told_apart, ((case, moved(told_apart, case)) for case in cases))
    sites = table.groupby("case")["subgroup_site"].first().to_dict()
    assert sites == {case: "A" if int(case[-1]) % 2 else "B" for case in cases}
    assert "subgroup_site" not in scored(plain, [(cases[0], moved(plain, cases[0]))])


def test_results_are_written_and_become_metrics(store: SliceStore, tmp_path: Path) -> None:
    cases = store.cases("test")
    missing, *_ = cases
    predicted = ((case, moved(store, case) * (case != missing)) for case in cases)
    result = write_scores(tmp_path, class_scores(store, predicted, TOLERANCE_MM), len(cases))
    kept = pd.read_parquet(tmp_path / "cases.parquet")
    metrics = result.metrics("test")
    assert metrics["test/dice"] == pytest.approx(case_dice(kept).mean())
    assert (metrics["test/missed"], metrics["test/false_positive"]) == (2.0, 0.0)
    far = float(kept[kept["case"] == missing]["hd95_mm"].iloc[0])
    assert metrics["test/hd95_mm_core"] == pytest.approx((far + 1 + 1) / 3)
    assert metrics["test/hd95_found_mm_core"] == pytest.approx(1.0)
    assert metrics["test/hd95_mm_ci95_low"] < metrics["test/hd95_mm"]
    written = pd.read_csv(tmp_path / "scores.csv")
    dice = written[(written["label"] == ALL_CLASSES) & (written["score"] == "dice")]
    assert dice["mean"].item() == pytest.approx(metrics["test/dice"])
    assert {"scores.md", "scores.tex"} <= {path.name for path in tmp_path.iterdir()}
