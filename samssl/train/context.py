"""What a training loop needs from wherever it runs; `LocalContext` runs it in this process.

`samssl.cluster` has the implementation for Ray Train workers. The loop is written once, against
`RunContext`.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from samssl.models.checkpoints import save_state

State = dict[str, Any]
"""Tensors, numbers, text, and lists and dicts of them: what `torch.load(weights_only=True)` reads back."""


class RunContext(Protocol):
    """One of `world_size` processes that train together."""

    rank: int
    world_size: int
    device: torch.device

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The model on `device`, synchronising gradients where there is more than one process."""
        ...

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics; every rank may call, rank 0 is heard."""
        ...

    def picture(self, name: str, image: np.ndarray) -> None:
        """Record an RGB image [H, W, 3] of uint8 under the relative file name `name`."""
        ...

    def progress(self, step: int, total: int, text: str) -> None:
        """Show how far the run is."""
        ...

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """Keep `state` to resume from. A barrier: every rank calls it, the same number of times."""
        ...

    def restore(self) -> State | None:
        """The last state kept, or None at a fresh start."""
        ...


class LocalContext:
    """One process without Ray or MLflow; keeps its state in `folder` if one is given."""

    rank = 0
    world_size = 1

    def __init__(self, folder: Path | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = folder
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.pictures: dict[str, np.ndarray] = {}

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The model on `device`."""
        return model.to(self.device)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Keep metrics in memory, in order."""
        self.metrics.append((step, dict(metrics)))

    def picture(self, name: str, image: np.ndarray) -> None:
        """Keep the picture in memory."""
        self.pictures[name] = image

    def progress(self, step: int, total: int, text: str) -> None:
        """Print one line."""
        print(f"{step}/{total} {text}", flush=True)

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """Write `state.pt`, whole or not at all."""
        if self.folder:
            save_state(state, self.folder / "state.pt")

    def restore(self) -> State | None:
        """Read `state.pt` if there is one."""
        path = self.folder / "state.pt" if self.folder else None
        return torch.load(path, weights_only=True) if path and path.exists() else None
