"""Coverage-guided fuzzing of every reader with atheris, by hand: it has no end of its own.

    python tests/fuzz/readers.py scan.nii -max_total_time=600

The name is one of the valid files of `hostile_support`, from which the fuzzer starts. It stops at anything
that is neither a scan nor a `UserError`, and leaves the bytes that did it in `crash-*`.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
PACKAGES = ["samssl.data", "nibabel", "nrrd", "pydicom", "PIL"]
with atheris.instrument_imports(include=PACKAGES):  # pyright: ignore[reportAttributeAccessIssue]
    from hostile_support import read_either_way, valid_files


def main() -> None:
    """Fuzz the reader of the file that is named first."""
    files = valid_files()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in files:
        sys.exit(f"Give the file to start from: {', '.join(files)}")
    folder = Path(tempfile.mkdtemp())
    (folder / "corpus").mkdir()
    (folder / "corpus" / "valid").write_bytes(files[name])
    path = folder / name

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_either_way(path)

    atheris.Setup([sys.argv[0], *sys.argv[2:], str(folder / "corpus")], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
