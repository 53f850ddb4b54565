"""JSON that notices when any byte of it has changed."""

import hashlib
import json
from typing import Any


def seal(content: dict[str, Any]) -> bytes:
    """`content` as JSON with its own SHA-256 inside."""
    return _canonical({**content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()})


def unseal(sealed: bytes) -> dict[str, Any]:
    """The content that `seal` was given.

    Raises:
        ValueError: these are not the bytes that `seal` returned.
    """
    content = json.loads(sealed)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON mapping")
    content.pop("sha256", None)
    if seal(content) != sealed:
        raise ValueError("its bytes are not those that were written")
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
