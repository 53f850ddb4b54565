"""From an encoder, bundle, export or run back to the source files; links are digests, not paths."""

import hashlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from samssl.cluster.ledger import Ledger, Writer, ledger_for
from samssl.cluster.origin import RANDOM
from samssl.cluster.registry import URI, fetch, find_version, role_of
from samssl.cluster.server import shown, tracking_uri
from samssl.config import UserError, as_url, is_url
from samssl.data.entries import source_files
from samssl.data.pseudonyms import key_path, listing_path, read_listing
from samssl.data.slices import SliceStore, verify_store
from samssl.files import read_json, sha256_file, sha256_files, sha256_tree

WRITTEN = ("encoder", "bundle", "export", "safetensors")
"""Roles of what one can ask about by its path."""

STATE = "state"
"""What a run can be continued from. It may be deleted, and is a link only where a later run read it."""


OFFLINE = (
    "MLflow at {uri} is not there: this follows run.json in the folders. Not checked: whether that is what "
    "MLflow recorded, and what runs outside of these folders made of it."
)


@dataclass(frozen=True)
class Link:
    """One thing that a run wrote, or that came from outside."""

    depth: int
    """0 for what was asked about, more for what it came from."""
    stage: str
    run_id: str
    role: str
    digest: str
    problems: list[str]
    """What is broken, in sentences; empty where the thing still has its digest."""
    unchecked: str = ""
    """Why nothing could be checked."""

    @property
    def state(self) -> str:
        """`verified`, `BROKEN` or why it is neither."""
        return "BROKEN" if self.problems else self.unchecked or "verified"


def describe_lineage(start: str) -> tuple[str, bool]:
    """The chain behind a path, a registered model or a run id as text, and whether every link holds."""
    ledger = ledger_for(start)
    links = list(trace(start, ledger))
    lines = [] if ledger.whole else [OFFLINE.format(uri=shown(tracking_uri()))]
    for link in links:
        indent, origin = "  " * link.depth, f"{link.stage} run {link.run_id}" if link.run_id else link.stage
        lines.append(f"{indent}{link.role} {link.digest[:16]}  {link.state}  ({origin})")
        lines += [f"{indent}    {problem}" for problem in link.problems]
    broken = [f"{link.role} ({link.stage})" for link in links if link.problems]
    checked, unchecked = (
        sum(link.state == "verified" for link in links),
        sum(bool(link.unchecked) for link in links),
    )
    verdict = f"BROKEN at: {', '.join(broken)}." if broken else f"Unbroken: {checked} links verified."
    verdict += f" Not checked: {unchecked}, as said above." if unchecked else ""
    return "\n".join([*lines, verdict]), not broken


def trace(start: str, ledger: Ledger) -> Iterator[Link]:
    """The links behind `start`, nearest first; each run and each file is checked once.

    Raises:
        UserError: no run is known for it.
    """
    path, seen, moved = Path(start), set[str](), {}
    if start.startswith(URI):
        registered, run = _registered(start, ledger)
        yield registered
    elif path.exists():
        run, moved = _run_of_path(path, ledger)
    else:
        run = ledger.by_id(start)
    tags = run.tags() | moved
    for evaluation in ledger.find({"input.bundle": tags["output.bundle"]}) if "output.bundle" in tags else []:
        seen.add(evaluation.run_id)
        yield from _outputs(evaluation, evaluation.tags(), depth=0)
    yield from _chain(run, tags, ledger, depth=0, seen=seen)


def _chain(run: Writer, tags: dict[str, str], ledger: Ledger, depth: int, seen: set[str]) -> Iterator[Link]:
    if run.run_id in seen:
        return
    seen.add(run.run_id)
    yield from _outputs(run, tags, depth)
    for role, digest in _tagged(tags, "input."):
        writer = _writer(tags, role, digest, ledger)
        if writer and role == STATE:
            yield from _outputs(writer, writer.tags(), depth + 1, [STATE])
        if writer:
            yield from _chain(writer, writer.tags(), ledger, depth + 1, seen)
        else:
            yield _outside(tags, role, digest, depth + 1, ledger)


def _outputs(
    run: Writer, tags: dict[str, str], depth: int, only: Collection[str] | None = None
) -> Iterator[Link]:
    """What `run` wrote, except its state; or `only` these roles."""
    for role, digest in _tagged(tags, "output."):
        if role not in only if only else role == STATE:
            continue
        path = Path(tags[f"path.{role}"])
        problems = _problems(role, path, digest)
        yield Link(depth, tags["stage"], run.run_id, role, digest, problems)
        if role == "manifest" and not problems:
            yield _sources(SliceStore(path), Path(tags["path.sources"]), depth + 1)


def _sources(store: SliceStore, root: Path, depth: int) -> Link:
    """The scans and masks that the store was made from, each by the digest in the store's index."""
    columns = (["source", "source_sha256"], ["mask_source", "mask_source_sha256"])
    digests = {
        name: digest for pair in columns for name, digest in store.index[pair].itertuples(index=False) if name
    }
    whole = hashlib.sha256("\n".join(sorted(digests.values())).encode()).hexdigest()
    name = f"{len(digests)} source files"
    unchecked = "" if root.exists() else f"{as_url(root)} cannot be reached from here"
    folder = root.parent if root.is_file() else root
    listed = read_listing(listing_path(key_path(), store.name))
    if not unchecked and (unknown := [source for source in digests if _is_pseudonym(source, store.name)]):
        missing = [source for source in unknown if source not in listed]
        if missing:
            unchecked = f"the private list of what {len(missing)} pseudonyms stand for is not here"
    if unchecked:
        return Link(depth, "from outside", "", name, whole, [], unchecked=unchecked)
    faults = []
    for source, digest in digests.items():
        files = (
            [folder / file for file in listed[source]] if source in listed else source_files(folder, source)
        )
        faults += _problems_of_source(source, files, digest)
    return Link(depth, "from outside", "", name, whole, faults)


def _is_pseudonym(source: str, name: str) -> bool:
    return re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{12}}", source) is not None


def _problems_of_source(source: str, files: list[Path], digest: str) -> list[str]:
    """What is wrong with the files of one scan or mask; they are called as the store calls them."""
    if not files or not all(file.exists() for file in files):
        return [f"The source {source} is not there any more."]
    found = sha256_files(files)
    return [] if found == digest else [f"The source {source} has changed: its digest is now {found[:16]}."]


def _outside(tags: dict[str, str], role: str, digest: str, depth: int, ledger: Ledger) -> Link:
    """What no run wrote: source scans, published weights, or weights drawn at random."""
    if digest.startswith(RANDOM):
        return Link(depth, "from outside", "", role, digest, [], unchecked="drawn at random from its seed")
    path = tags.get(f"input_path.{role}")
    if not path and not ledger.whole:
        return Link(depth, "from outside", "", role, digest, [], unchecked="no folder says where it lies")
    problems = _problems(role, Path(path), digest) if path else [f"No run is known that wrote this {role}."]
    return Link(depth, "from outside", "", role, digest, problems)


def _writer(tags: dict[str, str], role: str, digest: str, ledger: Ledger) -> Writer | None:
    """The run that wrote an input, found by its digest; the one noted at the time if it still fits."""
    kind = role.rstrip("_0123456789")  # manifest_2 is the manifest of a second store
    writers = ledger.find({f"output.{kind}": digest})
    noted = [run for run in writers if run.run_id == tags.get(f"run.{role}")]
    return next(iter(noted or writers), None)


def _tagged(tags: dict[str, str], prefix: str) -> list[tuple[str, str]]:
    return sorted(
        (name.removeprefix(prefix), value) for name, value in tags.items() if name.startswith(prefix)
    )


def _registered(uri: str, ledger: Ledger) -> tuple[Link, Writer]:
    """What is registered, measured where the registry keeps it, and the run that its version names."""
    version = find_version(uri)
    digest = version.tags.get("file.sha256", "")
    with tempfile.TemporaryDirectory() as folder:
        file = fetch(version, Path(folder))
        measure = sha256_tree if role_of(version) == "bundle" else sha256_file
        problems = _compare(file, digest, measure) if file else [f"The registry lost {version.source}."]
    name = f"{version.name} version {version.version}"
    return Link(0, "registry", "", name, digest, problems), ledger.by_id(version.run_id or "")


def _run_of_path(path: Path, ledger: Ledger) -> tuple[Writer, dict[str, str]]:
    """The run that wrote what lies at `path`, and the tag that says that it is now there.

    Found by its digest, or by the record beside it where it was changed since. A stage's own folder stands
    for its run.

    Raises:
        UserError: no run is known that wrote it.
    """
    if (path / "run.json").is_file():
        return ledger.by_id(read_json(path / "run.json")["run_id"]), {}
    digest = sha256_file(path) if path.is_file() else sha256_tree(path)
    for role in WRITTEN:
        found = ledger.find({f"output.{role}": digest})
        if found:
            return found[0], {f"path.{role}": str(path)}
    record = path.parent / "run.json"
    if record.is_file():
        run = ledger.by_id(read_json(record)["run_id"])
        moved = [name for name, at in _tagged(run.tags(), "path.") if Path(at).name == path.name]
        return run, {f"path.{role}": str(path) for role in moved}
    raise UserError(
        f"No run in {shown(tracking_uri())} wrote {path}. Give an encoder of pretrain, a bundle of finetune "
        "or an export, and their MLFLOW_TRACKING_URI."
    )


def _problems(role: str, path: Path, digest: str) -> list[str]:
    """What is wrong with the thing at `path`, which had this digest when its run ended."""
    if not path.exists() and not is_url(path):
        return [f"{path} is not there any more."]
    if role.startswith("manifest"):
        return verify_store(path) or _compare(path, digest, lambda store: SliceStore(store).digest)
    return _compare(path, digest, sha256_tree if role in ("bundle", "export") else sha256_file)


def _compare(path: Path, digest: str, measure: Callable[[Path], str]) -> list[str]:
    found = measure(path)
    return [] if found == digest else [f"{path} has changed: its digest is now {found[:16]}."]
