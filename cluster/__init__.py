"""`mmrag` over many processes: Ray Data stages, Ray Train, index shard actors, MLflow."""

import os

# MLflow reads these when it is first imported, wherever that is.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a stage says it once
