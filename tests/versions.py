"""Registered versions of hand-made bundles."""

from pathlib import Path

from app import registry
from app.config import Project
from tests.bundles import PROJECT


def project(name: str) -> Project:
    return Project.model_validate({**PROJECT, "name": name})


def registered(name: str, path: Path, key: str = "key") -> registry.Version:
    with registry.run(project(name), key) as run:
        run.log_bundle(path)
    return registry.register(name, run.id, path, data_version="c0ffee")
