"""The exceptions that are meant for people. Everything else that escapes is a defect of ours."""


class UserError(Exception):
    """Something the user can put right: says what must hold, what came, and what to do.

    The command line prints it without a traceback and exits with code 2; over HTTP it is a 4xx.
    """


class Interrupted(Exception):
    """Somebody asked for the work to stop, and what was done is kept; the message says what."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
