"""The report of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from samssl.files import write_text


def write_sweep_report(
    out: Path, table: pd.DataFrame, axes: Sequence[str], best: str, tested: Mapping[str, float]
) -> Path:
    """Write `trials.csv` and `report.html` into `out`; returns the path of the page."""
    write_text(out / "trials.csv", table.to_csv(index=False))
    write_text(out / "report.html", table.to_html())
    return out / "report.html"
