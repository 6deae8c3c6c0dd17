"""Signatures of bundles: Ed25519 over the manifest, which has the hash of every other file.

Keys are PEM files as OpenSSL makes them:

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
"""The file beside the manifest with the 64 bytes of the signature."""
SIGNING_KEY = "RAYLWAY_SIGNING_KEY"
"""Environment variable with the path of the private key."""


def sign(content: bytes, key: Path) -> bytes:
    """Sign the content of a manifest. Raises UserError if the file has no Ed25519 private key."""
    private = _load(key, serialization.load_pem_private_key, password=None)
    if not isinstance(private, Ed25519PrivateKey):
        raise UserError(f"{key}: must be an Ed25519 private key")
    return private.sign(content)


def write(manifest: Path, signature: bytes) -> None:
    """Write a signature beside a manifest, unless it is there already."""
    file = manifest.with_name(SIGNATURE)
    if not file.exists() or file.read_bytes() != signature:
        files.write(file, signature)


def signing_key() -> Path:
    """The path of the private key. Raises UserError if the environment has none."""
    file = os.environ.get(SIGNING_KEY)
    if not file:
        raise UserError(f"{SIGNING_KEY} must name the file of a private key; see `raylway sign --help`")
    return Path(file)


def require(manifest: Path, trusted: Sequence[str]) -> None:
    """Raise UserError unless a manifest is signed with the private key of one of the `trusted` public key
    files."""
    folder = manifest.parent
    try:
        signature = manifest.with_name(SIGNATURE).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder}: is not signed, but serving.trusted_keys requires it; sign it with `raylway sign`"
        ) from None
    content = manifest.read_bytes()
    for name in trusted:
        public = _load(Path(name), serialization.load_pem_public_key)
        if not isinstance(public, Ed25519PublicKey):
            raise UserError(f"serving.trusted_keys: {name}: must be an Ed25519 public key")
        try:
            public.verify(signature, content)
        except InvalidSignature:
            continue
        return
    raise UserError(f"{folder}: is not signed by any key in serving.trusted_keys")


def _load(file: Path, parse: Callable[..., Any], **options: Any) -> Any:
    try:
        return parse(file.read_bytes(), **options)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: is not a key in PEM format: {error}") from None
