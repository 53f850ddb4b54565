"""All that touches Ray, MLflow and lightly.

Settings that these read from the environment when they are imported are made here, before any of them is.
"""

import os

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report takes as long as one check
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line of a worker appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process a run, for a warning that nothing here heeds
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray's default, which clients and servers read differently unsaid
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # trials are told of by samssl.cluster.live
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the command line's
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # what cannot be sent is kept, and sent later
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
