"""Copy the application, so that a test can change its code: the keys of stages depend on it."""

import shutil
from pathlib import Path

from app.state import fingerprint
from tests.documents import ROOT


def copy_application(folder: Path) -> Path:
    """Copy `app` into a folder; returns the copy."""
    return shutil.copytree(ROOT / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))


def forget_code() -> None:
    """Clear the caches of fingerprints, which otherwise read the code once per process."""
    forget_sources()
    fingerprint._imports.cache_clear()


def forget_sources() -> None:
    """The same after changes that leave all imports as they were: reading those takes most of the time."""
    for cached in (fingerprint._source, fingerprint._code):
        cached.cache_clear()
