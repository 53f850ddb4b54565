"""What training starts from: published weights by name, files, earlier runs, and what loading them did.

Published files are looked for in the folder that `SAMSSL_CHECKPOINTS` names, or else in `checkpoints`.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from samssl.config import read_yaml
from samssl.models.checkpoints import CheckpointError, check_fit
from samssl.models.official_mae import from_mae, is_mae

Normalisation = Literal["sam", "unit"]
PublishedName = Literal["sam", "medsam", "mobile_sam", "mae", "random"]

FOLDER_VARIABLE = "SAMSSL_CHECKPOINTS"
RUN_FILE = "encoder.pth"
RUN_CONFIG = "config.yaml"
NORMALISATION_KEY = "samssl.normalisation"
"""Where the header of a `.safetensors` file says how its input is normalised."""


@dataclass(frozen=True)
class Published:
    """Weights that others have published, by variant."""

    files: Mapping[str, str]
    """Variant to file name, as its publisher names it."""
    repository: str
    """Where the publisher says how to get the files."""
    normalisation: Normalisation = "sam"
    hub_ids: Mapping[str, str] | None = None
    """Variant to the name of the same weights on the Hugging Face hub, for `base_model` of a model card."""


PUBLISHED: dict[str, Published] = {
    "sam": Published(
        {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"},
        "https://github.com/facebookresearch/segment-anything",
        hub_ids={
            "vit_b": "facebook/sam-vit-base",
            "vit_l": "facebook/sam-vit-large",
            "vit_h": "facebook/sam-vit-huge",
        },
    ),
    "medsam": Published(
        {"vit_b": "medsam_vit_b.pth"},
        "https://github.com/bowang-lab/MedSAM",
        normalisation="unit",
        hub_ids={"vit_b": "wanglab/medsam-vit-base"},
    ),
    "mobile_sam": Published({"vit_t": "mobile_sam.pt"}, "https://github.com/ChaoningZhang/MobileSAM"),
    "mae": Published(
        {
            "vit_b": "mae_pretrain_vit_base.pth",
            "vit_l": "mae_pretrain_vit_large.pth",
            "vit_h": "mae_pretrain_vit_huge.pth",
        },
        "https://github.com/facebookresearch/mae",
        hub_ids={
            "vit_b": "facebook/vit-mae-base",
            "vit_l": "facebook/vit-mae-large",
            "vit_h": "facebook/vit-mae-huge",
        },
    ),
}


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor: names of the model, and for `ignored` of the file."""

    source: str
    format: str
    loaded: tuple[str, ...] = ()
    """Taken as they are."""
    interpolated: tuple[str, ...] = ()
    """Taken, resampled to the model's shape."""
    new: tuple[str, ...] = ()
    """Not in the file: drawn from `init_seed`."""
    ignored: tuple[str, ...] = ()
    """In the file, and of no use to the model."""

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Heading to names, without what is empty."""
        named = {
            "loaded": self.loaded,
            "interpolated": self.interpolated,
            "new, drawn from init_seed": self.new,
            "in the file but not used": self.ignored,
        }
        return {heading: names for heading, names in named.items() if names}

    def text(self) -> str:
        """A line for each heading: how many tensors, and their names in groups."""
        lines = [f"Initial weights: {self.source} ({self.format})."]
        for heading, names in self.parts().items():
            groups = Counter(_group(name) for name in names)
            listed = ", ".join(f"{group} ({count})" for group, count in groups.items())
            lines.append(f"  {heading}: {len(names)} tensors: {listed}")
        return "\n".join(lines)

    def full_text(self) -> str:
        """`text`, then every name."""
        names = [f"{heading}: {name}" for heading, names in self.parts().items() for name in names]
        return "\n".join([self.text(), "", *names]) + "\n"


def initial_file(checkpoint: PublishedName | Path | None, variant: str) -> Path | None:
    """The file that `checkpoint` stands for; None where weights are drawn at random.

    Raises:
        CheckpointError: nobody published these weights at this size, or the file is not where it should be.
    """
    if checkpoint is None or checkpoint == "random":
        return None
    if isinstance(checkpoint, str):
        return _published_file(checkpoint, variant)
    if not checkpoint.is_dir():
        return checkpoint
    if not ((checkpoint / RUN_FILE).is_file() and (checkpoint / RUN_CONFIG).is_file()):
        raise CheckpointError(
            f"The folder {checkpoint} is no finished pretrain run: it lacks {RUN_FILE} or {RUN_CONFIG}. "
            "Give such a run, a promptable finetune run, an export, or a weights file as model.checkpoint."
        )
    return checkpoint / RUN_FILE


def normalisation_for(file: Path | None) -> Normalisation:
    """What the weights in `file` expect: as its publisher, its run or its header says, else as SAM."""
    if file is None:
        return "sam"
    for published in PUBLISHED.values():
        if file.name in published.files.values():
            return published.normalisation
    said = _header(file) if file.suffix == ".safetensors" else _run_model(file).get("normalisation")
    return "unit" if said == "unit" else "sam"


def hub_id(file_name: str) -> str | None:
    """The Hugging Face name of published weights, by the name of their file; None for any other file."""
    for published in PUBLISHED.values():
        for variant, name in published.files.items():
            if name == file_name:
                return (published.hub_ids or {}).get(variant)
    return None


def published_as(file_name: str) -> str | None:
    """What `model.checkpoint` calls published weights, by the name of their file; None for any other file."""
    for name, published in PUBLISHED.items():
        if file_name in published.files.values():
            return name
    return None


def fit_to(sam: nn.Module, weights: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors for `sam`, which may lie on the meta device, and what becomes of each.

    Everything but an official MAE checkpoint has to fit key by key.

    Raises:
        CheckpointError: listing what does not fit.
    """
    source = str(file)
    if is_mae(weights):
        adapted = from_mae(sam, weights, source)
        fitted, interpolated, ignored = adapted.weights, set(adapted.interpolated), adapted.ignored
        new = [name for name in sam.state_dict() if name not in fitted]
        loaded = [name for name in fitted if name not in interpolated]
        report = LoadReport(
            source, "official MAE", tuple(loaded), tuple(adapted.interpolated), tuple(new), ignored
        )
        return fitted, report
    check_fit(sam, weights, source)
    kind = "run of samssl" if _run_model(file) else "SAM format"
    return dict(weights), LoadReport(source, kind, loaded=tuple(weights))


def checkpoint_folder() -> Path:
    """Where published weights are looked for by name: what `SAMSSL_CHECKPOINTS` says, or `checkpoints/`."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "checkpoints").expanduser().absolute()


def _published_file(name: str, variant: str) -> Path:
    published = PUBLISHED[name]
    if variant not in published.files:
        raise CheckpointError(
            f"`{name}` was published for {', '.join(published.files)}, not for {variant}. "
            "Change model.variant or model.checkpoint."
        )
    file = checkpoint_folder() / published.files[variant]
    if not file.is_file():
        raise CheckpointError(
            f"The weights `{name}` of {variant} are not at {file}. Get {file.name} from "
            f"{published.repository} and put it there, or name its folder in {FOLDER_VARIABLE}."
        )
    return file


def _run_model(file: Path) -> dict[str, object]:
    """The settings `model` of the run that wrote `file`, as recorded beside it; empty for other files."""
    if file.name != RUN_FILE or not (file.parent / RUN_CONFIG).is_file():
        return {}
    return read_yaml(file.parent / RUN_CONFIG).get("model") or {}


def _header(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get(NORMALISATION_KEY)
    except (OSError, SafetensorError):
        return None  # reading the weights says what is wrong


def _group(name: str) -> str:
    """`image_encoder.blocks.3.attn.qkv.weight` -> `image_encoder.blocks.*.attn.qkv`; the decoders are one."""
    top, _, rest = name.partition(".")
    if top in ("prompt_encoder", "mask_decoder"):
        return top
    if top == "image_encoder" and not re.search(r"\.\d+\.\w+\.", rest):
        return f"{top}.{rest.partition('.')[0]}"
    return re.sub(r"\.(weight|bias)$", "", re.sub(r"\.\d+(?=\.|$)", ".*", name))
