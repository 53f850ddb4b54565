"""Self-supervision of no steps is no self-supervision: both arms give the same numbers, case by case."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from pipelines_support import make_study

pytestmark = pytest.mark.ray


def test_an_ssl_arm_of_zero_steps_is_the_no_ssl_arm(tmp_path: Path, make_scans: Callable[..., Path]) -> None:
    study = make_study(tmp_path, make_scans(tmp_path / "scans", cases=8))
    study.study("pretrain.optim.steps=0")
    tables = [
        pd.read_parquet(study.out / f"arms/{arm}/seed0/evaluate/cases.parquet") for arm in ("ssl", "no_ssl")
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    paired = study.json("summary.json")["paired"]
    assert (paired["mean_difference"], paired["ci95"], paired["wilcoxon_p"]) == (0, [0, 0], 1)
    assert tables[0]["dice"].notna().any()
