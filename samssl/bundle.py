"""The model bundle: everything `predict` needs, nothing pickled.

    bundle.json         format, strategy, label map, classes, input, image size, base weights' digest
    tuned.safetensors   the tensors that fine-tuning changed, by name

The base weights are not repeated: they are named by digest, and refused if they are others.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from segment_anything.modeling import Sam
from torch import Tensor

from samssl.config import UserError, build_config, to_tree
from samssl.data.classes import Classes, run_classes
from samssl.data.familiarity import Fingerprint, read_fingerprint, take_fingerprint
from samssl.data.inputs import InputConfig
from samssl.data.slices import SliceStore
from samssl.files import read_json, sha256_tree, write_json, written_aside
from samssl.models.checkpoints import (
    CheckpointError,
    put_weights,
    save_tensors,
    trained_tensors,
    weights_digest,
)
from samssl.models.sam import ModelConfig, resolve
from samssl.models.strategies import StrategyConfig, build_base, promptable_from, segmenter_from
from samssl.train.finetune import FinetuneConfig, classes_of

FORMAT = 3
READABLE = (1, 2, 3)
"""1 has no `input`: what was fine-tuned then saw grey slices in the ranges of the store. 1 and 2 have no
`classes` and `mode`: every label was a class, exclusive of the others, and all was automatic."""


class BundleError(UserError):
    """A bundle that cannot be used."""


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` says."""

    model: ModelConfig
    strategy: StrategyConfig
    labels: dict[int, str]
    """Label id to name, as in the store; id 0 is background."""
    seed: int
    base_sha256: str
    """`weights_digest` of the base model, whatever file format it lies in."""
    input: InputConfig = InputConfig()
    """Channels, and the values that become 0 and 1; what lies beyond is clipped."""
    classes: dict[str, tuple[str, ...]] | None = None
    """Name of each class and the labels it merges; None: every label is a class."""
    overlapping: bool = False
    """Whether the classes are regions that may share voxels."""
    mode: str = "automatic"
    """Whether it segments by itself (automatic) or what it is prompted for (promptable)."""
    fingerprint: Fingerprint | None = None
    """What the training data looked like; None in bundles of versions that did not note it."""
    format: int = FORMAT

    @property
    def run_classes(self) -> Classes:
        """What the segmenter tells apart."""
        return run_classes(self.labels, self.classes, self.overlapping)


def write_bundle(path: Path, config: FinetuneConfig, store: SliceStore, tuned: dict[str, Tensor]) -> str:
    """Write the folder `path`, whole or not at all; returns the SHA-256 over its files."""
    model = resolve(config.model)  # its normalisation belongs to the bundle, wherever the weights lie later
    num_outputs = classes_of(store, config.data).num_outputs
    base = build_base(model, config.strategy, num_outputs, config.optim.seed)
    bundle = Bundle(
        model=model,
        strategy=config.strategy,
        labels=store.labels,
        seed=config.optim.seed,
        base_sha256=weights_digest(base.state_dict()),
        input=config.data.input,
        classes=config.data.classes,
        overlapping=config.data.overlapping,
        mode=config.mode,
        fingerprint=take_fingerprint(store),
    )
    with written_aside(path) as folder:
        folder.mkdir()
        configs = {"model": model, "strategy": config.strategy, "input": config.data.input}
        tree = asdict(bundle) | {name: to_tree(value) for name, value in configs.items()}
        write_json(folder / "bundle.json", tree)
        save_tensors(tuned, folder / "tuned.safetensors")
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
    if not isinstance(tree, dict) or tree.get("format") not in READABLE:
        raise BundleError(
            f"{path} has a bundle format that this version cannot read; it reads {READABLE}. Use the samssl "
            "that wrote it (environment.json of its run says which), or fine-tune again."
        )
    return Bundle(
        model=build_config(ModelConfig, tree["model"], source=str(path)),
        strategy=build_config(StrategyConfig, tree["strategy"], source=str(path)),
        labels={int(label): str(name) for label, name in tree["labels"].items()},
        seed=int(tree["seed"]),
        base_sha256=str(tree["base_sha256"]),
        input=build_config(InputConfig, tree.get("input", {}), source=str(path)),
        classes=_read_classes(tree.get("classes")),
        overlapping=bool(tree.get("overlapping", False)),
        mode=str(tree.get("mode", "automatic")),
        fingerprint=read_fingerprint(tree.get("fingerprint")),
        format=int(tree["format"]),
    )


def _read_classes(tree: Mapping[str, list[str]] | None) -> dict[str, tuple[str, ...]] | None:
    return None if tree is None else {str(name): tuple(members) for name, members in tree.items()}


def load_segmenter(path: Path, base: Path | None = None) -> Any:
    """The fine-tuned segmenter of the bundle at `path`, on the CPU and in evaluation mode.

    A promptable one is a `samssl.models.promptable.PromptableSam`, wrapped where the strategy asks for it.

    `base` says where the base weights are, if not where the bundle was made.

    Raises:
        BundleError, CheckpointError: the base weights are missing or others, or tensors do not fit.
    """
    bundle = read_bundle(path)
    model = replace(bundle.model, checkpoint=base) if base else bundle.model
    num_outputs = bundle.run_classes.num_outputs
    start = build_base(model, bundle.strategy, num_outputs, bundle.seed)
    found = weights_digest(start.state_dict())
    if found != bundle.base_sha256:
        raise CheckpointError(
            f"The bundle {path} was made from base weights {bundle.base_sha256[:12]}, but "
            f"{model.checkpoint or 'the random weights here'} are {found[:12]}. Set `base` to the right file."
        )
    if isinstance(start, Sam) and bundle.mode == "promptable":
        segmenter = promptable_from(start, bundle.strategy, bundle.seed)
    else:
        segmenter = segmenter_from(start, bundle.strategy, num_outputs, bundle.seed)
    tuned = load_file(path / "tuned.safetensors")
    needed = trained_tensors(segmenter).keys()
    if needed != tuned.keys():
        wrong = sorted(needed ^ tuned.keys())
        raise BundleError(
            f"The tensors of {path} do not fit its strategy: {', '.join(wrong[:8])}. It was changed or "
            "copied in part: copy it whole from its run, or fine-tune again."
        )
    put_weights(segmenter, tuned)
    return segmenter.eval()
