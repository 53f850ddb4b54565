"""Study folder -> report.html and summary.json.

python pipelines/report.py --config FILE.yaml field.name=value
"""

from samssl.cli import run_pipeline

if __name__ == "__main__":
    run_pipeline("report")
