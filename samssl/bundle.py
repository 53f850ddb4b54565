"""The model bundle: everything `predict` needs, nothing pickled.

    bundle.json         format, strategy, label map, normalisation, image size, base weights' digest
    tuned.safetensors   the tensors that fine-tuning changed, by name

The base weights are not repeated: they are named by digest, and refused if they are others.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from samssl.config import UserError, build_config, to_tree
from samssl.data.slices import SliceStore
from samssl.files import read_json, sha256_tree, write_json, written_aside
from samssl.models.checkpoints import CheckpointError, put_weights, weights_digest
from samssl.models.sam import ModelConfig, build_sam
from samssl.models.strategies import StrategyConfig, build_segmenter
from samssl.train.finetune import FinetuneConfig

FORMAT = 1


class BundleError(UserError):
    """A bundle that cannot be used."""


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` says."""

    model: ModelConfig
    strategy: StrategyConfig
    labels: dict[int, str]
    """Label id to name; id 0 is background."""
    seed: int
    base_sha256: str
    """`weights_digest` of the base model, whatever file format it lies in."""
    normalisation: str = "per case: intensity_low..intensity_high of the store to 0..1, clipped"
    format: int = FORMAT


def write_bundle(path: Path, config: FinetuneConfig, store: SliceStore, tuned: dict[str, Tensor]) -> str:
    """Write the folder `path`, whole or not at all; returns the SHA-256 over its files."""
    from safetensors.torch import save_file

    base = weights_digest(build_sam(config.model).state_dict())
    bundle = Bundle(
        model=config.model,
        strategy=config.strategy,
        labels=store.labels,
        seed=config.optim.seed,
        base_sha256=base,
    )
    with written_aside(path) as folder:
        folder.mkdir()
        tree = asdict(bundle) | {"model": to_tree(config.model), "strategy": to_tree(config.strategy)}
        write_json(folder / "bundle.json", tree)
        save_file({name: value.contiguous() for name, value in tuned.items()}, folder / "tuned.safetensors")
    return sha256_tree(path)


def read_bundle(path: Path) -> Bundle:
    """The description of the bundle at `path`.

    Raises:
        BundleError: there is none, or another version wrote it.
    """
    try:
        tree = read_json(path / "bundle.json")
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} is not a model bundle: {error}. Give the folder that finetune wrote."
        ) from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise BundleError(
            f"{path} has a bundle format that this version cannot read; it reads format {FORMAT}."
        )
    return Bundle(
        model=build_config(ModelConfig, tree["model"], source=str(path)),
        strategy=build_config(StrategyConfig, tree["strategy"], source=str(path)),
        labels={int(label): str(name) for label, name in tree["labels"].items()},
        seed=int(tree["seed"]),
        base_sha256=str(tree["base_sha256"]),
    )


def load_segmenter(path: Path) -> Any:
    """The fine-tuned segmenter of the bundle at `path`, on the CPU and in evaluation mode.

    Raises:
        BundleError, CheckpointError: the base weights are missing or others, or tensors do not fit.
    """
    from safetensors.torch import load_file

    bundle = read_bundle(path)
    found = weights_digest(build_sam(bundle.model).state_dict())
    if found != bundle.base_sha256:
        raise CheckpointError(
            f"The bundle {path} was made from base weights {bundle.base_sha256[:12]}, but "
            f"{bundle.model.checkpoint or 'the random weights here'} are {found[:12]}. Restore that file."
        )
    segmenter = build_segmenter(bundle.model, bundle.strategy, len(bundle.labels), bundle.seed)
    tuned = load_file(path / "tuned.safetensors")
    needed = {name for name, parameter in segmenter.named_parameters() if parameter.requires_grad}
    if needed != tuned.keys():
        wrong = sorted(needed ^ tuned.keys())
        raise BundleError(f"The tensors of {path} do not fit its strategy: {', '.join(wrong[:8])}.")
    put_weights(segmenter, tuned)
    return segmenter.eval()
