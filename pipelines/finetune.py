"""Slice store and checkpoint -> model bundle.

python pipelines/finetune.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("finetune")
