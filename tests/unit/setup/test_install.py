"""Set-up in a copy of the few files that it needs, with a Python without site-packages."""

import contextlib
import hashlib
import io
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pip
import psutil
import pytest

from app.errors import UserError
from app.setup.environment import PACKAGES
from app.setup.horovod import _digest, _verify

ROOT = Path(__file__).parents[3]
NEEDED = (
    "app/__init__.py",
    "app/errors.py",
    "app/setup/__init__.py",
    "app/setup/install.py",
    "app/setup/environment.py",
    "app/setup/processes.py",
    "app/setup/horovod.py",
    "app/setup/horovod_patches.py",
    "app/data/__init__.py",
    "app/data/sources/samples.py",
    "app/data/sources/recipes.py",
    "pyproject.toml",
    "constraints.txt",
)
INSTALL = ("-m", "app.setup.install")
STAMP = (
    "from app.setup import install; install.STAMP.parent.mkdir(); install.STAMP.write_text(install._state())"
)


@pytest.fixture
def copy(tmp_path):
    for name in NEEDED:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.fixture
def programs(tmp_path):
    """Create a folder with these programs, which is the whole PATH."""

    def make(*names: str) -> str:
        (tmp_path / "bin").mkdir()
        for name in names:
            (tmp_path / "bin" / name).symlink_to("/bin/true")
        return str(tmp_path / "bin")

    return make


def python(copy: Path, path: str, *arguments: str) -> subprocess.CompletedProcess:
    # -S: without site-packages, as in a fresh checkout.
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=copy, env={"PATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("installed", "missing", "package"),
    [([], "g++", "g++"), (["make"], "g++", "g++"), (["g++"], "make", "make")],
)
def test_a_missing_compiler_is_an_error_of_one_line_that_names_the_package(
    copy, programs, installed, missing, package
):
    done = python(copy, programs(*installed), *INSTALL)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: building Horovod needs '{missing}', which was not found")
    assert f"apt-get install {package};" in line
    assert not (copy / ".venv").exists(), "compilers are checked before anything is created"


def test_a_repeated_set_up_does_nothing_if_nothing_has_changed(copy, programs):
    path = programs()  # no compiler, no pip: any step would fail
    assert python(copy, path, "-c", STAMP).returncode == 0
    done = python(copy, path, *INSTALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [file.name for file in (copy / ".venv").iterdir()] == [".raylway-installed"]


@pytest.mark.parametrize(
    "name",
    [
        "pyproject.toml",
        "constraints.txt",
        "app/setup/install.py",
        "app/setup/environment.py",
        "app/setup/horovod.py",
        "app/setup/horovod_patches.py",
        "app/data/sources/samples.py",
        "app/data/sources/recipes.py",
    ],
)
def test_a_change_of_a_file_that_it_depends_on_repeats_the_set_up(copy, programs, name):
    path = programs()
    python(copy, path, "-c", STAMP)
    with (copy / name).open("a") as file:
        file.write("\n# changed\n")
    done = python(copy, path, *INSTALL)
    assert done.returncode == 1
    assert "building Horovod needs" in done.stderr


def test_a_moved_checkout_repeats_the_set_up(copy, programs):
    path = programs()
    python(copy, path, "-c", STAMP)
    moved = copy.rename(copy.with_name("moved"))
    assert python(moved, path, *INSTALL).returncode == 1


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 12, 1)])
def test_another_python_is_an_error_of_one_line_that_names_the_needed_one(copy, programs, version):
    program = (
        "import sys, platform, runpy\n"
        f"sys.version_info = (*{version}, 'final', 0)\n"
        f"platform.python_version = lambda: '{'.'.join(map(str, version))}'\n"
        "runpy.run_module('app.setup.install', run_name='__main__')\n"
    )
    done = python(copy, programs("g++", "make"), "-c", program)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line == (
        f"error: Python 3.11 is needed, but this is {'.'.join(map(str, version))}; run make PYTHON=python3.11"
    )
    assert not (copy / ".venv").exists()


DOWNLOAD = """
import pathlib, sys
from app.setup import environment, horovod
environment.PYTHON = pathlib.Path(sys.argv[1])
folder = pathlib.Path(sys.argv[2])
options = ["--no-index", "--find-links", sys.argv[3], "--disable-pip-version-check"]
try:
    print(horovod._download("small==1.0", sys.argv[4], folder, *options))
except horovod.UserError as error:
    print("error:", error)
"""


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_source_archive_with_another_hash_is_refused_before_its_code_runs(copy, tmp_path, is_pinned):
    ran = tmp_path / "ran"
    links, folder = tmp_path / "links", tmp_path / "fetched"
    links.mkdir()
    folder.mkdir()
    setup = (
        f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='small', version='1.0')\n"
    )
    with tarfile.open(links / "small-1.0.tar.gz", "w:gz") as archive:
        for name, text in (
            ("setup.py", setup),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n"),
        ):
            info = tarfile.TarInfo(f"small-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    digest = hashlib.sha256((links / "small-1.0.tar.gz").read_bytes()).hexdigest()
    pinned = digest if is_pinned else "0" * 64
    done = python(copy, "/usr/bin:/bin", "-c", DOWNLOAD, sys.executable, str(folder), str(links), pinned)
    if is_pinned:
        assert done.stdout.strip() == str(folder / "small-1.0.tar.gz"), done.stdout + done.stderr
        return
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith(
        f"error: small==1.0: the source archive must have the SHA-256 {pinned}, but it has {digest}"
    )
    assert not ran.exists()


@pytest.mark.parametrize(
    "damage", ["truncated", "changed content", "added file", "missing file", "no record"]
)
def test_a_damaged_wheel_is_refused_with_one_line(tmp_path, damage):
    files = {"small.py": b"BUILD = 1\n", "small-1.0.dist-info/METADATA": b"Name: small\n"}
    record = "".join(f"{name},{_digest(content)},{len(content)}\n" for name, content in files.items())
    record += "small-1.0.dist-info/RECORD,,\n"
    wheel = tmp_path / "small-1.0-py3-none-any.whl"

    def write(contents: dict[str, bytes]) -> None:
        with zipfile.ZipFile(wheel, "w") as packed:
            for name, content in contents.items():
                packed.writestr(name, content)

    whole = {**files, "small-1.0.dist-info/RECORD": record.encode()}
    write(whole)
    _verify(wheel)
    match damage:
        case "truncated":
            wheel.write_bytes(wheel.read_bytes()[:-30])
        case "changed content":
            write({**whole, "small.py": b"BUILD = 2\n"})
        case "added file":
            write({**whole, "more.py": b""})
        case "missing file":
            write({name: content for name, content in whole.items() if name != "small.py"})
        case "no record":
            write(files)
    with pytest.raises(UserError, match=r"is damaged .*run `make setup` again") as caught:
        _verify(wheel)
    assert "\n" not in str(caught.value)


def test_a_wheel_replaces_one_of_the_same_version(copy):
    """This happens when Horovod is built again with other patches."""
    install = (
        "import pathlib, sys; from app.setup.horovod import install_wheel as f; f(pathlib.Path(sys.argv[1]))"
    )
    venv.create(copy / ".venv")
    (copy / ".venv" / PACKAGES / "pip").symlink_to(Path(pip.__file__).parent)  # ensurepip takes 6 s
    for build in ("first", "second"):
        wheel = copy / build / "small-1.0-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as file:
            contents = {
                "small.py": f"BUILD = {build!r}\n",
                "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
                "small-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            }
            for name, text in contents.items():
                file.writestr(name, text)
            record = [f"{name},{_digest(text.encode())},{len(text)}" for name, text in contents.items()]
            file.writestr("small-1.0.dist-info/RECORD", "\n".join([*record, "small-1.0.dist-info/RECORD,,"]))
        done = python(copy, "/usr/bin:/bin", "-c", install, str(wheel))
        assert done.returncode == 0, done.stderr
        (installed,) = copy.glob(".venv/lib/*/site-packages/small.py")
        assert build in installed.read_text()


PARALLEL = """
import os, subprocess, sys, time
from app.setup.processes import run, run_in_parallel
# Each task's process starts another one, as pip starts a build and a build starts compilers.
sleep = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])"
def wait():
    run([sys.executable, "-S", "-c", sleep])
def fail():
    run([sys.executable, "-S", "-c", "import sys; sys.stdin.read(); sys.exit('no space left')"])
print("started", flush=True)
run_in_parallel(wait, {second})
"""


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def test_a_task_that_fails_ends_the_other_and_its_error_is_reported(copy):
    started = time.monotonic()
    done = python(copy, "/usr/bin:/bin", "-c", PARALLEL.format(second="fail"))
    assert time.monotonic() - started < 30
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "no space left"
    assert "failed:" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes_of_the_tasks(copy, number):
    script = PARALLEL.format(second="wait")
    handler = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))\n"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", handler + script], cwd=copy, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 30
        while len(processes := descendants(process)) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=30)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert process.returncode != 0


LOCKED = """
import sys
from app.setup import environment, install
environment.VENV.mkdir(exist_ok=True)
with install._locked(install.LOCK):
    print("locked", flush=True)
    if sys.argv[1] == "hold":
        sys.stdin.read()
        install.STAMP.write_text(install._state())
"""


def test_a_second_set_up_waits_for_the_first_and_has_nothing_left_to_do(copy, programs):
    path = programs("g++", "make")
    with subprocess.Popen(
        [sys.executable, "-S", "-c", LOCKED, "hold"],
        cwd=copy, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as first:  # fmt: skip
        assert first.stdout.readline() == "locked\n"
        with subprocess.Popen(
            [sys.executable, "-S", *INSTALL], cwd=copy, env={"PATH": path}, stdout=subprocess.PIPE, text=True
        ) as second:
            assert second.stdout.readline().startswith("Waiting for another set-up of ")
            first.communicate()
            assert second.communicate(timeout=30)[0] == ""
            assert second.returncode == 0
