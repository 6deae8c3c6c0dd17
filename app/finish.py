"""How a process that used Ray ends.

Ray's native threads outlive `ray.shutdown()`. One that wakes while the process takes its libraries down runs
into what is there no longer, and work that was done ends as a segmentation fault. Ray's own workers leave
without taking anything down, and so do we.
"""

import atexit
import contextlib
import os
import sys


class Finish:
    """Make one before Ray is imported, and set `status`: the process then ends with it, after the exit
    handlers of Python that were registered later and before those of the libraries."""

    def __init__(self) -> None:
        self.status: int | None = None
        """The exit status; while it is None the process ends as any other."""
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.status is None:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads, or it is closed
                stream.flush()
        os._exit(self.status)
