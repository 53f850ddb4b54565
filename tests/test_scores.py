"""Scores brought together: what is averaged, what is counted, and who is drawn for the intervals."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from samssl.files import write_table
from samssl.scores import (
    ALL_CLASSES,
    lesion_labels,
    score_metrics,
    score_sheet,
    summarize_scores,
    with_volumes,
)
from samssl.statistics import Interval, mean_interval, patient_interval

NAN = math.nan
FAR_MM = 100.0


def row(case: str, label_id: int = 1, dice: float = 0.5, **facts: Any) -> dict[str, Any]:
    """A case and class as an evaluation scores it: 1000 voxels of 1 mm in the reference, 800 predicted."""
    given = {"reference_voxels": 1000, "predicted_voxels": 800, "nsd": 0.9, "hd95_mm": 4.0, "assd_mm": 1.0}
    given |= {"reference_lesions": 1, "predicted_lesions": 1, "detected_lesions": 1}
    given |= {"patient": case, "subgroup_site": "A"}
    return {"case": case, "label_id": label_id, "label": f"organ {label_id}", "dice": dice} | given | facts


def missed(case: str, label_id: int = 1) -> dict[str, Any]:
    return row(case, label_id, 0.0, predicted_voxels=0, nsd=0.0, hd95_mm=FAR_MM, assd_mm=FAR_MM)


def absent(case: str, label_id: int = 1, predicted_voxels: int = 0) -> dict[str, Any]:
    facts = {"reference_voxels": 0, "predicted_voxels": predicted_voxels}
    return row(case, label_id, NAN, nsd=NAN, hd95_mm=NAN, assd_mm=NAN, reference_lesions=0, **facts)


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return with_volumes(pd.DataFrame(rows), (1.0, 1.0, 1.0))


def summary(*rows: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    found: list[Any] = summarize_scores([table(*rows)]).to_dict("records")
    return {(entry["subgroup"], entry["label"], entry["score"]): entry for entry in found}


def test_volumes_follow_from_voxels_and_spacing() -> None:
    scored = with_volumes(
        pd.DataFrame([row("a", dice=0.8), missed("b"), absent("c", 1, 500)]), (2.0, 0.5, 1.0)
    )
    assert scored["iou"].tolist() == pytest.approx([2 / 3, 0.0, NAN], nan_ok=True)
    assert scored["volume_error_ml"].tolist() == pytest.approx([-0.2, -1.0, 0.5])
    assert scored["relative_volume_error"].tolist() == pytest.approx([-0.2, -1.0, NAN], nan_ok=True)
    assert scored["missed"].tolist() == [False, True, False]
    assert scored["false_positive"].tolist() == [False, False, True]


def test_missed_structures_stay_in_the_mean_and_are_left_out_of_its_companion_only() -> None:
    found = summary(row("a", hd95_mm=4.0), row("b", hd95_mm=6.0), missed("c"))
    assert found["all", ALL_CLASSES, "hd95_mm"]["mean"] == pytest.approx((4 + 6 + FAR_MM) / 3)
    assert found["all", ALL_CLASSES, "hd95_found_mm"]["mean"] == pytest.approx(5.0)
    assert (found["all", ALL_CLASSES, "missed"]["mean"], found["all", ALL_CLASSES, "missed"]["cases"]) == (
        1,
        3,
    )


def test_empty_references_are_left_out_under_one_policy_and_counted_under_the_other() -> None:
    found = summary(row("a", dice=0.5), absent("b"), absent("c", predicted_voxels=9))
    assert (found["all", "organ 1", "dice"]["mean"], found["all", "organ 1", "dice"]["cases"]) == (0.5, 1)
    counted = found["all", "organ 1", "dice_empty_counted"]
    assert (counted["mean"], counted["cases"]) == (pytest.approx((0.5 + 1 + 0) / 3), 3)
    spurious = found["all", "organ 1", "false_positive"]
    assert (spurious["mean"], spurious["cases"]) == (1, 2)


def test_classes_are_averaged_within_a_case_before_cases_are() -> None:
    found = summary(row("a", 1, 0.2), row("a", 2, 0.4), row("b", 1, 0.9), absent("b", 2))
    assert found["all", ALL_CLASSES, "dice"]["mean"] == pytest.approx((0.3 + 0.9) / 2)
    assert found["all", "organ 2", "dice"]["mean"] == pytest.approx(0.4)


def test_seeds_are_averaged_within_a_case() -> None:
    seeds = [table(row("a", dice=0.2), row("b", dice=0.6)), table(missed("a"), row("b", dice=0.8))]
    scores = summarize_scores(seeds)
    found = scores[scores["subgroup"] == "all"].set_index(["label", "score"])
    assert found.loc[(ALL_CLASSES, "dice"), "mean"] == pytest.approx((0.1 + 0.7) / 2)
    assert found.loc[(ALL_CLASSES, "missed"), "mean"] == 0.5  # one of two seeds missed it
    assert found.loc[(ALL_CLASSES, "hd95_found_mm"), "mean"] == pytest.approx(4.0)


def test_scans_of_one_patient_are_drawn_together() -> None:
    dice = [0.5, 0.52, 0.7, 0.71, 0.9, 0.88]
    patients = ["p", "p", "q", "q", "r", "r"]
    rows = [row(f"c{index}", dice=value, patient=patients[index]) for index, value in enumerate(dice)]
    together = summary(*rows)["all", ALL_CLASSES, "dice"]
    apart = mean_interval(dice)
    assert together["mean"] == pytest.approx(apart.mean)
    assert together["high"] - together["low"] > apart.high - apart.low
    assert patient_interval(dice, list("abcdef")) == apart


def test_weighted_interval_is_of_the_sum_over_the_sum() -> None:
    interval = patient_interval([1.0, 0.0, 0.5], ["a", "b", "c"], [1.0, 3.0, 4.0])
    assert interval.mean == pytest.approx((1 + 0 + 2) / 8)
    assert interval.low < interval.mean < interval.high
    assert patient_interval([0.5, 0.5], ["a", "b"], [1.0, 3.0]) == Interval(0.5, 0.5, 0.5, 2)
    with pytest.raises(ValueError, match="no mean"):
        patient_interval([0.5], ["a"], [0.0])


def test_lesions_are_scored_where_there_are_many() -> None:
    counts = {"reference_lesions": 4, "predicted_lesions": 5, "detected_lesions": 3}
    rows = [row("a", 1, **counts), row("b", 1, reference_lesions=1), row("a", 2), row("b", 2)]
    assert lesion_labels(table(*rows)) == ["organ 1"]
    found = summary(*rows)
    assert found["all", "organ 1", "lesion_sensitivity"]["mean"] == pytest.approx((3 + 1) / (4 + 1))
    assert found["all", "organ 1", "false_positive_lesions"]["mean"] == pytest.approx((2 + 0) / 2)
    assert ("all", "organ 2", "lesion_sensitivity") not in found


def test_subgroups_have_their_own_means() -> None:
    found = summary(row("a", dice=0.4), row("b", dice=0.6), row("c", dice=0.9, subgroup_site="B"))
    assert found["site=A", ALL_CLASSES, "dice"]["mean"] == pytest.approx(0.5)
    assert found["site=B", ALL_CLASSES, "dice"]["cases"] == 1
    assert math.isnan(found["site=B", ALL_CLASSES, "dice"]["low"])


def test_metric_names_are_those_that_mlflow_allows_and_no_value_is_nan() -> None:
    scores = summarize_scores([table(row("a", subgroup_site="St. M/B (2)"), row("b"), absent("c"))])
    metrics = score_metrics(scores, "test")
    assert metrics["test/hd95_mm_organ_1"] == 4.0
    assert metrics["test/dice_ci95_low"] == metrics["test/dice"] == 0.5
    assert metrics["test/site/St._M/B__2_/dice"] == 0.5
    assert all(np.isfinite(list(metrics.values())))


def test_sheet_and_its_three_files(tmp_path: Any) -> None:
    scores = summarize_scores([table(row("a", dice=0.4), row("b", dice=0.6), missed("c"))])
    write_table(tmp_path / "scores", scores, score_sheet(scores))
    texts = {path.suffix: path.read_text() for path in tmp_path.iterdir()}
    interval = mean_interval([0.4, 0.6, 0.0])
    cell = f"0.333 ({interval.low:.3f} to {interval.high:.3f})"
    assert cell in texts[".md"]
    assert cell in texts[".tex"]
    assert "1 of 3" in texts[".md"]
    assert "0 of 0" not in texts[".md"]  # no reference without the class, so nothing to count
    assert r"\toprule" in texts[".tex"]
    assert pd.read_csv(tmp_path / "scores.csv")["mean"].tolist() == scores["mean"].tolist()


def test_tables_made_before_shapes_were_scored_have_no_summary() -> None:
    assert summarize_scores([pd.DataFrame([row("a")]).drop(columns="nsd")]).empty
