"""Fingerprints of code: everything that the results of a module depend on, apart from its inputs.

A fingerprint has the source of a module and of all modules of the application that it imports, and the
versions of the libraries that these import. Imports are read from the source, including those inside
functions, so that no list has to be maintained.
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
IGNORED_LIBRARIES = {"cryptography", "psutil", "pydantic", "ray", "threadpoolctl"}
"""Libraries whose releases change no result: they validate, start and distribute work."""


def fingerprint(*modules: str) -> dict[str, str]:
    """The SHA-256 of the source of each module that `modules` depend on, themselves included, and the version
    of each library. Raises ValueError for a module outside the application."""
    names, libraries = dependencies(*modules)
    hashes = {name: hashlib.sha256(_source(name)).hexdigest() for name in sorted(names)}
    return hashes | {name: _version(name) for name in sorted(libraries)}


def dependencies(*modules: str) -> tuple[frozenset[str], frozenset[str]]:
    """The modules of the application, and the top-level packages of libraries, that `modules` import directly
    or indirectly; `modules` and the packages that contain them are included."""
    names: set[str] = set()
    libraries: set[str] = set()
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name in names:
            continue
        names.add(name)
        if "." in name:
            pending.append(name.rpartition(".")[0])
        for imported in _imports(name):
            top_package = imported.partition(".")[0]
            if top_package == APPLICATION:
                pending.append(imported)
            elif top_package not in sys.stdlib_module_names:
                libraries.add(top_package)
    return frozenset(names), frozenset(libraries - IGNORED_LIBRARIES)


@functools.cache
def _imports(name: str) -> frozenset[str]:
    return frozenset(_imported_names(ast.parse(_code(name))))


def _imported_names(node: ast.AST) -> Iterator[str]:
    """The modules that a part of a module imports, except those for type checkers only."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            full_name = f"{node.module}.{alias.name}"
            yield full_name if _file(full_name) else node.module
    elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from _imported_names(child)


@functools.cache
def _source(name: str) -> bytes:
    """A module's code, as it was at the first call in this process; of a package also its data files."""
    file = _file(name)
    data_files = []
    if file is not None and file.name == "__init__.py":
        data_files = sorted(path for path in file.parent.glob("*.*") if path.suffix not in (".py", ".pyc"))
    return b"\0".join([_code(name), *(path.read_bytes() for path in data_files)])


@functools.cache
def _code(name: str) -> bytes:
    file = _file(name)
    if file is None:
        raise ValueError(f"{name} must be a module of {APPLICATION}")
    return file.read_bytes()


def _file(name: str) -> Path | None:
    """The file of a module; None if the application has no such module."""
    path = ROOT.joinpath(*name.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if name.startswith(APPLICATION) and file.is_file()), None)


@functools.cache
def _version(package: str) -> str:
    """The installed release, without the build's tag: PyTorch for a CPU and for a GPU are one release."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        distributions = importlib.metadata.packages_distributions().get(package)
        if not distributions:
            return "not installed"
        version = importlib.metadata.version(distributions[0])
    return version.partition("+")[0]
