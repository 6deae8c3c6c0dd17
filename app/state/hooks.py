"""Records of uses of Ray's private parts that have no effect, for `raylway status`.

Raylway overrides private methods of Ray and edits the configuration that Serve writes for HAProxy. If a new
version of Ray no longer calls such a method or writes such a line, nothing raises an error. So each use
checks that it has an effect, and is recorded here if it has none.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.state.home import home


def report(source: str, faults: Sequence[str]) -> None:
    """Record what has no effect in `source`, such as "training". Without faults, remove an earlier record."""
    record = _folder() / f"{source}.json"
    if faults:
        from app.state import files  # HAProxy's stand-in imports this module at each reload

        files.write(record, json.dumps(list(faults)))
    else:
        record.unlink(missing_ok=True)


def reported() -> Iterator[str]:
    """Each recorded fault as a line that names its source, by source."""
    for record in sorted(_folder().glob("*.json")):
        for fault in json.loads(record.read_text()):
            yield f"{record.stem}: {fault}"


def _folder() -> Path:
    return home() / "hooks"
