"""A local issuer of access tokens, for `serving.auth: local`. Its keys are in the state directory."""

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from joserfc import jwt
from joserfc.jwk import ECKey, KeySet

from app.errors import UserError
from app.serving.gateway.auth import SCOPES
from app.state import files, locks
from app.state.home import home, make_private

ISSUER = "raylway"
"""Claim `iss` of the tokens."""
AUDIENCE = "raylway"
"""Claim `aud` of the tokens."""
PRIVATE_KEYS, PUBLIC_KEYS = "keys.json", "jwks.json"
"""Files with the JSON Web Key Sets; the first key signs."""
LOCK = "issuer"
"""Name of the lock under which keys are added."""


def jwks() -> Path:
    """The file with the public keys, a JSON Web Key Set. Creates the first key if there is none."""
    if not (_folder() / PRIVATE_KEYS).exists():
        with locks.exclusive(LOCK):
            if not (_folder() / PRIVATE_KEYS).exists():
                _add_key()
    return _folder() / PUBLIC_KEYS


def new_key() -> None:
    """Create a key that signs all later tokens; tokens signed with earlier keys stay valid."""
    with locks.exclusive(LOCK):
        _add_key()


def issue(subject: str, scopes: Sequence[str], hours: float) -> str:
    """Issue a token that expires after `hours`. Raises UserError for an unknown scope."""
    for scope in scopes:
        if scope.partition(":")[0] not in SCOPES:
            raise UserError(
                f"a scope must be one of {', '.join(SCOPES)}, or one of them for one model, such as "
                f"predict:income; not {scope!r}"
            )
    jwks()
    key = ECKey.import_key(json.loads((_folder() / PRIVATE_KEYS).read_text())["keys"][0])
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


def _add_key() -> None:
    """Add a key; the caller must hold LOCK, because concurrent calls could overwrite each other's key."""
    folder = _folder()
    make_private(folder)
    file = folder / PRIVATE_KEYS
    existing = json.loads(file.read_text())["keys"] if file.exists() else []
    key = ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, auto_kid=True)
    keys = KeySet([key, *(ECKey.import_key(existing_key) for existing_key in existing)])
    # Publish the key first: if the process is killed in between, no token has an unpublished key.
    _write(folder / PUBLIC_KEYS, dict(keys.as_dict(private=False)))
    _write(file, dict(keys.as_dict(private=True)))


def _folder() -> Path:
    return home() / "issuer"


def _write(file: Path, document: dict[str, object]) -> None:
    files.write(file, json.dumps(document, indent=1), mode=0o600)
