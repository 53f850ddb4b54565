"""Going on from an earlier pretrain run: weights, decoder, optimizer, step and place in the stream."""

from pathlib import Path
from typing import Any

import torch

from samssl.config import UserError, build_config, flatten, read_yaml, to_tree
from samssl.files import read_json
from samssl.train.context import State

STATE_FILE = "state.pt"

KEPT = ("method", "model.", "masking.", "targets.", "mae.", "simmim.")
KEPT_BY_THE_OPTIMIZER = ("optim.weight_decay", "optim.beta", "optim.layer_decay", "optim.ema", "optim.seed")
FREE = ("model.checkpoint", "model.init_seed")
"""The earlier run's own weights take their place."""


def check_continues(folder: Path, config: Any) -> str:
    """Whether `config`, a resolved pretrain configuration, can go on from the run in `folder`.

    Returns a sentence that says at which step, and which settings change from there.

    Raises:
        UserError: there is no finished run, its state belongs to other settings, or nothing is left to do.
    """
    record, earlier = _read_run(folder)
    old = flatten(to_tree(build_config(type(config), earlier, source=str(folder / "config.yaml"))))
    new = flatten(to_tree(config))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    refused = [name for name in changed if name.startswith(KEPT + KEPT_BY_THE_OPTIMIZER) and name not in FREE]
    if refused:
        listed = ", ".join(f"{name} ({old.get(name)} there, {new.get(name)} here)" for name in refused)
        raise UserError(
            f"The run {folder} cannot be continued with other settings of {listed}. "
            "Set them as they were, or start from its weights alone, as model.checkpoint."
        )
    step = int(record["metrics"]["steps"])
    if config.optim.steps <= step:
        raise UserError(
            f"The run {folder} is at step {step} already. Set optim.steps, which counts from its beginning, "
            "to more than that."
        )
    others = [name for name in changed if name.startswith(("data.", "optim."))]
    return f"continues {folder} from step {step}" + (f"; new: {', '.join(others)}" if others else "")


def read_state(folder: Path) -> State:
    """The state that the pretrain run in `folder` ended with.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / STATE_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whatever way its bytes lead to
        raise UserError(
            f"{path} cannot be read as the state of a run ({type(error).__name__}). Check continue_from."
        ) from None


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`run.json` and `config.yaml` of a finished pretrain run."""
    try:
        record = read_json(folder / "run.json")
    except (OSError, ValueError):
        record = {}
    if record.get("stage") != "pretrain" or record.get("status") != "finished":
        raise UserError(
            f"{folder} holds no finished pretrain run, which continue_from needs. An unfinished one goes on "
            "by its own command."
        )
    if not (folder / STATE_FILE).is_file():
        raise UserError(f"{folder / STATE_FILE} is missing: without it {folder} cannot be continued.")
    return record, read_yaml(folder / "config.yaml")
