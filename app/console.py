"""Output for users: one line per stage. All other output goes to a log file."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from rich.console import Console as Rich
from rich.console import RenderableType
from rich.live import Live

from app.state.home import home, private_file


class Console:
    """Writes to the terminal, also while `output_to_log` redirects standard output."""

    def __init__(self, stream: IO[str] | None = None):
        # Outside a terminal (a job's log, a pipe), lines are wide enough for a gate's reason.
        stream = stream or sys.stdout
        width = None if stream.isatty() else 160
        self._rich = Rich(file=stream, width=width, highlight=False, soft_wrap=True)

    def print(self, text: object = "", style: str | None = None) -> None:
        """Print a text, without markup, or a renderable of Rich."""
        self._rich.print(text, style=style, markup=False)

    def print_wait(self, reason: str | None) -> None:
        """Print what the command waits for; prints nothing if `reason` is None."""
        if reason:
            self.print(f"  {reason}", style="yellow")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Print the duration and the summary of a stage, which is the block.

        Yields a function that sets the summary; the block must call it. A block that raises prints nothing.
        """
        started = time.perf_counter()
        summary: list[str] = []

        def done(text: str, *, cached: bool = False) -> None:
            summary[:] = [f"{text}{' (done before)' if cached else ''}"]

        yield done
        seconds = time.perf_counter() - started
        self._rich.print(f"  [bold]{name:<9}[/bold] {seconds:6.1f} s  ", end="")
        self._rich.print("".join(summary), markup=False)

    @contextlib.contextmanager
    def live(self) -> Iterator[Callable[[RenderableType], None] | None]:
        """A display that is redrawn in place during the block: yields the function that draws it.

        Yields None if the output is no terminal.
        """
        if not self._rich.is_terminal:
            yield None
            return
        with Live(console=self._rich, refresh_per_second=4, vertical_overflow="crop") as display:
            yield display.update

    def epoch(self, metrics: dict[str, float], num_epochs: int, score: str) -> None:
        """Print an epoch's line; `score` is the name of the validation metric to show."""
        self._rich.print(
            f"    epoch {metrics['epoch'] + 1:.0f}/{num_epochs}  train loss {metrics['train_loss']:.4f}"
            f"  validation {score} {metrics[f'validation_{score}']:.4f}  {metrics['rows_per_s']:,.0f} rows/s",
            style="dim",
        )


def short_path(path: Path) -> Path:
    """A path relative to the working directory, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextlib.contextmanager
def output_to_log(command: str) -> Iterator[tuple[Console, Path]]:
    """Redirect the output of this process and its children to a log file; yields a console and the file.

    Redirects file descriptors, since the C++ parts of Ray and Horovod do not write through Python.
    """
    log = home() / "logs" / f"{command}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    private_file(log)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal, errors = os.dup(1), os.dup(2)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with os.fdopen(os.dup(terminal), "w", buffering=1) as stream:
            yield Console(stream), log
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminal, 1)
        os.dup2(errors, 2)
        os.close(terminal)
        os.close(errors)
