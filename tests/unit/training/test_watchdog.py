"""The watchdog kills its own process, so each test starts a real one."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

TIMEOUT_S = 1.0
START = f"""
import sys, threading, time
from app.training.watchdog import Watchdog
dog = Watchdog({TIMEOUT_S})
dog.beat()
print("ready", flush=True)
"""
BEATS = "for _ in range(20): time.sleep(0.1); dog.beat()\n"
HANGS = "threading.Event().wait()\n"


@contextmanager
def process(script: str):
    """A process with a watchdog that runs a script; killed at the end."""
    command = [sys.executable, "-c", START + script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout.readline() == "ready\n"
            yield started
        finally:
            started.kill()


def test_a_process_that_hangs_is_killed_in_time_and_prints_its_threads():
    with process("dog.beat()\ndef stuck():\n    threading.Event().wait()\nstuck()") as hung:
        started = time.monotonic()
        assert hung.wait(10) == -signal.SIGKILL
        assert TIMEOUT_S <= time.monotonic() - started + 0.05 < 3 * TIMEOUT_S
        output = hung.stderr.read()
    assert "no step for 1 s" in output
    assert "in stuck" in output


def test_a_process_that_hangs_after_some_steps_is_killed_too():
    with process("for _ in range(5): time.sleep(0.1); dog.beat()\n" + HANGS) as hung:
        assert hung.wait(10) == -signal.SIGKILL


def test_a_process_with_a_closed_stderr_is_killed_too():
    with process("sys.stderr.close()\n" + HANGS) as hung:
        assert hung.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("end", ["dog.stop()\ntime.sleep(1.5)", ""], ids=["stopped", "ended"])
def test_a_process_that_makes_steps_is_not_killed(end):
    with process(BEATS + end) as busy:
        assert busy.wait(15) == 0
        assert busy.stderr.read() == ""


def test_a_paused_process_does_not_count_as_hanging():
    with process(BEATS) as paused:
        time.sleep(0.5)
        paused.send_signal(signal.SIGSTOP)
        time.sleep(3 * TIMEOUT_S)
        paused.send_signal(signal.SIGCONT)
        assert paused.wait(15) == 0
