"""The exceptions that are meant for people. Everything else that escapes is a defect of ours."""


class UserError(Exception):
    """Something the user can put right: says what must hold, what came, and what to do.

    The command line prints it without a traceback and exits with code 2; over HTTP it is a 4xx.
    """
