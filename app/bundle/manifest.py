"""The manifest of a bundle: the SHA-256 of every file, and how the bundle was made."""

import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.bundle.signature import SIGNATURE
from app.errors import UserError
from app.state import files

MANIFEST = "MANIFEST.json"
SUFFIXES = {".json", ".md", ".onnx", ".parquet", ".safetensors", ".txt"}
"""Suffixes of the files that a bundle may have. Opening such a file runs no code from it."""
REQUIRED = ("example.json", "model.onnx", "schema.json")
MLFLOW_MODEL = "MLmodel"
"""The file without a suffix that a bundle may have; MLflow's tools read it."""
REPAIR = "remove the folder and run the command again, which fetches a registered bundle again"
"""What to do about a broken bundle."""


class BrokenBundle(UserError):
    """A bundle's files do not match its manifest."""


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a complete bundle: the SHA-256 of every file, and `facts` about how it was made.

    The manifest has no time, so that equal contents have the same identity.
    """
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = sorted(str(path.relative_to(folder)) for path in paths)
    hashes = {name: files.sha256(folder / name) for name in names if name not in (MANIFEST, SIGNATURE)}
    origin = {"git_commit": _git_commit(), "python": platform.python_version()}
    files.write(folder / MANIFEST, encoded({**facts, **origin, "files": hashes}))


def encoded(manifest: Mapping[str, Any]) -> bytes:
    """The content of a manifest's file."""
    return json.dumps(manifest, indent=1).encode()


def identity_of(path: Path) -> str:
    """The SHA-256 of a bundle's manifest. As the manifest has the hash of every other file, bundles with the
    same identity are equal. Raises BrokenBundle if there is no manifest."""
    manifest_of(path)
    return files.sha256(path / MANIFEST)


def manifest_of(path: Path) -> dict[str, Any]:
    """Read the manifest of the bundle in a folder without checking its files. Raises BrokenBundle if there is
    none or it cannot be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        dict(manifest["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenBundle(f"{path}: is not a bundle: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenBundle(f"{path}: its {MANIFEST} cannot be read; {REPAIR}") from None
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """Read the manifest of a bundle and check its files. Raises BrokenBundle unless all match.

    Files that are not in the manifest are ignored: other programs leave files there, and nothing opens them.
    """
    manifest = manifest_of(path)
    hashes = dict(manifest["files"])
    faults = [
        f"{name} is not a file that a bundle may have" for name in hashes if not _is_allowed(path, name)
    ]
    faults += [f"{name} is not in the manifest" for name in REQUIRED if name not in hashes]
    for name, expected in hashes.items():
        try:
            if files.sha256(path / name) != expected:
                faults.append(f"{name} was changed")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    if faults:
        raise BrokenBundle(f"{path}: {', '.join(sorted(faults))}; {REPAIR}")
    return manifest


def copy(source: Path, target: Path, manifest: bytes | None = None) -> None:
    """Copy the files that a bundle's manifest lists into an empty folder.

    `manifest` is the content of the new folder's manifest; None: that of the source. Raises BrokenBundle if
    the files do not match the source's manifest.
    """
    for name in verify(source)["files"]:
        files.copy(source / name, target / name)
    files.write(target / MANIFEST, manifest or (source / MANIFEST).read_bytes())
    verify(target)
    files.sync(target)


def require_passed(manifest: Mapping[str, Any], what: str) -> None:
    """Raise UserError unless a manifest has a decision of the gate, and the model passed.

    `what` names the bundle in the message, such as "income version 3".
    """
    decision = manifest.get("decision")
    if decision is None:
        raise UserError(
            f"{what} must have passed the gate, but its bundle has no decision; train it again with "
            "`raylway train`, which skips the stages that are done"
        )
    if not decision["passed"]:
        raise UserError(f"{what} must have passed the gate, which refused it: {decision['reason']}")


def _is_allowed(folder: Path, name: str) -> bool:
    """Whether `name` is a data file directly in the folder. A link could lead anywhere."""
    file = folder / name
    is_plain = name == file.name and not file.is_symlink()
    return is_plain and (file.suffix in SUFFIXES or name == MLFLOW_MODEL)


def _git_commit() -> str | None:
    """The commit of the running code, with `+` if the code was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
