"""The versions of Ray and Optuna that Raylway runs with.

Raylway overrides and calls private parts of both, which may change with every minor version. A command or a
replica that finds another version ends before it starts anything.
"""

from importlib import metadata

from app.errors import UserError

TESTED = {"ray": "2.60", "optuna": "5.0"}
"""Minor version of each library that the tests run with. pyproject.toml pins the same ones."""


def require_tested_versions() -> None:
    """Raise UserError unless each library in TESTED is installed in its tested minor version.

    Reads the installed packages' metadata and imports neither library.
    """
    for library, minor in TESTED.items():
        try:
            version = metadata.version(library)
        except metadata.PackageNotFoundError:
            version = "none"
        if version.split(".")[:2] != minor.split("."):
            raise UserError(
                f"{library} must be version {minor}.x, which Raylway is tested with, but the environment has "
                f"{version}; run `make setup`, or `pip install '{library}~={minor}.0'`"
            )
