"""Slice store -> nnU-Net and its scores.

python pipelines/nnunet.py out=FOLDER store=STORE field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("nnunet")
