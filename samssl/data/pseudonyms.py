"""Names that stand for patients and files: keyed digests (HMAC-SHA256), and the private list behind them.

Whoever has the key can tell which pseudonym a name gets; without it no guess can be checked. The key and
the lists stay with the user, outside of every store, in the folder of the key file.
"""

import csv
import hashlib
import hmac
import io
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from samssl.config import UserError
from samssl.files import written_aside

KEY_VARIABLE = "SAMSSL_KEY_FILE"
_DEFAULT_FILE = Path("~/.samssl/pseudonyms.key")
_KEY_BYTES = 32
_MAX_KEY_FILE_BYTES = 4096


@dataclass(frozen=True)
class Key:
    """The secret that pseudonyms are made with; never printed, logged or stored with data."""

    path: Path
    secret: bytes

    def __repr__(self) -> str:
        return f"Key(fingerprint={self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """Tells keys apart without giving them away."""
        return hashlib.sha256(b"samssl key fingerprint\0" + self.secret).hexdigest()[:16]

    def pseudonym(self, name: str, what: str, secret: str) -> str:
        """`name` and 12 hex digits: two among 100 000 cases meet with a chance of 2 in 100 000."""
        message = f"{name}\0{what}\0{secret}".encode(errors="surrogateescape")
        return f"{name}-{hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:12]}"


def key_path(key_file: Path | None = None) -> Path:
    """The key file that is set, else that of the environment, else the one in the home folder."""
    return (key_file or Path(os.environ.get(KEY_VARIABLE) or _DEFAULT_FILE)).expanduser().absolute()


def open_key(key_file: Path | None = None) -> Key:
    """The user's key; made on first use, readable by nobody else.

    Raises:
        UserError: the file cannot be read or made, or holds no key.
    """
    path = key_path(key_file)
    try:
        if not path.exists():
            _make(path)
        with path.open() as file:
            text = file.read(_MAX_KEY_FILE_BYTES).strip()
        secret = bytes.fromhex(text)
    except OSError as error:
        raise UserError(
            f"The key of pseudonyms, {path}, cannot be read or made ({error.strerror}). Set data.key_file or "
            f"{KEY_VARIABLE} to a file of yours, or data.public_names=true for public data."
        ) from None
    except ValueError:
        secret = b""
    if len(secret) < _KEY_BYTES:
        raise UserError(
            f"{path} holds no key of pseudonyms: it takes {2 * _KEY_BYTES} hex digits. Restore it from your "
            "copy. If there is none, remove the file: pseudonyms will then be new ones."
        )
    return Key(path, secret)


def _make(path: Path) -> None:
    """Write a new key aside and link it into place; whoever comes second uses the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(_KEY_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()


def listing_path(key: Key | Path, name: str) -> Path:
    """The private list of a data set: which file each pseudonym of a source stands for."""
    return (key.path if isinstance(key, Key) else key).parent / "listings" / f"{name}.csv"


def write_listing(key: Key, name: str, files: Mapping[str, Iterable[str]]) -> Path:
    """Add to a data set's private list which files (relative to its root) a pseudonym stands for.

    Raises:
        UserError: the list cannot be written.
    """
    path = listing_path(key, name)
    held = read_listing(path) | {source: list(names) for source, names in files.items()}
    text = io.StringIO(newline="")
    rows = [(source, name) for source, names in sorted(held.items()) for name in names]
    csv.writer(text, lineterminator="\n").writerows([("source", "file"), *rows])
    content = text.getvalue().encode(errors="surrogateescape")
    try:
        if not path.is_file() or path.read_bytes() != content:
            with written_aside(path) as partial:
                partial.touch(mode=0o600)
                partial.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"The private list {path} cannot be written ({error.strerror}); without it nobody could "
            "tell which file a reason is about. Set data.key_file to a file in a folder of yours."
        ) from None
    return path


def read_listing(path: Path) -> dict[str, list[str]]:
    """Files by the pseudonyms of their sources; empty where there is no list."""
    held: dict[str, list[str]] = {}
    if path.is_file():
        with path.open(newline="", errors="surrogateescape") as file:
            for row in csv.DictReader(file):
                held.setdefault(row["source"], []).append(row["file"])
    return held
