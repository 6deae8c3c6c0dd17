"""Finished work, kept under a key that is the hash of what went in: the same work is not done twice."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from app.errors import UserError
from app.home import home


def key(stage: str, inputs: Mapping[str, Any], code: Iterable[ModuleType]) -> str:
    """The name under which a stage's output is kept.

    `inputs` is everything that determines it (JSON values); `code` the modules that make it, so that a
    change of theirs makes it anew.
    """
    sources = {m.__name__: _sha256(Path(str(m.__file__)).read_bytes()) for m in code}
    canonical = json.dumps([stage, dict(inputs), sources], sort_keys=True, allow_nan=False)
    return _sha256(canonical.encode())[:20]


def folder(stage: str, key: str) -> Path:
    """Where a stage's output with this key is, or would be."""
    return home() / "stages" / stage / key


def produce(target: Path, build: Callable[[Path], None], *, fresh: bool = False) -> bool:
    """Have `build` fill a new folder and put it at `target`, whole or not at all.

    Does nothing if the target is there, unless `fresh`; if another process is at it, waits for that one.
    Returns whether it was built.
    """
    if target.exists() and not fresh:
        return False
    with _alone(target):
        if target.exists() and not fresh:
            return False
        _build(target, build)
    return True


def _build(target: Path, build: Callable[[Path], None]) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(draft)
        if target.exists():  # asked for afresh
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of a target; the kernel gives it back if this process is killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.parent / f".{target.name}.lock"
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is(lock, file):  # whoever held it before took it away
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


def _is(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def require_shared(seen_by: Callable[[Path], Mapping[str, bool]] | None = None) -> None:
    """Check that all nodes of the cluster see this state directory. Needs Ray.

    `seen_by` tells of each node's address whether it sees a file. Raises UserError that names the nodes
    that do not: their tasks would write where nobody looks.
    """
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=home(), prefix=".seen-") as marker:
        nodes = (seen_by or _seen_by)(Path(marker.name))
    blind = [address for address, sees in nodes.items() if not sees]
    if blind:
        raise UserError(
            f"every node must see the state directory {home()}, but {', '.join(blind)} does not; put "
            "RAYLWAY_HOME on a file system that all nodes mount (NFS, EFS, Lustre)"
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
