"""Registered versions: registering, finding, promoting and signing them."""

import base64
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import mlflow.onnx
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from app.bundle import copies, manifest, signature
from app.bundle.manifest import BrokenBundle, identity_of, require_passed, verify
from app.config.project import NAME, require_name
from app.errors import UserError
from app.registry.artifacts import local_folder
from app.registry.connection import client, uri
from app.state import locks
from app.state.audit import Audit, Entry
from app.state.audit_head import Head

CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTING, PROMOTED, NOT_PROMOTED = PROMOTIONS = ("promoting", "promote", "promote undone")
"""In the audit log: a promotion that begins, and how it ended."""
IDENTITY_TAG = "raylway.identity"
"""On a version: its bundle's identity, by which the same bundle is not registered twice."""
CANDIDATE_TAG = "raylway.candidate"
"""On a version: the identity of its bundle before the gate's decision was added."""
SIGNATURE_TAG = "raylway.signature"
"""On a version: the signature of its manifest, base64."""
HEAD_TAG = "raylway.audit_head"
"""On a version: the audit log's newest entry (`app.state.audit_head.Head`) when the version was created."""
ALIAS_ACTIONS = ("register", "promote")
"""In the audit log: what gives aliases."""


@dataclass(frozen=True)
class Version:
    """A registered version with its bundle."""

    name: str
    number: str
    aliases: tuple[str, ...]
    identity: str
    """The SHA-256 of its bundle's manifest."""

    @property
    def path(self) -> Path:
        """The bundle's folder, which `resolve` and `find` have filled."""
        return copies.folder(self.identity)


class Outdated(UserError):
    """The champion changed between the gate's decision and the registration."""


def register(name: str, run_id: str, path: Path, uri: str) -> Version:
    """Register the bundle in a folder, which `Run.log_bundle` has stored at `uri`; or finish a registration
    that was interrupted. A bundle that is registered already keeps its version.

    The first version becomes the champion, a later one the challenger. Raises UserError if the gate did not
    let the bundle pass, and Outdated if the champion is not the one that it was compared with.
    """
    manifest = verify(path)
    require_passed(manifest, f"a version of {name}")
    ours = client()
    # The registry's tables hold nothing that would stop two versions or two aliases at once.
    with locks.exclusive(f"registry-{name}"), Audit() as audit:
        _create_model(ours, name)
        _finish_promotion(audit, name)
        entry = _with_tag(name, IDENTITY_TAG, identity_of(path))
        if entry is None:
            champion = find(name, CHAMPION)
            judged = manifest["decision"].get("champion")
            if (champion and champion.identity) != (judged and judged["identity"]):
                raise Outdated(f"{name} has another champion than the one that this was compared with")
            tags = {
                IDENTITY_TAG: identity_of(path),
                CANDIDATE_TAG: manifest.get("candidate", ""),
                HEAD_TAG: str(audit.head() or ""),
                "raylway.data_version": manifest.get("data_version", ""),
            }
            entry = ours.create_model_version(name, uri, run_id=run_id, tags=tags)
        _finish(ours, audit, name, entry)
    return resolve(name, str(entry.version))


def _create_model(ours: MlflowClient, name: str) -> None:
    try:
        ours.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _finish(ours: MlflowClient, audit: Audit, name: str, entry: Any) -> None:
    """Give a new version its alias, unless that is done. Whoever gave aliases since it was created decided
    later, and is not overruled."""
    number = str(entry.version)
    head = entry.tags.get(HEAD_TAG)
    created = Head.parse(head) if head else None
    registered = audit.newest_first(name, ("register",), since=created)
    if any(e.details["version"] == number for e in registered):
        return
    # That nobody gave an alias is proven by the whole log since then, not by a search for such entries.
    later = [e for e in audit.entries(name, since=created) if e.action in ALIAS_ACTIONS]
    aliases = ours.get_registered_model(name).aliases
    given = [alias for alias, version in aliases.items() if str(version) == number]
    alias = given[0] if given else None if later else CHALLENGER if CHAMPION in aliases else CHAMPION
    if alias and not given:
        ours.set_registered_model_alias(name, alias, number)
    details = {"version": number, "alias": alias, "identity": entry.tags[IDENTITY_TAG]}
    audit.add("register", name, details)


def registered_candidate(name: str, candidate: str) -> Version | None:
    """The version whose bundle had this identity before the gate's decision was added."""
    entry = _with_tag(name, CANDIDATE_TAG, candidate)
    return None if entry is None else resolve(name, str(entry.version))


def _with_tag(name: str, tag: str, value: str) -> Any:
    """MLflow's entry of the first version with a tag, or None."""
    return next((entry for entry in reversed(_entries(name)) if entry.tags.get(tag) == value), None)


def resolve(name: str, version: str) -> Version:
    """The version with a number or an alias; its bundle is fetched if it is elsewhere.

    Raises UserError if there is none, saying which there are.
    """
    require_name(name)
    found = find(name, version)
    if found is None:
        known = ", ".join(_described(v) for v in versions(name))
        hint = f"{name} has {known}" if known else f"{name} has no versions; train one with `raylway train`"
        shown = version if len(version) <= 40 else f"{version[:30]}..."
        raise UserError(f"no version {shown!r} of the model {name!r} is registered; {hint}")
    return found


def find(name: str, version: str) -> Version | None:
    """Like `resolve`, but None if there is none."""
    if not re.fullmatch(NAME, name) or not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", version):
        return None
    ours = client()
    try:
        if version.isdecimal():
            if len(version) > 9:  # more than the registry's tables hold
                return None
            found = ours.get_model_version(name, version)
        else:
            found = ours.get_model_version_by_alias(name, version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return Version(name, str(found.version), tuple(found.aliases), _kept(name, found))


def _kept(name: str, entry: Any) -> str:
    """Have a version's bundle among those that are kept here; returns its identity."""
    identity = entry.tags.get(IDENTITY_TAG)
    if identity is None or not copies.folder(identity).exists():
        fetched = _fetched(name, entry)
        if identity not in (None, fetched):
            raise UserError(
                f"{name} version {entry.version}: the bundle at {entry.source} is not the one that was "
                "registered; restore it, or train and register another version"
            )
        identity = fetched
    path = copies.require(identity)
    if signed := entry.tags.get(SIGNATURE_TAG):
        signature.write(path / manifest.MANIFEST, base64.b64decode(signed))
    return identity


def _fetched(name: str, entry: Any) -> str:
    """Fetch a version's bundle from MLflow's store; returns its identity."""
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


def versions(name: str) -> Sequence[Any]:
    """MLflow's entries of all versions of a model, the newest first. Raises UserError for a name none has."""
    require_name(name)
    ours = client()
    # Searching leaves the aliases out.
    return [ours.get_model_version(name, entry.version) for entry in _entries(name)]


def _entries(name: str) -> Sequence[Any]:
    """MLflow's entries of all versions, the newest first, without their aliases."""
    return client().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])


def promote(name: str, version: str, on_wait: Callable[[str], None] | None = None) -> Version:
    """Make a version the champion; if it was the challenger, there is none until the next one.

    `on_wait` is told who is waited for, if somebody else is changing the model's aliases. Raises UserError if
    there is no such version, or it did not pass the gate.
    """
    require_name(name)
    with locks.exclusive(f"registry-{name}", on_wait), Audit() as audit:
        _finish_promotion(audit, name)
        chosen, before = resolve(name, version), _aliases(name).get(CHAMPION)
        require_passed(verify(chosen.path), f"{name} version {chosen.number}")
        # Written before the aliases change: what a kill leaves half done, whoever comes next finishes.
        audit.add(PROMOTING, name, {"version": chosen.number, "before": before})
        _finish_promotion(audit, name)
    return resolve(name, chosen.number)


def finish_promotion(audit: Audit, name: str) -> None:
    """Finish a promotion that was cut short. Raises Busy if somebody is changing the model's aliases."""
    if _unfinished(audit, name):
        with locks.exclusive(f"registry-{name}", wait=False):
            _finish_promotion(audit, name)


def _finish_promotion(audit: Audit, name: str) -> None:
    """The steps of a promotion after its first entry; each may have been done before."""
    begun = _unfinished(audit, name)
    if begun is None:
        return
    ours, number, before = client(), begun.details["version"], begun.details["before"]
    aliases = _aliases(name)
    # Somebody has deleted the version, or given the alias to another one: theirs came later.
    if find(name, number) is None or aliases.get(CHAMPION) not in (before, number):
        audit.add(NOT_PROMOTED, name, begun.details, begun.who, expected=begun.number, among=PROMOTIONS)
        return
    ours.set_registered_model_alias(name, CHAMPION, number)
    if aliases.get(CHALLENGER) == number:
        ours.delete_registered_model_alias(name, CHALLENGER)
    audit.add(PROMOTED, name, begun.details, begun.who, expected=begun.number, among=PROMOTIONS)


def _unfinished(audit: Audit, name: str) -> Entry | None:
    last = audit.last(name, PROMOTIONS)
    return last if last is not None and last.action == PROMOTING else None


def _aliases(name: str) -> dict[str, str]:
    """The versions' numbers by alias."""
    return {alias: str(number) for alias, number in client().get_registered_model(name).aliases.items()}


def sign(name: str, version: str, key: Path) -> Version:
    """Sign a version's bundle with the private key in a file.

    Raises UserError if the bundle is broken, or the file holds no such key.
    """
    chosen = resolve(name, version)
    verify(chosen.path)
    signed = signature.sign((chosen.path / manifest.MANIFEST).read_bytes(), key)
    with locks.exclusive(f"registry-{name}"), Audit() as audit:
        tag = base64.b64encode(signed).decode()
        client().set_model_version_tag(name, chosen.number, SIGNATURE_TAG, tag)
        audit.add("sign", name, {"version": chosen.number})
    return resolve(name, chosen.number)


def _described(entry: Any) -> str:
    aliases = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
    return f"{entry.version}{aliases}"
