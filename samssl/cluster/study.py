"""A study: the same few-shot fine-tuning from several initial weights, over several seeds, compared.

<out>/store/                                 one slice store
<out>/pretrain/seed<k>/                      self-supervised pretraining from the base weights
<out>/arms/<arm>/seed<k>/finetune, evaluate  the same cases, shots and seeds in every arm
<out>/report.html, summary.json
"""

from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

from samssl.cluster.stage import Place, stage
from samssl.cluster.stages import run_evaluate, run_finetune, run_prepare, run_pretrain, run_simulate
from samssl.config import config, derive
from samssl.data.prepare import PrepareConfig
from samssl.data.recipes.simulated import SimulateConfig
from samssl.evaluate import EvaluateConfig
from samssl.files import read_json
from samssl.models.sam import ModelConfig
from samssl.models.strategies import follow_name
from samssl.report.page import ReportConfig, write_report
from samssl.train.finetune import FinetuneConfig
from samssl.train.pretrain import PretrainConfig


@config
class StudyConfig:
    """Arms that differ in their initial weights and in nothing else.

    Folders, stores and models of the single stages follow from `out`, `name` and `model`.
    """

    name: str
    """Name of the study: the MLflow experiment."""
    out: Path
    """Folder of the study."""
    model: ModelConfig = ModelConfig()
    """The base model of every arm, and what pretraining starts from."""
    simulate: SimulateConfig | None = None
    """Makes the scans first, where they are simulated."""
    prepare: PrepareConfig
    """Scans to slice store."""
    pretrain: PretrainConfig
    """Base weights to self-supervised weights."""
    finetune: FinetuneConfig
    """Fine-tuning, the same in every arm."""
    arms: dict[str, Literal["ssl", "base"]] = field(default_factory=lambda: {"ssl": "ssl", "no_ssl": "base"})
    """Name of each arm, and whether it starts from the pretrained or from the base weights."""
    seeds: tuple[int, ...] = (0,)
    """Each seed draws its own base weights (where no checkpoint is given), shots, batches and new layers."""

    @staticmethod
    def fill(tree: dict[str, Any]) -> None:
        """Derive what the single stages are told from `name`, `out`, `model` and `seeds`."""
        follow_name(tree, "finetune.strategy")
        out, name = Path(str(tree.get("out", "runs/study"))), tree.get("name", "study")
        store = str(out / "store")
        derived: dict[str, Any] = {"prepare.name": name, "prepare.out": store}
        if tree.get("simulate") is not None:
            derived |= {"simulate.out": str(out / "cohort"), "prepare.data.root": str(out / "cohort")}
        for stage_name in ("pretrain", "finetune"):
            derived |= {
                f"{stage_name}.out": str(out / stage_name),
                f"{stage_name}.data.store": store,
                f"{stage_name}.model": tree.get("model", {}),
                f"{stage_name}.optim.seed": 0,
            }
        derived["finetune.data.shot_seed"] = 0
        derived["finetune.data.input"] = _given(tree, "pretrain", "data", "input")
        ignored = [field_name for field_name, value in derived.items() if derive(tree, field_name, value)]
        if ignored:
            print(
                f"study: follows from other fields, and is ignored: {', '.join(ignored)}",
                flush=True,
            )


def _given(tree: Any, *names: str) -> Any:
    """What the nested `tree` says under these names; an empty mapping where it says nothing."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree or {}


def run_study(config: StudyConfig) -> Path:
    """Run whatever of the study is not finished yet, then write the report; returns its path."""
    place = Place(experiment=config.name)
    with stage("study", config, {}, place, always=True) as work:
        place = replace(place, parent_run_id=work.run.run_id)
        if config.simulate:
            run_simulate(config.simulate)
        run_prepare(config.prepare, place)
        for seed in config.seeds:
            _run_seed(config, seed, replace(place, seed=seed))
        page = write_report(ReportConfig(study=config.out))
        summary = read_json(page.with_name("summary.json"))
        work.metrics = _metrics(summary)
        for path in (page, page.with_name("summary.json")):
            work.run.log_file(path)
    print(f"\nReport:    {page}\nMLflow UI: mlflow ui --backend-store-uri {work.run.uri}", flush=True)
    return page


def _run_seed(config: StudyConfig, seed: int, place: Place) -> None:
    """Pretrain once from this seed's base weights, then fine-tune and evaluate every arm."""
    base = replace(config.model, init_seed=config.model.init_seed + seed)
    starts = {"base": base}
    if "ssl" in config.arms.values():
        pretrain = replace(
            config.pretrain,
            out=config.out / "pretrain" / f"seed{seed}",
            model=base,
            optim=replace(config.pretrain.optim, seed=seed),
        )
        starts["ssl"] = replace(base, checkpoint=run_pretrain(pretrain, place))
    for arm, start in config.arms.items():
        folder = config.out / "arms" / arm / f"seed{seed}"
        finetune = replace(
            config.finetune,
            out=folder / "finetune",
            model=starts[start],
            data=replace(config.finetune.data, shot_seed=seed),
            optim=replace(config.finetune.optim, seed=seed),
        )
        bundle = run_finetune(finetune, replace(place, arm=arm))
        evaluate = EvaluateConfig(out=folder / "evaluate", bundle=bundle, store=config.prepare.out)
        run_evaluate(evaluate, replace(place, arm=arm))


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The study's results by metric name, for MLflow."""
    metrics = {f"{arm}/test/dice": entry["test/dice"] for arm, entry in summary["arms"].items()}
    if summary.get("paired"):
        metrics |= {f"paired/{name}": summary["paired"][name] for name in ("mean_difference", "wilcoxon_p")}
    return {name: value for name, value in metrics.items() if value is not None}
