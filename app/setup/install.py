"""Set-up: `python3 -m app.setup.install` creates the environment in .venv with Python and a compiler only.

Only the standard library is used. Horovod is built from its source while pip installs the other dependencies,
once per machine. If nothing has changed since the last time, it returns at once and does not use the
network.
"""

from __future__ import annotations  # an older Python must get as far as the message that it is too old

import fcntl
import hashlib
import platform
import signal
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import UserError
from app.setup import horovod
from app.setup.environment import PIP, ROOT, VENV, pip_install, python
from app.setup.processes import PROCESSES, run_in_parallel

STAMP = VENV / ".raylway-installed"
"""File with the hash of everything that the installed environment depends on."""
LOCK = VENV / ".raylway-lock"
"""File that a running set-up locks."""
PIP_VERSION = "pip==26.3"
"""Version of pip. That of Python 3.11 takes three times as long to resolve the dependencies."""
TORCH = "torch==2.13.0"
SOURCES = ("pyproject.toml", "constraints.txt", "app/setup/*.py", "app/data/sources/*.py")
"""Patterns of the files that the environment depends on."""
BUILD_TIME = "about 3 minutes on two cores"
"""Duration of Horovod's build, for the user."""


def install() -> None:
    """Bring .venv up to date with `SOURCES`. Raises UserError if that fails."""
    if sys.version_info[:2] != (3, 11):
        raise UserError(
            f"Python 3.11 is needed, but this is {platform.python_version()}; run make PYTHON=python3.11"
        )
    state = _state()
    if _is_installed(state):
        return
    compiler = horovod.find_compiler()  # before the long downloads
    VENV.mkdir(exist_ok=True)
    with _locked(LOCK):
        if _is_installed(state):  # by another set-up, for which this one has waited
            return
        try:
            _install(compiler)
        finally:
            PROCESSES.stop()
        STAMP.write_text(state)


def _install(compiler: str) -> None:
    print(f"Setting up {VENV.name} (only the first time takes minutes)", flush=True)
    if not PIP.exists():
        _step("virtual environment", lambda: venv.create(VENV, with_pip=True))
    _step("build tools", lambda: pip_install(PIP_VERSION, *horovod.BUILD_TOOLS))
    # First and alone: any other package that needs torch would choose another build of it.
    _step("PyTorch", lambda: pip_install(TORCH))
    target = horovod.find_target()
    if not target.wheels():
        print(f"  the other dependencies, and Horovod built {target.description}: {BUILD_TIME}", flush=True)
        run_in_parallel(
            lambda: _timed("dependencies installed", _install_dependencies),
            lambda: _timed(
                "Horovod built and kept for the next time", lambda: horovod.build(target, compiler)
            ),
        )
    else:
        _step("the other dependencies", _install_dependencies)
    _step("Horovod", lambda: horovod.install_wheel(target.wheels()[0]))


def _install_dependencies() -> None:
    pip_install("--no-build-isolation", "-e", f"{ROOT}[dev]")
    python("-m", "app.data.sources.samples")


def _is_installed(state: str) -> bool:
    return STAMP.exists() and STAMP.read_text() == state


def _state() -> str:
    """A hash of everything that the environment depends on."""
    digest = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock a file for the time of the block, or until this process dies."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another set-up of {VENV}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _step(name: str, work: Callable[[], object]) -> None:
    """Do work; prints its name before, and its duration after it."""
    started = time.monotonic()
    print(f"  {name} ...", end="", flush=True)
    work()
    print(f" {time.monotonic() - started:.0f} s", flush=True)


def _timed(result: str, work: Callable[[], object]) -> None:
    """Do work in parallel with other work; prints one line, after it."""
    started = time.monotonic()
    work()
    print(f"    {result} after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # SystemExit stops PROCESSES
    try:
        install()
    except UserError as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        print("\nstopped; `make setup` continues from what is installed", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
