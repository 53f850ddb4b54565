"""Downloading from a server of the test's own."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from samssl.config import UserError
from samssl.data.download import download, fetch
from samssl.data.recipe import Archive


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def tar_of(path: Path, *members: tarfile.TarInfo | str) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = 0 if info.islnk() or info.issym() else 4
            tar.addfile(info, io.BytesIO(b"scan"))
    return path


def published(file: Path, address: str, folder: str = "", kind: str = "sha256") -> Archive:
    """An archive of the local server, which has no certificate for HTTPS."""
    digest = hashlib.new(kind, file.read_bytes()).hexdigest()
    archive = SimpleNamespace(url=f"{address}/{file.name}", checksum=f"{kind}:{digest}", folder=folder)
    return cast(Archive, archive)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_tar_is_checked_and_unpacked(served: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    file = tar_of(served[0] / "set.tar", "Task/imagesTr/a.nii.gz", "Task/dataset.json")
    fetch(published(file, served[1], kind=kind), tmp_path / "here")
    assert (tmp_path / "here/Task/imagesTr/a.nii.gz").read_bytes() == b"scan"
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["Task"]


def test_a_zip_goes_into_its_folder(served: tuple[Path, str], tmp_path: Path) -> None:
    file = served[0] / "flat.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.nii.gz", "scan")
    fetch(published(file, served[1], "training_data"), tmp_path / "here")
    assert (tmp_path / "here/training_data/a.nii.gz").read_text() == "scan"


def test_what_was_not_published_is_not_unpacked(served: tuple[Path, str], tmp_path: Path) -> None:
    file = tar_of(served[0] / "set.tar", "Task/a.nii.gz")
    archive = published(file, served[1])
    tar_of(file, "Task/b.nii.gz")
    with pytest.raises(UserError, match="not the archive that was published"):
        fetch(archive, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "member", ["../outside.txt", "a/../../outside.txt", link("a/link", "../../outside"), link("a", "/etc")]
)
def test_a_tar_cannot_write_outside(
    served: tuple[Path, str], tmp_path: Path, member: str | tarfile.TarInfo
) -> None:
    file = tar_of(served[0] / "evil.tar", "a/ok.txt", member)
    with pytest.raises(UserError, match="may not be unpacked"):
        fetch(published(file, served[1]), tmp_path / "here")
    assert not (tmp_path / "outside.txt").exists()
    assert list((tmp_path / "here").iterdir()) == []


def test_a_zip_cannot_write_outside(served: tuple[Path, str], tmp_path: Path) -> None:
    file = served[0] / "evil.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "scan")
        archive.writestr("../../../outside.txt", "evil")
        archive.writestr("/tmp/../outside.txt", "evil")
    fetch(published(file, served[1]), tmp_path / "here")
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["a.txt"]


def test_nothing_is_overwritten(served: tuple[Path, str], tmp_path: Path) -> None:
    file = tar_of(served[0] / "set.tar", "Task/a.nii.gz")
    mine = tmp_path / "here" / "Task"
    mine.mkdir(parents=True)
    (mine / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="there already"):
        fetch(published(file, served[1]), tmp_path / "here")
    assert [path.name for path in mine.iterdir()] == ["mine.txt"]


def test_an_archive_that_is_not_there_is_named(served: tuple[Path, str], tmp_path: Path) -> None:
    archive = cast(Archive, SimpleNamespace(url=f"{served[1]}/none.tar", checksum="md5:0", folder=""))
    with pytest.raises(UserError, match=r"none\.tar could not be downloaded.*404"):
        fetch(archive, tmp_path / "here")


def test_a_set_without_archives_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be downloaded from here.*Synapse"):
        download("btcv", tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "http://a.org/a.zip", "checksum": "md5:" + 32 * "0"},
        {"url": "https://a.org/a.zip", "checksum": "md5:0"},
        {"url": "https://a.org/a.zip", "checksum": "md5:" + 32 * "0", "folder": "../b"},
    ],
)
def test_a_recipe_can_only_name_checked_archives(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"HTTPS|checksum|below"):
        Archive(**fields)
