"""Model bundle and new scans -> masks on the scans' own voxels.

python pipelines/predict.py BUNDLE SCAN... --out DIR
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("predict")
