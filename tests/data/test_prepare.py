import csv
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from samssl.config import ConfigError, UserError, load_config
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.slices import SliceStore, verify_store
from samssl.data.sources import find_sources
from samssl.data.splits import SplitConfig


def _mtimes(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def _rejected(out):
    with (out / "rejected.csv").open() as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def test_second_call_writes_nothing(prepare_config):
    config = prepare_config()
    first = prepare(config)
    assert (first.cases, first.slices, first.rejected, first.wrote, first.removed) == (7, 28, 0, 7, 0)
    before = _mtimes(config.out)
    assert prepare(config) == replace(first, wrote=0)
    assert _mtimes(config.out) == before


def test_digest_depends_on_neither_workers_nor_order_nor_place(prepare_config, decathlon):
    digest = prepare(prepare_config("one")).digest
    assert prepare(prepare_config("two", workers=2)).digest == digest

    def backwards(function, items):
        return map(function, list(items)[::-1])

    assert prepare(prepare_config("three"), run=backwards).digest == digest
    moved = shutil.copytree(decathlon, decathlon.with_name("moved"))
    config = prepare_config("four")
    assert prepare(replace(config, data=replace(config.data, root=moved))).digest == digest
    stores = [config.out.with_name(name) for name in ("one", "two", "three", "four")]
    assert len({(store / "manifest.json").read_bytes() for store in stores}) == 1


def test_a_patient_is_in_one_split_only(prepare_config):
    config = replace(prepare_config(cases_per_patient=2), split=SplitConfig(train=1.0, val=1.0, test=1.0))
    prepare(config)
    index = SliceStore(config.out).index
    assert set(index.groupby("patient")["split"].nunique()) == {1}
    assert dict(index.groupby("split")["case"].nunique()) == {"pool": 1, "train": 2, "val": 2, "test": 2}


def test_unlabelled_scan_of_a_tested_patient_is_left_out(prepare_config, decathlon):
    (decathlon / "imagesTs" / "liver_7.nii.gz").rename(decathlon / "imagesTs" / "liver_1_second.nii.gz")
    config = prepare_config(patient_pattern=r"liver_(\d)", public_names=True)
    config = replace(config, split=SplitConfig(train=2.0, val=0.0, test=4.0))
    summary = prepare(config)
    assert summary.cases == 6
    assert "its patient is in the split" in _rejected(config.out)["imagesTs/liver_1_second.nii.gz"]
    assert verify_store(config.out) == []
    assert prepare(config) == replace(summary, wrote=0)


def test_copies_of_an_image_never_face_each_other(prepare_config, decathlon):
    for number in (2, 3, 4):
        for part in ("imagesTr", "labelsTr"):
            shutil.copy(decathlon / part / "liver_1.nii.gz", decathlon / part / f"liver_{number}.nii.gz")
    config = replace(prepare_config(public_names=True), split=SplitConfig(train=1.0, val=1.0, test=1.0))
    prepare(config)
    store = SliceStore(config.out)
    copies = store.index["case"].isin([f"liver_{number}" for number in (1, 2, 3, 4)])
    assert store.index.loc[copies, "split"].nunique() == store.index.loc[copies, "patient"].nunique() == 1


def test_only_the_changed_case_is_written_again(prepare_config, decathlon):
    config = prepare_config(public_names=True)
    first = prepare(config)
    path = decathlon / "imagesTr" / "liver_3.nii.gz"
    nib.save(nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(6, 5, 4), np.eye(4)), path)
    before = _mtimes(config.out)
    second = prepare(config)
    assert second.wrote == 1
    assert second.digest != first.digest
    changed = {path for path, mtime in _mtimes(config.out).items() if before.get(path) != mtime}
    parts = {path.relative_to(config.out).parts[:2] for path in changed}
    assert parts == {("cases", "liver_3.zarr"), ("index.parquet",), ("manifest.json",)}


def test_another_split_rewrites_no_case(prepare_config):
    config = prepare_config()
    digest = prepare(config).digest
    other = prepare(replace(config, split=SplitConfig(train=1.0, val=1.0, test=1.0)))
    assert other.wrote == 0
    assert other.digest != digest


def test_other_settings_rewrite_the_cases(prepare_config):
    prepare(prepare_config())
    assert prepare(prepare_config(window_hu=(0.0, 100.0))).wrote == 7
    assert prepare(prepare_config(window_hu=(0.0, 100.0), axis="coronal")).wrote == 7


def test_damage_to_the_store_is_mended(prepare_config):
    config = prepare_config(public_names=True)
    digest = prepare(config).digest
    for name in ("case.json", "zarr.json", "image/c/0/0/0"):
        path = config.out / "cases" / "liver_2.zarr" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        summary = prepare(config)
        assert (summary.wrote, summary.digest) == (1, digest), name
        assert verify_store(config.out) == []


def test_killed_call_is_no_store_and_is_resumed(prepare_config):
    config = prepare_config()

    def killed(function, items):
        for item in list(items)[:3]:
            yield function(item)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, run=killed)
    with pytest.raises(UserError, match="no complete slice store"):
        SliceStore(config.out)
    leftover = config.out / "cases" / ".x.zarr.0123abcd.partial"
    leftover.mkdir()
    assert prepare(config).wrote == 4
    assert not leftover.exists()
    assert verify_store(config.out) == []


_KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from samssl.data.parallel import local_map
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.sources import DataSource
from samssl.data.splits import SplitConfig

def run(function, items):
    for number, result in enumerate(local_map(2)(function, items)):
        if number == 2:
            os.killpg(0, signal.SIGKILL)
        yield result

source = DataSource(root=Path(sys.argv[1]), public_names=True)
split = SplitConfig(train=2.0, val=1.0, test=2.0)
prepare(PrepareConfig(name="tiny", out=Path(sys.argv[2]), data=source, split=split), run)
"""


def test_finished_cases_outlive_a_kill_of_all_processes(prepare_config, decathlon):
    undisturbed = prepare(prepare_config("undisturbed", public_names=True)).digest
    config = prepare_config("killed", public_names=True)
    command = [sys.executable, "-c", _KILLED_IN_THE_MIDDLE, str(decathlon), str(config.out)]
    assert subprocess.run(command, start_new_session=True, check=False).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="no complete slice store"):
        SliceStore(config.out)
    finished = [path.parent for path in config.out.glob("cases/[!.]*/case.json")]
    before = {path: mtime for case in finished for path, mtime in _mtimes(case).items()}
    assert len(finished) >= 3
    summary = prepare(config)
    assert (summary.wrote, summary.digest) == (7 - len(finished), undisturbed)
    assert before.items() <= _mtimes(config.out).items()
    assert verify_store(config.out) == []


def test_broken_files_are_listed_and_the_rest_goes_on(prepare_config, decathlon):
    (decathlon / "imagesTr" / "liver_2.nii.gz").write_bytes(b"rubbish")
    (decathlon / "labelsTr" / "liver_4.nii.gz").write_bytes(b"rubbish")
    config = replace(prepare_config(public_names=True), split=SplitConfig(train=1.0, val=1.0, test=1.0))
    summary = prepare(config)
    assert (summary.cases, summary.rejected) == (5, 2)
    assert set(_rejected(config.out)) == {"imagesTr/liver_2.nii.gz", "imagesTr/liver_4.nii.gz"}
    assert "liver_2.nii.gz is damaged" in _rejected(config.out)["imagesTr/liver_2.nii.gz"]
    assert verify_store(config.out) == []
    before = _mtimes(config.out)
    assert prepare(config) == replace(summary, wrote=0)
    assert _mtimes(config.out) == before
    shutil.copy(decathlon / "imagesTr" / "liver_1.nii.gz", decathlon / "imagesTr" / "liver_2.nii.gz")
    shutil.copy(decathlon / "labelsTr" / "liver_1.nii.gz", decathlon / "labelsTr" / "liver_4.nii.gz")
    assert prepare(config).rejected == 0
    assert not (config.out / "rejected.csv").exists()


def test_nothing_usable_leaves_nothing(prepare_config, decathlon):
    for path in decathlon.glob("images*/*"):
        path.write_bytes(b"rubbish")
    config = prepare_config(public_names=True)
    with pytest.raises(UserError, match=r"None of the 7 scans can be used.*liver_\d"):
        prepare(config)
    assert not config.out.exists()


def test_splits_that_cannot_be_filled_are_refused_before_reading(prepare_config):
    config = replace(prepare_config(), split=SplitConfig(train=6.0, val=1.0, test=1.0))
    with pytest.raises(UserError, match="6 patients have masks"):
        prepare(config)
    assert not config.out.exists()


def test_cases_that_are_gone_from_the_source_go_from_the_store(prepare_config, decathlon):
    config = prepare_config(public_names=True)
    prepare(config)
    for part in ("imagesTr", "labelsTr"):
        (decathlon / part / "liver_6.nii.gz").unlink()
    summary = prepare(config)
    assert (summary.removed, summary.wrote, summary.cases) == (1, 0, 6)
    assert not (config.out / "cases" / "liver_6.zarr").exists()
    assert verify_store(config.out) == []
    renamed = prepare(replace(config, name="other", data=replace(config.data, public_names=False)))
    assert (renamed.removed, renamed.wrote) == (6, 6)
    assert verify_store(config.out) == []


def test_nothing_but_the_source_columns_tells_a_name(prepare_config):
    config = prepare_config()
    prepare(config)
    names = [path.relative_to(config.out).as_posix() for path in config.out.rglob("*")]
    texts = [path.read_text() for path in config.out.rglob("*.json")]
    assert not any("liver_" in text for text in names + texts)
    index = SliceStore(config.out).index.drop(columns=["source", "mask_source"])
    assert "liver_" not in index.to_csv()


def test_config_is_read_from_yaml_names(tmp_path):
    (tmp_path / "p.yaml").write_text(
        json.dumps(
            {
                "name": "a",
                "out": "s",
                "data": {"root": "d", "labels": {"1": "liver"}},
                "split": {"train": "5"},
            }
        )
    )
    config = load_config(PrepareConfig, tmp_path / "p.yaml", {"data.window_hu": ["-100", "300"]})
    assert config.data.labels == {1: "liver"}
    assert config.data.window_hu == (-100, 300)
    assert config.split.train == 5
    with pytest.raises(ConfigError, match="letters"):
        load_config(PrepareConfig, tmp_path / "p.yaml", {"name": "a/b"})


def test_the_memory_of_a_case_follows_its_files_or_is_what_is_set(prepare_config, decathlon):
    config = prepare_config(public_names=True)
    entry = find_sources(config.data, config.name).entries[0]
    sizes = [path.stat().st_size for path in (*entry.image_files, *entry.mask_files)]
    assert config.memory_of(entry) == (1 << 28) + 40 * sum(sizes)
    assert replace(config, memory_gib=1.5).memory_of(entry) == 3 << 29
