"""The report stage: a study folder -> `report.html`, a page that stands alone, and the numbers beside it.

`summary.json` has all of them, `scores.csv`, `.md` and `.tex` those of the arms for a paper.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from samssl.config import config
from samssl.data.slices import SliceStore
from samssl.files import write_json, write_table, write_text
from samssl.report import verdict as words
from samssl.report.study import Study, read_study
from samssl.report.summary import summarize
from samssl.scores import SCORES, score_sheet, score_text


@config
class ReportConfig:
    """What to report on."""

    study: Path
    """Folder of the study, as `samssl study` wrote it."""
    out: Path | None = None
    """Folder for report.html and summary.json; null: the study folder itself."""
    baseline: str = "no_ssl"
    """Arm that the comparison starts from."""
    treatment: str = "ssl"
    """Arm that is compared with the baseline."""

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        if self.baseline == self.treatment:
            raise ValueError(f"baseline and treatment are both '{self.treatment}'; name two different arms")


def write_report(config: ReportConfig) -> Path:
    """Write `summary.json`, `scores.*` and `report.html`; returns the path of the page.

    Raises:
        UserError: when the study folder holds no finished evaluation.
    """
    study = read_study(config.study)
    summary = summarize(study, config.baseline, config.treatment)
    out = config.out or config.study
    page = render(study, summary, config)
    write_json(out / "summary.json", summary)
    scores = arm_scores(summary, _shown_arms(summary, config))
    if len(scores):
        write_table(out / "scores", scores, score_sheet(scores))
    write_text(out / "report.html", page)
    return out / "report.html"


def render(study: Study, summary: dict[str, Any], config: ReportConfig) -> str:
    """The whole page as text. Every number in it comes from `summary`."""
    from samssl.report import charts, examples  # matplotlib only when a page is made

    store, store_note = examples.open_store(study.home / "store")
    arms = _shown_arms(summary, config)
    shown, failed = examples.make_examples(study, summary, arms, store) if store else ([], [])
    return template("report.html").render(
        summary=summary,
        dataset=store.name if store else "",
        verdict=words.verdict(summary),
        caveats=words.caveats(summary),
        arms=arms,
        machines=_machines(summary["stages"]),
        charts=charts.result_charts(summary, arms),
        curves=charts.training_curves(study, arms),
        reconstructions=charts.reconstructions(study),
        lineage=charts.lineage(study, arms),
        score_blocks=score_blocks(arm_scores(summary, arms)),
        tolerances=study.tolerances_mm,
        in_pixels=store is not None and _in_pixels(store),
        examples=shown,
        failures=failed,
        commands=reproduction(study, config, arms),
        legend=examples.legend(study, store) if store else {},
        store_note=store_note,
    )


def arm_scores(summary: Mapping[str, Any], arms: Iterable[str]) -> pd.DataFrame:
    """The scores of every arm: `samssl.scores.summarize_scores` with a column `arm` before it."""
    return pd.DataFrame([{"arm": arm, **row} for arm in arms for row in summary["arms"][arm]["scores"]])


def score_blocks(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """One table a subgroup and label: a row a score, `texts` by arm."""
    blocks = []
    for (subgroup, label), own in scores.groupby(["subgroup", "label"], sort=False) if len(scores) else ():
        rows = {}
        entries: list[Any] = own.to_dict("records")
        for entry in entries:
            rows.setdefault(SCORES[entry["score"]].title, {})[entry["arm"]] = score_text(entry)
        blocks.append({"subgroup": subgroup, "label": label, "rows": rows})
    return blocks


def reproduction(study: Study, config: ReportConfig, arms: Iterable[str]) -> list[tuple[str, str]]:
    """What is on the page, and the command that computes it anew."""
    path = shlex.quote(config.study.as_posix())
    compared = f"baseline={config.baseline} treatment={config.treatment}"
    commands = [
        ("everything", f"samssl study --config {path}/config.yaml out=NEW_FOLDER"),
        ("this page and its tables", f"samssl report study={path} {compared}"),
    ]
    for arm in arms:
        for seed, evaluation in study.evaluations[arm].items():
            what, folder = f"{words.arm_name(arm)}, seed {seed}", evaluation.stage.folder
            if (study.root / folder / "config.yaml").is_file():
                told = f"samssl evaluate --config {path}/{folder}/config.yaml out=NEW_FOLDER"
                commands.append((f"scores of {what}", told))
            commands.append((f"what {what} was made from", f"samssl lineage {evaluation.stage.run_id}"))
    return commands


def _in_pixels(store: SliceStore) -> bool:
    """Whether the store holds nothing but 2D images, of which no file says how large a pixel is."""
    columns = store.rows.columns(["num_slices", "spacing_y_mm", "spacing_x_mm"])
    return bool((columns == 1).all(axis=None))


def template(name: str) -> Any:
    """A template of the report, with the filters by which pages write numbers."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    filters = (words.number, words.signed, words.p_value, words.arm_name, duration, machine, short)
    environment = Environment(
        loader=PackageLoader("samssl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(name)


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`, or a dash."""
    if seconds is None:
        return words.DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
    )


def machine(hardware: Mapping[str, Any]) -> str:
    """`Xeon, 2 cores, 23.5 GiB memory, 2 x H100` from a stage's hardware; empty where nothing is known."""
    gpus = Counter(hardware.get("gpus") or ())
    parts = [
        str(hardware.get("processor") or ""),
        f"{hardware['cores']} cores" if hardware.get("cores") else "",
        f"{hardware['memory_gib']} GiB memory" if hardware.get("memory_gib") else "",
        *(f"{count} x {gpu}" for gpu, count in gpus.items()),
    ]
    return ", ".join(part for part in parts if part)


def short(digest: str) -> str:
    """The first ten characters of a SHA-256; whatever is not one stays whole."""
    return digest[:10] if re.fullmatch("[0-9a-f]{32,64}", digest) else digest


def _machines(stages: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Each different machine with a letter: `{"Xeon, 2 cores": "A"}`."""
    texts = dict.fromkeys(text for stage in stages if (text := machine(stage["hardware"])))
    return {text: chr(ord("A") + index % 26) for index, text in enumerate(texts)}


def _shown_arms(summary: Mapping[str, Any], config: ReportConfig) -> list[str]:
    """Treatment, baseline, then every further arm."""
    first = [arm for arm in (config.treatment, config.baseline) if arm in summary["arms"]]
    return first + [arm for arm in summary["arms"] if arm not in first]
