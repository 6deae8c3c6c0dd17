import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.cluster import guardian

OWNER = """
import os, subprocess, sys
from app.cluster import guardian

guardian.PREFIX = sys.argv[1]
owned = guardian.create_directory()
command = [sys.executable, "-c", "import signal; signal.pause()"]
environment = {**os.environ, guardian.MARK: str(owned.path)}
fds = [owned.lock] if sys.argv[2] == "hand over" else []
child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=fds)
if sys.argv[2] == "hand over":
    owned.hand_over()
print(owned.path, owned._guardian, child.pid, flush=True)
sys.stdin.read()
"""
"""Program that owns a cluster of one process until it is killed."""


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    monkeypatch.setattr(guardian, "PREFIX", f"{tmp_path}/raylway-")
    return guardian.PREFIX


@pytest.fixture
def own(prefix):
    """Start an owner. Returns its process, the directory of the cluster, the guardian and a member."""
    started = []

    def start(mode: str = ""):
        command = [sys.executable, "-c", OWNER, prefix, mode]
        owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        directory, *pids = owner.stdout.readline().split()
        processes = [psutil.Process(int(pid)) for pid in pids]
        started.extend([owner, *processes])
        return owner, Path(directory), *processes

    yield start
    for process in started:
        if not isinstance(process, psutil.Process) or process.is_running():
            process.kill()
    for process in started:
        if isinstance(process, subprocess.Popen):
            process.communicate()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not true within 60 s"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_owned_directory_is_not_reaped(prefix):
    owned = guardian.create_directory()
    assert owned.path.stat().st_mode & 0o777 == 0o700
    guardian.reap_orphans()
    assert owned.path.exists()
    owned.destroy()
    assert not owned.path.exists()
    assert not psutil.pid_exists(owned._guardian)


def test_a_cluster_ends_with_its_killed_owner(own):
    owner, directory, watcher, member = own()
    assert directory.exists()
    owner.kill()
    wait_until(lambda: not directory.exists())
    wait_until(lambda: gone(member) and gone(watcher))


def test_a_cluster_that_was_handed_over_ends_with_its_new_owner(own):
    owner, directory, watcher, member = own("hand over")
    owner.kill()
    owner.wait()
    guardian.reap_orphans()
    assert directory.exists()
    assert not gone(member)
    member.kill()
    wait_until(lambda: not directory.exists())
    wait_until(lambda: gone(watcher))


def test_the_next_command_reaps_the_cluster_of_a_killed_guardian(own, prefix):
    other, kept, _, _ = own()
    owner, directory, watcher, member = own()
    older = Path(f"{prefix}older")  # without a lock: of an older version, or not ready yet
    older.mkdir()
    watcher.kill()
    owner.kill()
    owner.wait()
    assert directory.exists()
    guardian.create_directory().destroy()
    assert gone(member)
    assert not directory.exists()
    assert kept.exists()
    assert older.exists()
    assert other.poll() is None


def test_reap_kills_only_processes_with_the_mark(tmp_path):
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
