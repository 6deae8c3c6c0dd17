"""Where Raylway keeps its state."""

import contextlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from app.errors import UserError

LIMITS = "connect_timeout=5&keepalives_idle=30&tcp_user_timeout=30000"
"""For PostgreSQL: seconds until it must have accepted a connection, seconds of silence after which it is
asked whether it is there, and milliseconds until what was sent must have arrived."""
FRONT = "RAYLWAY_FRONT"
"""Environment variable: the folder with the settings of a local cluster's front (HAProxy)."""
SECRET = "RAYLWAY_FRONT_SECRET"
"""Environment variable: what HAProxy shows the replicas of its own cluster; they answer nobody else."""


def home() -> Path:
    """The state directory, absolute: `$RAYLWAY_HOME`, or `.raylway` in the current directory.

    It is not made here: `make_private` makes it.
    """
    return Path(os.environ.get("RAYLWAY_HOME", ".raylway")).expanduser().resolve()


def make_private(folder: Path) -> Path:
    """Make a folder, if it is not there, and return it.

    The state directory holds clients' data, tokens and keys: one that is made here is for its owner alone
    (0700). The mode of one that is there already is its owner's decision.
    """
    root = home()
    if not folder.is_relative_to(root):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    root.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.relative_to(root)
    for part in (root, *(root / parent for parent in reversed(inside.parents)), folder):
        part.mkdir(mode=0o700, exist_ok=True)
    return folder


def private_file(file: Path) -> Path:
    """Make an empty file that only its owner can read (0600), if it is not there, and return it.

    SQLite gives its own files beside a database (-wal, -shm) the database's mode.
    """
    make_private(file.parent)
    # One that is there is not opened: to close it would drop all locks of this process on it, and with them
    # those of its SQLite connections (sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    return file


def front_folder() -> Path:
    """Where the settings of a cluster's front are: the local cluster's own folder, or the state directory,
    which all nodes of another cluster share."""
    return Path(os.environ[FRONT]) if FRONT in os.environ else home()


def database_url(file: str) -> str:
    """Where tables are kept: $RAYLWAY_DATABASE_URL (PostgreSQL), or a SQLite file in the state directory.

    The file is made by whoever opens it, with `private_file`.
    """
    url = os.environ.get("RAYLWAY_DATABASE_URL")
    if url is None:
        if "?" in str(home()):  # where a URL's parameters begin: another file would be opened
            raise UserError(f"RAYLWAY_HOME: must not have a question mark in its path; it is {home()}")
        return f"sqlite:///{home() / file}"
    if not _is_database(url):  # it has a password: not shown
        raise UserError(
            "RAYLWAY_DATABASE_URL: must be a URL such as postgresql://USER:PASSWORD@HOST:5432/NAME; it "
            f"begins with {url.partition(':')[0][:20]!r}, or its host or port cannot be. Correct or unset it"
        )
    # SQLAlchemy would look for psycopg2.
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    if url.startswith("postgresql") and "connect_timeout=" not in url:
        url += f"{'&' if '?' in url else '?'}{LIMITS}"
    return url


def _is_database(url: str) -> bool:
    """Whether a URL is one that SQLAlchemy can read, and of a database that we know."""
    try:
        urlsplit(url).port  # noqa: B018 (it raises)
    except ValueError:
        return False
    return re.match(r"postgres(ql)?(\+psycopg)?://|sqlite:///", url) is not None
