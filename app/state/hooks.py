"""Records of private parts of Ray that did not take effect, for `raylway status`.

Raylway overrides private methods of Ray and edits the configuration that Serve writes for HAProxy. What a new
version of Ray no longer calls or writes may fail without an error, so each use checks that it took effect,
and reports here if it did not.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.state.home import home


def report(source: str, faults: Sequence[str]) -> None:
    """Record what did not take effect in `source`, such as "training"; no faults remove an earlier record."""
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
