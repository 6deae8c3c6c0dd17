"""What all commands share: arguments, the console with its log file, signals and exit codes."""

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from app.cli import failures
from app.console import Console, output_to_log, short_path
from app.errors import Interrupted, UserError, describe

EXIT_FAILED, EXIT_USER, EXIT_GATE = 1, 2, 3
"""Exit codes: the command failed; the user's input is wrong; the gate rejected the candidate."""

File = Annotated[
    Path, typer.Argument(help="The project file, such as configs/income.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, such as training.epochs=3. May be repeated."
    ),
]
ModelName = Annotated[str, typer.Argument(help="The registered model, such as income.")]
EndpointName = Annotated[str, typer.Argument(help="The endpoint, such as income.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@contextmanager
def running(command: str, hint: str = "", *, quiet: bool = False) -> Iterator[Console]:
    """Run the body of a command: yields its console, and sends all other output to a log file.

    The console names the log file first, unless `quiet`. `hint` is printed after "stopped" when the user
    interrupts the command. SIGTERM ends the command as Ctrl-C does. Raises typer.Exit with EXIT_FAILED if the
    body fails; the error then takes one line on the console, and its traceback is in the log.
    """
    received = signal.SIGINT

    def interrupt(number: int, _: object) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with output_to_log(command) as (console, log):
        if not quiet:
            console.print(f"log: {short_path(log)}", style="dim")
        try:
            yield console
        except (UserError, typer.Exit):
            raise
        except Interrupted as stop:
            console.print(f"stopped: {stop}; {hint}")
            raise typer.Exit(128 + stop.signal_number) from None
        except KeyboardInterrupt:
            console.print(f"stopped{f'; {hint}' if hint else ''}")
            raise typer.Exit(128 + received) from None
        except Exception as error:
            traceback.print_exc()
            if message := failures.explain(error):
                raise UserError(message) from None
            console.print(f"failed: {describe(error)}", style="red")
            console.print(f"the log has the traceback: {short_path(log)}")
            raise typer.Exit(EXIT_FAILED) from None


def require_cluster() -> None:
    """Raise UserError unless a cluster is up that continues to run after the command."""
    from app.cluster.session import joins_lasting_cluster

    if not joins_lasting_cluster():
        raise UserError("no cluster is up, so nothing is served; see `raylway up` and `raylway serve`")


def require_passed(passed: bool) -> None:
    """Raise typer.Exit with EXIT_GATE if the gate rejected the candidate."""
    if not passed:
        raise typer.Exit(EXIT_GATE)


def wait_for_signal() -> None:
    """Block until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
