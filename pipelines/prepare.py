"""Raw scans -> slice store.

python pipelines/prepare.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("prepare")
