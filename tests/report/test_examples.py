"""Which cases and which part of them the report shows."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from samssl.data.classes import run_classes
from samssl.data.slices import SliceStore
from samssl.report.examples import (
    Sources,
    choose_cases,
    crop_around,
    further_failures,
    make_example,
    painted,
    read_prediction,
    scale,
)
from samssl.report.study import read_study
from tests.report.conftest import StudyWriter


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        ({"a": 0.1, "b": 0.9, "c": 0.5}, {"Worst": "a", "Median": "c", "Best": "b"}),
        ({"b": 0.5, "a": 0.5, "c": 0.5, "d": 0.2}, {"Worst": "d", "Median": "c", "Best": "a"}),
        ({"a": 0.1, "b": 0.9}, {"Worst": "a", "Best": "b"}),
        ({"a": 0.1}, {"Best": "a"}),
    ],
)
def test_cases_are_chosen_by_dice(dice: dict[str, float], chosen: dict[str, str]) -> None:
    assert list(choose_cases(dice).items()) == list(chosen.items())  # the worst comes first


def test_further_bad_cases_are_not_shown_twice_and_have_faults() -> None:
    dice = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 1.0, "e": 0.2}
    assert further_failures(dice, ["a", "c"]) == {2: "e", 4: "b"}


def test_crop_holds_all_foreground_and_a_margin() -> None:
    masks = np.zeros((2, 100, 100), np.uint8)
    masks[0, 10:30, 40:60] = 1
    masks[1, 20:50, 40:60] = 2
    rows, columns = crop_around(masks)
    # Rows 10 to 50 and 40 % of 40 on each side would start below 0: the window slides inside. Columns are
    # 20 and 8 on each side, 36 in all.
    assert (rows, columns) == (slice(0, 72), slice(32, 68))


def test_crop_keeps_a_third_of_the_view_and_all_of_it_without_foreground() -> None:
    mask = np.zeros((90, 90), np.uint8)
    assert crop_around([mask]) == (slice(0, 90), slice(0, 90))
    mask[88, 45] = 1
    assert crop_around([mask]) == (slice(60, 90), slice(30, 60))


def test_scale_uses_the_window_of_the_case() -> None:
    info = pd.Series({"intensity_low": -160.0, "intensity_high": 240.0})
    image = np.array([[-1000, 40, 3000]], np.int16)
    np.testing.assert_allclose(scale(image, info), [[0, 0.5, 1]])


def test_prediction_that_is_not_there(tmp_path: Path) -> None:
    assert read_prediction(tmp_path, "a") is None
    zarr.create_array(tmp_path / "predictions.zarr" / "a", shape=(2, 3, 4), dtype="uint8")[:] = 7
    np.testing.assert_array_equal(read_prediction(tmp_path, "a"), np.full((2, 3, 4), 7))


def test_example_shows_the_slice_with_most_foreground(study: StudyWriter, store: SliceStore) -> None:
    case = store.cases("test")[0]
    folder = study.evaluation("ssl", 0, {case: 0.5})
    evaluations = {"SSL": read_study(study.root).evaluations["ssl"][0]}
    sources = Sources(store, study.root, evaluations, run_classes(store.labels))
    example = make_example("Best", case, {"ssl": 0.5}, sources)
    assert example
    assert (example.z, example.num_slices) == (1, 3)
    # Without a prediction there is the reference and the image; with one, a column more.
    assert [panel.title for panel in example.above + example.below] == ["Reference", "Image"]
    zarr.create_array(folder / "predictions.zarr" / case, shape=(3, 12, 10), dtype="uint8")[:] = 1
    example = make_example("Best", case, {"ssl": 0.5}, sources)
    assert example
    assert [panel.title for panel in example.above] == ["Reference", "SSL"]
    assert [panel.title for panel in example.below] == ["Image", "SSL: differences"]


def test_failure_shows_the_slice_that_is_most_wrong(study: StudyWriter, store: SliceStore) -> None:
    case = store.cases("test")[0]
    folder, mask = study.evaluation("ssl", 0, {case: 0.5}), store.mask(case)
    assert mask is not None
    mask[0, :2] = 1
    zarr.create_array(folder / "predictions.zarr" / case, shape=mask.shape, dtype="uint8")[:] = mask
    evaluations = {"SSL": read_study(study.root).evaluations["ssl"][0]}
    sources = Sources(store, study.root, evaluations, run_classes(store.labels))
    example = make_example("2.", case, {"ssl": 0.5}, sources, most_wrong=True)
    assert example
    assert example.z == 0


def test_case_that_the_store_does_not_know(study: StudyWriter, store: SliceStore) -> None:
    sources = Sources(store, study.root, {}, run_classes(store.labels))
    assert make_example("Best", "nobody", {}, sources) is None


def test_regions_are_painted_the_smaller_over_the_larger(study: StudyWriter, store: SliceStore) -> None:
    case = store.cases("test")[0]
    regions = run_classes(
        store.labels, {"whole": ["liver", "tumour"], "tumour": ["tumour"]}, overlapping=True
    )
    seen = np.zeros((2, 3, 12, 10), bool)
    seen[0, 1, 2:8, 2:8] = seen[1, 1, 4:6, 4:6] = True
    picture = painted(seen[:, 1], regions)
    assert (picture == 2).sum() == 4
    assert (picture == 1).sum() == 32
    folder = study.evaluation("ssl", 0, {case: 0.5})
    zarr.create_array(folder / "predictions.zarr" / case, shape=seen.shape, dtype="bool")[:] = seen
    np.testing.assert_array_equal(read_prediction(folder, case), seen)  # pyright: ignore[reportArgumentType]
    evaluations = {"SSL": read_study(study.root).evaluations["ssl"][0]}
    example = make_example("Best", case, {"ssl": 0.5}, Sources(store, study.root, evaluations, regions))
    assert example
    assert [panel.title for panel in example.above] == ["Reference", "SSL"]
