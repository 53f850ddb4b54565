"""Data sets and stores behind URLs: fsspec's memory for this process, file:// where there are several."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_support import save, series
from fsspec.implementations.memory import MemoryFileSystem

from samssl.config import ConfigError, UserError, load_config
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.slices import SliceStore, verify_store
from samssl.data.sources import DataSource

Prepare = Callable[..., PrepareConfig]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """An empty filesystem in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "store", {})
        patch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
        yield MemoryFileSystem()


@pytest.fixture
def fetched(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were fetched one by one."""
    names: list[str] = []
    get_file = MemoryFileSystem.get_file

    def noting(self: MemoryFileSystem, rpath: str, lpath: str, **options: Any) -> None:
        names.append(rpath.rpartition("/")[2])
        get_file(self, rpath, lpath, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", noting)
    return names


def at(config: PrepareConfig, url: str, **changes: object) -> PrepareConfig:
    """`config` for the set at a URL."""
    return replace(config, data=replace(config.data, root=Path(url)), **changes)


def test_a_set_behind_a_url_gives_the_store_of_a_local_one(
    prepare_config: Prepare, decathlon: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = prepare(prepare_config("local"))
    memory.put(str(decathlon), "/bucket/set", recursive=True)
    scratch = decathlon.with_name("scratch")
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    config = at(prepare_config("far"), "memory://bucket/set")
    far = prepare(config)
    assert far.digest == local.digest
    assert far.cases == 7
    assert verify_store(config.out) == []
    assert not list(scratch.iterdir())


def test_finished_cases_are_not_fetched_again_and_changed_ones_are(
    prepare_config: Prepare, decathlon: Path, memory: MemoryFileSystem, fetched: list[str]
) -> None:
    memory.put(str(decathlon), "/bucket/set", recursive=True)
    config = at(prepare_config("far", public_names=True), "memory://bucket/set")
    first = prepare(config)
    assert fetched.count("liver_3.nii.gz") == 2  # image and mask
    fetched.clear()
    assert prepare(config) == replace(first, wrote=0)
    assert fetched == ["dataset.json"]
    memory.put(str(decathlon / "imagesTr/liver_4.nii.gz"), "/bucket/set/imagesTr/liver_3.nii.gz")
    fetched.clear()
    assert prepare(config).wrote == 1
    assert sorted(fetched) == ["dataset.json", "liver_3.nii.gz", "liver_3.nii.gz"]
    fetched.clear()
    prepare(replace(config, data=replace(config.data, window_hu=(0.0, 100.0))))
    assert fetched.count("liver_1.nii.gz") == 2


def test_a_broken_scan_behind_a_url_is_named_by_its_url(
    prepare_config: Prepare, decathlon: Path, memory: MemoryFileSystem
) -> None:
    (decathlon / "imagesTr/liver_2.nii.gz").write_bytes(b"no scan")
    memory.put(str(decathlon), "/bucket/set", recursive=True)
    config = at(prepare_config("far", public_names=True), "memory://bucket/set")
    assert prepare(config).rejected == 1
    assert "memory:/bucket/set/imagesTr/liver_2.nii.gz" in (config.out / "rejected.csv").read_text()


def test_files_that_belong_together_are_fetched_together(tmp_path: Path, memory: MemoryFileSystem) -> None:
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    save(series(np.tile(voxels, (1, 4, 4))), tmp_path / "dicom" / "one")
    (tmp_path / "meta").mkdir()
    header = "NDims = 3\nDimSize = 5 4 3\nElementType = MET_SHORT\nElementDataFile = scan.raw\n"
    (tmp_path / "meta/scan.mhd").write_text(header)
    (tmp_path / "meta/scan.raw").write_bytes(voxels.tobytes())
    for name in ("dicom", "meta"):
        memory.put(str(tmp_path / name), f"/bucket/{name}", recursive=True)
        source = DataSource(root=Path(f"memory://bucket/{name}"), modality="CT", labels={}, public_names=True)
        config = PrepareConfig(name=name, out=tmp_path / f"{name}_store", data=source, workers=1)
        near = replace(config, out=tmp_path / f"{name}_near", data=replace(source, root=tmp_path / name))
        assert prepare(config).digest == prepare(near).digest


def test_a_store_behind_a_url_is_that_of_a_folder_and_whole_before_it_is_one(
    prepare_config: Prepare, memory: MemoryFileSystem
) -> None:
    local = prepare(prepare_config("local"))
    config = replace(prepare_config("records"), store=Path("memory://bucket/store"))

    def killed(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 3:
                raise KeyboardInterrupt
            yield function(item)

    with pytest.raises(KeyboardInterrupt):
        prepare(config, run=killed)
    with pytest.raises(UserError, match="no complete slice store"):
        SliceStore("memory://bucket/store")
    # A case whose last file is missing was being put when the process died.
    memory.rm(next(path for path in memory.find("/bucket/store") if path.endswith("case.json")))
    far = prepare(config)
    assert (far.digest, far.cases, far.wrote) == (local.digest, 7, 5)
    assert verify_store("memory://bucket/store") == []
    assert prepare(config) == replace(far, wrote=0)
    assert not (config.out / "cases").exists()


def test_scans_that_are_gone_leave_a_store_behind_a_url(
    prepare_config: Prepare, decathlon: Path, memory: MemoryFileSystem
) -> None:
    config = replace(prepare_config("records", public_names=True), store=Path("memory://bucket/store"))
    prepare(config)
    (decathlon / "imagesTr/liver_1.nii.gz").unlink()
    (decathlon / "labelsTr/liver_1.nii.gz").unlink()
    assert prepare(config).removed == 1
    assert verify_store("memory://bucket/store") == []


def test_several_processes_read_and_write_behind_urls(prepare_config: Prepare, decathlon: Path) -> None:
    digest = prepare(prepare_config("local")).digest
    store = decathlon.with_name("far_store")
    config = at(prepare_config("records", workers=2), f"file://{decathlon}", store=Path(f"file://{store}"))
    assert prepare(config).digest == digest
    assert verify_store(store) == []


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("memory://bucket/nothing", "there is nothing at memory://bucket/nothing"),
        ("memory://bucket/cases.csv", "memory://bucket/cases.csv is a file. Give its folder"),
        ("nosuch://bucket/set", "nosuch://bucket/set cannot be opened: Protocol not known"),
    ],
)
def test_what_cannot_be_listed_is_named(
    prepare_config: Prepare, memory: MemoryFileSystem, root: str, message: str
) -> None:
    memory.pipe_file("/bucket/cases.csv", b"image\n")
    with pytest.raises(UserError, match=message):
        prepare(at(prepare_config(), root))


def test_a_name_that_leads_out_of_the_set_is_no_file_of_it(
    prepare_config: Prepare, decathlon: Path, memory: MemoryFileSystem
) -> None:
    memory.put(str(decathlon), "/bucket/set", recursive=True)
    memory.store["/bucket/set/imagesTr/../../../liver_9.nii.gz"] = memory.store[
        "/bucket/set/imagesTr/liver_1.nii.gz"
    ]
    assert prepare(at(prepare_config(), "memory://bucket/set")).cases == 7


def test_records_lie_in_a_folder_and_stores_behind_urls(tmp_path: Path) -> None:
    settings = {"name": "tiny", "data.root": str(tmp_path), "out": "s3://bucket/store"}
    with pytest.raises(ConfigError, match="give the URL as `store`"):
        load_config(PrepareConfig, None, settings)
    with pytest.raises(ConfigError, match="Name a folder as `out`"):
        load_config(PrepareConfig, None, settings | {"out": str(tmp_path), "store": str(tmp_path / "store")})
    kept = load_config(PrepareConfig, None, settings | {"out": str(tmp_path), "store": "s3://bucket/store"})
    assert str(kept.root) == "s3://bucket/store"
