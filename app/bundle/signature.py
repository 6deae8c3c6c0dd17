"""Signatures of bundles: Ed25519 over the manifest, which has the hash of every other file.

Keys are PEM files, as OpenSSL makes them:

    openssl genpkey -algorithm ed25519 -out signing.pem
    openssl pkey -in signing.pem -pubout -out signing.pub
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from app.errors import UserError
from app.state import files

SIGNATURE = "MANIFEST.sig"
"""Beside the manifest, the 64 bytes themselves."""
SIGNING_KEY = "RAYLWAY_SIGNING_KEY"
"""Names the private key's file in the environment."""


def signed(content: bytes, key: Path) -> bytes:
    """The signature of a manifest's content. Raises UserError if the file holds no private key."""
    private = _key(key, serialization.load_pem_private_key, password=None)
    if not isinstance(private, Ed25519PrivateKey):
        raise UserError(f"{key}: must be an Ed25519 private key")
    return private.sign(content)


def put(manifest: Path, signature: bytes) -> None:
    """Have a signature beside a manifest, unless this one is there."""
    file = manifest.with_name(SIGNATURE)
    if not file.exists() or file.read_bytes() != signature:
        files.write(file, signature)


def signing_key() -> Path:
    """The private key's file. Raises UserError if the environment names none."""
    file = os.environ.get(SIGNING_KEY)
    if not file:
        raise UserError(f"{SIGNING_KEY} must name the file of a private key; see `raylway sign --help`")
    return Path(file)


def require(manifest: Path, trusted: Sequence[str]) -> None:
    """Raises UserError unless the manifest is signed with a key whose public one is in a `trusted` file."""
    folder = manifest.parent
    try:
        signature = manifest.with_name(SIGNATURE).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder}: is not signed, and serving.trusted_keys asks for it; say `raylway sign` first"
        ) from None
    content = manifest.read_bytes()
    for name in trusted:
        public = _key(Path(name), serialization.load_pem_public_key)
        if not isinstance(public, Ed25519PublicKey):
            raise UserError(f"serving.trusted_keys: {name}: must be an Ed25519 public key")
        try:
            public.verify(signature, content)
        except InvalidSignature:
            continue
        return
    raise UserError(f"{folder}: is signed by nobody whom serving.trusted_keys names")


def _key(file: Path, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(file.read_bytes(), **options)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: is no key in PEM format: {error}") from None
