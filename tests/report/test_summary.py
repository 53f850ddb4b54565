"""The numbers of a study against numbers worked out by hand, and what happens when parts are missing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from samssl.config import UserError
from samssl.report.study import read_study
from samssl.report.summary import summarize
from samssl.statistics import mean_interval, paired_comparison
from tests.report.conftest import StudyWriter

NAN = math.nan


def summary_of(study: StudyWriter) -> dict[str, Any]:
    return summarize(read_study(study.root), baseline="no_ssl", treatment="ssl")


def test_arm_by_hand(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": {1: 0.5, 2: 0.75}, "b": {1: 0.25, 2: NAN}, "c": {1: NAN, 2: NAN}})
    arm = summary_of(study)["arms"]["ssl"]
    # a: mean of both labels 0.625; b: label 1 only, 0.25; c: no label in the reference, no Dice.
    assert arm["per_case"] == {"a": 0.625, "b": 0.25}
    assert (arm["test/dice"], arm["ci95"], arm["cases"]) == (0.4375, [0.25, 0.625], 2)
    assert arm["per_label"]["liver"] == {"test/dice": 0.375, "ci95": [0.25, 0.5], "cases": 2}
    assert arm["per_label"]["tumour"] == {"test/dice": 0.75, "ci95": [None, None], "cases": 1}
    # The writer predicts voxels of every label in every case.
    assert arm["false_positive_cases"] == {"liver": {"cases": 1, "of": 1}, "tumour": {"cases": 2, "of": 2}}
    assert arm["run_id"] == "id-arms/ssl/seed0/evaluate"
    assert arm["run_ids"] == {"0": "id-arms/ssl/seed0/evaluate"}


def test_seeds_are_averaged_within_a_case_before_anything_else(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.25, "b": 0.5})
    study.evaluation("ssl", 10, {"a": 0.75, "b": 0.5})
    arm = summary_of(study)["arms"]["ssl"]
    assert arm["per_case"] == {"a": 0.5, "b": 0.5}
    assert (arm["test/dice"], arm["ci95"], arm["cases"]) == (0.5, [0.5, 0.5], 2)
    assert list(arm["per_seed"]) == ["0", "10"]
    assert arm["per_seed"]["10"] == {"test/dice": 0.625, "ci95": [0.5, 0.75], "cases": 2}


def test_paired_comparison_is_over_cases(study: StudyWriter) -> None:
    ssl, base = [0.7, 0.8, 0.9, 0.4, 0.5], [0.6, 0.75, 0.6, 0.5, 0.5]
    study.evaluation("ssl", 0, dict(zip("abcde", ssl, strict=True)))
    study.evaluation("no_ssl", 0, dict(zip("edcba", base[::-1], strict=True)))  # written in another order
    paired, expected = summary_of(study)["paired"], paired_comparison(ssl, base)
    assert paired["mean_difference"] == pytest.approx(0.07)
    assert paired["ci95"] == [expected.low, expected.high]
    assert paired["wilcoxon_p"] == expected.wilcoxon_p
    assert [paired[name] for name in ("better", "worse", "tied", "cases")] == [3, 1, 1, 5]
    assert paired["means"] == pytest.approx({"ssl": 0.66, "no_ssl": 0.59})
    assert paired["per_case"]["c"] == {"ssl": 0.9, "no_ssl": 0.6}


def test_equal_arms_differ_by_exactly_nothing(study: StudyWriter) -> None:
    for arm in ("ssl", "no_ssl"):
        for seed in range(3):
            study.evaluation(arm, seed, {"a": 0.1 + seed / 7, "b": 0.3 + seed / 9})
    paired = summary_of(study)["paired"]
    assert (paired["mean_difference"], paired["ci95"], paired["wilcoxon_p"]) == (0.0, [0.0, 0.0], 1.0)
    assert paired["tied"] == 2


def test_comparison_uses_the_seeds_and_cases_of_both_arms(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5, "b": 0.5, "only": 0.9})
    study.evaluation("ssl", 1, {"a": 0.9, "b": 0.9, "only": 0.9})
    study.evaluation("no_ssl", 0, {"a": 0.25, "b": 0.5})
    summary = summary_of(study)
    assert summary["paired"]["seeds"] == [0]
    assert summary["paired"]["per_case"] == {
        "a": {"ssl": 0.5, "no_ssl": 0.25},
        "b": {"ssl": 0.5, "no_ssl": 0.5},
    }
    assert any("only one of the two arms has: seed 1" in note for note in summary["notes"])
    assert any("cases that only one of the two arms has (1)" in note for note in summary["notes"])


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (None, "no evaluation of arm no_ssl"),
        ((1, {"a": 0.5}), "no seed in common"),
        ((0, {"z": 0.5}), "no case in common"),
    ],
)
def test_arms_that_cannot_be_compared(
    study: StudyWriter, other: tuple[int, dict] | None, reason: str
) -> None:
    study.evaluation("ssl", 0, {"a": 0.5})
    if other:
        study.evaluation("no_ssl", *other)
    summary = summary_of(study)
    assert summary["paired"] is None
    assert any(reason in note for note in summary["notes"])


def test_cases_that_a_seed_lacks_are_left_out_of_its_arm(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5, "b": 0.7})
    study.evaluation("ssl", 1, {"a": 0.7})
    summary = summary_of(study)
    assert summary["arms"]["ssl"]["per_case"] == {"a": pytest.approx(0.6)}
    assert any("not scored by every seed are left out (1)" in note for note in summary["notes"])


def _no_record(folder: Path) -> None:
    (folder / "run.json").unlink()


def _broken_record(folder: Path) -> None:
    (folder / "run.json").write_text('{"stage": "eval')


def _no_table(folder: Path) -> None:
    (folder / "cases.parquet").unlink()


def _cut_table(folder: Path) -> None:
    table = folder / "cases.parquet"
    table.write_bytes(table.read_bytes()[:100])


def _foreign_table(folder: Path) -> None:
    table = folder / "cases.parquet"
    table.write_bytes((folder.parents[1] / "seed0/evaluate/cases.parquet").read_bytes())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_no_record, "seed1/evaluate has no run.json"),
        (_broken_record, "seed1/evaluate/run.json cannot be read"),
        (_no_table, "seed1/evaluate/cases.parquet is missing or cannot be read"),
        (_cut_table, "seed1/evaluate/cases.parquet is missing or cannot be read"),
        (_foreign_table, "seed1/evaluate/cases.parquet is not the table that its run wrote"),
    ],
)
def test_seed_that_failed_is_left_out_and_named(study: StudyWriter, damage: Any, reason: str) -> None:
    study.evaluation("ssl", 0, {"a": 0.5})
    damage(study.evaluation("ssl", 1, {"a": 0.9}))
    summary = summary_of(study)
    assert summary["arms"]["ssl"]["test/dice"] == 0.5
    assert any(reason in note for note in summary["notes"])


def test_unfinished_run_is_left_out(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5})
    study.evaluation("ssl", 1, {"a": 0.9}, status="failed")
    (study.root / "arms/ssl/seed2/finetune").mkdir(parents=True)
    summary = summary_of(study)
    assert list(summary["arms"]["ssl"]["per_seed"]) == ["0"]
    assert any("seed1/evaluate is marked 'failed'" in note for note in summary["notes"])
    assert "Arm ssl has no evaluation for seed 2." in summary["notes"]


def test_study_without_evaluations_is_an_error_that_says_why(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5}, status="failed")
    with pytest.raises(UserError, match=r"(?s)no finished evaluation.*seed0/evaluate is marked 'failed'"):
        read_study(study.root)


def test_missing_study_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study folder"):
        read_study(tmp_path / "nowhere")


def test_inputs_of_another_version_are_named(study: StudyWriter) -> None:
    study.run("store", "prepare", outputs={"manifest": "new"})
    study.run("arms/ssl/seed0/finetune", "finetune", arm="ssl", seed=0, outputs={"bundle": "b1"})
    study.evaluation("ssl", 0, {"a": 0.5}, inputs={"manifest": "old", "bundle": "b1"})
    (note,) = summary_of(study)["notes"][:1]
    assert note.startswith("arms/ssl/seed0/evaluate used the manifest old, but store now holds new")


def test_stages_come_in_the_order_they_run_with_their_digests(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5})
    study.run("arms/ssl/seed0/finetune", "finetune", arm="ssl", seed=0, outputs={"bundle": "b"})
    study.run("pretrain/seed10", "pretrain", seed=10)
    study.run("pretrain/seed2", "pretrain", seed=2, outputs={"encoder": "e"})
    summary = summary_of(study)
    assert [stage["folder"] for stage in summary["stages"]] == [
        "pretrain/seed2",
        "pretrain/seed10",
        "arms/ssl/seed0/finetune",
        "arms/ssl/seed0/evaluate",
    ]
    assert summary["digests"]["pretrain/seed2"] == {"encoder": "e"}
    assert summary["stages"][0]["wall_time_s"] == 61.0


def test_times_are_kept_apart_from_results(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5, "b": 0.6})
    study.evaluation("no_ssl", 0, {"a": 0.4, "b": 0.6})
    before = summary_of(study)
    study.evaluation("ssl", 0, {"a": 0.5, "b": 0.6}, wall_time_s=99.0)
    after = summary_of(study)
    assert (before["arms"], before["paired"]) == (after["arms"], after["paired"])
    assert before["stages"] != after["stages"]


def test_name_and_simulation_come_from_the_study_config(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5})
    assert (summary_of(study)["study"], summary_of(study)["simulated"]) == ("tiny", False)
    (study.root / "config.yaml").write_text("name: demo\nsimulate: {subjects: 24}\n")
    assert (summary_of(study)["study"], summary_of(study)["simulated"]) == ("demo", True)


def test_summary_is_json_without_nan(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": {1: 0.5, 2: NAN}})
    study.evaluation("no_ssl", 0, {"a": {1: 0.5, 2: NAN}})
    summary = summary_of(study)
    assert json.loads(json.dumps(summary, allow_nan=False))["arms"]["ssl"]["ci95"] == [None, None]
    assert summary["arms"]["ssl"]["per_label"]["tumour"] == {
        "test/dice": None,
        "ci95": [None, None],
        "cases": 0,
    }


def test_interval_of_an_arm_is_the_bootstrap_over_cases(study: StudyWriter) -> None:
    dice = [0.61, 0.72, 0.74, 0.80, 0.35]
    study.evaluation("ssl", 0, dict(zip("abcde", dice, strict=True)))
    interval = mean_interval(dice)
    assert summary_of(study)["arms"]["ssl"]["ci95"] == [interval.low, interval.high]
