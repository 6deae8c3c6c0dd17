"""The table of commands, and the entry point: `raylway COMMAND`, or `python -m app COMMAND` in a Ray Job.

Commands import Ray, PyTorch and MLflow inside their functions, so that `--help` and `check` answer at once.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperGroup

from app.cli import failures, local, models, options, serve, train
from app.cli.command import EXIT_USER
from app.cli.finish import Finish
from app.errors import UserError

Command = Callable[..., None]
RUN = "run"
"""The command of a group that runs if none is named: `raylway sweep FILE` is `raylway sweep run FILE`."""

COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "keys": train.keys,
    "check": train.check,
    "preflight": train.preflight,
    "train": train.train,
    "sweep": {RUN: train.sweep, "report": train.sweep_report},
    "versions": models.versions,
    "promote": models.promote,
    "compress": models.compress,
    "sign": models.sign,
    "predict": models.predict,
    "serve": serve.serve,
    "traffic": serve.traffic,
    "status": serve.status,
    "undeploy": serve.undeploy,
    "token": serve.token,
    "audit": models.audit,
    "up": local.up,
    "down": local.down,
    "demo": local.demo,
}
SETTINGS: Mapping[str, dict[str, Any]] = {
    # Variants have any name: --champion 90 --blue 10.
    "traffic": {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}},
}


class _Group(TyperGroup):
    """A group of commands, of which RUN is the default."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


def command_line() -> typer.Typer:
    """The parser of COMMANDS. Called with a list of words, it runs a command."""
    parser = typer.Typer(
        help="`raylway COMMAND`, or `python -m app COMMAND` in a Ray Job.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, command in COMMANDS.items():
        if isinstance(command, Mapping):
            summary = str(command[RUN].__doc__).partition("\n")[0]
            group = typer.Typer(cls=_Group, no_args_is_help=True)
            for subname, subcommand in command.items():
                group.command(subname)(subcommand)
            parser.add_typer(group, name=name, help=summary)
        else:
            parser.command(name, **SETTINGS.get(name, {}))(command)
    return parser


def main() -> None:
    """Parse the command line and run the command. A user's mistake takes one line, and exit code 2."""
    finish = Finish()
    try:
        finish.status = command_line()(standalone_mode=False) or 0
    except SystemExit as exit_:  # Typer raises it if the reader of the output has closed the pipe
        finish.status = exit_.code if isinstance(exit_.code, int) else None
        raise
    except typer.TyperException as error:
        finish.status = _refuse(options.describe(error))
    except UserError as error:
        finish.status = _refuse(str(error))
    except Exception as error:  # outside of `command.running`
        message = failures.explain(error)
        if message is None:
            raise
        finish.status = _refuse(message)
    sys.exit(finish.status)


def _refuse(message: str) -> int:
    """Print the message, unless Typer has shown the help instead."""
    if message:
        print(f"error: {message}", file=sys.stderr)
    return EXIT_USER
