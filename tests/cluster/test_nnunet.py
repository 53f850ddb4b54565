import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from samssl.cluster.nnunet import NnunetConfig, run_nnunet, shot_cases
from samssl.config import UserError
from samssl.data.prepare import DataSource, PrepareConfig, prepare
from samssl.data.slices import SliceStore
from samssl.data.splits import SplitConfig, few_shot


def test_it_learns_from_the_shots_of_finetune(tmp_path: Path, make_scans: Callable[..., Path]) -> None:
    source = DataSource(root=make_scans(tmp_path / "scans", cases=6))
    split = SplitConfig(train=4.0, val=1.0, test=1.0)
    prepare(PrepareConfig(name="boxes", out=tmp_path / "store", data=source, split=split, workers=1))
    store = SliceStore(tmp_path / "store")
    found = {
        shots: shot_cases(
            store, NnunetConfig(out=tmp_path, store=tmp_path / "store", shots=shots, shot_seed=3)
        )
        for shots in (0, 1, 2)
    }
    assert found[0] == store.cases("train")
    assert found[2] == sorted({case for case, _ in few_shot(store.index, 2, "patients", seed=3)})
    assert set(found[1]) < set(found[2])


@pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is not None, reason="nnU-Net is installed here")
def test_without_the_package_it_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'samssl\[nnunet\]'"):
        run_nnunet(NnunetConfig(out=tmp_path / "run", store=tmp_path / "store"))
    assert not (tmp_path / "run").exists()
