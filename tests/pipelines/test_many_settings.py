"""A study of several arms and numbers of shots: its overview, an arm that fails, an arm that is added."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from pipelines_support import StudyFolder, make_study

pytestmark = pytest.mark.ray
ARMS = {
    "no_ssl": {},
    "unet": {"init": "random", "set": {"strategy.network": "unet"}},
    "broken": {"set": {"strategy.lora.blocks": [9]}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, make_scans: Callable[..., Path]) -> StudyFolder:
    """Two numbers of shots, two arms that work and one that cannot."""
    root = tmp_path_factory.mktemp("settings")
    folder = make_study(root, make_scans(root / "scans", cases=8), arms=ARMS, shots=[1, 2], treatment="unet")
    done = folder.study(check=False)
    assert done.returncode == 1
    assert "2 run(s) of the study failed:" in done.stderr
    assert "1-shot/arms/broken/seed0: " in done.stderr
    assert "blocks 0 to 3" in done.stderr
    return folder


def test_each_setting_has_a_report_and_all_of_them_an_overview(study: StudyFolder) -> None:
    overview = (study.out / "report.html").read_text()
    for shots in (1, 2):
        page = (study.out / f"{shots}-shot/report.html").read_text()
        assert "failed: strategy.lora.blocks names [9]" in page
        assert f'href="{shots}-shot/report.html"' in overview
        tables = [
            study.out / f"{shots}-shot/arms/{arm}/seed0/evaluate/cases.parquet" for arm in ("no_ssl", "unet")
        ]
        means = [pd.read_parquet(path).groupby("case")["dice"].mean().mean() for path in tables]
        scores = pd.read_csv(study.out / "scores.csv").set_index(["dataset", "arm"])["dice"]
        assert scores[f"tiny, {shots}-shot"].to_dict() == pytest.approx(
            dict(zip(("no_ssl", "unet"), means, strict=True))
        )
    difference = study.json("summary.json")["difference"]
    assert (difference["treatment"], difference["datasets"], difference["cases"]) == ("unet", 2, 6)


def test_the_shots_of_one_are_among_the_shots_of_two(study: StudyFolder) -> None:
    shots = [
        set((study.out / f"{count}-shot/arms/{arm}/seed0/finetune/shots.csv").read_text().splitlines()[1:])
        for count in (1, 2)
        for arm in ("no_ssl", "unet")
    ]
    assert shots[0] == shots[1] < shots[2] == shots[3]


def test_what_is_mended_and_added_is_run_and_nothing_else(study: StudyFolder) -> None:
    settings = yaml.safe_load((study.root / "study.yaml").read_text())
    settings["arms"]["broken"]["set"] = {"strategy.lora.blocks": [3]}
    settings["arms"]["decoder"] = {"set": {"strategy.scope": "decoder"}}
    (study.root / "study.yaml").write_text(yaml.safe_dump(settings))
    kept = {path: path.stat().st_mtime_ns for path in study.out.rglob("cases.parquet")}
    told = study.study().stdout
    assert told.count("nothing to do") == 2 * len(kept) == 8
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    scores = pd.read_csv(study.out / "scores.csv")
    assert set(scores["arm"]) == {"no_ssl", "unet", "broken", "decoder"}
    assert "Ranks over cases" in (study.out / "report.html").read_text()


def test_a_dry_run_counts_what_is_finished_and_starts_nothing(study: StudyFolder) -> None:
    before = sorted(study.out.rglob("*"))
    told = study.study("seeds=[0, 1]", "dry_run=true").stdout
    row = next(line.split() for line in told.splitlines() if line.startswith("fine-tuning"))
    assert [int(count) for count in row[1:3]] == [16, 8]
    assert sorted(study.out.rglob("*")) == before
