"""Run commands as a user does, each in its own process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def raylway(*arguments: str) -> subprocess.CompletedProcess:
    """Run a command from the root of the checkout; its output is text."""
    command = [sys.executable, "-m", "app", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
