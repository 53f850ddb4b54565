"""Scores of study folders as one table, and published values beside them."""

from pathlib import Path

import pandas as pd
import pytest

from samssl.arms import pair_arms, score_arms
from samssl.config import UserError
from samssl.report.study import read_study
from samssl.report.tables import PublishedValue, beside_published, read_published, tidy_scores
from tests.report.conftest import StudyWriter

HOW_TO = Path(__file__).parents[2] / "docs/how-to.md"
VALUES = """
values:
  - {arm: lora, dataset: liver, dice: 0.9, source: "Example 2025, table 3"}
  - {arm: nnU-Net, dataset: liver, dice: 9.1e-1, source: "Example 2025, table 3"}
  - {arm: lora, dataset: heart, dice: 1, source: Other 2024}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "published.yaml"
    path.write_text(VALUES)
    return path


def test_published_values_are_read(file: Path) -> None:
    values = read_published(file)
    assert [value.dice for value in values] == [0.9, 0.91, 1.0]
    assert values[1] == PublishedValue(
        arm="nnU-Net", dataset="liver", dice=0.91, source="Example 2025, table 3"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- {arm: a}", "must hold a mapping"),
        ("lists: []", "one list, 'values:'"),
        ("values: {arm: a}", "one list, 'values:'"),
        ("values: [0.9]", "Entry 1 of .* must give arm, dataset, dice and source, not 0.9"),
        ("values: [{arm: a, dataset: d, dice: 0.9}]", "entry 1 of .*\n  source: is required"),
        ("values: [{arm: a, dataset: d, dice: 0.9, source: s, dize: 1}]", "dize: there is no such field"),
        ("values: [{arm: a, dataset: d, dice: 86.7, source: s}]", "divide percentages by 100"),
        ("values: [{arm: a, dataset: d, dice: .nan, source: s}]", "between 0 and 1"),
        ("values: [{arm: a, dataset: d, dice: 0.9, source: ' '}]", "source is empty"),
        ("values: [{arm: a, dataset: d, dice: high, source: s}]", "dice: .* valid number"),
        (VALUES + "  - {arm: lora, dataset: heart, dice: 0.8, source: Other 2024}", "'lora' on heart twice"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_published(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of published values"):
        read_published(tmp_path / "none.yaml")


def test_published_values_stand_below_ours_and_are_marked(file: Path) -> None:
    measured = pd.DataFrame(
        [("ssl", "spleen", 0.5, 0.4, 0.6, 3, 1), ("ssl", "liver", 0.8, 0.7, 0.9, 3, 1)],
        columns=["arm", "dataset", "dice", "low", "high", "cases", "seeds"],
    )
    table = beside_published(measured, read_published(file))
    assert list(zip(table["dataset"], table["name"], table["published"], table["source"], strict=True)) == [
        ("spleen", "SSL", False, "this study"),
        ("liver", "SSL", False, "this study"),
        ("liver", "lora (published)", True, "Example 2025, table 3"),
        ("liver", "nnU-Net (published)", True, "Example 2025, table 3"),
    ]
    assert table["dice"].to_list() == [0.5, 0.8, 0.9, 0.91]
    assert table["low"].notna().to_list() == [True, True, False, False]


def test_without_published_values_ours_stay_as_they_are() -> None:
    measured = pd.DataFrame({"arm": ["a"], "dataset": ["d"], "dice": [0.5]})
    assert beside_published(measured, ())["published"].to_list() == [False]


def test_two_study_folders_become_one_table(tmp_path: Path) -> None:
    studies = {}
    for dataset, shift in (("liver", 0.0), ("heart", 0.25)):
        root = tmp_path / dataset
        root.mkdir()
        writer = StudyWriter(root)
        writer.evaluation("ssl", 0, {"p1": {1: 0.5 + shift, 2: 0.75 + shift}, "p2": {1: 0.5, 2: 0.5}})
        writer.evaluation("no_ssl", 0, {"p1": {1: 0.25, 2: 0.25}, "p2": {1: 0.25, 2: 0.25}})
        studies[dataset] = read_study(root)
    table = tidy_scores(studies)
    assert len(table) == 8
    paired = pair_arms(table, ["ssl", "no_ssl"])
    assert paired.by_case["ssl"].to_dict() == {
        ("heart", "p1"): 0.875,
        ("heart", "p2"): 0.5,
        ("liver", "p1"): 0.625,
        ("liver", "p2"): 0.5,
    }
    assert score_arms(table).set_index(["arm", "dataset"]).loc[("no_ssl", "liver"), "dice"] == 0.25


def test_the_snippet_of_the_how_to_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = HOW_TO.read_text().split("## Compare many arms", 1)[1].split("\n## ", 1)[0]
    code, values = (
        section.split(start, 1)[1].split("```", 1)[0]
        for start in ("```python\n", "```yaml\n# published.yaml\n")
    )
    (tmp_path / "published.yaml").write_text(values)
    for dataset in ("hippocampus", "acdc"):
        writer = StudyWriter(tmp_path / "runs" / dataset)
        for shift, arm in enumerate(("ssl", "no_ssl", "lora_only")):
            writer.evaluation(arm, 0, {f"p{case}": 0.5 + case / 9 - shift / 10 for case in range(4)})
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "nnU-Net (published)" in capsys.readouterr().out
