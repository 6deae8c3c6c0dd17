"""Registered versions of a model: looking them up, fetching their bundles, and signing them."""

import base64
import contextlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import mlflow.onnx
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from app.bundle import copies, manifest, signature
from app.bundle.manifest import BrokenBundle, verify
from app.config.project import NAME, require_name
from app.errors import UserError
from app.registry.artifacts import local_folder
from app.registry.connection import client, uri
from app.state import locks
from app.state.audit import Audit

CHAMPION, CHALLENGER = "champion", "challenger"
IDENTITY_TAG = "raylway.identity"
"""Tag of a version with its bundle's identity, so that no bundle is registered twice."""
SIGNATURE_TAG = "raylway.signature"
"""Tag of a version with the signature of its manifest, base64."""
MAX_NUMBER_DIGITS = 9
"""Maximum length of a version number that the registry's tables can hold."""


@dataclass(frozen=True)
class Version:
    """A registered version with its bundle."""

    name: str
    number: str
    aliases: tuple[str, ...]
    identity: str
    """SHA-256 of the bundle's manifest."""

    @property
    def path(self) -> Path:
        """Folder of the bundle, which `resolve` and `find` have fetched."""
        return copies.folder(self.identity)


def resolve(name: str, version: str) -> Version:
    """The version with a number or an alias. A remote bundle is fetched.

    Raises UserError, which lists the existing versions, if there is none.
    """
    require_name(name)
    resolved = find(name, version)
    if resolved is None:
        if entries := versions(name):
            hint = f"{name} has {', '.join(_described(entry) for entry in entries)}"
        else:
            hint = f"{name} has no versions; train one with `raylway train`"
        shown = version if len(version) <= 40 else f"{version[:30]}..."
        raise UserError(f"no version {shown!r} of the model {name!r} is registered; {hint}")
    return resolved


def find(name: str, version: str) -> Version | None:
    """Like `resolve`, but returns None if there is no such version."""
    if not re.fullmatch(NAME, name) or not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", version):
        return None
    mlflow_client = client()
    try:
        if version.isdecimal():
            if len(version) > MAX_NUMBER_DIGITS:
                return None
            entry = mlflow_client.get_model_version(name, version)
        else:
            entry = mlflow_client.get_model_version_by_alias(name, version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return Version(name, str(entry.version), tuple(entry.aliases), _local_identity(name, entry))


def _local_identity(name: str, entry: ModelVersion) -> str:
    """Fetch a version's bundle and signature, unless this state directory has them; returns the identity."""
    identity = entry.tags.get(IDENTITY_TAG)
    if identity is None or not copies.folder(identity).exists():
        fetched = _fetch(name, entry)
        if identity not in (None, fetched):
            raise UserError(
                f"{name} version {entry.version}: the bundle at {entry.source} must be the one that was "
                "registered, but it is another one; restore it, or train and register another version"
            )
        identity = fetched
    path = copies.require(identity)
    if encoded := entry.tags.get(SIGNATURE_TAG):
        signature.write(path / manifest.MANIFEST, base64.b64decode(encoded))
    return identity


def _fetch(name: str, entry: ModelVersion) -> str:
    """Fetch a version's bundle from MLflow's store, and return its identity."""
    local = local_folder(entry.source)
    try:
        if local is not None:
            return copies.keep(local).name
        with tempfile.TemporaryDirectory() as folder:
            fetched = mlflow.artifacts.download_artifacts(entry.source, dst_path=folder, tracking_uri=uri())
            return copies.keep(Path(fetched)).name
    except (BrokenBundle, MlflowException, OSError) as error:
        raise UserError(
            f"{name} version {entry.version}: its bundle cannot be fetched from {entry.source}: {error}"
        ) from None


def versions(name: str) -> Sequence[ModelVersion]:
    """MLflow's entries of all versions of a model, the newest first. Raises UserError for an invalid name."""
    require_name(name)
    mlflow_client = client()
    # The entries of a search have no aliases.
    return [mlflow_client.get_model_version(name, entry.version) for entry in _search(name)]


def with_tag(name: str, tag: str, value: str) -> ModelVersion | None:
    """MLflow's entry of the first version with a tag; None if there is none."""
    return next((entry for entry in reversed(_search(name)) if entry.tags.get(tag) == value), None)


def _search(name: str) -> Sequence[ModelVersion]:
    """MLflow's entries of all versions, the newest first, without their aliases."""
    return client().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])


def aliases_of(name: str) -> dict[str, str]:
    """The version number of each alias of a model."""
    return {alias: str(number) for alias, number in client().get_registered_model(name).aliases.items()}


def locked(
    name: str, on_wait: Callable[[str], None] | None = None, *, wait: bool = True
) -> contextlib.AbstractContextManager[None]:
    """The lock of a model's versions and aliases, with the arguments of `app.state.locks.exclusive`: MLflow
    does not prevent two versions or aliases at once."""
    return locks.exclusive(f"registry-{name}", on_wait, wait=wait)


def sign(name: str, version: str, key: Path) -> Version:
    """Sign a version's bundle with the private key in a file.

    Raises UserError if the bundle is broken, or the file has no such key.
    """
    chosen = resolve(name, version)
    verify(chosen.path)
    signed = signature.sign((chosen.path / manifest.MANIFEST).read_bytes(), key)
    with locked(name), Audit() as audit:
        encoded = base64.b64encode(signed).decode()
        client().set_model_version_tag(name, chosen.number, SIGNATURE_TAG, encoded)
        audit.add("sign", name, {"version": chosen.number})
    return resolve(name, chosen.number)


def _described(entry: ModelVersion) -> str:
    aliases = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
    return f"{entry.version}{aliases}"
