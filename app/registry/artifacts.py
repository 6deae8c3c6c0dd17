"""The store in which MLflow keeps the files of runs."""

import tempfile
from pathlib import Path

import mlflow
import mlflow.onnx
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from app.bundle import manifest


def local_folder(uri: str) -> Path | None:
    """The folder of a file URI or path; None for a remote store."""
    return Path(local_file_uri_to_path(uri)) if is_local_uri(uri) else None


def stored_manifest(uri: str) -> bytes | None:
    """The manifest of a bundle in a remote store; None if it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = mlflow.artifacts.download_artifacts(f"{uri}/{manifest.MANIFEST}", dst_path=folder)
        except (MlflowException, OSError):
            return None
        return Path(file).read_bytes()
