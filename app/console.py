"""What a person sees: one line for each stage. Everything else goes to a log file that is named."""

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
    """Writes for people, to the terminal that there was before the chatter was sent away."""

    def __init__(self, stream: IO[str] | None = None):
        # Wide enough for a reason in one line where the output is no terminal (a job's log, a pipe).
        stream = stream or sys.stdout
        width = None if stream.isatty() else 160
        self._rich = Rich(file=stream, width=width, highlight=False, soft_wrap=True)

    def say(self, text: object = "", style: str | None = None) -> None:
        self._rich.print(text, style=style, markup=False)

    def wait(self, reason: str | None) -> None:
        """Say what is waited for, if anything is."""
        if reason:
            self.say(f"  {reason}", style="yellow")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Time a stage; yields a function that is told in a few words what was done, before it ends."""
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
        """A place that changes, for the time of the block: yields what shows something there.

        None where the output is no terminal.
        """
        if not self._rich.is_terminal:
            yield None
            return
        with Live(console=self._rich, refresh_per_second=4, vertical_overflow="crop") as place:
            yield place.update

    def epoch(self, metrics: dict[str, float], num_epochs: int, score: str) -> None:
        """A line for each epoch, as it ends; `score` is the validation metric to show."""
        self._rich.print(
            f"    epoch {metrics['epoch'] + 1:.0f}/{num_epochs}  train loss {metrics['train_loss']:.4f}"
            f"  validation {score} {metrics[f'validation_{score}']:.4f}  {metrics['rows_per_s']:,.0f} rows/s",
            style="dim",
        )


def short(path: Path) -> Path:
    """A path as a person would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextlib.contextmanager
def chatter_to_log(command: str) -> Iterator[tuple[Console, Path]]:
    """Send all that this process and its children print to a log file; yields a console and the file.

    At the level of file descriptors, since Ray's and Horovod's C++ parts do not ask Python.
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
