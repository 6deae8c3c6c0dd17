import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# An exit handler of a C library runs after those of Python. This one aborts the process.
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


def run_finished(code: str) -> tuple[int, str]:
    """Exit code and output of a process that creates Finish and then runs the code."""
    process = run(FINISHED + code)
    return process.returncode, process.stdout


def test_without_a_status_the_exit_handlers_of_libraries_run():
    assert run_finished("") == (-signal.SIGABRT, "done\na handler of Python's\n")


@pytest.mark.parametrize("status", [0, 3])
def test_with_a_status_the_process_exits_before_the_handlers_of_libraries(status):
    assert run_finished(f"finish.status = {status}") == (status, "done\na handler of Python's\n")


def test_output_that_cannot_be_written_is_a_failure():
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        assert run(FINISHED + "finish.status = 0", stdout=full).returncode != 0


@pytest.mark.parametrize(("file", "status"), [("smoke", 0), ("none", 2)])
def test_commands_exit_with_their_status(file, status):
    arguments = ["raylway", "check", f"configs/{file}.yaml"]
    assert run(f"sys.argv = {arguments}\nfrom app.cli.main import main\nmain()").returncode == status


@pytest.mark.parametrize(("selected", "status"), [("salt", 0), ("no_such_test", 5)])
def test_a_test_run_exits_with_its_status(selected, status):
    arguments = ["tests/unit/serving/traffic/test_routing.py", "-q", "-p", "no:cacheprovider", "-k", selected]
    assert run(f"import pytest\nsys.exit(pytest.main({arguments}))").returncode == status
