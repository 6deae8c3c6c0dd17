"""Files and folders that are there whole or not at all, and locks between processes.

Nothing that somebody may read is written in place: content goes under a private name beside it, and one
rename puts it there. A process that is killed leaves the old content or the new one, and maybe a private
name, which nobody reads.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def write(file: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Create or replace a file by one rename; its content is on the disk when this returns.

    `mode` is that of a new file, less the umask.
    """
    data = content.encode() if isinstance(content, str) else content
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = private(file)
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file to a place where there is none; its content is on the disk when this returns."""
    shutil.copyfile(source, target)
    sync(target)


def private(path: Path) -> Path:
    """A name beside `path` that nobody else uses: hidden, and on the same file system."""
    return path.with_name(f".{path.name}-{secrets.token_hex(6)}")


def drafts(path: Path) -> Iterator[Path]:
    """What `private` named for this path. Whoever holds the path's lock knows that their writers are dead."""
    prefix, length = f".{path.name}-", len(f".{path.name}-") + 12
    for other in path.parent.iterdir():
        if other.name.startswith(prefix) and len(other.name) == length:
            yield other


def discard(folder: Path) -> None:
    """Remove a folder, if it is there. No part of it stays under its name if the removal is cut short."""
    doomed = private(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a path, which need not exist; the kernel releases it if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is(lock, file):  # whoever held it before removed it
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
