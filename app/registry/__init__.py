"""Runs, registered versions and their bundles, kept by MLflow. No other package imports it."""

import os

# MLflow reads both when it is first imported, which a module of this package does.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
