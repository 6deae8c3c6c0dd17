"""Exceptions whose messages are for users, and the messages of wrapped exceptions.

Any other exception that reaches the user is a defect.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

LAST_MESSAGE = r"^[ \t]+.*\n([\w.]+(?:\(\w+\))?: .*(?:\n(?!Traceback|ray::|During|The above|\s*$).*)*)"
"""The message after the last frame of a traceback, with its continuation lines."""


class UserError(Exception):
    """An error that the user can correct. Its message says what must hold, what came, and what to do.

    The command line prints it without a traceback and exits with code 2; over HTTP it is a 4xx.
    """


class Interrupted(Exception):
    """The work was stopped by a signal. The message says what was kept."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def first_cause(error: BaseException) -> BaseException:
    """The error that was raised first, if libraries have wrapped it: Ray keeps it in `cause`."""
    while True:
        inner = getattr(error, "cause", None)
        if not isinstance(inner, BaseException):
            # Ray Data raises a UserError from an error of its own, which is not its cause.
            inner = None if isinstance(error, UserError) else error.__cause__
        if inner is None or inner is error:
            return error
        error = inner


def describe(error: BaseException) -> str:
    """Type and first line of the error that was raised first. Further lines are advice from its library."""
    first = first_cause(error)
    lines = str(first).strip().splitlines() or ["no message"]
    return f"{type(first).__name__}: {lines[0]}"


def describe_traceback(text: str) -> str:
    """The message of the last traceback in a text, without its type for a UserError."""
    # The last frame is indented; an empty line or another traceback follows the message.
    messages = re.findall(LAST_MESSAGE, text, re.MULTILINE)
    if not messages:
        return (text.strip().splitlines() or ["no message"])[-1]
    kind, _, message = messages[-1].partition(": ")
    return message if kind.startswith("app.errors.") or "(UserError)" in kind else messages[-1]


@contextmanager
def unwrap_user_errors() -> Iterator[None]:
    """Raise a UserError itself where libraries have wrapped it."""
    try:
        yield
    except Exception as error:
        first = first_cause(error)
        if isinstance(first, UserError) and first is not error:
            raise first from None
        raise
