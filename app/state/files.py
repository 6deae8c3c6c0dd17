"""Files and folders that are written completely or not at all, and locks between processes.

Nothing that another process may read is written in place: content is written under a private name beside its
target, and one rename puts it there. A process that is killed leaves the old content or the new one, and
perhaps a private name, which nobody reads.
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

PRIVATE_SUFFIX_BYTES = 6
"""Length of the random suffix of a private name; it is written in hexadecimal."""


@contextlib.contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A private path at which the block creates a file or folder, which is renamed to `target` at its end.

    A file replaces an existing one; a folder needs a free name. If the block raises, its draft is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = private_path(target)
    try:
        yield draft
        draft.rename(target)
    except BaseException:
        remove(draft)
        raise


def write(file: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Create or replace a file; its content is on the disk when this returns.

    `mode` is the mode of a new file, less the umask.
    """
    data = content.encode() if isinstance(content, str) else content
    with atomic(file) as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def copy(source: Path, target: Path) -> None:
    """Copy a file to a path where there is none; its content is on the disk when this returns."""
    shutil.copyfile(source, target)
    sync(target)


def private_path(path: Path) -> Path:
    """A path beside `path` that nobody else uses: hidden, and on the same file system."""
    return path.with_name(f".{path.name}-{secrets.token_hex(PRIVATE_SUFFIX_BYTES)}")


def private_paths(path: Path) -> Iterator[Path]:
    """The existing private paths of a path. If the caller has its lock, their writers are dead."""
    prefix = f".{path.name}-"
    length = len(prefix) + 2 * PRIVATE_SUFFIX_BYTES
    for other in path.parent.iterdir():
        if other.name.startswith(prefix) and len(other.name) == length:
            yield other


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder, if it exists. If the removal is cut short, no part of it remains under its name."""
    private = private_path(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(private)
        shutil.rmtree(private, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a path, which need not exist. The kernel releases it if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_open_as(lock, file):  # the previous holder removed the file
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


def _is_open_as(path: Path, file: IO) -> bool:
    """Whether the open file is the one that the path leads to now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
