"""All stages, several arms and seeds, compared in one report.

python pipelines/study.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("study")
