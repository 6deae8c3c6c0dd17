"""Ends a local cluster together with the process that owns it, however that process ends.

Three mechanisms, so that it does not matter if one of them is killed:
- The guardian, a process beside the cluster. When the owner has ended, it kills every process that carries
  the cluster's mark, and removes the cluster's directory. (`python -m app.cluster.guardian DIRECTORY`,
  started by `create_directory`.)
- The parent-death signal, which HAProxy's stand-in (app.serving.gateway.haproxy) sets for HAProxy, and Ray
  for its own servers.
- The next command that starts a cluster: it reaps this user's clusters that no process owns any more.

The owner of a cluster is the process that holds the lock of its directory. The kernel releases the lock when
the last process that inherited it ends. Unlike a process id or a file, a lock cannot outlive its owner.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "RAYLWAY_CLUSTER"
"""Environment variable that names a local cluster's directory in each of its processes."""
PREFIX = "/tmp/raylway-"
"""Start of the path of every cluster's directory. In /tmp and short: the paths of sockets in the directory
must fit 107 bytes, and $TMPDIR can be long."""
LOCK_NAME = "lock"
"""Name of the lock file in a cluster's directory. A directory without one is not a cluster's, or not
ready."""


@dataclass(frozen=True)
class OwnedDirectory:
    """A local cluster's directory, locked by this process."""

    path: Path
    """The directory. Only this user can enter it."""
    lock: int
    """File descriptor of the lock. A process that inherits it owns the cluster too."""
    _pipe: int
    """Write end of the guardian's standard input. A byte means that the owner has changed; the end of the
    stream means that this process has ended."""
    _guardian: int
    """Process id of the guardian."""

    def hand_over(self) -> None:
        """Make the process that inherited `lock` the only owner: the cluster then ends with that process."""
        with contextlib.suppress(BrokenPipeError):  # the guardian was killed
            os.write(self._pipe, b".")
        os.close(self._pipe)
        os.close(self.lock)

    def destroy(self) -> None:
        """Kill the cluster's remaining processes, and remove its directory."""
        reap(self.path)
        os.close(self._pipe)
        os.close(self.lock)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._guardian, 0)


def create_directory() -> OwnedDirectory:
    """Create and lock the directory of a new cluster, and start its guardian. Reaps orphans first."""
    reap_orphans()
    directory, lock = _create_locked()
    read_end, write_end = os.pipe()
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    # Not subprocess: a Popen object warns when its process outlives it. A session of its own keeps Ctrl-C in
    # the terminal away from the guardian.
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "app.cluster.guardian", str(directory)],
        {**os.environ, MARK: "", "PYTHONPATH": os.pathsep.join(filter(None, path))},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, read_end, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    os.close(read_end)
    return OwnedDirectory(directory, lock, write_end, pid)


def reap(directory: Path) -> None:
    """Kill the processes that carry the mark of the cluster in `directory`, and remove the directory.

    HAProxy and Ray's agents can survive a head that was killed, and keep their ports.
    """
    # Repeat until no process is left: one that is about to be killed may start another.
    while processes := _marked_processes(directory):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(processes, timeout=5)
        if alive:
            break  # blocked in the kernel
    shutil.rmtree(directory, ignore_errors=True)


def reap_orphans() -> None:
    """Reap this user's clusters without an owner: both owner and guardian were killed."""
    for directory in Path(PREFIX).parent.glob(f"{Path(PREFIX).name}*"):
        with contextlib.suppress(OSError):  # already removed, or without a lock file
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            with (directory / LOCK_NAME).open("r+") as file:
                # Raises BlockingIOError, an OSError, if the cluster has an owner.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                reap(directory)


def _create_locked() -> tuple[Path, int]:
    """Create a directory and lock it; returns the descriptor of its lock file too."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=Path(PREFIX).name, dir=Path(PREFIX).parent))
        lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / LOCK_NAME).exists():
            return directory, lock
        os.close(lock)  # another process reaped the directory before it was locked


def _marked_processes(directory: Path) -> list[psutil.Process]:
    """Processes with the mark of the cluster in `directory`, except this one."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_marked = process.environ().get(MARK) == str(directory)
            if is_marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def main() -> None:
    """Run the guardian: wait until the cluster has no owner, then reap it."""
    os.chdir("/")
    directory = Path(sys.argv[1])
    if sys.stdin.buffer.read(1):
        # Handed over: the lock becomes free when its new owner ends.
        with contextlib.suppress(FileNotFoundError), (directory / LOCK_NAME).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    reap(directory)


if __name__ == "__main__":
    main()
