"""Runs, registered versions and their bundles in MLflow. No other package imports MLflow."""

import os

# MLflow reads both variables when it is first imported, by a module of this package.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
