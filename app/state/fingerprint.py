"""Fingerprints of code: what a module's results depend on, beside its inputs.

That is the source of the module and of everything in the application that it imports, and the versions of the
libraries that these import. Imports are read from the source, those inside of functions too, so that no list
has to be kept by hand.
"""

import ast
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
APPLICATION = Path(__file__).parents[1].name
WITHOUT_EFFECT = {"cryptography", "psutil", "pydantic", "ray", "threadpoolctl"}
"""Libraries whose releases change no result: they check, start and distribute work."""


def fingerprint(*modules: str) -> dict[str, str]:
    """The SHA-256 of the source of each module that `modules` need, themselves included, and the version of
    each library. Raises ValueError for a module that is not the application's."""
    needed, libraries = dependencies(*modules)
    hashes = {name: hashlib.sha256(_source(name)).hexdigest() for name in sorted(needed)}
    return hashes | {name: _version(name) for name in sorted(libraries)}


def dependencies(*modules: str) -> tuple[frozenset[str], frozenset[str]]:
    """The modules of the application and the top-level packages of libraries that are imported, directly or
    not, by `modules`, themselves included. A module needs the packages that it is in."""
    needed: set[str] = set()
    libraries: set[str] = set()
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name in needed:
            continue
        needed.add(name)
        if "." in name:
            pending.append(name.rpartition(".")[0])
        for imported in _imports(name):
            top = imported.partition(".")[0]
            if top == APPLICATION:
                pending.append(imported)
            elif top not in sys.stdlib_module_names:
                libraries.add(top)
    return frozenset(needed), frozenset(libraries - WITHOUT_EFFECT)


@functools.cache
def _imports(name: str) -> frozenset[str]:
    return frozenset(_named(ast.parse(_source(name))))


def _named(node: ast.AST) -> Iterator[str]:
    """What is imported in a part of a module, but for type checkers alone."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if _file(whole) else node.module
    elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from _named(child)


@functools.cache
def _source(name: str) -> bytes:
    """As it was when it was first asked for, in this process."""
    file = _file(name)
    if file is None:
        raise ValueError(f"{name} must be a module of {APPLICATION}")
    return file.read_bytes()


def _file(name: str) -> Path | None:
    """None if the application has no such module."""
    path = ROOT.joinpath(*name.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if name.startswith(APPLICATION) and file.is_file()), None)


@functools.cache
def _version(package: str) -> str:
    """The installed release, without the build's tag: PyTorch for a CPU and for a GPU are one release."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        distributions = importlib.metadata.packages_distributions().get(package)
        if not distributions:
            return "not installed"
        found = importlib.metadata.version(distributions[0])
    return found.partition("+")[0]
