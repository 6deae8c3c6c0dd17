"""Where Raylway keeps its state."""

import os
from pathlib import Path


def home() -> Path:
    """The state directory, absolute: `$RAYLWAY_HOME`, or `.raylway` in the current directory.

    It is not made here: whoever writes below it makes what it needs.
    """
    return Path(os.environ.get("RAYLWAY_HOME", ".raylway")).expanduser().resolve()
