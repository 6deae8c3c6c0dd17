"""The virtual environment in .venv, and its pip."""

from __future__ import annotations  # an older Python must get as far as the message that it is too old

import sys
from pathlib import Path

from app.setup.processes import run

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PIP = VENV / "bin" / "pip"
PACKAGES = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
"""The folder of the installed packages, relative to that of a virtual environment."""


def python(*arguments: str) -> str:
    """Run the environment's Python and return its standard output. Raises UserError if it fails."""
    return run([PYTHON, *arguments], cwd=ROOT)


def pip(command: str, *arguments: str) -> None:
    """Run pip with the pinned versions. Raises UserError with the end of its output if it fails."""
    quiet = ("--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"))
    python("-m", "pip", command, *quiet, *arguments)


def pip_install(*arguments: str) -> None:
    """Install packages. Raises UserError if it fails."""
    # Compiling all 26,000 modules would take longer than everything else. Python compiles a module at its
    # first import.
    pip("install", "--no-compile", *arguments)
