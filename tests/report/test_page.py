"""The page shows the summary's numbers, stands alone, and degrades into sentences."""

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from scipy.ndimage import gaussian_filter

from samssl.config import UserError
from samssl.data.slices import SliceStore
from samssl.report.examples import MOST_FAILURES
from samssl.report.figures import marked, overlay
from samssl.report.page import ReportConfig, duration, machine, short, write_report
from samssl.report.verdict import number, p_value, signed
from samssl.scores import score_text
from tests.report.conftest import StudyWriter

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The text, the loaded addresses and the balance of a page's tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str | None] = []
        self.tags: Counter[str] = Counter()
        self._open: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.addresses += [
            values[name] or "" for name in ("src", "href", "srcset", "action") if name in values
        ]
        if tag == "img":
            self.alts.append(values.get("alt"))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)


def report(study: StudyWriter, **settings: str) -> tuple[Page, dict]:
    page = write_report(ReportConfig(study=study.root, **settings))  # pyright: ignore[reportArgumentType]
    return Page(page), json.loads(page.with_name("summary.json").read_text())


@pytest.fixture
def full(study: StudyWriter, store: SliceStore) -> StudyWriter:
    """Two seeds of both arms over real scans, with histories and pictures."""
    (study.root / "config.yaml").write_text("name: tiny study\nsimulate: {subjects: 6}\n")
    cases = store.cases("test")
    for seed in (0, 1):
        study.run(f"pretrain/seed{seed}", "pretrain", seed=seed)
        study.history(f"pretrain/seed{seed}", train__loss=[1.0, 0.5, 0.4], val__loss=[0.9, 0.6, 0.5])
        for step in (20, 100, 3):
            picture = study.root / f"pretrain/seed{seed}/reconstructions/step_{step:06d}.png"
            picture.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 6, 3), step, np.uint8)).save(picture)
        for arm, gain in (("ssl", 0.1), ("no_ssl", 0.0)):
            study.run(f"arms/{arm}/seed{seed}/finetune", "finetune", arm=arm, seed=seed)
            study.history(f"arms/{arm}/seed{seed}/finetune", train__loss=[1.0, 0.5], val__dice=[0.3, 0.6])
            dice = {case: {1: 0.5 + gain + index / 9, 2: 0.3 + seed / 7} for index, case in enumerate(cases)}
            folder = study.evaluation(arm, seed, dice)
            for case in cases:
                array = zarr.create_array(
                    folder / "predictions.zarr" / case, shape=(3, 12, 10), dtype="uint8"
                )
                array[:] = np.asarray(store.mask(case))
    return study


def test_numbers_on_the_page_are_those_of_the_summary(full: StudyWriter) -> None:
    page, summary = report(full)
    paired = summary["paired"]
    for arm in summary["arms"].values():
        for entry in (arm, *arm["per_label"].values(), *arm["per_seed"].values()):
            low, high = entry["ci95"]
            assert (
                f"{number(entry['test/dice'])} {number(low)} to {number(high)} {entry['cases']}" in page.text
            )
    low, high = paired["ci95"]
    assert (
        f"{signed(paired['mean_difference'])} {signed(low)} to {signed(high)} {paired['cases']} 2"
        in page.text
    )
    assert p_value(paired["wilcoxon_p"]) in page.source
    for case, dice in paired["per_case"].items():
        difference = signed(dice["ssl"] - dice["no_ssl"])
        assert f"{case} {number(dice['ssl'])} {number(dice['no_ssl'])} {difference}" in page.text
    for stage in summary["stages"]:
        assert stage["run_id"] in page.source


def test_full_page(full: StudyWriter) -> None:
    page, _ = report(full)
    assert "mean Dice" in page.text
    assert "on the same 4 simulated test cases" in page.text
    assert "What is missing" not in page.source
    # Charts: paired, differences, labels, pretraining, fine-tuning, lineage; 2 x 2 pictures; 3 cases x 6,
    # and the case that is left as a row of 3.
    assert page.tags["img"] == 6 + 4 + 18 + 3
    assert page.text.count("step 3:") == page.text.count("step 100:") == 2
    assert "step 20:" not in page.text
    assert "1 min 1 s" in page.text
    assert "Machine A: Abacus, 2 cores, 4.0 GiB memory." in page.text
    assert len(page.source) < 5_000_000


def test_every_score_is_on_the_page_and_in_the_tables(full: StudyWriter) -> None:
    page, summary = report(full)
    table = (full.root / "scores.md").read_text()
    for arm in ("ssl", "no_ssl"):
        assert {row["subgroup"] for row in summary["arms"][arm]["scores"]} == {"all", "site=A"}
        for row in summary["arms"][arm]["scores"]:
            assert score_text(row) in page.text
            assert score_text(row) in table
    assert "within 2.0 mm of the other" in page.text
    assert "No arm missed a label" in page.text
    assert "site=A" in page.text


def test_each_number_comes_with_the_command_that_gives_it(full: StudyWriter) -> None:
    (full.root / "arms/ssl/seed0/evaluate/config.yaml").write_text("split: test\n")
    page, _ = report(full)
    for command in (
        f"samssl evaluate --config {full.root}/arms/ssl/seed0/evaluate/config.yaml out=NEW_FOLDER",
        "samssl lineage id-arms/no_ssl/seed1/evaluate",
        f"samssl report study={full.root} baseline=no_ssl treatment=ssl",
    ):
        assert command in page.text


def test_failures_are_listed(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": {1: 0.5, 2: float("nan")}, "b": 0.6})
    page, _ = report(study)
    assert "a tumour SSL false positive" in page.text


def test_page_of_noisy_scans_is_below_5_mb(full: StudyWriter) -> None:
    """With as many pictures as there ever are, of 512 x 512 pixels with noise of 5 % of the window."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(size=(512, 512)), 25)
    labels = (smooth > 0).astype(np.uint8)
    image = smooth / np.ptp(smooth) + 0.5 + 0.05 * rng.normal(size=smooth.shape)
    scan = np.clip(image, 0, 1).astype(np.float32)
    pictures = 3 * 6 + MOST_FAILURES * 3
    heaviest = max(len(overlay(scan, labels, 1.0)), len(marked(scan, labels > 0, 1.0)))
    page, _ = report(full)
    assert len(page.source) + pictures * heaviest < 5_000_000


def test_page_stands_alone_and_is_accessible(full: StudyWriter) -> None:
    page, _ = report(full)
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert page.tags["script"] == 0
    assert all(alt for alt in page.alts)
    assert len(page.alts) == page.tags["img"]


def test_same_study_gives_the_same_bytes(full: StudyWriter) -> None:
    paths = [full.root / name for name in ("report.html", "summary.json")]
    report(full)
    first = [path.read_bytes() for path in paths]
    report(full)
    assert [path.read_bytes() for path in paths] == first


def test_report_goes_where_it_is_told(study: StudyWriter, tmp_path: Path) -> None:
    study.evaluation("ssl", 0, {"a": 0.5})
    report(study, out=tmp_path / "elsewhere")  # pyright: ignore[reportArgumentType]
    scores = [f"scores.{suffix}" for suffix in ("csv", "md", "tex")]
    written = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert written == ["report.html", *scores, "summary.json"]
    assert not (study.root / "report.html").exists()


def test_names_are_escaped(study: StudyWriter) -> None:
    (study.root / "config.yaml").write_text("name: <b>bold</b>\n")
    for arm in ("ssl", "no_ssl", "<i>third"):
        study.evaluation(arm, 0, {"<script>alert(1)</script>": 0.5, "b&c": 0.7})
    page, _ = report(study)
    assert page.tags["script"] == page.tags["b"] == page.tags["i"] == 0
    assert {"<b>bold</b>", "<i>third", "<script>alert(1)</script>", "b&c"} <= {
        word.strip() for word in page.words
    }


def test_one_arm_without_anything_else(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5, "b": 0.7})
    page, summary = report(study)
    assert summary["paired"] is None
    for sentence in (
        "There is no pair of arms to compare",
        "There is no evaluation of arm no_ssl",
        "The study folder holds no slice store",
        "The study folder holds no pretraining history.",
        "There are no reconstruction pictures.",
        "The study folder holds no fine-tuning history.",
    ):
        assert sentence in page.text
    assert page.tags["img"] == 2  # Dice by label, lineage


def test_one_case(study: StudyWriter) -> None:
    study.evaluation("ssl", 0, {"a": 0.5})
    study.evaluation("no_ssl", 0, {"a": 0.4})
    page, _ = report(study)
    assert "One case cannot show whether SSL is better than no SSL" in page.text
    assert "no interval from one case" in page.text


def test_arms_of_other_names(study: StudyWriter) -> None:
    study.evaluation("mae_long", 0, {"a": 0.5, "b": 0.6})
    study.evaluation("meta", 0, {"a": 0.4, "b": 0.3})
    page, summary = report(study, baseline="meta", treatment="mae_long")
    assert summary["paired"]["better"] == 2
    assert "mae long minus meta, paired" in page.text


def test_parts_that_cannot_be_read_do_not_stop_the_report(full: StudyWriter) -> None:
    (full.root / "store/manifest.json").write_text("{}")
    (full.root / "pretrain/seed0/reconstructions/step_000100.png").write_bytes(b"not a picture")
    (full.root / "pretrain/seed0/history.csv").write_text("step\n1\n")
    page, _ = report(full)
    assert "The slice store cannot be read, so no scans are shown." in page.text
    assert page.text.count("step 100:") == 1


def test_nothing_is_written_when_there_is_nothing_to_report(study: StudyWriter) -> None:
    with pytest.raises(UserError, match="no finished evaluation"):
        report(study)
    assert list(study.root.iterdir()) == []


def test_equal_arms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both 'ssl'"):
        ReportConfig(study=tmp_path, baseline="ssl")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "\N{EN DASH}"),
        (41.6, "42 s"),
        (59.9, "1 min 0 s"),
        (185.0, "3 min 5 s"),
        (7800.0, "2 h 10 min"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_machine_and_digest_in_short() -> None:
    assert machine({}) == ""
    assert machine({"processor": "X", "cores": 8, "gpus": ["H100", "H100"]}) == "X, 8 cores, 2 x H100"
    assert short("ab" * 32) == "ababababab"
    assert short("random-micro-0") == "random-micro-0"
