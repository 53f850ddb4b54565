"""The model card of an export: Markdown with the front matter that the Hugging Face hub reads.

Everything in it comes from the folder of the pretrain run, or from a bundle and its evaluation. Paths, and so
names of folders and files, are left out: data sets, initial weights and the run appear by digest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from samssl.bundle import Bundle
from samssl.config import UserError, config, read_yaml
from samssl.files import read_json
from samssl.models.initial import hub_id
from samssl.models.onnx_files import DECODER_FILE, ENCODER_FILE
from samssl.models.sam import MICRO_IMAGE_SIZE, ModelConfig

SHOWN = ("val/", "probe/")
"""How metrics begin that say something about the encoder."""
TAGS = ("segment-anything", "radiology", "medical-imaging")

NOT_CLINICAL = (
    "Not for clinical use: the weights were not made, tested or approved for diagnosis, treatment or any "
    "other decision about a patient."
)

SCALED = {
    "unit": "Images go in with intensities in 0..1 on three channels, without SAM's mean and deviation.",
    "sam": "Images go in as SAM normalises them: 0..255, less SAM's mean, by its standard deviation.",
}


@config
class CardConfig:
    """What only the publisher knows."""

    license: str | None = None
    """Licence of the weights, as the hub names it (apache-2.0, cc-by-nc-4.0); null: said to be unknown."""
    base_model: str | None = None
    """Hub name of the model that pretraining began with; null: told from the name of a published file."""
    title: str | None = None
    """Heading of the card; null: made of variant and method."""
    evaluation: Path | None = None
    """Of a bundle: folder of an `evaluate` of it, whose scores the card gives."""
    intended_use: str = (
        "Starting point for fine-tuning segmentation of the kind of images it was pretrained on."
    )
    """What the weights are for, in a sentence or two. It is published as it is written here."""


@dataclass(frozen=True)
class PretrainRun:
    """What the folder of a finished pretrain run says."""

    record: dict[str, Any]
    """`run.json`."""
    settings: dict[str, Any]
    """`config.yaml`."""
    environment: dict[str, Any]
    history: pd.DataFrame
    """Columns step, metric, value."""

    @property
    def model(self) -> dict[str, Any]:
        """The settings `model`."""
        return self.settings["model"]


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found of a bundle."""

    split: str
    manifest: str
    """Digest of the store that it was scored on."""
    values: dict[str, float]
    """By the name of the metric, without the split."""


def read_scores(folder: Path, bundle_digest: str) -> Scores:
    """The finished evaluation in `folder` of the bundle with this digest.

    Raises:
        UserError: there is none, or it is of another bundle.
    """
    try:
        record, settings = read_json(folder / "run.json"), read_yaml(folder / "config.yaml")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read as an evaluation: {error}. Give its folder.") from None
    if record.get("stage") != "evaluate" or record.get("status") != "finished":
        raise UserError(f"{folder} holds no finished evaluation. Give the folder of one as card.evaluation.")
    if record["inputs"]["bundle"] != bundle_digest:
        raise UserError(f"{folder} holds an evaluation of another bundle. Give one of the exported bundle.")
    begins = f"{settings['split']}/"
    found = {name.removeprefix(begins): value for name, value in record["metrics"].items()}
    values = {name: value for name, value in found.items() if isfinite(value)}
    return Scores(settings["split"], record["inputs"]["manifest"], values)


def bundle_card(bundle: Bundle, card: CardConfig, files: Mapping[str, str], scores: Scores | None) -> str:
    """The text of `README.md` of a fine-tuned SAM, merged into plain weights or as ONNX or both."""
    labels = ", ".join(bundle.run_classes.names.values())
    written = [f"- written: `{name}`, SHA-256 `{digest}`" for name, digest in files.items()]
    uses = [f"**{NOT_CLINICAL}**"]
    if "encoder.pth" in files:
        uses.append(_merged_use(bundle.model, labels))
    if ENCODER_FILE in files:
        uses.append(_onnx_use(bundle, labels))
    sections = {
        "Use": "\n\n".join(uses),
        "Metrics": _bundle_metrics(scores),
        "Lineage": "\n".join([*written, f"- base weights `{bundle.base_sha256}`"]),
        "Licence": _licence(card),
    }
    title = card.title or f"SAM {bundle.model.variant}, fine-tuned for {labels}"
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"---\n{_bundle_matter(bundle, card, title, scores)}---\n\n# {title}\n\n{body}\n"


def read_run(folder: Path) -> PretrainRun:
    """The pretrain run in `folder`.

    Raises:
        UserError: there is none, or it has not finished.
    """
    try:
        record = read_json(folder / "run.json")
        settings, environment = read_yaml(folder / "config.yaml"), read_json(folder / "environment.json")
        history = pd.read_csv(folder / "history.csv")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read as a pretrain run: {error}. Give its folder.") from None
    if record.get("stage") != "pretrain" or record.get("status") != "finished":
        raise UserError(
            f"{folder} holds no finished pretrain run. Let pretrain finish, or give another folder."
        )
    return PretrainRun(record, settings, environment, history)


def model_card(run: PretrainRun, card: CardConfig, files: Mapping[str, str]) -> str:
    """The text of `README.md`; `files` maps the names of the exported weights to their SHA-256."""
    sections = {
        "Use": _use(run, card),
        "Data": _data(run),
        "Recipe": _recipe(run),
        "Metrics": _metrics(run),
        "Lineage": _lineage(run, files),
        "Licence": _licence(card),
    }
    title = (
        card.title or f"SAM {run.model['variant']}, pretrained on radiology without labels ({method(run)})"
    )
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"---\n{_front_matter(run, card)}---\n\n# {title}\n\n{body}\n"


def method(run: PretrainRun) -> str:
    """The self-supervised method by name."""
    return str(run.settings.get("method", "mae"))


def public_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are paths or addresses, at any depth, and without empty groups."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            value = public_settings(value)
        if value != {} and not (isinstance(value, str) and ("/" in value or "\\" in value)):
            kept[name] = value
    return kept


def loading_snippet(variant: str, image_size: int) -> str:
    """Three lines of Python that load the exported `encoder.pth`."""
    if variant == "micro":
        return (
            "from samssl.models.sam import ModelConfig, build_sam\n"
            f'model = ModelConfig(variant="micro", image_size={image_size}, checkpoint=Path("encoder.pth"))\n'
            "image_encoder = build_sam(model).image_encoder"
        )
    package = "mobile_sam" if variant == "vit_t" else "segment_anything"
    return (
        f"from {package} import sam_model_registry\n"
        f'sam = sam_model_registry["{variant}"](checkpoint="encoder.pth")  # every key in its place\n'
        "image_encoder = sam.image_encoder"
    )


def _front_matter(run: PretrainRun, card: CardConfig) -> str:
    matter = {
        **_terms(card, str(run.model.get("checkpoint") or "")),
        "pipeline_tag": "mask-generation",
        "tags": [*TAGS, "self-supervised", method(run)],
        "datasets": [_dataset(run.record["inputs"]["manifest"])],
    }
    return yaml.safe_dump(matter, sort_keys=False)


def _bundle_matter(bundle: Bundle, card: CardConfig, title: str, scores: Scores | None) -> str:
    automatic = bundle.mode == "automatic"
    matter: dict[str, Any] = {
        **_terms(card, str(bundle.model.checkpoint or "")),
        "pipeline_tag": "image-segmentation" if automatic else "mask-generation",
        "tags": [*TAGS, bundle.strategy.method],
    }
    if scores:
        metrics = [
            {
                "type": name.partition("_")[0].partition("/")[0],
                "name": f"{scores.split}/{name}",
                "value": value,
            }
            for name, value in scores.values.items()
            if name != "cases"
        ]
        dataset = {
            "type": _dataset(scores.manifest),
            "name": _dataset(scores.manifest),
            "split": scores.split,
        }
        result = {"task": {"type": matter["pipeline_tag"]}, "dataset": dataset, "metrics": metrics}
        matter["datasets"] = [_dataset(scores.manifest)]
        matter["metrics"] = sorted({metric["type"] for metric in metrics})
        matter["model-index"] = [{"name": title, "results": [result]}]
    return yaml.safe_dump(matter, sort_keys=False)


def _terms(card: CardConfig, checkpoint: str) -> dict[str, str]:
    """Licence, library and, if that is known, the model that training began with."""
    licence = {"license": card.license} if card.license else {"license": "other", "license_name": "unknown"}
    base = card.base_model or hub_id(Path(checkpoint).name)
    return {**licence, "library_name": "samssl", **({"base_model": base} if base else {})}


def _dataset(manifest: str) -> str:
    """Data sets appear by the digest of their store."""
    return f"sha256-{manifest}"


def _use(run: PretrainRun, card: CardConfig) -> str:
    variant, size = run.model["variant"], run.model["image_size"]
    scaled = SCALED[run.model.get("normalisation") or "sam"]
    return (
        f"{card.intended_use}\n\n**{NOT_CLINICAL}**\n\n"
        f"The files hold all of SAM ({variant}) under its own key names, with the image encoder pretrained "
        f"further; neck, prompt encoder and mask decoder are those that it began with. {scaled} "
        f"It was pretrained at {size} px.\n\n```python\n{loading_snippet(variant, size)}\n```"
    )


def _merged_use(model: ModelConfig, label: str) -> str:
    own_size, size = MICRO_IMAGE_SIZE if model.variant == "micro" else 1024, model.image_size
    other_size = "" if size == own_size else f" SAM's own code computes at {own_size} px instead."
    return (
        f"All of SAM ({model.variant}) under its own key names, fine-tuned to draw one "
        f"label, `{label}`, without a prompt: it is the mask of `multimask_output=False`. Its predicted IoU "
        f"was not trained. {SCALED[model.normalisation or 'sam']} Slices were stretched to squares of {size} "
        f"px.{other_size}\n\n```python\n{loading_snippet(model.variant, size)}\n```"
    )


def _onnx_use(bundle: Bundle, labels: str) -> str:
    size, channels = bundle.model.image_size, bundle.input.num_channels
    what = f"draws {labels} without prompts" if bundle.mode == "automatic" else "answers points and boxes"
    return (
        f"`{ENCODER_FILE}` takes images [batch, {channels}, {size}, {size}] with intensities in 0..1 and "
        f"gives `image_embeddings`, from which `{DECODER_FILE}` {what}: `low_res_logits`. Batches may be of "
        "any size. "
        "`samssl.models.onnx_files` says more."
    )


def _bundle_metrics(scores: Scores | None) -> str:
    if scores is None:
        return "None were given."
    rows = [f"| {name} | {value:.4g} |" for name, value in scores.values.items()]
    return f"On the split {scores.split} of the slice store `{scores.manifest}`.\n\n" + "\n".join(
        ["| metric | value |", "|---|---|", *rows]
    )


def _data(run: PretrainRun) -> str:
    splits = ", ".join(run.settings["data"]["splits"])
    return (
        f"Unlabelled slices of the splits {splits} of the slice store with the digest "
        f"`{run.record['inputs']['manifest']}` (SHA-256 over pixels, geometry and splits). "
        "No data come with the weights, and nothing here names a patient."
    )


def _recipe(run: PretrainRun) -> str:
    packages = run.environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("samssl", "torch") if name in packages)
    code = run.environment["git_commit"] or "unknown"
    hours = run.record["wall_time_s"] / 3600
    recipe = public_settings(run.settings)
    recipe.pop("register", None)
    return (
        f"Commit {code}; source SHA-256 `{run.environment['source_sha256']}`; {versions}. "
        f"{run.record['metrics'].get('steps', 0):g} steps in {hours:.2f} h on {_hardware(run)}. "
        f"Settings, without paths:\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"
    )


def _hardware(run: PretrainRun) -> str:
    hardware = run.record["hardware"]
    return ", ".join(hardware["gpus"]) or f"{hardware['processor']}, {hardware['cores']} cores"


def _metrics(run: PretrainRun) -> str:
    """First and last value of what was measured on held-out patients."""
    shown = run.history[run.history["metric"].str.startswith(SHOWN)].sort_values("step", kind="stable")
    lines = ["| metric | first | last | at step |", "|---|---|---|---|"]
    for metric, rows in shown.groupby("metric"):
        first, last = rows.iloc[0], rows.iloc[-1]
        lines.append(f"| {metric} | {first['value']:.4g} | {last['value']:.4g} | {last['step']} |")
    probed = shown["metric"].str.startswith("probe/").any()
    note = "" if probed else " No probe with labels was run."
    return (
        "On patients that were not pretrained on. `val/loss` is the reconstruction loss of hidden patches, "
        f"lower is better; it alone does not show that segmentation gets better.{note}\n\n" + "\n".join(lines)
    )


def _lineage(run: PretrainRun, files: Mapping[str, str]) -> str:
    lines = [f"- written: `{name}`, SHA-256 `{digest}`" for name, digest in files.items()]
    lines += [f"- read: {role} `{digest}`" for role, digest in run.record["inputs"].items()]
    return "\n".join([*lines, f"- MLflow run `{run.record['run_id']}`"])


def _licence(card: CardConfig) -> str:
    if card.license:
        return f"{card.license}, as whoever exported these weights states."
    return (
        "Unknown: whoever exported these weights stated no licence. Ask before you use or pass them on; the "
        "initial weights and the data have terms of their own."
    )
