"""The state directory, and the addresses of the databases."""

import contextlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from app.errors import UserError

POSTGRESQL_TIMEOUTS = "connect_timeout=5&keepalives_idle=30&tcp_user_timeout=30000"
"""Connection parameters: seconds until a connection must be accepted, seconds of silence until the server is
probed, and milliseconds until sent data must be acknowledged."""
GATEWAY_FOLDER_VARIABLE = "RAYLWAY_GATEWAY_FOLDER"
"""Environment variable with the folder of a local cluster's gateway settings (HAProxy)."""
GATEWAY_SECRET_VARIABLE = "RAYLWAY_GATEWAY_SECRET"
"""Environment variable with the secret that HAProxy sends to the replicas of its cluster, which accept no
other requests."""


def home() -> Path:
    """The state directory, absolute: `$RAYLWAY_HOME`, or `.raylway` in the current directory.

    This does not create it; `make_private` does.
    """
    return Path(os.environ.get("RAYLWAY_HOME", ".raylway")).expanduser().resolve()


def make_private(folder: Path) -> Path:
    """Create a folder, if it does not exist, and return it.

    The state directory has clients' data, tokens and keys, so folders in it are created for their owner alone
    (0700). The mode of an existing folder is left to its owner.
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
    """Create an empty file that only its owner can read (0600), if it does not exist, and return it.

    SQLite creates its files beside a database (-wal, -shm) with the database's mode.
    """
    make_private(file.parent)
    # An existing file is not opened: closing it would drop all locks of this process on it, and with them
    # those of its SQLite connections (sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    return file


def gateway_folder() -> Path:
    """The folder of a cluster's gateway settings: the local cluster's own folder, or the state directory,
    which all nodes of any other cluster share."""
    folder = os.environ.get(GATEWAY_FOLDER_VARIABLE)
    return home() if folder is None else Path(folder)


def database_url(file: str) -> str:
    """The URL of a database: $RAYLWAY_DATABASE_URL (PostgreSQL), or a SQLite file in the state directory.

    Whoever opens the file creates it, with `private_file`. Raises UserError if the variable is not such a
    URL.
    """
    url = os.environ.get("RAYLWAY_DATABASE_URL")
    if url is None:
        if "?" in str(home()):  # it would start the URL's parameters, and another file would be opened
            raise UserError(f"RAYLWAY_HOME: must not have a question mark in its path; it is {home()}")
        return f"sqlite:///{home() / file}"
    if not _is_supported(url):  # the message must not show the password
        raise UserError(
            "RAYLWAY_DATABASE_URL: must be a URL such as postgresql://USER:PASSWORD@HOST:5432/NAME; it "
            f"begins with {url.partition(':')[0][:20]!r}, or its host or port is invalid. Correct or unset it"
        )
    # Name the driver: SQLAlchemy's default is psycopg2.
    url = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    if url.startswith("postgresql") and "connect_timeout=" not in url:
        url += f"{'&' if '?' in url else '?'}{POSTGRESQL_TIMEOUTS}"
    return url


def _is_supported(url: str) -> bool:
    """Whether a URL can be parsed, and its database is PostgreSQL or SQLite."""
    try:
        urlsplit(url).port  # noqa: B018 (it raises ValueError)
    except ValueError:
        return False
    return re.match(r"postgres(ql)?(\+psycopg)?://|sqlite:///", url) is not None
