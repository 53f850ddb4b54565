"""Pretrain run or bundle -> weights or ONNX to publish, with a model card.

python pipelines/export.py run=RUN_FOLDER out=FOLDER card.license=LICENCE
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("export")
