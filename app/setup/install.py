"""Set-up: `python3 -m app.setup.install` makes the environment in .venv, from Python and a compiler alone.

Only the standard library is used. Horovod is built from its source against the pinned PyTorch, once per
machine: the wheel is kept in the user's cache directory. When nothing has changed since the last time,
it returns at once and asks no network.
"""

from __future__ import annotations  # to say so, an older Python must get past the annotations

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
from collections.abc import Callable, Sequence
from pathlib import Path

from app.errors import UserError
from app.setup.horovod_patches import PATCHES

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".raylway-installed"
TORCH = "torch==2.13.0"
HOROVOD = "horovod==0.28.1"
HOROVOD_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
"""The source archive's. It is checked before pip asks for the metadata, which runs the archive's code."""
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "cmake")
CXX_STANDARD = 20
"""Horovod 0.28.1 asks for C++14, which PyTorch's headers no longer compile as."""
BUILD_MINUTES = "2 to 5 minutes on two cores"


def install() -> None:
    """Bring .venv up to date with pyproject.toml and constraints.txt. Raises UserError if that cannot be."""
    if sys.version_info[:2] != (3, 11):
        raise UserError(
            f"Python 3.11 is needed, but this is {platform.python_version()}; say make PYTHON=python3.11"
        )
    state = _state()
    if STAMP.exists() and STAMP.read_text() == state:
        return
    compiler = _compiler()  # before the long downloads
    print(f"Setting up {VENV.name} (only the first time takes minutes)", flush=True)
    if not PYTHON.exists():
        _step("virtual environment", lambda: venv.create(VENV, with_pip=True))
    _step("build tools", lambda: _pip("install", *BUILD_TOOLS))
    # First and alone: any other package that wants torch would choose another build of it.
    _step("PyTorch", lambda: _pip("install", TORCH))
    _step("Raylway's dependencies", lambda: _pip("install", "--no-build-isolation", "-e", f"{ROOT}[dev]"))
    wheel = _horovod_wheel(compiler)
    _step("Horovod", lambda: _install_wheel(wheel))
    _step("sample data", lambda: _run([PYTHON, "-m", "app.data.sources.samples"]))
    STAMP.write_text(state)


def _state() -> str:
    """What the environment depends on, as a hash."""
    digest = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    code = ("app/setup/install.py", "app/setup/horovod_patches.py", "app/data/sources/samples.py")
    for name in ("pyproject.toml", "constraints.txt", *code):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _compiler() -> str:
    for program, package in ((os.environ.get("CXX", "g++"), "g++"), ("make", "make")):
        if not shutil.which(program):
            raise UserError(
                f"building Horovod needs {program!r}, which was not found; install the package {package} "
                f"(Debian, Ubuntu: apt-get install {package}; Fedora: dnf install "
                f"{'gcc-c++' if package == 'g++' else package})"
            )
    return os.environ.get("CXX", "g++")


def _horovod_wheel(compiler: str) -> Path:
    """Horovod's wheel for this Python, PyTorch and platform: from the user's cache, or built into it."""
    nccl = _nccl_home()
    operations = "nccl" if nccl else "gloo"
    digest = hashlib.sha256(repr(PATCHES).encode()).hexdigest()[:8]
    tag = f"py{sys.version_info.major}{sys.version_info.minor}-{platform.system()}-{platform.machine()}"
    build = subprocess.check_output(
        [PYTHON, "-c", "import torch; print(torch.__version__)"], text=True
    ).strip()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raylway"
    folder = cache / f"{HOROVOD}-torch{build}-{tag}-{operations}-{digest}".replace("==", "-").lower()
    if not (found := list(folder.glob("*.whl"))):
        print(f"  building Horovod against PyTorch {build} with {operations}: {BUILD_MINUTES}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _build_horovod(Path(scratch), compiler, nccl)
            folder.mkdir(exist_ok=True)
            for wheel in (Path(scratch) / "wheel").glob("*.whl"):
                wheel.replace(folder / wheel.name)
        found = list(folder.glob("*.whl"))
    return found[0]


def _install_wheel(wheel: Path) -> None:
    """Also over one of the same version: with other patches it is another build. Raises UserError for a wheel
    that is damaged."""
    _verify(wheel)
    _pip("install", "--no-deps", "--force-reinstall", str(wheel))


def _build_horovod(scratch: Path, compiler: str, nccl: Path | None) -> None:
    wrapper = scratch / "c++"
    wrapper.write_text(
        f'#!/bin/sh\nexec {shutil.which(compiler)} "$@" -std=c++{CXX_STANDARD}\n'
    )  # the last one wins
    wrapper.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",  # cmake from PyPI
        "CXX": str(wrapper),
        "MAKEFLAGS": f"-j{os.cpu_count()}",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
    }
    if nccl:
        # The wheel of NCCL has only the versioned name of the library, the linker looks for the plain one.
        home = scratch / "nccl"
        (home / "lib").mkdir(parents=True)
        (home / "include").symlink_to(nccl / "include")
        (home / "lib" / "libnccl.so").symlink_to(nccl / "lib" / "libnccl.so.2")
        environment |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_HOME": str(home),
            "HOROVOD_NCCL_LINK": "SHARED",
        }
    source = _horovod_source(scratch)
    command = [str(PYTHON), "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    log = scratch.parent / "horovod-build.log"
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "-w", str(scratch / "wheel"), str(source)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout
        shown = 0
        for line in process.stdout:
            file.write(line)
            if (percent := re.match(r"\s*\[\s*(\d+)%\]", line)) and int(percent[1]) >= shown + 20:
                shown = int(percent[1]) // 20 * 20
                print(f"    {shown} % after {time.monotonic() - started:.0f} s", flush=True)
        if process.wait():
            raise UserError(f"Horovod could not be built; the end of {log} says why")
    print(f"    built in {time.monotonic() - started:.0f} s and kept for the next time", flush=True)


def _horovod_source(scratch: Path) -> Path:
    """Horovod's source, unpacked and patched."""
    archive = _download(HOROVOD, HOROVOD_SHA256, scratch)
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    source = scratch / archive.name.removesuffix(".tar.gz")
    for name, old, new in PATCHES:
        before, found, after = (source / name).read_text().rpartition(old)
        if not found:
            raise UserError(f"{HOROVOD}: {name} is not as expected; it must have `{old}`")
        (source / name).write_text(before + new + after)
    return source


def _download(requirement: str, sha256: str, folder: Path, *options: str) -> Path:
    """Have pip fetch a source archive. Raises UserError if it cannot be had, or has another hash."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    fetch = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--no-cache-dir", "--require-hashes"]
    try:
        _pip("download", *fetch, *options, "-d", str(folder), "-r", str(pinned))
    except UserError as error:
        if found := re.search(r"Got\s+([0-9a-f]{64})", str(error)):
            raise UserError(
                f"{requirement}: the source archive must have the SHA-256 {sha256}, but it has {found[1]}; "
                "nothing of it was run. If it comes from a mirror, have the mirror mended"
            ) from None
        raise
    (archive,) = folder.glob("*.tar.gz")
    return archive


def _verify(wheel: Path) -> None:
    """Raise UserError unless each file of a wheel is as the wheel's own RECORD says."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            names = [name for name in packed.namelist() if not name.endswith("/")]
            (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
            rows = csv.reader(packed.read(record).decode().splitlines())
            hashes = {row[0]: row[1] for row in rows}
            wrong = [
                name for name in names if name != record and _digest(packed.read(name)) != hashes.get(name)
            ]
            wrong += [name for name in hashes if name not in names]
    except (OSError, ValueError, IndexError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        wrong = [str(error)]
    if wrong:
        raise UserError(
            f"{wheel}: is damaged ({wrong[0]}); remove {wheel.parent} and run `make setup` again to build it"
        )


def _digest(content: bytes) -> str:
    """As a RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def _nccl_home() -> Path | None:
    """NCCL's folder, where PyTorch sees a GPU and there is a CUDA compiler to build with."""
    probe = "import torch, nvidia.nccl; print(torch.cuda.is_available(), nvidia.nccl.__path__[0])"
    done = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True)
    available, _, path = done.stdout.strip().partition(" ")
    return Path(path) if done.returncode == 0 and available == "True" and shutil.which("nvcc") else None


def _pip(*arguments: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    _run([PYTHON, "-m", "pip", arguments[0], *quiet, *arguments[1:]])


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        what = " ".join(str(part) for part in command[1:5])
        raise UserError(f"`{what} ...` failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")


def _step(name: str, work: Callable[[], object]) -> None:
    started = time.monotonic()
    print(f"  {name} ...", end="", flush=True)
    work()
    print(f" {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        install()
    except UserError as error:
        sys.exit(f"\nerror: {error}")
