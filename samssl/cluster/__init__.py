"""The only place that imports Ray or MLflow."""
