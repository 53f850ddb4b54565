"""A pretrained encoder, or a fine-tuned SAM merged into plain weights, as a folder to publish.

<out>/model/encoder.pth            all of SAM in SAM's format; of a pretrain run as it wrote it
<out>/model/encoder.safetensors    the same tensors
<out>/model/config.yaml            the settings, without paths
<out>/model/README.md              the model card
"""

import shutil
from pathlib import Path

import yaml
from torch import Tensor

from samssl.bundle import Bundle, load_segmenter, read_bundle
from samssl.cluster.stage import Input, Place, StageRun, stage
from samssl.cluster.tracking import find_runs
from samssl.config import UserError, build_config, config, to_tree
from samssl.files import sha256_file, sha256_tree, write_text, written_aside
from samssl.models.checkpoints import read_weights, save_state, save_tensors
from samssl.models.initial import NORMALISATION_KEY, RUN_CONFIG, RUN_FILE
from samssl.models.merging import check_mergeable, merged_weights
from samssl.models.sam import ModelConfig, check_checkpoint, resolve
from samssl.report.card import CardConfig, PretrainRun, merged_card, model_card, public_settings, read_run


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
    card: CardConfig = CardConfig()
    """What the model card says beyond what the run knows."""


def run_export(config: ExportConfig, place: Place = Place()) -> Path:
    """Write the weights in both formats, and their model card; returns the folder to publish."""
    if config.merge:
        return _export_merged(config, place)
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
            _write(folder, encoder, run, config.card, str(resolve(model).normalisation))
            _record(work, folder)
    print(f"export: {folder}", flush=True)
    return folder


def _export_merged(config: ExportConfig, place: Place) -> Path:
    """Write the weights of a fine-tuned SAM, LoRA merged, and what they are; returns the folder."""
    path = config.run / "bundle" if (config.run / "bundle").is_dir() else config.run
    bundle = read_bundle(path)
    check_mergeable(bundle.strategy)
    folder = config.out / "model"
    with stage("export", config, {"bundle": Input(sha256_tree(path), path)}, place) as work:
        if not work.done:
            weights = merged_weights(load_segmenter(path, config.base), bundle.strategy)
            with written_aside(folder) as partial:
                partial.mkdir()
                _write_merged(partial, weights, bundle, config.card)
            work.wrote("encoder", sha256_file(folder / RUN_FILE), folder / RUN_FILE)
            _record(work, folder)
    print(f"export: {folder}", flush=True)
    return folder


def _write_merged(folder: Path, weights: dict[str, Tensor], bundle: Bundle, card: CardConfig) -> None:
    save_state(weights, folder / RUN_FILE)
    header = {NORMALISATION_KEY: str(bundle.model.normalisation)}
    save_tensors(weights, folder / "encoder.safetensors", header)
    settings = {"model": to_tree(bundle.model), "strategy": to_tree(bundle.strategy)}
    write_text(folder / RUN_CONFIG, yaml.safe_dump(public_settings(settings), sort_keys=False))
    files = {name: sha256_file(folder / name) for name in (RUN_FILE, "encoder.safetensors")}
    write_text(folder / "README.md", merged_card(bundle, card, files))


def _record(work: StageRun, folder: Path) -> None:
    work.run.log_file(folder / "README.md")
    work.wrote("safetensors", sha256_file(folder / "encoder.safetensors"), folder / "encoder.safetensors")
    work.wrote("export", sha256_tree(folder), folder)


def _write(folder: Path, encoder: Path, run: PretrainRun, card: CardConfig, normalisation: str) -> None:
    with written_aside(folder) as partial:
        partial.mkdir()
        shutil.copyfile(encoder, partial / RUN_FILE)
        header = {NORMALISATION_KEY: normalisation}
        save_tensors(read_weights(encoder), partial / "encoder.safetensors", header)
        files = {name: sha256_file(partial / name) for name in (RUN_FILE, "encoder.safetensors")}
        write_text(partial / RUN_CONFIG, yaml.safe_dump(public_settings(run.settings), sort_keys=False))
        write_text(partial / "README.md", model_card(run, card, files))


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
