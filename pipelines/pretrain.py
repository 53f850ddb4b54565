"""Slice store -> SAM-format encoder checkpoint, by masked autoencoding without labels.

python pipelines/pretrain.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("pretrain")
