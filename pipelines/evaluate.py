"""Model bundle and slice store -> table of per-case scores.

python pipelines/evaluate.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("evaluate")
