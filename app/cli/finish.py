"""How a process that used Ray ends.

Ray's native threads outlive `ray.shutdown()`; one of each session goes on exporting metrics. If it wakes
while the process takes its libraries down, it runs into what is there no longer, and work that was done ends
as a segmentation fault. Ray's own workers leave without taking anything down, and so do we.
"""

import atexit
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
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # what was to be said is lost: Python's own end says so, and with another status
        os._exit(self.status)
