"""The copies of bundles in the state directory: one folder each, named by the bundle's identity, never
changed.

Serving, judging and prediction read bundles from here. The folders in MLflow's store are for MLflow's tools,
which may write into them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.bundle import manifest
from app.bundle.manifest import BrokenBundle, verify
from app.state import stages
from app.state.home import home


def folder(identity: str) -> Path:
    """The folder for the bundle with an identity, whether it exists or not. The path is the same on every
    machine that shares this state directory."""
    return home() / "bundles" / identity


def require(identity: str) -> Path:
    """The folder of an existing copy.

    Raises BrokenBundle if its manifest has another identity: anyone who can change a bundle's files can
    change its manifest too.
    """
    path = folder(identity)
    if manifest.identity_of(path) != identity:
        raise BrokenBundle(f"{path}: its {manifest.MANIFEST} was changed; {manifest.REPAIR}")
    return path


def keep(source: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Copy a bundle into the state directory, with `facts` added to its manifest; returns the copy's folder.

    Copies only the files of the manifest. Raises BrokenBundle if they do not match the manifest.
    """
    sealed = verify(source)
    content = manifest.encoded({**sealed, **facts}) if facts else (source / manifest.MANIFEST).read_bytes()
    target = folder(hashlib.sha256(content).hexdigest())
    stages.place(target, lambda draft: manifest.copy(source, draft, content))
    return target
