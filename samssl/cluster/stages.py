"""Each stage once: its digests in, its work, its digests out."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samssl.bundle import write_bundle
from samssl.cluster.launch import call_remote, ray_map, train
from samssl.cluster.stage import Place, StageRun, stage
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.recipes.simulated import SimulateConfig, simulate
from samssl.data.slices import REJECTED_FILE, SliceStore
from samssl.evaluate import EvaluateConfig, evaluate
from samssl.files import sha256_file, sha256_tree, write_text, written_aside
from samssl.models.checkpoints import save_weights
from samssl.models.sam import ModelConfig, check_checkpoint
from samssl.report.page import ReportConfig, write_report
from samssl.train.context import State
from samssl.train.finetune import FinetuneConfig, finetune, training_rows
from samssl.train.pretrain import PretrainConfig, pretrain, pretrained_sam


def run_simulate(config: SimulateConfig) -> None:
    """Write a cohort of simulated subjects."""
    simulate(config, run=ray_map)


def run_prepare(config: PrepareConfig, place: Place = Place()) -> str:
    """Scans to a slice store; returns the digest of its manifest."""
    with stage("prepare", config, {}, place, always=True) as work:
        summary = prepare(config, run=ray_map)
        print(
            f"prepare: {summary.cases} cases, {summary.slices} slices; wrote {summary.wrote} cases",
            flush=True,
        )
        if summary.rejected:
            print(f"prepare: rejected {summary.rejected} files, see {config.out / REJECTED_FILE}", flush=True)
        work.metrics = {"cases": summary.cases, "slices": summary.slices, "rejected": summary.rejected}
        work.run.set_tags({"path.sources": str(config.data.root.absolute())})
        work.wrote("manifest", summary.digest, config.out)
    return summary.digest


def run_pretrain(config: PretrainConfig, place: Place = Place()) -> Path:
    """Slice store to a SAM-format encoder checkpoint; returns its path."""
    inputs = {"manifest": SliceStore(config.data.store).digest, "encoder": encoder_digest(config.model)}
    checkpoint = config.out / "encoder.pth"
    with stage("pretrain", config, inputs, place) as work:
        if not work.done:
            state = train(pretrain, config, config.resources, work.run, work.out / "ray")
            save_weights(pretrained_sam(config, state), checkpoint)
            with written_aside(config.out / "state.pt") as path:
                torch.save(state, path)
            _finish(work, state)
            work.metrics = {"val/loss": -state["progress"]["best_score"], "steps": state["progress"]["step"]}
            work.wrote("encoder", sha256_file(checkpoint), checkpoint)
    return checkpoint


def run_finetune(config: FinetuneConfig, place: Place = Place()) -> Path:
    """Slice store and SAM-format checkpoint to a model bundle; returns its path."""
    store = SliceStore(config.data.store)
    inputs = {"manifest": store.digest, "encoder": encoder_digest(config.model)}
    bundle = config.out / "bundle"
    with stage("finetune", config, inputs, place) as work:
        if not work.done:
            shots = training_rows(store, config.data)
            write_text(
                config.out / "shots.csv", "\n".join(["case,z", *(f"{case},{z}" for case, z in shots)]) + "\n"
            )
            state = train(finetune, config, config.resources, work.run, work.out / "ray")
            progress = state["progress"]
            digest = write_bundle(bundle, config, store, tuned_weights(progress))
            _finish(work, state)
            work.metrics = {"val/dice": progress["best_score"], "best_step": progress["best_step"]}
            work.wrote("bundle", digest, bundle)
    return bundle


def run_evaluate(config: EvaluateConfig, place: Place = Place()) -> None:
    """Model bundle and slice store to a table of per-case scores."""
    inputs = {"manifest": SliceStore(config.store).digest, "bundle": sha256_tree(config.bundle)}
    with stage("evaluate", config, inputs, place) as work:
        if not work.done:
            evaluation = call_remote(evaluate, config)
            work.metrics = evaluation.metrics(config.split)
            table = work.out / "cases.parquet"
            work.run.log_file(table)
            work.wrote("cases", sha256_file(table), table)


def run_report(config: ReportConfig) -> None:
    """Study folder to `report.html` and `summary.json`."""
    print(f"report: {write_report(config)}", flush=True)


def tuned_weights(progress: dict[str, Any]) -> dict[str, Tensor]:
    """What fine-tuning changed, as at the best validation, named as in the segmenter."""
    prefix = "segmenter."
    return {name.removeprefix(prefix): value for name, value in progress["best_weights"].items()}


def _finish(work: StageRun, state: State) -> None:
    """Leave the curves and pictures in the stage's folder; Ray's own files are not needed any more."""
    lines = [f"{step},{metric},{value!r}" for step, metric, value in state["progress"]["history"]]
    write_text(work.out / "history.csv", "\n".join(["step,metric,value", *lines]) + "\n")
    work.run.download("reconstructions", work.out)
    shutil.rmtree(work.out / "ray", ignore_errors=True)


def encoder_digest(model: ModelConfig) -> str:
    """SHA-256 of the checkpoint file, or what random weights are drawn from."""
    if model.checkpoint is None:
        return f"random-{model.variant}-{model.init_seed}"
    check_checkpoint(model)  # here, before anything is started or written
    return sha256_file(model.checkpoint)
