import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from samssl.cluster.nnunet import NnunetConfig, run_nnunet, shot_cases
from samssl.config import UserError
from samssl.data.slices import SliceStore
from samssl.data.splits import few_shot


def test_it_learns_from_the_shots_of_finetune(
    tmp_path: Path, prepare_boxes: Callable[..., SliceStore]
) -> None:
    store = prepare_boxes(tmp_path, train=4, val=1, test=1)
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
