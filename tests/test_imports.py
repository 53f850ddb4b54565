"""The torch core runs where Ray, MLflow and lightly are absent."""

import subprocess
import sys

import pytest

CORE = [
    "samssl.bundle",
    "samssl.evaluate",
    "samssl.inference",
    "samssl.predict",
    "samssl.predicting",
    "samssl.report.page",
    "samssl.serving.app",
    "samssl.serving.segmenting",
    "samssl.train.finetune",
    "samssl.train.pretrain",
    "samssl.data.prepare",
    "samssl.data.recipes.simulated",
    "samssl.cli",
]


def test_core_imports_without_ray_mlflow_and_lightly() -> None:
    absent = (
        "import sys; sys.modules.update(dict.fromkeys(['ray', 'mlflow', 'lightly', 'pytorch_lightning']))"
    )
    imports = "; ".join(f"import {name}" for name in CORE)
    subprocess.run([sys.executable, "-c", f"{absent}; {imports}"], check=True)


@pytest.mark.parametrize(
    "name",
    [
        "simulate",
        "prepare",
        "pretrain",
        "finetune",
        "export",
        "evaluate",
        "predict",
        "nnunet",
        "report",
        "study",
    ],
)
def test_pipeline_names_shadow_no_installed_package(name: str) -> None:
    """`python pipelines/x.py` puts that folder first on the path."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
