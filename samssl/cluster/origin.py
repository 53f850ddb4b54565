"""What a run starts from, in tags that a person can filter by.

`init` is `ssl` (an encoder that pretrain wrote), `finetuned` (one that finetune or export merged), the name
of published weights (`sam`, `medsam`, ...), `random`, or `file` for any other. `ssl_run_id` is the run of
pretrain.
"""

from pathlib import Path

from samssl.cluster.tracking import Run
from samssl.models.initial import published_as

RANDOM = "random-"
"""How the digest of weights that were drawn, not read, begins."""
HANDED_ON = ("init", "ssl_run_id", "arm", "seed", "shots")
"""What an evaluation takes over from the run that wrote its bundle."""


def tags_of_encoder(digest: str, path: Path | None, writer: Run | None) -> dict[str, str]:
    """`init`, and `ssl_run_id` where there is one, of a run that starts from this encoder."""
    if digest.startswith(RANDOM):
        return {"init": "random"}
    if writer is None:
        return {"init": (path and published_as(path.name)) or "file"}
    written_by = writer.tags()
    if written_by["stage"] == "pretrain":
        return {"init": "ssl", "ssl_run_id": writer.run_id}
    earlier = {name: value for name, value in written_by.items() if name == "ssl_run_id"}
    return {"init": "finetuned", **earlier}


def tags_of_bundle(writer: Run | None) -> dict[str, str]:
    """What the evaluation of a bundle is filtered by: as the run that wrote it."""
    known = writer.tags() if writer else {}
    return {name: known[name] for name in HANDED_ON if name in known}
