import io

import numpy as np
import pandas as pd
import pytest

from samssl.config import UserError
from samssl.data.index import INDEX_COLUMNS, STATISTICS, SliceIndex, store_digest
from samssl.data.prepare import prepare
from samssl.data.sealed import seal, unseal
from samssl.data.slices import SliceStore, verify_store, write_index


@pytest.fixture
def store(prepare_config) -> SliceStore:
    config = prepare_config(public_names=True)
    prepare(config)
    return SliceStore(config.out)


def parquet(frame: pd.DataFrame, **options: object) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return buffer.getvalue()


def test_rows_say_what_the_table_says(store) -> None:
    table, rows = store.index, store.rows
    assert tuple(table.columns) == INDEX_COLUMNS
    assert len(rows) == len(table) == 28
    for row, facts in table.iterrows():
        assert (rows.case_name(row), int(rows.z[row])) == (facts["case"], facts["z"])
        assert rows.num_slices(row) == facts["num_slices"]
        assert rows.labelled(row) == bool(facts["mask_sha256"])
        values = rows.intensity(row)
        assert (values.modality, values.low, values.high) == ("CT", -160, 240)
        assert (values.mean, values.std, values.lowest, values.highest) == tuple(facts[[*STATISTICS]])
        assert store.describe(row) == f"{facts['case']}/{facts['z']}"
    for split in ("pool", "train", "val", "test", "nothing"):
        assert rows.rows([split]).tolist() == table.index[table["split"] == split].tolist()
        assert rows.cases(split) == sorted(set(table.loc[table["split"] == split, "case"]))
    emptier = table.assign(content_fraction=np.arange(28) / 27)
    full = table.index[(table["split"] == "train") & (emptier["content_fraction"] >= 0.5)].tolist()
    assert 0 < len(full) < 8
    assert SliceIndex(parquet(emptier)).rows(["train"], 0.5).tolist() == full
    volume = store.image("liver_1")
    row = store.first_row("liver_1")
    assert rows.intensity(row).mean == pytest.approx(volume[volume > volume.min()].mean())


def test_cases_are_found_by_name(store) -> None:
    for case in set(store.index["case"]):
        assert store.rows.case_name(store.first_row(case)) == case
    for unknown in ("", "liver", "liver_8", "zebra"):
        assert store.rows.first_row(unknown) is None


def test_row_groups_of_a_big_file_share_their_names(store) -> None:
    rows = SliceIndex(parquet(store.index, row_group_size=3))
    codes, names = rows.groups("patient")
    assert [names[code] for code in codes] == store.index["patient"].tolist()
    assert len(names) == len(set(names))
    assert [rows.case_name(row) for row in range(28)] == store.index["case"].tolist()


def test_facts_that_are_missing_are_no_numbers(store) -> None:
    rows = SliceIndex(parquet(store.index.assign(intensity_mean=np.nan)))
    assert np.isnan(rows.intensity(3).mean)
    assert rows.intensity(3).low == -160


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index: index.sort_values(by=["z", "case"]),
        lambda index: index.iloc[::-1],
        lambda index: index[index["z"] != 1],
        lambda index: index.drop(columns=["split"]),
    ],
)
def test_an_index_that_rows_cannot_be_numbered_by_is_refused(store, spoil) -> None:
    with pytest.raises(ValueError, match=r"not sorted|has no column split"):
        SliceIndex(parquet(spoil(store.index)))


def test_a_store_of_format_1_is_read_without_the_new_facts(store, tmp_path) -> None:
    old = store.index.drop(columns=[*STATISTICS])
    manifest = unseal((tmp_path / "store" / "manifest.json").read_bytes())
    files = {name: digest for name, digest in manifest["files"].items() if name != "index.parquet"}
    digest = write_index(tmp_path / "store", store.name, store.labels, old, files)
    rewritten = unseal((tmp_path / "store" / "manifest.json").read_bytes())
    (tmp_path / "store" / "manifest.json").write_bytes(seal({**rewritten, "format": 1}))
    reopened = SliceStore(tmp_path / "store")
    assert digest == store_digest(store.name, store.labels, old) != store.digest
    assert reopened.rows.intensity(0).low == -160
    assert np.isnan(reopened.rows.intensity(0).mean)
    np.testing.assert_array_equal(reopened.image("liver_1"), store.image("liver_1"))
    assert verify_store(tmp_path / "store") == []


def test_a_store_of_a_later_format_is_refused(store, tmp_path) -> None:
    path = tmp_path / "store" / "manifest.json"
    path.write_bytes(seal({**unseal(path.read_bytes()), "format": 3}))
    with pytest.raises(UserError, match=r"format 3.*newer samssl"):
        SliceStore(store.root)
