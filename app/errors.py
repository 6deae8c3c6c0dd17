"""The exceptions that are meant for people. Everything else that escapes is a defect of ours."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

RAISED = r"^[ \t]+.*\n([\w.]+(?:\(\w+\))?: .*(?:\n(?!Traceback|ray::|During|The above|\s*$).*)*)"
"""A message after the last frame of a traceback: its first line and those that go on."""


class UserError(Exception):
    """Something the user can put right: says what must hold, what came, and what to do.

    The command line prints it without a traceback and exits with code 2; over HTTP it is a 4xx.
    """


class Interrupted(Exception):
    """Somebody asked for the work to stop, and what was done is kept; the message says what."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def root(error: BaseException) -> BaseException:
    """The error that was raised first, of one that libraries have wrapped: Ray keeps it in `cause`."""
    while True:
        inner = getattr(error, "cause", None)
        if not isinstance(inner, BaseException):
            # Ray Data raises an error of ours from one of its own, which says nothing.
            inner = None if isinstance(error, UserError) else error.__cause__
        if inner is None or inner is error:
            return error
        error = inner


def described(error: BaseException) -> str:
    """The type and the first line of the error that was raised first; advice of libraries follows it."""
    first = root(error)
    lines = str(first).strip().splitlines() or ["no message"]
    return f"{type(first).__name__}: {lines[0]}"


def described_in(text: str) -> str:
    """The message of the last exception whose traceback stands in a text, without its type if it is ours."""
    # Its last frame is indented; what follows the message is an empty line or another traceback.
    raised = re.findall(RAISED, text, re.MULTILINE)
    if not raised:
        return (text.strip().splitlines() or ["no message"])[-1]
    kind, _, message = raised[-1].partition(": ")
    return message if kind.startswith("app.errors.") or "(UserError)" in kind else raised[-1]


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a UserError that libraries have wrapped as itself."""
    try:
        yield
    except Exception as error:
        first = root(error)
        if isinstance(first, UserError) and first is not error:
            raise first from None
        raise
