"""Fine-tuning at many points of a search space; the best point is tested.

python pipelines/sweep.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("sweep")
