"""SQL statements that are too long for a string in Python."""

import importlib.resources


def statement(name: str) -> str:
    """The text of a statement: the file `NAME.sql` of this package."""
    return (importlib.resources.files(__name__) / f"{name}.sql").read_text()
