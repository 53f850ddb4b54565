"""Self-supervised continued pretraining and fine-tuning of SAM for radiology."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samssl.inference import LoadedBundle

__all__ = ["load_bundle"]


def load_bundle(*paths: str | Path, base: str | Path | None = None, prompted: bool = False) -> "LoadedBundle":
    """The bundle at a path, ready for `predict`; several paths predict together.

    `base` says where the base weights are, if not where they were when the bundle was made. With `prompted`
    the bundle is promptable, and `predict` is told by `pointing` what to segment.

    Raises:
        UserError: there is no bundle, or it cannot be used.
    """
    from samssl.inference import LoadedBundle  # torch and all else only now: `import samssl` stays light

    return LoadedBundle([Path(path) for path in paths], Path(base) if base else None, prompted=prompted)
