"""Register versions of hand-made bundles."""

from pathlib import Path

from app.bundle import copies
from app.bundle.manifest import identity_of
from app.config import Project
from app.registry import registration, runs, versions
from tests.bundles import PASSED, PROJECT


def project(name: str) -> Project:
    return Project.model_validate({**PROJECT, "name": name})


def registered(name: str, path: Path, key: str = "key") -> versions.Version:
    """Register a hand-made bundle that has passed the gate, as training does; returns its version."""
    candidate = identity_of(path)
    existing = registration.registered_candidate(name, candidate)
    champion = versions.find(name, versions.CHAMPION)
    champion_facts = champion and {"identity": champion.identity}
    facts = {"candidate": candidate, "decision": {**PASSED, "champion": champion_facts}}
    sealed = existing.path if existing else copies.keep(path, facts)
    with runs.run(project(name), key) as run:
        return registration.register(name, run.id, sealed, run.log_bundle(sealed))
