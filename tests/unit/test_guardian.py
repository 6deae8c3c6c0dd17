import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.cluster import guardian

HOLDER = """
import os, subprocess, sys
from app.cluster import guardian

guardian.PREFIX = sys.argv[1]
held = guardian.hold()
command = [sys.executable, "-c", "import signal; signal.pause()"]
environment = {**os.environ, guardian.MARK: str(held.directory)}
fds = [held.lock] if sys.argv[2] == "hand over" else []
child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=fds)
if sys.argv[2] == "hand over":
    held.hand_over()
print(held.directory, held._guardian, child.pid, flush=True)
sys.stdin.read()
"""
"""Holds a cluster of one process until it is killed."""


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    monkeypatch.setattr(guardian, "PREFIX", f"{tmp_path}/raylway-")
    return guardian.PREFIX


@pytest.fixture
def hold(prefix):
    """Starts a holder; gives its process, the cluster's directory, the guardian and the cluster's process."""
    started = []

    def start(how: str = ""):
        command = [sys.executable, "-c", HOLDER, prefix, how]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        directory, *pids = holder.stdout.readline().split()
        processes = [psutil.Process(int(pid)) for pid in pids]
        started.extend([holder, *processes])
        return holder, Path(directory), *processes

    yield start
    for process in started:
        if not isinstance(process, psutil.Process) or process.is_running():
            process.kill()
    for process in started:
        if isinstance(process, subprocess.Popen):
            process.communicate()


def wait_until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_directory_is_held_until_the_end(prefix):
    held = guardian.hold()
    assert held.directory.stat().st_mode & 0o777 == 0o700
    guardian.reap_dead()
    assert held.directory.exists(), "it is held"
    held.end()
    assert not held.directory.exists()
    assert not psutil.pid_exists(held._guardian)


def test_a_cluster_ends_with_the_killed_process_that_holds_it(hold):
    holder, directory, watcher, member = hold()
    assert directory.exists()
    holder.kill()
    wait_until(lambda: not directory.exists())
    wait_until(lambda: gone(member) and gone(watcher))


def test_a_cluster_that_was_handed_over_ends_with_who_has_it_now(hold):
    holder, directory, watcher, member = hold("hand over")
    holder.kill()
    holder.wait()
    guardian.reap_dead()
    assert directory.exists()
    assert not gone(member)
    member.kill()
    wait_until(lambda: not directory.exists())
    wait_until(lambda: gone(watcher))


def test_what_a_killed_guardian_leaves_is_reaped_by_the_next_command(hold, prefix):
    other, kept, _, _ = hold()
    holder, directory, watcher, member = hold()
    older = Path(f"{prefix}older")  # without a lock: of an older version, or just being made
    older.mkdir()
    watcher.kill()
    holder.kill()
    holder.wait()
    assert directory.exists()
    guardian.hold().end()
    assert gone(member)
    assert not directory.exists()
    assert kept.exists()
    assert older.exists()
    assert other.poll() is None


def test_reap_kills_what_bears_the_mark_and_nothing_else(tmp_path):
    def start(mark: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", "input()"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {guardian.MARK: str(mark)})

    orphan, bystander = start(tmp_path / "ours"), start(tmp_path / "others")
    guardian.reap(tmp_path / "ours")
    assert gone(psutil.Process(orphan.pid)) if psutil.pid_exists(orphan.pid) else True
    assert bystander.poll() is None
    bystander.kill()
    for process in (orphan, bystander):
        process.communicate()
