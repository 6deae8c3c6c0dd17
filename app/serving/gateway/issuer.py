"""A small issuer of access tokens, for when there is no OAuth2 server: its key is in the state directory."""

import json
import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

from app.errors import UserError
from app.state import database
from app.state.home import home, make_private

PRIVATE, PUBLIC = "keys.json", "jwks.json"
LOCK = "issuer"
ISSUER = "raylway"
AUDIENCE = "raylway"
SCOPES = ("predict", "feedback", "explain", "admin")
"""Each for all models, or for one, such as predict:income."""


def jwks() -> Path:
    """The public keys, as a JSON Web Key Set; made with a first key if there is none."""
    if not (_folder() / PRIVATE).exists():
        with database.alone(LOCK):
            if not (_folder() / PRIVATE).exists():
                _add_key()
    return _folder() / PUBLIC


def new_key() -> None:
    """Sign with a new key from now on; tokens of the ones before stay good."""
    with database.alone(LOCK):
        _add_key()


def _add_key() -> None:
    """Needs the lock: of two who add a key at once, one would lose the other's."""
    folder = _folder()
    make_private(folder)
    private = folder / PRIVATE
    before = json.loads(private.read_text())["keys"] if private.exists() else []
    key = ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, auto_kid=True)
    keys = KeySet([key, *(ECKey.import_key(each) for each in before)])
    # Published before anything is signed with it, whatever ends this in between.
    _write(folder / PUBLIC, dict(keys.as_dict(private=False)))
    _write(private, dict(keys.as_dict(private=True)))


def issue(subject: str, scopes: Sequence[str], hours: float) -> str:
    """A token for somebody. Raises UserError for a scope that there is not."""
    for scope in scopes:
        if scope.partition(":")[0] not in SCOPES:
            raise UserError(
                f"{scope!r} is no scope; there are {', '.join(SCOPES)}, each also for one model, such as "
                "predict:income"
            )
    jwks()
    key = ECKey.import_key(json.loads((_folder() / PRIVATE).read_text())["keys"][0])
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": subject,
        "scope": " ".join(scopes),
        "iat": now,
        "exp": now + int(hours * 3600),
        "jti": uuid.uuid4().hex,
    }
    return jwt.encode({"alg": "ES256", "kid": key.kid}, claims, key)


def _folder() -> Path:
    return home() / "issuer"


def _write(path: Path, document: dict[str, object]) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        json.dump(document, file, indent=1)
    Path(name).replace(path)
