"""Horovod's wheel: built from its source against the environment's PyTorch, and kept in the user's cache."""

from __future__ import annotations  # an older Python must get as far as the message that it is too old

import base64
import csv
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from app.errors import UserError
from app.setup.environment import PACKAGES, PYTHON, VENV, pip, pip_install, python
from app.setup.horovod_patches import PATCHES
from app.setup.processes import PROCESSES

HOROVOD = "horovod==0.28.1"
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
"""SHA-256 of the source archive, checked before pip builds the metadata, which runs the archive's code."""
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "cmake")
CXX_FLAGS = "-std=c++20 -g0"
"""Options that override Horovod's own: C++14, with which PyTorch's headers no longer compile, and debug
information, which takes a fifth of the compiler's time and most of the wheel's size."""


class Target(NamedTuple):
    """A build of Horovod."""

    description: str
    nccl: Path | None
    """Folder of NCCL; None for a build with Gloo only."""
    folder: Path
    """Folder of the wheel in the cache."""

    def wheels(self) -> list[Path]:
        """The wheel in the cache, in a list; empty if it has not been built."""
        return list(self.folder.glob("*.whl"))


def find_target() -> Target:
    """The build for the environment's PyTorch and this machine."""
    nccl = _nccl_home()
    operations = "nccl" if nccl else "gloo"
    digest = hashlib.sha256(repr((PATCHES, CXX_FLAGS)).encode()).hexdigest()[:8]
    tag = f"py{sys.version_info.major}{sys.version_info.minor}-{platform.system()}-{platform.machine()}"
    torch = python("-c", "import torch; print(torch.__version__)").strip()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raylway"
    name = f"{HOROVOD}-torch{torch}-{tag}-{operations}-{digest}".replace("==", "-").lower()
    return Target(f"for PyTorch {torch} with {operations}", nccl, cache / name)


def find_compiler() -> str:
    """The C++ compiler's command. Raises UserError if it or make is missing."""
    for program, package in ((os.environ.get("CXX", "g++"), "g++"), ("make", "make")):
        if not shutil.which(program):
            raise UserError(
                f"building Horovod needs {program!r}, which was not found; install the package {package} "
                f"(Debian, Ubuntu: apt-get install {package}; Fedora: dnf install "
                f"{'gcc-c++' if package == 'g++' else package})"
            )
    return os.environ.get("CXX", "g++")


def build(target: Target, compiler: str) -> None:
    """Build Horovod's wheel and move it into the cache. Raises UserError if the build fails."""
    cache = target.folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = _build(Path(scratch), compiler, target.nccl)
        target.folder.mkdir(exist_ok=True)
        wheel.replace(target.folder / wheel.name)


def install_wheel(wheel: Path) -> None:
    """Install a wheel. Replaces an installed one of the same version, which may have other patches.

    Raises UserError if the wheel is damaged.
    """
    _verify(wheel)
    pip_install("--no-deps", "--force-reinstall", str(wheel))


def _build(scratch: Path, compiler: str, nccl: Path | None) -> Path:
    """Build the wheel in `scratch` and return its path. Raises UserError if the build fails."""
    wrapper = scratch / "c++"
    # Of several options of one kind, the compiler uses the last.
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which(compiler)} "$@" {CXX_FLAGS}\n')
    wrapper.chmod(0o755)
    build_environment = _snapshot(scratch / "environment")
    environment = {
        **os.environ,
        "HOROVOD_CMAKE": str(build_environment / PACKAGES / "cmake" / "data" / "bin" / "cmake"),
        "CXX": str(wrapper),
        "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
    }
    if nccl:
        # NCCL's wheel has the library under its versioned name only; the linker needs the plain name.
        home = scratch / "nccl"
        (home / "lib").mkdir(parents=True)
        (home / "include").symlink_to(nccl / "include")
        (home / "lib" / "libnccl.so").symlink_to(nccl / "lib" / "libnccl.so.2")
        environment |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_HOME": str(home),
            "HOROVOD_NCCL_LINK": "SHARED",
        }
    source = _source(scratch)
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--use-pep517"]
    pip_wheel = [build_environment / "bin" / "python", "-m", "pip", "wheel", *options]
    command = [*map(str, pip_wheel), "-w", str(scratch / "wheel"), str(source)]
    log = scratch / "build.log"
    started = time.monotonic()
    with (
        log.open("w") as file,
        PROCESSES.start(command, env=environment, stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout
        percent_shown = 0
        for line in process.stdout:
            file.write(line)
            if (percent := re.match(r"\s*\[\s*(\d+)%\]", line)) and int(percent[1]) >= percent_shown + 20:
                percent_shown = int(percent[1]) // 20 * 20
                print(f"    Horovod: {percent_shown} % after {time.monotonic() - started:.0f} s", flush=True)
    if process.returncode:
        kept_log = log.replace(scratch.parent / "horovod-build.log")
        raise UserError(f"Horovod could not be built; see the end of {kept_log}")
    (wheel,) = (scratch / "wheel").glob("*.whl")
    return wheel


def _snapshot(folder: Path) -> Path:
    """Create a virtual environment of links to the packages that .venv has now, and return its folder.

    The build must not see packages that pip is still installing.
    """
    venv.create(folder, symlinks=True)
    for package in (VENV / PACKAGES).iterdir():
        (folder / PACKAGES / package.name).symlink_to(package)
    return folder


def _source(scratch: Path) -> Path:
    """Download, unpack and patch Horovod's source; returns its folder."""
    archive = _download(HOROVOD, HOROVOD_SHA256, scratch)
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    source = scratch / archive.name.removesuffix(".tar.gz")
    for name, old, new in PATCHES:
        before, matched, after = (source / name).read_text().rpartition(old)
        if not matched:
            raise UserError(f"{HOROVOD}: {name} must contain `{old}`, but it does not")
        (source / name).write_text(before + new + after)
    return source


def _download(requirement: str, sha256: str, folder: Path, *options: str) -> Path:
    """Download a source archive with pip and return its path. Raises UserError if its hash differs."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    fetch = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--no-cache-dir", "--require-hashes"]
    try:
        pip("download", *fetch, *options, "-d", str(folder), "-r", str(pinned))
    except UserError as error:
        if actual := re.search(r"Got\s+([0-9a-f]{64})", str(error)):
            raise UserError(
                f"{requirement}: the source archive must have the SHA-256 {sha256}, but it has {actual[1]}; "
                "none of its code was run. If it comes from a mirror, report it to the mirror's operator"
            ) from None
        raise
    (archive,) = folder.glob("*.tar.gz")
    return archive


def _verify(wheel: Path) -> None:
    """Raise UserError unless every file of a wheel has the hash in the wheel's RECORD."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            names = [name for name in packed.namelist() if not name.endswith("/")]
            (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
            rows = csv.reader(packed.read(record).decode().splitlines())
            hashes = {row[0]: row[1] for row in rows}
            damaged = [
                name for name in names if name != record and _digest(packed.read(name)) != hashes.get(name)
            ]
            damaged += [name for name in hashes if name not in names]
    except (OSError, ValueError, IndexError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        damaged = [str(error)]
    if damaged:
        raise UserError(
            f"{wheel}: is damaged ({damaged[0]}); remove {wheel.parent} and run `make setup` again to "
            "build it"
        )


def _digest(content: bytes) -> str:
    """The hash of a file's content, in the format of a RECORD."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def _nccl_home() -> Path | None:
    """NCCL's folder if PyTorch sees a GPU and a CUDA compiler is installed, else None."""
    probe = "import torch, nvidia.nccl; print(torch.cuda.is_available(), nvidia.nccl.__path__[0])"
    done = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True)
    available, _, path = done.stdout.strip().partition(" ")
    return Path(path) if done.returncode == 0 and available == "True" and shutil.which("nvcc") else None
