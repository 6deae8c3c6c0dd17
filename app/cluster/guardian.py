"""A local cluster ends with the process that holds it, whatever ends that process.

Three things see to it, so that one that is killed does not matter:
- The guardian, a process beside the cluster. When the holder has ended it kills what bears the cluster's mark
  and removes the cluster's directory. (`python -m app.cluster.guardian DIRECTORY`; started by `hold`.)
- The parent-death signal: HAProxy sets it (app.serving.front), and so does Ray for its own servers.
- The next command that holds a cluster: it reaps the clusters of this user that nobody holds any more.

A cluster is held by whoever has the lock of its directory. The kernel releases the lock when the last process
that has it ends, so neither a process id nor a file can be taken for somebody who is gone.
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
"""Names a local cluster's directory in the environment of each of its processes."""
PREFIX = "/tmp/raylway-"
"""Directly in /tmp and short: the paths of the sockets in it must fit 107 bytes, and $TMPDIR can be long."""
LOCK = "lock"
"""File in a cluster's directory. A directory without one is no cluster's, or is still being made."""


@dataclass(frozen=True)
class Held:
    """A local cluster's directory, held by this process."""

    directory: Path
    """Only this user can enter it."""
    lock: int
    """File descriptor. A process that inherits it holds the cluster too."""
    _pipe: int
    """The guardian reads it: a byte when the holder has changed, its end when this process has ended."""
    _guardian: int

    def hand_over(self) -> None:
        """From now on the cluster ends with the process that inherited `lock`, not with this one."""
        with contextlib.suppress(BrokenPipeError):  # somebody killed the guardian
            os.write(self._pipe, b".")
        os.close(self._pipe)
        os.close(self.lock)

    def end(self) -> None:
        """Kill what is left of the cluster, and remove its directory."""
        reap(self.directory)
        os.close(self._pipe)
        os.close(self.lock)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._guardian, 0)


def hold() -> Held:
    """Make the directory of a new cluster, and start its guardian. Reaps dead clusters first."""
    reap_dead()
    directory, lock = _locked_directory()
    read_end, write_end = os.pipe()
    path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    # Not subprocess: its objects expect to see the end of what they started. In a session of its own, so that
    # Ctrl-C in the terminal does not reach it.
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
    return Held(directory, lock, write_end, pid)


def reap(directory: Path) -> None:
    """Kill what is left of the cluster in `directory`, by its mark, and remove the directory.

    HAProxy and Ray's agents can outlive a head that was killed, and go on holding their ports.
    """
    # Again until a look finds none: a process that is about to be killed may start another.
    while marked := _marked(directory):
        for process in marked:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(marked, timeout=5)
        if alive:
            break  # in the kernel's hands
    shutil.rmtree(directory, ignore_errors=True)


def reap_dead() -> None:
    """Reap this user's clusters that nobody holds, such as after a kill of both holder and guardian."""
    for directory in Path(PREFIX).parent.glob(f"{Path(PREFIX).name}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or without a lock
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            with (directory / LOCK).open("r+") as file:
                # BlockingIOError, an OSError: somebody holds it.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                reap(directory)


def _locked_directory() -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=Path(PREFIX).name, dir=Path(PREFIX).parent))
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / LOCK).exists():
            return directory, lock
        os.close(lock)  # somebody reaped it before it was locked


def _marked(directory: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get(MARK) == str(directory)
            if marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def main() -> None:
    """The guardian's process."""
    os.chdir("/")
    directory = Path(sys.argv[1])
    if sys.stdin.buffer.read(1):
        # Handed over: wait for the holder that has the lock now.
        with contextlib.suppress(FileNotFoundError), (directory / LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    reap(directory)


if __name__ == "__main__":
    main()
