"""Outputs of stages, stored under a key that is the hash of their inputs, so that no work is done twice."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from app.state import files
from app.state.fingerprint import fingerprint
from app.state.home import home, make_private


def key(stage: str, inputs: Mapping[str, Any], *modules: str) -> str:
    """The key of a stage's output.

    `inputs` are the JSON values that determine the output. `modules` are the names of the modules that make
    it: the key changes with their source, with that of the modules that they import, and with the versions of
    the libraries. Raises ValueError for an input that is not a JSON value.
    """
    canonical = json.dumps([stage, dict(inputs), fingerprint(*modules)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def folder(stage: str, key: str) -> Path:
    """The path of a stage's output, which need not exist."""
    return home() / "stages" / stage / key


def produce(target: Path, build: Callable[[Path], None], *, fresh: bool = False) -> bool:
    """Let `build` fill a new folder, and link `target` to it; returns whether it was built.

    Does nothing if the target exists, unless `fresh`; waits if another process is building it. The target is
    a symbolic link, which one rename replaces. A reader of several files calls `current` once: the previous
    folder is kept for such readers, and older ones are removed.
    """
    if target.exists() and not fresh:
        return False
    make_private(target.parent)
    with files.locked(target):
        if target.exists() and not fresh:
            return False
        previous = target.readlink().parts[0] if target.is_symlink() else None
        _remove_private(target, keep={previous})
        generation = files.private_path(target)
        try:
            (generation / target.name).mkdir(parents=True)
            build(generation / target.name)
            _link(target, generation)
        except BaseException:
            files.remove(generation)
            raise
        _remove_private(target, keep={previous, generation.name})
    return True


def current(target: Path) -> Path:
    """The folder that a target links to now: its files belong together even if the target is built again."""
    return target.resolve()


def place(target: Path, build: Callable[[Path], None]) -> bool:
    """Let `build` fill a new folder, and rename it to `target`, which is never replaced; returns whether it
    was built.

    Does nothing if the target exists.
    """
    if target.exists():
        return False
    make_private(target.parent)
    with files.locked(target):
        if target.exists():
            return False
        _remove_private(target)
        with files.atomic(target) as draft:
            draft.mkdir()
            build(draft)
    return True


def drop(target: Path) -> None:
    """Remove a target, if it exists."""
    with files.locked(target):
        if target.is_symlink():
            target.unlink()
        else:
            files.discard(target)
        _remove_private(target)


def _link(target: Path, generation: Path) -> None:
    with files.atomic(target) as link:
        link.symlink_to(Path(generation.name) / target.name)
        if target.is_dir() and not target.is_symlink():
            files.discard(target)  # written by a release in which targets were folders


def _remove_private(target: Path, keep: Collection[str | None] = ()) -> None:
    """Remove the private folders and links of a target, except those in `keep`.

    Needs the target's lock: then they belong to dead processes or to earlier builds.
    """
    for path in files.private_paths(target):
        if path.name not in keep:
            files.remove(path)
