"""A pretrained encoder, a fine-tuned SAM merged into plain weights, or ONNX files, as a folder to publish.

<out>/model/encoder.pth            all of SAM in SAM's format; of a pretrain run as it wrote it
<out>/model/encoder.safetensors    the same tensors
<out>/model/image_encoder.onnx     with `onnx`; of a bundle that is not merged instead of the two above
<out>/model/mask_decoder.onnx
<out>/model/config.yaml            the settings, without paths
<out>/model/README.md              the model card
"""

import shutil
from pathlib import Path
from typing import Any

import yaml

from samssl.bundle import Bundle, load_segmenter, read_bundle
from samssl.cluster.stage import Input, Place, StageRun, stage
from samssl.cluster.tracking import find_runs
from samssl.config import UserError, build_config, config, to_tree
from samssl.data.inputs import InputConfig
from samssl.files import sha256_file, sha256_tree, write_text, written_aside
from samssl.models.checkpoints import read_weights, save_state, save_tensors
from samssl.models.initial import NORMALISATION_KEY, RUN_CONFIG, RUN_FILE
from samssl.models.merging import check_mergeable, without_lora
from samssl.models.onnx_files import write_onnx
from samssl.models.promptable import PromptableSam
from samssl.models.sam import ModelConfig, build_sam, check_checkpoint, resolve
from samssl.report.card import (
    CardConfig,
    PretrainRun,
    Scores,
    bundle_card,
    model_card,
    public_settings,
    read_run,
    read_scores,
)


@config
class ExportConfig:
    """A pretrain run, or a bundle that can be merged, to a folder that can be published."""

    run: Path
    """Folder of a finished pretrain run, or its `encoder.pth`; with `merge`, a finetune run or a bundle."""
    out: Path
    """Folder of this export; what is to be published is `model` in it."""
    merge: bool = False
    """Make a plain SAM of a bundle that was fine-tuned with strategy.head=sam and without adapters."""
    base: Path | None = None
    """With `merge`: the bundle's base weights, if they are not where they were when it was made."""
    onnx: bool = False
    """Also write image encoder and mask decoder as ONNX, checked against torch with onnxruntime. Without
    `merge` `run` may be any finetune run or bundle of SAM, of which nothing but these is written."""
    card: CardConfig = CardConfig()
    """What the model card says beyond what the run knows."""


def run_export(config: ExportConfig, place: Place = Place()) -> Path:
    """Write the weights in both formats, and their model card; returns the folder to publish."""
    if config.merge or (config.onnx and (_bundle_at(config.run) / "bundle.json").is_file()):
        return _export_bundle(config, place)
    encoder = _encoder_of(config.run)
    run = read_run(encoder.parent)
    if sha256_file(encoder) != run.record["outputs"]["encoder"]:
        raise UserError(
            f"{encoder} is not what its run wrote: its digest has changed. Export an unchanged run."
        )
    model = build_config(ModelConfig, run.model | {"checkpoint": str(encoder)}, source=str(encoder.parent))
    check_checkpoint(model)  # all of SAM's keys in SAM's own classes
    folder = config.out / "model"
    inputs = {"encoder": Input(run.record["outputs"]["encoder"], encoder)}
    with stage("export", config, inputs, place) as work:
        if not work.done:
            _write(folder, encoder, run, config, resolve(model))
            _record(work, folder)
    print(f"export: {folder}", flush=True)
    return folder


def _export_bundle(config: ExportConfig, place: Place) -> Path:
    """Write a fine-tuned SAM: merged its weights, LoRA in them, and with `onnx` its ONNX files."""
    path = _bundle_at(config.run)
    bundle, digest = read_bundle(path), sha256_tree(path)
    if config.merge:
        check_mergeable(bundle.strategy)
    if bundle.strategy.network != "sam":
        raise UserError(f"The bundle {path} is a {bundle.strategy.network}, and export is of SAM.")
    scores = read_scores(config.card.evaluation, digest) if config.card.evaluation else None
    folder = config.out / "model"
    with stage("export", config, {"bundle": Input(digest, path)}, place) as work:
        if not work.done:
            plain = without_lora(load_segmenter(path, config.base), bundle.strategy)
            with written_aside(folder) as partial:
                partial.mkdir()
                _write_bundle(partial, plain, bundle, config, scores)
            if config.merge:
                work.wrote("encoder", sha256_file(folder / RUN_FILE), folder / RUN_FILE)
            _record(work, folder)
    print(f"export: {folder}", flush=True)
    return folder


def _bundle_at(run: Path) -> Path:
    return run / "bundle" if (run / "bundle").is_dir() else run


def _write_bundle(
    folder: Path, plain: Any, bundle: Bundle, config: ExportConfig, scores: Scores | None
) -> None:
    if config.merge:
        weights = {name: value.detach().contiguous() for name, value in plain.state_dict().items()}
        save_state(weights, folder / RUN_FILE)
        header = {NORMALISATION_KEY: str(bundle.model.normalisation)}
        save_tensors(weights, folder / "encoder.safetensors", header)
    if config.onnx:
        _write_onnx(folder, plain, bundle.model.image_size, bundle.input.num_channels)
    files = _digests(folder)
    settings = {"model": to_tree(bundle.model), "strategy": to_tree(bundle.strategy)}
    write_text(folder / RUN_CONFIG, yaml.safe_dump(public_settings(settings), sort_keys=False))
    write_text(folder / "README.md", bundle_card(bundle, config.card, files, scores))


def _write_onnx(folder: Path, sam: Any, image_size: int, num_channels: int) -> None:
    for name, different in write_onnx(folder, sam, image_size, num_channels).items():
        print(f"export: {name} differs from torch by at most {different:.1g}", flush=True)


def _digests(folder: Path) -> dict[str, str]:
    """Of the files of weights."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def _record(work: StageRun, folder: Path) -> None:
    work.run.log_file(folder / "README.md")
    tensors = folder / "encoder.safetensors"
    if tensors.is_file():
        work.wrote("safetensors", sha256_file(tensors), tensors)
    work.wrote("export", sha256_tree(folder), folder)


def _write(folder: Path, encoder: Path, run: PretrainRun, config: ExportConfig, model: ModelConfig) -> None:
    with written_aside(folder) as partial:
        partial.mkdir()
        shutil.copyfile(encoder, partial / RUN_FILE)
        header = {NORMALISATION_KEY: str(model.normalisation)}
        save_tensors(read_weights(encoder), partial / "encoder.safetensors", header)
        if config.onnx:
            inputs = build_config(InputConfig, run.settings["data"].get("input", {}), source=str(config.run))
            sam = PromptableSam(build_sam(model)).eval()
            _write_onnx(partial, sam, model.image_size, inputs.num_channels)
        files = _digests(partial)
        write_text(partial / RUN_CONFIG, yaml.safe_dump(public_settings(run.settings), sort_keys=False))
        write_text(partial / "README.md", model_card(run, config.card, files))


def _encoder_of(run: Path) -> Path:
    """`encoder.pth` in its run's folder, which the tracking server knows where the file was moved away.

    Raises:
        UserError: there is no such file, or no run is known that wrote it.
    """
    encoder = run / RUN_FILE if run.is_dir() else run
    if not encoder.is_file():
        raise UserError(f"{encoder} is not there. Give the folder of a finished pretrain run as `run`.")
    if encoder.name == RUN_FILE and (encoder.parent / "run.json").is_file():
        return encoder
    for writer in find_runs({"output.encoder": sha256_file(encoder)}):
        written = Path(writer.tags()["path.encoder"])
        if written.is_file():
            return written
    raise UserError(f"No run is known that wrote {encoder}. Give the folder of its pretrain run as `run`.")
