"""Ending a process that used Ray without running the destructors of its libraries.

Native threads of Ray outlive `ray.shutdown()`; one per session keeps exporting metrics. If it wakes while the
process unloads its libraries, the process ends with a segmentation fault although its work is done. Ray's own
workers exit without unloading, and so does this process.
"""

import atexit
import os
import sys


class Finish:
    """An exit handler that ends the process with `status`, before the exit handlers of libraries.

    Create it before Ray is imported: Python's exit handlers that are registered later run first.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        """Exit code. While it is None, the process ends as Python would end it."""
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.status is None:
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # output is lost: let Python report it, and end with its own exit code
        os._exit(self.status)
