"""A copy of the application whose code a test may change, for the keys of stages."""

import shutil
from pathlib import Path

from app.state import fingerprint
from tests.documents import ROOT


def copy_application(folder: Path) -> Path:
    """Copy `app` into a folder; returns the copy."""
    return shutil.copytree(ROOT / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))


def forget_code() -> None:
    """Have fingerprints read the code again, which they otherwise do once in a process."""
    for cached in (fingerprint._source, fingerprint._code, fingerprint._imports):
        cached.cache_clear()
