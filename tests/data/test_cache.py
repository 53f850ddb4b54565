import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from samssl.config import UserError, absolute_paths, as_url
from samssl.data.cache import CachedFiles
from samssl.data.prepare import prepare
from samssl.data.slices import SliceStore
from samssl.train.pretrain import PretrainDataConfig


@pytest.fixture
def remote(prepare_config):
    """A store at memory://far, and where it was made."""
    config = prepare_config(public_names=True)
    prepare(config)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{config.out}/", "/far/", recursive=True)
    yield filesystem, SliceStore(config.out)
    if filesystem.exists("/far"):
        filesystem.rm("/far", recursive=True)


def test_what_was_read_once_is_read_from_the_disk(remote, tmp_path: Path) -> None:
    filesystem, local = remote
    store = SliceStore("memory://far", tmp_path / "cache")
    np.testing.assert_array_equal(store.image_slice("liver_1", 2), local.image_slice("liver_1", 2))
    filesystem.rm("/far/cases", recursive=True)
    again = SliceStore("memory://far", tmp_path / "cache")
    for z in range(4):
        np.testing.assert_array_equal(again.image_slice("liver_1", z), local.image_slice("liver_1", z))
    with pytest.raises(UserError, match="liver_2"):
        again.image_slice("liver_2", 0)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".")]


def test_a_full_disk_is_left_alone(remote, tmp_path: Path) -> None:
    filesystem, local = remote
    everything = shutil.disk_usage(tmp_path).total
    files = CachedFiles(filesystem, "/far", tmp_path / "cache", keep_free_bytes=everything)
    name = "cases/liver_1.zarr/image/zarr.json"
    content = (Path(local.root) / name).read_bytes()
    assert files.cat_file(f"/far/{name}") == content
    assert files.cat_file(f"/far/{name}", start=-7) == content[-7:]
    assert not list((tmp_path / "cache").rglob("zarr.json"))


def test_ranges_of_a_cached_file_are_ranges_of_the_file(remote, tmp_path: Path) -> None:
    filesystem, local = remote
    files = CachedFiles(filesystem, "/far", tmp_path / "cache", keep_free_bytes=0)
    name = "cases/liver_1.zarr/image/c/0/0/0"
    content = (Path(local.root) / name).read_bytes()
    for start, end in ((None, None), (3, 9), (-5, None), (0, 10**9), (9, 3)):
        assert files.cat_file(f"/far/{name}", start, end) == content[start:end]
    assert (tmp_path / "cache" / name).read_bytes() == content


def test_a_url_survives_being_a_path(remote) -> None:
    data = absolute_paths(PretrainDataConfig(store=Path("memory://far"), more_stores=(Path("near"),)))
    assert data.store == Path("memory://far")
    assert data.more_stores == (Path("near").absolute(),)
    assert SliceStore(data.store).digest == remote[1].digest
    assert as_url("s3://bucket/store") == as_url(Path("s3://bucket/store")) == "s3://bucket/store"
    assert as_url(Path("/data/a:b")) == "/data/a:b"
