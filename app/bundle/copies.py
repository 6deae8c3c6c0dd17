"""Bundles in the state directory: one folder each, named by the bundle's identity and never written again.

Whatever is served, judged or used for predictions is read from here. The folders of MLflow's store are for
MLflow's tools, which may write into them.
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
    """Where the bundle with an identity is kept, or would be: the same path on every machine that has this
    state directory."""
    return home() / "bundles" / identity


def require(identity: str) -> Path:
    """The folder of a bundle that is kept.

    Raises BrokenBundle if its manifest has another identity: who changes a bundle can change that as well.
    """
    path = folder(identity)
    if manifest.identity_of(path) != identity:
        raise BrokenBundle(f"{path}: its {manifest.MANIFEST} was changed; {manifest.AGAIN}")
    return path


def keep(source: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Keep a copy of a bundle, with `facts` added to its manifest; returns its folder.

    Copies the manifest's files and no other. Raises BrokenBundle if they are not as the manifest says.
    """
    sealed = verify(source)
    content = manifest.document({**sealed, **facts}) if facts else (source / manifest.MANIFEST).read_bytes()
    target = folder(hashlib.sha256(content).hexdigest())
    stages.place(target, lambda draft: manifest.copy(source, draft, content))
    return target
