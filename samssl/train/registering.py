"""How a pretrained encoder or a fine-tuned bundle is named in a model registry."""

import re
from typing import Literal

from samssl.config import config


@config
class RegisterConfig:
    """The place of what a run wrote in MLflow's model registry."""

    enabled: bool = True
    """Register the encoder or the bundle when its run has finished. The registry keeps a copy of it."""
    name: str | None = None
    """Name of the model, of which each run makes a new version; null: `samssl-<variant>-encoder`,
    or of a bundle `samssl-<variant>-bundle`."""
    alias: str = "newest"
    """Name that moves on to the new version, as in models:/samssl-vit_b-encoder@newest."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name or "unnamed"):
            raise ValueError(f"register.name '{self.name}' may hold letters, digits, '_', '-' and '.' only")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.alias):
            raise ValueError(f"register.alias '{self.alias}' may hold letters, digits, '_' and '-' only")
        if re.fullmatch(r"latest|v\d+", self.alias.lower()):
            raise ValueError(f"register.alias '{self.alias}' is a name that MLflow keeps for itself")

    def model_name(self, variant: str, role: Literal["encoder", "bundle"]) -> str:
        """The name under which an encoder or a bundle of `variant` is registered."""
        return self.name or f"samssl-{variant}-{role}"
