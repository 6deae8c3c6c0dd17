"""The newest entry of the audit log that this machine has seen, stored outside the database.

If entries are cut off the end of the log, the rest is still a complete chain; only the head shows the cut. It
is a file in the state directory, authenticated by a key beside it, which the database does not have. Anyone
who can write there can forge it: as a protection, keep the head that `raylway audit` prints elsewhere.
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

KEY_FILE, HEAD_FILE = "key", "head.json"
NUM_KEY_BYTES = 32


class BrokenLog(UserError):
    """The audit log, or its head, was changed after it was written."""


@dataclass(frozen=True)
class Head:
    """An entry of the log, which also determines all earlier ones."""

    number: int
    seal: str

    def __str__(self) -> str:
        return f"{self.number}:{self.seal}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The head in the form NUMBER:SEAL, as `raylway audit` prints it. Raises UserError for other text."""
        match = re.fullmatch(r"(?P<number>[1-9][0-9]{0,17}):(?P<seal>[0-9a-f]{64})", text.strip())
        if match is None:
            raise UserError(f"{text}: must be NUMBER:SEAL, as `raylway audit` prints it last")
        return cls(int(match["number"]), match["seal"])


def folder() -> Path:
    """The folder of this database's head and key."""
    url = sqlalchemy.make_url(database_url("production.db")).set(password="")
    name = hashlib.sha256(url.render_as_string(hide_password=False).encode()).hexdigest()[:16]
    return home() / "audit" / name


def load() -> Head | None:
    """The stored head; None if there never was one. Raises BrokenLog if it was removed or changed."""
    if not folder().exists():
        return None
    try:
        key = (folder() / KEY_FILE).read_bytes()
        document = json.loads((folder() / HEAD_FILE).read_text())
        head = Head(int(document["number"]), str(document["seal"]))
        if hmac.compare_digest(str(document["mac"]), _mac(key, head)):
            return head
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BrokenLog(
        f"{folder()}: must hold the head of the audit log as it was written, but it was changed or removed; "
        "restore the folder, or remove it to trust the log as it is"
    )


def store(head: Head) -> None:
    """Store the newest entry. Of two concurrent writers the older may win: later entries are chained to an
    older head as well."""

    def initialize(draft: Path) -> None:
        files.write(draft / KEY_FILE, secrets.token_bytes(NUM_KEY_BYTES), mode=0o600)
        _write(draft, head)

    # Key and first head are placed together, so that a key without a head means that the head was removed.
    if not stages.place(folder(), initialize):
        _write(folder(), head)


def _write(target: Path, head: Head) -> None:
    mac = _mac((target / KEY_FILE).read_bytes(), head)
    document = {"number": head.number, "seal": head.seal, "mac": mac}
    file = target / HEAD_FILE
    with files.locked(file):
        for draft in files.private_paths(file):  # of writers that were killed
            draft.unlink()
        files.write(file, json.dumps(document), mode=0o600)


def _mac(key: bytes, head: Head) -> str:
    return hmac.new(key, str(head).encode(), hashlib.sha256).hexdigest()
