import subprocess
import sys
import threading
import time

import pytest

from app.state import locks
from app.state.locks import Busy, exclusive


def test_a_lock_excludes_other_holders_and_the_error_names_its_holder():
    with exclusive("income"):
        message = r"the lock income must be free, but process \d+ .* holds it"
        with pytest.raises(Busy, match=message), exclusive("income", wait=False):
            pass
        with exclusive("flights", wait=False):
            pass
    with exclusive("income", wait=False):
        pass


def test_a_waiter_gets_one_message_that_names_the_holder_and_then_the_lock():
    messages, order = [], []

    def wait():
        with exclusive("income", messages.append):
            order.append("second")

    with exclusive("income"):
        thread = threading.Thread(target=wait)
        thread.start()
        while not messages:
            time.sleep(0.01)
        time.sleep(2 * locks.POLL_S)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert len(messages) == 1
    assert messages[0].startswith("waiting for process ")
    assert messages[0].endswith("which holds the lock income")


def test_the_lock_of_a_killed_holder_is_released():
    script = """if True:
        import time
        from app.state.locks import exclusive
        with exclusive("x"):
            print("locked", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(Busy), exclusive("x", wait=False):
            pass
        holder.kill()
    with exclusive("x", wait=False):
        pass
