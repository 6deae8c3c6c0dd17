"""Where Raylway keeps its state."""

import os
import re
from pathlib import Path


def home() -> Path:
    """The state directory, absolute: `$RAYLWAY_HOME`, or `.raylway` in the current directory.

    It is not made here: whoever writes below it makes what it needs.
    """
    return Path(os.environ.get("RAYLWAY_HOME", ".raylway")).expanduser().resolve()


def database_url(file: str) -> str:
    """Where tables are kept: $RAYLWAY_DATABASE_URL (PostgreSQL), or a SQLite file in the state directory."""
    url = os.environ.get("RAYLWAY_DATABASE_URL")
    if url is None:
        return f"sqlite:///{home() / file}"
    # SQLAlchemy would look for psycopg2.
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
