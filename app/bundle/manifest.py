"""The manifest of a bundle: the hash of every file, and how the bundle came about."""

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
KINDS = {".json", ".md", ".onnx", ".parquet", ".safetensors", ".txt"}
"""Endings of files that a bundle may have. None of them is run by whoever opens it."""
AGAIN = "remove the folder and give the command again: a registered bundle is then fetched anew"
"""What to do about a broken bundle."""
REQUIRED = ("example.json", "model.onnx", "schema.json")
FLAVOR = "MLmodel"
"""For MLflow's own tools."""


class BrokenBundle(UserError):
    """A bundle's files are not as its manifest says."""


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest, last: the SHA-256 of every file, and `facts` of how the bundle came about.

    It holds no time, so that the same content has the same identity.
    """
    found = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_symlink() or not f.is_dir())
    listed = {name: files.sha256(folder / name) for name in found if name not in (MANIFEST, SIGNATURE)}
    origin = {"git_commit": _git_commit(), "python": platform.python_version()}
    files.write(folder / MANIFEST, document({**facts, **origin, "files": listed}))


def document(manifest: Mapping[str, Any]) -> bytes:
    """The content of a manifest's file."""
    return json.dumps(manifest, indent=1).encode()


def identity_of(path: Path) -> str:
    """The SHA-256 of a bundle's manifest, which has the hash of every other file: two bundles with the same
    identity are the same in all that counts. Raises BrokenBundle if there is no manifest."""
    manifest_of(path)
    return files.sha256(path / MANIFEST)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of the bundle in a folder, whose files are not looked at. Raises BrokenBundle."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        dict(manifest["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenBundle(f"{path}: is not a bundle: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise BrokenBundle(f"{path}: its {MANIFEST} cannot be read; {AGAIN}") from None
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all as it says; raises BrokenBundle if not.

    Files that are not in the manifest are ignored: other programs leave theirs, and nothing opens them.
    """
    manifest = manifest_of(path)
    listed = dict(manifest["files"])
    faults = [f"{name} is not a file that a bundle may have" for name in listed if not _allowed(path, name)]
    faults += [f"{name} is not in the manifest" for name in REQUIRED if name not in listed]
    for name, digest in listed.items():
        try:
            if files.sha256(path / name) != digest:
                faults.append(f"{name} was changed")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    if faults:
        raise BrokenBundle(f"{path}: {', '.join(sorted(faults))}; {AGAIN}")
    return manifest


def copy(source: Path, target: Path, manifest: bytes | None = None) -> None:
    """Copy a bundle's files, and no others, into an empty folder, with its manifest or another one.

    Raises BrokenBundle if they are not as the manifest says.
    """
    for name in verify(source)["files"]:
        files.copy(source / name, target / name)
    files.write(target / MANIFEST, manifest or (source / MANIFEST).read_bytes())
    verify(target)
    files.sync(target)


def require_passed(manifest: Mapping[str, Any], what: str) -> None:
    """Raises UserError unless the gate's decision is in a manifest and the model passed.

    `what` names the bundle, such as "income version 3".
    """
    decision = manifest.get("decision")
    if decision is None:
        raise UserError(
            f"{what} must have passed the gate, but its bundle holds no decision of it; train it again with "
            "`raylway train`, which keeps what is done already"
        )
    if not decision["passed"]:
        raise UserError(f"{what} must have passed the gate, which refused it: {decision['reason']}")


def _allowed(folder: Path, name: str) -> bool:
    """Whether it names a plain file of data, directly in the folder. A link could lead anywhere."""
    file = folder / name
    plain = name == file.name and not file.is_symlink()
    return plain and (file.suffix in KINDS or name == FLAVOR)


def _git_commit() -> str | None:
    """The commit of the code that runs, with `+` if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
