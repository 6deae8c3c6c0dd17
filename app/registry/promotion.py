"""Promoting a version to champion, in steps that the next process finishes if one is killed."""

from collections.abc import Callable

from app.bundle.manifest import require_passed, verify
from app.config.project import require_name
from app.registry import versions
from app.registry.connection import client
from app.registry.versions import CHALLENGER, CHAMPION, Version
from app.state.audit import Audit, Entry

PROMOTING, PROMOTED, NOT_PROMOTED = PROMOTIONS = ("promoting", "promote", "promote undone")
"""Actions in the audit log: the start of a promotion, and its two possible ends."""


def promote(name: str, version: str, on_wait: Callable[[str], None] | None = None) -> Version:
    """Make a version the champion. If it was the challenger, there is none until the next one is registered.

    `on_wait` is called with a message if another process is changing the model's aliases. Raises UserError if
    there is no such version, or if it has not passed the gate.
    """
    require_name(name)
    with versions.locked(name, on_wait), Audit() as audit:
        finish_locked(audit, name)
        chosen, previous = versions.resolve(name, version), versions.aliases_of(name).get(CHAMPION)
        require_passed(verify(chosen.path), f"{name} version {chosen.number}")
        # Written before the aliases change, so that the next process can finish what a kill interrupts.
        audit.add(PROMOTING, name, {"version": chosen.number, "before": previous})
        finish_locked(audit, name)
    return versions.resolve(name, chosen.number)


def finish(audit: Audit, name: str) -> None:
    """Finish a promotion that was interrupted. Raises Busy if another process is changing the aliases."""
    if _unfinished(audit, name):
        with versions.locked(name, wait=False):
            finish_locked(audit, name)


def finish_locked(audit: Audit, name: str) -> None:
    """Run the steps of a promotion after its first entry, unless they are done. Needs the model's lock."""
    start = _unfinished(audit, name)
    if start is None:
        return
    mlflow, number, previous = client(), start.details["version"], start.details["before"]
    aliases = versions.aliases_of(name)
    is_deleted = versions.find(name, number) is None
    # A version that was deleted, or another champion, is a later decision, and is kept.
    is_overruled = is_deleted or aliases.get(CHAMPION) not in (previous, number)
    if not is_overruled:
        mlflow.set_registered_model_alias(name, CHAMPION, number)
        if aliases.get(CHALLENGER) == number:
            mlflow.delete_registered_model_alias(name, CHALLENGER)
    action = NOT_PROMOTED if is_overruled else PROMOTED
    audit.add(action, name, start.details, start.who, expected=start.number, among=PROMOTIONS)


def _unfinished(audit: Audit, name: str) -> Entry | None:
    """The first entry of a promotion that has not ended."""
    last = audit.last(name, PROMOTIONS)
    return last if last is not None and last.action == PROMOTING else None
