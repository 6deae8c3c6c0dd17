"""The newest entry of the audit log that this machine has seen, kept outside of the database: if entries are
cut off the end of the log, what is left is a whole chain, and only this shows it.

It is a file in the state directory, with a keyed hash whose key is beside it, not in the database. Whoever
can write there can forge it: to guard against them, keep what `raylway audit` prints somewhere else.
"""

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import sqlalchemy

from app.errors import UserError
from app.state import files, stages
from app.state.home import database_url, home

KEY, FILE = "key", "head.json"


class Broken(UserError):
    """The log is not what was written."""


@dataclass(frozen=True)
class Head:
    """An entry of the log, with which all before it are given too."""

    number: int
    seal: str

    def __str__(self) -> str:
        return f"{self.number}:{self.seal}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From NUMBER:SEAL, as `raylway audit` prints it. Raises UserError for anything else."""
        found = re.fullmatch(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", text.strip())
        if found is None:
            raise UserError(f"{text}: must be NUMBER:SEAL, as `raylway audit` prints it last")
        return cls(int(found[1]), found[2])


def folder() -> Path:
    """Where the head of this database's log and its key are."""
    url = sqlalchemy.make_url(database_url("production.db")).set(password="")
    name = hashlib.sha256(url.render_as_string(hide_password=False).encode()).hexdigest()[:16]
    return home() / "audit" / name


def load() -> Head | None:
    """The head that was kept; None if there was never one. Raises Broken if it was removed or changed."""
    if not folder().exists():
        return None
    try:
        key = (folder() / KEY).read_bytes()
        document = json.loads((folder() / FILE).read_text())
        head = Head(int(document["number"]), str(document["seal"]))
        if hmac.compare_digest(str(document["mac"]), _mac(key, head)):
            return head
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise Broken(
        f"{folder()}: must hold the head of the audit log as it was written, but it was changed or removed; "
        "restore the folder, or remove it to trust the log as it is"
    )


def keep(head: Head) -> None:
    """Remember the newest entry, whole or not at all. Of two writers at once the older may win: a head that
    lags is good, for what comes after it is chained to it."""

    def begin(draft: Path) -> None:
        files.write(draft / KEY, secrets.token_bytes(32), mode=0o600)
        _write(draft, head)

    # The key and a first head appear together: a key without a head is one that was removed.
    if not stages.place(folder(), begin):
        _write(folder(), head)


def _write(target: Path, head: Head) -> None:
    document = {"number": head.number, "seal": head.seal, "mac": _mac((target / KEY).read_bytes(), head)}
    file = target / FILE
    with files.locked(file):
        for draft in files.private_paths(file):  # their writers were killed
            draft.unlink()
        files.write(file, json.dumps(document), mode=0o600)


def _mac(key: bytes, head: Head) -> str:
    return hmac.new(key, str(head).encode(), hashlib.sha256).hexdigest()
