"""Finished work, kept under a key that is the hash of what went in: the same work is not done twice."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.state import files
from app.state.fingerprint import fingerprint
from app.state.home import database_url, home, make_private


def key(stage: str, inputs: Mapping[str, Any], *modules: str) -> str:
    """The name under which a stage's output is kept.

    `inputs` is everything that determines it (JSON values). `modules` are the names of those that make it: a
    change of one of them, of what it imports within the application, or of a library's version makes it anew.
    """
    canonical = json.dumps([stage, dict(inputs), fingerprint(*modules)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def folder(stage: str, key: str) -> Path:
    """Where a stage's output with this key is, or would be."""
    return home() / "stages" / stage / key


def produce(target: Path, build: Callable[[Path], None], *, fresh: bool = False) -> bool:
    """Have `build` fill a new folder and make `target` lead to it, whole or not at all.

    Does nothing if the target is there, unless `fresh`; if another process builds it, waits for that one.
    Returns whether it was built. The target is a link, which one rename replaces; who reads several files one
    after the other takes `current` once. The folder that was current until now is kept for them, older ones
    are removed.
    """
    if target.exists() and not fresh:
        return False
    make_private(target.parent)
    with files.locked(target):
        if target.exists() and not fresh:
            return False
        before = target.readlink().parts[0] if target.is_symlink() else None
        _collect(target, {before})
        generation = files.private_path(target)
        try:
            (generation / target.name).mkdir(parents=True)
            build(generation / target.name)
            _point(target, generation)
        except BaseException:
            shutil.rmtree(generation, ignore_errors=True)
            raise
        _collect(target, {before, generation.name})
    return True


def current(target: Path) -> Path:
    """The folder that a target leads to now: its files stay together, also if the target is built again."""
    return target.resolve()


def place(target: Path, build: Callable[[Path], None]) -> bool:
    """Have `build` fill a new folder and rename it to `target`, where it stays: it is never replaced.

    Does nothing if the target is there. Returns whether it was built.
    """
    if target.exists():
        return False
    make_private(target.parent)
    with files.locked(target):
        if target.exists():
            return False
        _collect(target, set())
        draft = files.private_path(target)
        draft.mkdir()
        try:
            build(draft)
            draft.rename(target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return True


def drop(target: Path) -> None:
    """Remove a finished folder, if it is there."""
    with files.locked(target):
        if target.is_symlink():
            target.unlink()
        else:
            files.discard(target)
        _collect(target, set())


def _point(target: Path, generation: Path) -> None:
    link = files.private_path(target)
    link.symlink_to(Path(generation.name) / target.name)
    if target.is_dir() and not target.is_symlink():
        files.discard(target)  # made before targets were links
    link.replace(target)


def _collect(target: Path, keep: set[str | None]) -> None:
    """Remove the folders and links beside a target that nothing leads to, but for those in `keep`.

    Needs the target's lock: with it, they belong to processes that are dead, or to a build before.
    """
    for other in files.private_paths(target):
        if other.name in keep:
            continue
        if other.is_symlink():
            other.unlink()
        else:
            shutil.rmtree(other, ignore_errors=True)


def require_shared(*folders: Path, seen_by: Callable[[Path], Mapping[str, bool]] | None = None) -> None:
    """Check that all nodes of the cluster see the state directory and `folders`, and that they can share a
    database. Needs Ray.

    `seen_by` tells of each node's address whether it sees a file. Raises UserError that names the nodes that
    do not: their tasks would write where nobody looks. SQLite is for a single node: its locks do not hold
    between the machines of a shared file system.
    """
    make_private(home())
    for folder in (home(), *folders):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-") as marker:
            nodes = (seen_by or _seen_by)(Path(marker.name))
        if blind := [address for address, sees in nodes.items() if not sees]:
            what, setting = ("the state directory ", "RAYLWAY_HOME") if folder == home() else ("", "it")
            raise UserError(
                f"every node must see {what}{folder}, but {', '.join(blind)} does not; put {setting} on a "
                "file system that all nodes mount (NFS, EFS, Lustre)"
            )
        if len(nodes) > 1 and database_url("production.db").startswith("sqlite"):
            raise UserError(
                f"this cluster has {len(nodes)} nodes, which must share a database: set RAYLWAY_DATABASE_URL "
                "to a PostgreSQL database; SQLite is for one node"
            )


def _seen_by(file: Path) -> dict[str, bool]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return {}
    sees = ray.remote(num_cpus=0)(lambda: file.exists())
    asked = [sees.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote() for n in nodes]
    return {n["NodeManagerAddress"]: seen for n, seen in zip(nodes, ray.get(asked), strict=True)}
