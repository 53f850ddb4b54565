"""The stages by the names of their commands."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One command: its configuration class and its function, imported only when it is used."""

    help: str
    config: str
    function: str
    sources: tuple[str, ...] = ()
    """The fields that arguments without `=` stand for, in this order; the last one may be a list."""


STAGES = {
    "simulate": Stage(
        "write a cohort of simulated subjects",
        "samssl.data.recipes.simulated:SimulateConfig",
        "samssl.cluster.stages:run_simulate",
    ),
    "prepare": Stage(
        "scans to a slice store",
        "samssl.data.prepare:PrepareConfig",
        "samssl.cluster.stages:run_prepare",
        sources=("data.root",),
    ),
    "inspect": Stage(
        "scans or a slice store to a page of what they are, what may be wrong, and settings that suit them",
        "samssl.data.inspection:InspectConfig",
        "samssl.cluster.inspecting:run_inspect",
        sources=("source",),
    ),
    "pretrain": Stage(
        "slice store to a SAM-format encoder checkpoint, without labels",
        "samssl.train.pretrain:PretrainConfig",
        "samssl.cluster.stages:run_pretrain",
    ),
    "finetune": Stage(
        "labelled cases and a checkpoint to a model bundle",
        "samssl.train.finetune:FinetuneConfig",
        "samssl.cluster.stages:run_finetune",
    ),
    "export": Stage(
        "pretrain run, or bundle, to weights or ONNX with a model card, to publish",
        "samssl.cluster.export:ExportConfig",
        "samssl.cluster.export:run_export",
    ),
    "evaluate": Stage(
        "model bundle to per-case scores",
        "samssl.evaluate:EvaluateConfig",
        "samssl.cluster.stages:run_evaluate",
    ),
    "predict": Stage(
        "masks of new scans: samssl predict BUNDLE SCAN... --out DIR",
        "samssl.predicting:PredictConfig",
        "samssl.predicting:run_predict",
        sources=("bundle", "scans"),
    ),
    "serve": Stage(
        "a bundle as a server on this machine, with a page in the browser: samssl serve BUNDLE",
        "samssl.serving.settings:ServeConfig",
        "samssl.cluster.serve:run_serve",
        sources=("bundle",),
    ),
    "nnunet": Stage(
        "labelled cases to an nnU-Net and its scores, to compare with",
        "samssl.cluster.nnunet:NnunetConfig",
        "samssl.cluster.nnunet:run_nnunet",
    ),
    "export-runs": Stage(
        "MLflow runs to a folder",
        "samssl.cluster.transfer:ExportRunsConfig",
        "samssl.cluster.transfer:run_export_runs",
    ),
    "import-runs": Stage(
        "exported runs into another MLflow",
        "samssl.cluster.transfer:ImportRunsConfig",
        "samssl.cluster.transfer:run_import_runs",
    ),
    "report": Stage(
        "study folder to report.html and summary.json",
        "samssl.report.page:ReportConfig",
        "samssl.cluster.stages:run_report",
    ),
    "sweep": Stage(
        "fine-tuning at many points of a search space; the best is tested",
        "samssl.cluster.sweep_design:SweepConfig",
        "samssl.cluster.sweep:run_sweep",
    ),
    "study": Stage(
        "all stages, several arms and seeds, compared",
        "samssl.cluster.study_design:StudyConfig",
        "samssl.cluster.study:run_study",
    ),
}
