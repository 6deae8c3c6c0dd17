import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# What a library registers runs after all that Python does: this one brings the process down.
BROKEN = """
import atexit, ctypes, sys
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
"""
FINISHED = """
from app.cli.finish import Finish
finish = Finish()
atexit.register(print, "a handler of Python's")
print("done")
"""


def run(code: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BROKEN + code]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, timeout=120, cwd=ROOT, **options)


def ended(code: str) -> tuple[int, str]:
    done = run(FINISHED + code)
    return done.returncode, done.stdout


def test_without_a_status_the_process_ends_as_any_other():
    status, said = ended("")
    assert (status, said) == (-signal.SIGABRT, "done\na handler of Python's\n")


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_is_not_lost_to_what_libraries_do_at_the_end(status):
    assert ended(f"finish.status = {status}") == (status, "done\na handler of Python's\n")


def test_what_could_not_be_said_is_no_success():
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        assert run(FINISHED + "finish.status = 0", stdout=full).returncode != 0


@pytest.mark.parametrize(("file", "status"), [("smoke", 0), ("none", 2)])
def test_commands_end_so(file, status):
    arguments = ["raylway", "check", f"configs/{file}.yaml"]
    assert run(f"sys.argv = {arguments}\nfrom app.cli.main import main\nmain()").returncode == status


@pytest.mark.parametrize(("selected", "status"), [("salt", 0), ("no_such_test", 5)])
def test_tests_end_so(selected, status):
    arguments = ["tests/unit/serving/traffic/test_routing.py", "-q", "-p", "no:cacheprovider", "-k", selected]
    assert run(f"import pytest\nsys.exit(pytest.main({arguments}))").returncode == status
