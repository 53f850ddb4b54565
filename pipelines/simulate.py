"""Nothing -> scans of simulated subjects (MSD layout).

python pipelines/simulate.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("simulate")
