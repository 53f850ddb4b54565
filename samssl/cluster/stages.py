"""Each stage once: its digests in, its work, its digests out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from samssl.bundle import load_segmenter, read_bundle, write_bundle
from samssl.cluster.launch import CLUSTER, Executor
from samssl.cluster.origin import RANDOM
from samssl.cluster.registry import Registration, bundle_registration, encoder_registration
from samssl.cluster.stage import TRAINING, Input, Place, StageRun, stage
from samssl.cluster.tasks import ray_map
from samssl.cluster.tracking import find_runs
from samssl.config import absolute_paths, as_url
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.recipes.simulated import SimulateConfig, simulate
from samssl.data.slices import REJECTED_FILE, SliceStore
from samssl.evaluate import CURVE_FILE, SCORES_FILE, EvaluateConfig, Evaluation, evaluate
from samssl.files import sha256_file, sha256_tree, write_text
from samssl.models.checkpoints import save_state, save_tensors, save_weights
from samssl.models.initial import RUN_FILE, LoadReport
from samssl.models.merging import merged_weights
from samssl.models.sam import ModelConfig, check_checkpoint, resolve
from samssl.report.page import ReportConfig, write_report
from samssl.train.context import State
from samssl.train.continuation import STATE_FILE, check_continues
from samssl.train.finetune import FinetuneConfig, classes_of, finetune, learnt_slices
from samssl.train.pretrain import PretrainConfig, pretrain, pretrained_sam

COUNTED = ("loaded", "interpolated", "new", "ignored")


def run_simulate(config: SimulateConfig) -> None:
    """Write a cohort of simulated subjects."""
    simulate(config, run=ray_map)


def run_prepare(config: PrepareConfig, place: Place = Place()) -> str:
    """Scans to a slice store; returns the digest of its manifest."""
    place = replace(place, dataset=place.dataset or config.name)
    with stage("prepare", config, {}, place, always=True) as work:
        limits = config.workers, config.memory_of
        summary = prepare(config, lambda function, items: ray_map(function, items, *limits))
        print(f"prepare: {summary.cases} cases, {summary.slices} slices, digest {summary.digest}", flush=True)
        print(f"prepare: wrote {summary.wrote} cases, removed {summary.removed}", flush=True)
        if summary.rejected:
            print(
                f"prepare: rejected {summary.rejected} files, see {config.root / REJECTED_FILE}", flush=True
            )
        if summary.private_list:
            print(f"prepare: {summary.private_list} says, to you alone, what each pseudonym stands for")
            work.tag({"pseudonym_key": summary.key_fingerprint})
        work.metrics = {"cases": summary.cases, "slices": summary.slices, "rejected": summary.rejected}
        work.tag({"path.sources": as_url(absolute_paths(config.data.root))})
        work.wrote("manifest", summary.digest, config.store or config.out)
    return summary.digest


def run_pretrain(config: PretrainConfig, place: Place = Place(), executor: Executor = CLUSTER) -> Path:
    """Slice store to a SAM-format encoder checkpoint; returns its path."""
    config, inputs, report = _pretrain_start(config)
    checkpoint, state_file = config.out / RUN_FILE, config.out / STATE_FILE
    place = _named(place, SliceStore(config.data.store))
    with stage("pretrain", config, inputs, place) as work:
        if not work.done:
            _tell_weights(work, report)
            state = executor.train(pretrain, config, config.resources, work.run, work.out / TRAINING)
            save_weights(pretrained_sam(config, state), checkpoint)
            save_state(state, state_file)
            _finish(work, state)
            work.metrics = {"last/val_loss": last(state, "val/loss"), "steps": state["progress"]["step"]}
            work.wrote("encoder", sha256_file(checkpoint), checkpoint)
            work.wrote("state", sha256_file(state_file), state_file)
            if config.register.enabled:
                _register(work, encoder_registration(checkpoint, config.model, config.register))
    return checkpoint


def run_finetune(config: FinetuneConfig, place: Place = Place(), executor: Executor = CLUSTER) -> Path:
    """Slice store and SAM-format checkpoint to a model bundle; returns its path."""
    store = SliceStore(config.data.store)
    config = replace(config, model=resolve(config.model))
    encoder, report = _finetune_start(config)
    classes_of(store, config.data)  # here, before anything is started or written
    inputs = {"manifest": Input(store.digest, config.data.store), "encoder": encoder}
    inputs |= _further_manifests(config.data.more_stores)
    bundle = config.out / "bundle"
    place = _named(place, store, config.data.shots)
    with stage("finetune", config, inputs, place) as work:
        if not work.done:
            _tell_weights(work, report)
            warn_of_other_store(inputs["encoder"], inputs["manifest"])
            listed = [name.replace("/", ",") for name in learnt_slices(config)]
            write_text(config.out / "shots.csv", "\n".join(["case,z", *listed]) + "\n")
            state = executor.train(finetune, config, config.resources, work.run, work.out / TRAINING)
            progress = state["progress"]
            digest = write_bundle(bundle, config, store, tuned_weights(state))
            save_tensors(as_segmenter(state["weights"]), config.out / "last.safetensors")
            if config.mode == "promptable":
                _write_merged(work, bundle, config)
            _finish(work, state)
            work.metrics = {"best/val_dice": progress["best_score"], "best/step": progress["best_step"]}
            work.metrics["trained_parameters"] = sum(value.numel() for value in state["weights"].values())
            work.wrote("bundle", digest, bundle)
            if config.register.enabled:
                _register(work, bundle_registration(bundle, read_bundle(bundle), config.register))
    return bundle


def run_evaluate(config: EvaluateConfig, place: Place = Place(), executor: Executor = CLUSTER) -> None:
    """Model bundle and slice store to a table of per-case scores."""
    read_bundle(config.bundle)  # here, before anything is started or written
    bundle = Input(sha256_tree(config.bundle), config.bundle)
    inputs = {"manifest": manifest_of(config.store), "bundle": bundle}
    with stage("evaluate", config, inputs, _named(place, SliceStore(config.store))) as work:
        if not work.done:
            record_scores(work, executor.call(evaluate, config), config.split)


def record_scores(work: StageRun, evaluation: Evaluation, split: str) -> None:
    """Log the scores of a split, and the tables and the picture that evaluation left behind."""
    work.metrics = evaluation.metrics(split)
    table = work.out / "cases.parquet"
    for path in (table, *sorted(work.out.glob(f"{SCORES_FILE}.*")), work.out / CURVE_FILE):
        if path.is_file():
            work.run.log_file(path)
    work.wrote("cases", sha256_file(table), table)


def run_report(config: ReportConfig) -> None:
    """Study folder to `report.html` and `summary.json`."""
    print(f"report: {write_report(config)}", flush=True)


def tuned_weights(state: State) -> dict[str, Tensor]:
    """What fine-tuning changed, at the best validation if that was kept, named as in the segmenter."""
    return as_segmenter(state["progress"]["best_weights"] or state["weights"])


def as_segmenter(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that `fit` kept, named as in the segmenter."""
    return {name.removeprefix("segmenter."): value for name, value in weights.items()}


def last(state: State, metric: str) -> float:
    """The last value of a metric in the history."""
    return [value for _, name, value in state["progress"]["history"] if name == metric][-1]


def _finish(work: StageRun, state: State) -> None:
    """Leave the curves in the stage's folder."""
    lines = [f"{step},{metric},{value!r}" for step, metric, value in state["progress"]["history"]]
    write_text(work.out / "history.csv", "\n".join(["step,metric,value", *lines]) + "\n")
    work.obsolete.append(work.out / TRAINING)


def _named(place: Place, store: SliceStore, shots: int = 0) -> Place:
    """`place` with what it does not say itself: the data set, and the shots where they are counted."""
    counted = shots or None
    return replace(
        place,
        dataset=place.dataset or store.name,
        shots=counted if place.shots is None else place.shots,
    )


def manifest_of(store: Path) -> Input:
    """The slice store, by the digest of its manifest."""
    return Input(SliceStore(store).digest, store)


def encoder_of(model: ModelConfig) -> tuple[Input, LoadReport]:
    """The initial weights: the checkpoint by its SHA-256, or what random weights are drawn from.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    report = check_checkpoint(model)  # here, before anything is started or written
    file = resolve(model).checkpoint
    if not isinstance(file, Path):
        return Input(f"{RANDOM}{model.variant}-{model.init_seed}", None), report
    return Input(sha256_file(file), file), report


def _finetune_start(config: FinetuneConfig) -> tuple[Input, LoadReport]:
    """The initial weights of SAM, or from what a baseline is drawn."""
    network, seed = config.strategy.network, config.optim.seed
    if network == "sam":
        return encoder_of(config.model)
    report = LoadReport(f"{network} drawn at random from optim.seed {seed}", "no checkpoint")
    return Input(f"{RANDOM}{network}-{seed}", None), report


def _pretrain_start(config: PretrainConfig) -> tuple[PretrainConfig, dict[str, Input], LoadReport]:
    """The settings with all that follows from the initial weights, the inputs, and what is loaded.

    A continued run starts from the weights of the earlier one, whose parts that do not train it keeps.
    """
    model, earlier = config.model, config.continue_from
    if earlier:
        model = replace(model, checkpoint=earlier)
    config = replace(config, model=resolve(model))
    if earlier:
        print(f"pretrain: {check_continues(earlier, config)}", flush=True)
    encoder, report = encoder_of(config.model)
    inputs = {"manifest": manifest_of(config.data.store), "encoder": encoder}
    inputs |= _further_manifests(config.data.more_stores)
    if earlier:
        inputs["state"] = Input(sha256_file(earlier / STATE_FILE), earlier / STATE_FILE)
    return config, inputs, report


def _register(work: StageRun, registration: Registration) -> None:
    work.run.register(registration)
    print(f"registered as {registration.uri}", flush=True)


def _further_manifests(stores: Sequence[Path]) -> dict[str, Input]:
    """The stores that are learnt from beside the first, by role."""
    return {f"manifest_{number}": manifest_of(store) for number, store in enumerate(stores, start=2)}


def _write_merged(work: StageRun, bundle: Path, config: FinetuneConfig) -> None:
    """Leave the fine-tuned SAM as plain weights too, where it can be: another run starts from this folder."""
    if config.strategy.method == "adapter":
        print("finetune: no encoder.pth, as adapters cannot be merged into SAM's own weights", flush=True)
        return
    checkpoint = work.out / RUN_FILE
    save_state(merged_weights(load_segmenter(bundle), config.strategy), checkpoint)
    work.wrote("encoder", sha256_file(checkpoint), checkpoint)


def _tell_weights(work: StageRun, report: LoadReport) -> None:
    """Print what was loaded and what is new, and keep it with the run."""
    print(report.text(), flush=True)
    write_text(work.out / "weights.txt", report.full_text())
    work.run.log_file(work.out / "weights.txt")
    counts = {f"weights.{heading}": len(getattr(report, heading)) for heading in COUNTED}
    work.run.set_tags({"weights.format": report.format, **{name: str(n) for name, n in counts.items()}})


def warn_of_other_store(encoder: Input, manifest: Input) -> None:
    """Say so if the encoder was pretrained on another store, which may have split the patients otherwise."""
    for run in find_runs({"output.encoder": encoder.digest}):
        pretrained_on = run.tags().get("input.manifest")
        if pretrained_on not in (None, manifest.digest):
            print(
                f"finetune: WARNING: the encoder was pretrained on another store ({pretrained_on[:12]}). "
                "Make sure that none of its patients is in the splits val and test of this one.",
                flush=True,
            )
            return
