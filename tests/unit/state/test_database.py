import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy

from app.state import database
from app.state.audit import Audit
from app.state.database import Busy, alone


def test_a_lock_keeps_others_out_and_says_who_holds_it():
    with alone("income"):
        with (
            pytest.raises(Busy, match=r"process \d+ .* is changing the same \(income\)"),
            alone("income", wait=False),
        ):
            pass
        with alone("flights", wait=False):
            pass
    with alone("income", wait=False):
        pass


def test_who_waits_is_told_for_whom_once_and_gets_the_lock_next():
    told, order = [], []

    def wait():
        with alone("income", told.append):
            order.append("second")

    with alone("income"):
        thread = threading.Thread(target=wait)
        thread.start()
        while not told:
            time.sleep(0.01)
        time.sleep(2 * database.POLL_S)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert len(told) == 1
    assert told[0].startswith("waiting for process ")


def test_a_holder_that_is_killed_frees_the_lock():
    hold = """if True:
        import time
        from app.state.database import alone
        with alone("x"):
            print("held", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Busy), alone("x", wait=False):
            pass
        holder.kill()
    with alone("x", wait=False):
        pass


def test_all_who_open_a_new_database_at_once_find_it():
    opened = []

    def tables():
        with database.connect().connect() as connection:
            return sqlalchemy.inspect(connection).get_table_names()

    threads = [threading.Thread(target=lambda: opened.append(tables())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 8


def test_what_one_process_writes_is_there_though_another_opens_and_closes_the_file():
    """SQLite's locks are the process's: a file that is opened and closed beside them would drop them, and
    the next process that leaves would take the log of what is not in the database yet with it."""
    look = "from app.state.audit import Audit; print(len(Audit().entries()))"

    def seen() -> int:
        return int(subprocess.run([sys.executable, "-c", look], check=True, capture_output=True).stdout)

    with Audit() as first, Audit() as second:
        for number in range(1, 4):
            first.add("sign", "income", {})
            assert len(second.entries()) == number
            with Audit() as third:
                third.entries()
            assert seen() == number
