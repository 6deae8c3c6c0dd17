"""Set-up, from a copy of the few files that it needs, by a Python that sees nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = (
    "app/__init__.py",
    "app/errors.py",
    "app/install.py",
    "app/horovod_patches.py",
    "app/data/__init__.py",
    "app/data/samples.py",
    "pyproject.toml",
    "constraints.txt",
)
INSTALL = ("-m", "app.install")
STAMP = "from app import install; install.STAMP.parent.mkdir(); install.STAMP.write_text(install._state())"


@pytest.fixture
def copy(tmp_path):
    for name in NEEDED:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.fixture
def programs(tmp_path):
    """The folder that is the whole PATH, with these programs in it."""

    def make(*names: str) -> str:
        (tmp_path / "bin").mkdir()
        for name in names:
            (tmp_path / "bin" / name).symlink_to("/bin/true")
        return str(tmp_path / "bin")

    return make


def python(copy: Path, path: str, *arguments: str) -> subprocess.CompletedProcess:
    # -S: without site-packages, as before anything is installed.
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=copy, env={"PATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("there", "missing", "package"),
    [([], "g++", "g++"), (["make"], "g++", "g++"), (["g++"], "make", "make")],
)
def test_a_missing_compiler_is_one_line_that_names_the_package(copy, programs, there, missing, package):
    done = python(copy, programs(*there), *INSTALL)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: building Horovod needs '{missing}', which was not found")
    assert f"apt-get install {package};" in line
    assert not (copy / ".venv").exists(), "asked for before anything is made"


def test_nothing_is_done_when_nothing_has_changed(copy, programs):
    path = programs()  # no compiler, no pip: any step would fail
    assert python(copy, path, "-c", STAMP).returncode == 0
    done = python(copy, path, *INSTALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [file.name for file in (copy / ".venv").iterdir()] == [".raylway-installed"]


@pytest.mark.parametrize(
    "name",
    ["pyproject.toml", "constraints.txt", "app/install.py", "app/horovod_patches.py", "app/data/samples.py"],
)
def test_a_change_of_what_it_depends_on_is_noticed(copy, programs, name):
    path = programs()
    python(copy, path, "-c", STAMP)
    with (copy / name).open("a") as file:
        file.write("\n# changed\n")
    done = python(copy, path, *INSTALL)
    assert done.returncode == 1
    assert "building Horovod needs" in done.stderr


def test_a_moved_checkout_is_noticed(copy, programs):
    path = programs()
    python(copy, path, "-c", STAMP)
    moved = copy.rename(copy.with_name("moved"))
    assert python(moved, path, *INSTALL).returncode == 1


@pytest.mark.parametrize("version", [(3, 10, 4), (3, 12, 1)])
def test_another_python_is_one_line_that_says_which(copy, programs, version):
    pretend = (
        "import sys, platform, runpy\n"
        f"sys.version_info = (*{version}, 'final', 0)\n"
        f"platform.python_version = lambda: '{'.'.join(map(str, version))}'\n"
        "runpy.run_module('app.install', run_name='__main__')\n"
    )
    done = python(copy, programs("g++", "make"), "-c", pretend)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line == (
        f"error: Python 3.11 is needed, but this is {'.'.join(map(str, version))}; say make PYTHON=python3.11"
    )
    assert not (copy / ".venv").exists()


def test_a_wheel_replaces_one_of_the_same_version(copy):
    """As when Horovod is built again with other patches."""
    make = "import venv; from app import install; venv.create(install.VENV, with_pip=True)"
    install = "import pathlib, sys; from app.install import _install_wheel as f; f(pathlib.Path(sys.argv[1]))"
    assert python(copy, "/usr/bin:/bin", "-c", make).returncode == 0
    for build in ("first", "second"):
        wheel = copy / build / "small-1.0-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr("small.py", f"BUILD = {build!r}\n")
            file.writestr(
                "small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n"
            )
            file.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            file.writestr("small-1.0.dist-info/RECORD", "")
        done = python(copy, "/usr/bin:/bin", "-c", install, str(wheel))
        assert done.returncode == 0, done.stderr
        (installed,) = copy.glob(".venv/lib/*/site-packages/small.py")
        assert build in installed.read_text()
