"""Registering a bundle as a version of a model."""

from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from app.bundle.manifest import identity_of, require_passed, verify
from app.errors import UserError
from app.registry import promotion, versions
from app.registry.connection import client
from app.registry.versions import CHALLENGER, CHAMPION, IDENTITY_TAG, Version
from app.state.audit import Audit
from app.state.audit_head import Head

CANDIDATE_TAG = "raylway.candidate"
"""Tag of a version with the identity of its bundle before the gate's decision was added."""
HEAD_TAG = "raylway.audit_head"
"""Tag of a version with the audit log's head (`app.state.audit_head.Head`) when the version was created."""
REGISTERED = "register"
"""Action in the audit log."""
ALIAS_ACTIONS = (REGISTERED, promotion.PROMOTED)
"""Actions in the audit log that set aliases."""


class Outdated(UserError):
    """The champion changed between the gate's decision and the registration."""


def register(name: str, run_id: str, path: Path, uri: str) -> Version:
    """Register the bundle in a folder, which `Run.log_bundle` has stored at `uri`.

    A registration that was interrupted is finished; a registered bundle keeps its version. The first version
    becomes the champion, a later one the challenger. Raises UserError if the bundle has not passed the gate,
    and Outdated if the champion is not the one that it was compared with.
    """
    manifest = verify(path)
    require_passed(manifest, f"a version of {name}")
    mlflow = client()
    with versions.locked(name), Audit() as audit:
        _create_model(mlflow, name)
        promotion.finish_locked(audit, name)
        entry = versions.with_tag(name, IDENTITY_TAG, identity_of(path))
        if entry is None:
            champion = versions.find(name, CHAMPION)
            compared = manifest["decision"].get("champion")
            if (champion and champion.identity) != (compared and compared["identity"]):
                raise Outdated(f"the champion of {name} changed after the candidate was compared with it")
            tags = {
                IDENTITY_TAG: identity_of(path),
                CANDIDATE_TAG: manifest.get("candidate", ""),
                HEAD_TAG: str(audit.head() or ""),
                "raylway.data_version": manifest.get("data_version", ""),
            }
            entry = mlflow.create_model_version(name, uri, run_id=run_id, tags=tags)
        _finish(mlflow, audit, name, entry)
    return versions.resolve(name, str(entry.version))


def registered_candidate(name: str, candidate: str) -> Version | None:
    """The version whose bundle had this identity before the gate's decision was added."""
    entry = versions.with_tag(name, CANDIDATE_TAG, candidate)
    return None if entry is None else versions.resolve(name, str(entry.version))


def _create_model(mlflow: MlflowClient, name: str) -> None:
    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _finish(mlflow: MlflowClient, audit: Audit, name: str, entry: ModelVersion) -> None:
    """Set a new version's alias, unless that is done. Aliases that were set since the version was created
    are later decisions, and are kept."""
    number = str(entry.version)
    head = entry.tags.get(HEAD_TAG)
    created = Head.parse(head) if head else None
    registrations = audit.newest_first(name, (REGISTERED,), since=created)
    if any(registration.details["version"] == number for registration in registrations):
        return
    # Check all entries since then: only a complete chain proves that no entry with an alias was removed.
    is_decided = any(e.action in ALIAS_ACTIONS for e in audit.entries(name, since=created))
    aliases = versions.aliases_of(name)
    alias = next((alias for alias, version in aliases.items() if version == number), None)
    if alias is None and not is_decided:
        alias = CHALLENGER if CHAMPION in aliases else CHAMPION
        mlflow.set_registered_model_alias(name, alias, number)
    details = {"version": number, "alias": alias, "identity": entry.tags[IDENTITY_TAG]}
    audit.add(REGISTERED, name, details)
