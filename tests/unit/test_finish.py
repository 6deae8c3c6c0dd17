import signal
import subprocess
import sys

import pytest

# What a library registers runs after all that Python does: this one brings the process down.
BROKEN = """
import atexit, ctypes
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
from app.finish import Finish
finish = Finish()
atexit.register(print, "a handler of Python's")
print("done")
"""


def ended(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", BROKEN + code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_without_a_status_the_process_ends_as_any_other():
    status, said = ended("")
    assert (status, said) == (-signal.SIGABRT, "done\na handler of Python's\n")


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_is_not_lost_to_what_libraries_do_at_the_end(status):
    assert ended(f"finish.status = {status}") == (status, "done\na handler of Python's\n")
