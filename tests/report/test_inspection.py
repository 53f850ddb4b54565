"""`samssl inspect` on data in which mistakes were planted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from samssl.config import build_config, flatten, load_config, to_tree
from samssl.data.inspection import (
    FINGERPRINT_FILE,
    InspectConfig,
    Inspection,
    inspect,
    read_fingerprint,
    write_fingerprint,
)
from samssl.data.prepare import PrepareConfig, prepare
from samssl.data.slices import SliceStore, verify_store
from samssl.report.inspection import Written, terminal, write_inspection
from samssl.train.finetune import FinetuneConfig
from samssl.train.pretrain import PretrainConfig


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMSSL_KEY_FILE", str(tmp_path / "keys" / "pseudonyms.key"))


def smooth(seed: int) -> np.ndarray:
    """A volume of its own, in HU, with large structures as scans have them."""
    blocks = np.random.default_rng(seed).normal(0, 300, (6, 6, 2))
    return np.kron(blocks, np.ones((4, 4, 2))).astype(np.int16)


def box(low: int = 8, high: int = 16, label: int = 1) -> np.ndarray:
    mask = np.zeros((24, 24, 4), np.uint8)
    mask[low:high, low:high] = label
    return mask


def write_set(root: Path, scans: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> Path:
    for name, (image, mask) in scans.items():
        for folder, array in (("images", image), ("masks", mask)):
            if array is not None:
                (root / folder).mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, np.diag([1, 1, 3, 1])), root / folder / f"{name}.nii.gz")
    return root


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    good = {f"mueller_{number}": (smooth(number), box()) for number in range(4)}
    speck = box()
    speck[2, 2] = 2
    return write_set(
        tmp_path / "set",
        good
        | {
            "empty": (smooth(10), box(0, 0)),
            "constant": (smooth(11), np.ones((24, 24, 4), np.uint8)),
            "turned": (smooth(12), 1 - box()),
            "speck": (smooth(13), speck),
            "copy": (smooth(0), box()),
            "unmasked": (smooth(14), None),
            "nothing": (np.zeros((24, 24, 4), np.int16), box()),
        },
    )


def inspected(tmp_path: Path, source: Path, **more: Any) -> tuple[Inspection, Written]:
    tree = {"source": str(source), "out": str(tmp_path / "seen"), "workers": "1", **more}
    config = load_config(InspectConfig, None, tree)
    seen = inspect(config)
    return seen, write_inspection(seen, config)


OF_SET = {"data.modality": "CT", "data.labels": {1: "liver", 2: "tumour", 3: "cyst"}}


def test_planted_mistakes_are_found(tmp_path: Path, flawed: Path) -> None:
    seen, written = inspected(tmp_path, flawed, **OF_SET, **{"data.public_names": "true"})
    found = {finding.text: finding.cases for finding in written.findings}

    def cases(words: str) -> tuple[str, ...]:
        return next(cases for text, cases in found.items() if words in text)

    assert cases("masks are empty") == ("empty",)
    assert cases("one label all over") == ("constant",)
    assert cases("touches all four borders") == ("turned",)
    assert cases("Specks of one or two pixels") == ("speck",)
    assert cases("look like copies of each other (1 voxel by voxel; 1 under") == ("copy", "mueller_0")
    assert cases("No mask shows cyst") == ()
    assert cases("1 of 10 scans have no mask") == ()
    assert [source for source, _ in seen.rejected] == ["images/nothing.nii.gz"]
    assert written.findings[0].serious
    assert "LOOK: 1 of 9 masks are one label all over" in terminal(seen, written)


def test_a_set_without_mistakes_is_left_alone(tmp_path: Path) -> None:
    scans = {
        f"p{number}_{scan}": (smooth(10 * number + scan), box()) for number in range(2) for scan in (0, 1)
    }
    root = write_set(tmp_path / "set", dict(scans))
    more = {"data.modality": "CT", "data.labels": {1: "liver"}, "data.patient_pattern": r"^(p\d)_"}
    _, written = inspected(tmp_path, root, **more)
    assert written.findings == []


def test_recommended_settings_are_taken_by_their_stages(tmp_path: Path, flawed: Path) -> None:
    _, written = inspected(tmp_path, flawed, **OF_SET)
    by_name = {path.name: path for path in written.settings}
    taken = load_config(PrepareConfig, by_name["recommended_prepare.yaml"], {"out": str(tmp_path / "store")})
    assert taken.data.root == flawed
    assert taken.data.axis == "axial"
    low, high = taken.data.window_hu
    assert low < 0 < high
    tuned = load_config(FinetuneConfig, by_name["recommended_finetune.yaml"], {"out": "a", "data.store": "b"})
    assert tuned.model.image_size == 256
    assert {entry.field for entry in written.recommendations} >= {"model.image_size", "data.window_hu"}


def test_no_name_reaches_page_or_fingerprint(tmp_path: Path, flawed: Path) -> None:
    seen, written = inspected(tmp_path, flawed, **OF_SET)
    written_files = [path for path in written.page.parent.iterdir() if path.suffix in (".html", ".json")]
    text = "".join(path.read_text() for path in written_files) + terminal(seen, written)
    assert "mueller" not in text
    assert "nothing.nii" not in text
    assert written.page.stat().st_size < 5 << 20
    assert "http://" not in written.page.read_text().replace("http://www.w3.org", "")


@pytest.fixture
def store(tmp_path: Path) -> SliceStore:
    root = write_set(tmp_path / "scans", {f"s{n}": (smooth(n), box()) for n in range(6)})
    # Stored once more with another grey scale: other voxels, so nothing else keeps them in one split.
    copy = (smooth(0) // 2 + 5).astype(np.int16)
    write_set(root, {f"t{n}": (copy + n, box()) for n in range(6)})
    prepare(
        load_config(
            PrepareConfig,
            None,
            {
                "name": "set",
                "out": str(tmp_path / "store"),
                "data.root": str(root),
                "data.modality": "MR",
                "data.labels": {1: "liver"},
                "data.public_names": "true",
                "split": {"train": 4, "val": 4, "test": 4},
                "workers": "1",
            },
        )
    )
    return SliceStore(tmp_path / "store")


def test_a_store_keeps_its_fingerprint_and_stays_what_it_is(tmp_path: Path, store: SliceStore) -> None:
    assert read_fingerprint(store) is None
    seen, written = inspected(tmp_path, Path(store.root))
    assert {entry.split for entry in seen.cases} == {"train", "val", "test"}
    kept = read_fingerprint(SliceStore(store.root))
    assert kept is not None
    assert kept["digest"] == store.digest == SliceStore(store.root).digest
    assert len(kept["cases"]) == 12
    assert "tiny" not in kept["cases"][0]
    assert verify_store(store.root) == []
    across = next(finding for finding in written.findings if "in different splits" in finding.text)
    assert across.serious
    assert {"s0", "t0", "t5"} <= set(across.cases)


def defaults(store: SliceStore, kind: type, settings: Mapping[str, Any], capsys: Any) -> tuple[Any, str]:
    """The settings of a training stage on the store, and what is said."""
    given = {"out": "a", "data.store": str(store.root), **settings}
    return load_config(kind, None, given), capsys.readouterr().out


def test_training_takes_what_is_not_given_from_the_fingerprint(
    tmp_path: Path, store: SliceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, said = defaults(store, FinetuneConfig, {}, capsys)
    assert (plain.model.image_size, said) == (1024, "")
    inspected(tmp_path, Path(store.root))
    capsys.readouterr()
    for kind, stage in ((FinetuneConfig, "finetune"), (PretrainConfig, "pretrain")):
        config, said = defaults(store, kind, {}, capsys)
        assert config.model.image_size == 256
        assert said == f"{stage}: from the store's fingerprint: model.image_size=256\n"
        assert defaults(store, kind, {"model.image_size": "512"}, capsys)[0].model.image_size == 512
        assert defaults(store, kind, {"model.checkpoint": str(tmp_path)}, capsys)[1] == ""
    whole = to_tree(plain)
    assert to_tree(build_config(FinetuneConfig, whole, "a run that has begun")) == whole


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, {"image_size": 256, "keep_small": True, "balance": "class", "foreground_share": 0.5}),
        ({"data.shot_unit": "slices"}, {"image_size": 256, "keep_small": True}),
        ({"data.classes": {"all": ["liver"]}}, {"image_size": 256, "keep_small": True}),
        ({"mode": "promptable"}, {"image_size": 256}),
        (
            {"data.sampling.foreground_share": None},
            {"image_size": 256, "keep_small": True, "balance": "class"},
        ),
        ({"data.more_stores": ["elsewhere"], "mode": "promptable"}, {}),
    ],
)
def test_only_what_has_a_meaning_is_taken(
    store: SliceStore, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], taken: dict[str, Any]
) -> None:
    fields = {
        "model.image_size": 256,
        "loss.keep_small": True,
        "data.sampling.balance": "class",
        "data.sampling.foreground_share": 0.5,
    }
    advice = [{"stage": "finetune", "field": name, "value": value} for name, value in fields.items()]
    seen = inspect(InspectConfig(source=Path(store.root), workers=1))
    write_fingerprint(seen, Path(store.root), {"recommendations": advice})
    config, said = defaults(store, FinetuneConfig, settings, capsys)
    flat = {name.rpartition(".")[2]: value for name, value in flatten(config).items() if name in fields}
    usual = {"image_size": 1024, "keep_small": False, "balance": "none", "foreground_share": None}
    assert flat == usual | taken
    assert said.count("=") == len(taken)


def test_a_changed_fingerprint_is_noticed(tmp_path: Path, store: SliceStore) -> None:
    inspected(tmp_path, Path(store.root))
    path = Path(store.root) / FINGERPRINT_FILE
    content = json.loads(path.read_text())
    content["cases"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(Exception, match="damaged"):
        read_fingerprint(store)


def test_order_of_cases_and_workers_do_not_matter(tmp_path: Path, flawed: Path) -> None:
    first, _ = inspected(tmp_path, flawed, **OF_SET)
    config = load_config(InspectConfig, None, {"source": str(flawed), **OF_SET})
    backwards = inspect(config, run=lambda function, items: map(function, list(items)[::-1]))
    assert backwards.cases == first.cases
