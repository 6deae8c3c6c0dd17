"""The audit log as text: one line per entry with the action; for changed settings, the old and new values."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from app.config import Serving
from app.state.audit import Entry

MAX_VALUE_CHARACTERS = 40
Details = Mapping[str, Any]


def table(entries: Sequence[Entry]) -> RenderableType:
    """The entries as a table: number, time in UTC, who, model, what was done."""
    grid = Table.grid(padding=(0, 2))
    for column in ("number", "time", "who", "model"):
        grid.add_column(column, no_wrap=True, justify="right" if column == "number" else "left")
    grid.add_column("what", overflow="fold")
    for entry, sentence in zip(entries, sentences(entries), strict=True):
        at = datetime.fromtimestamp(entry.at, UTC).isoformat(sep=" ", timespec="seconds")[:19]
        grid.add_row(*map(Text, (str(entry.number), at, entry.who, entry.model, sentence)))
    return grid


def sentences(entries: Sequence[Entry]) -> Iterator[str]:
    """A sentence per entry: what was done."""
    served: dict[str, Details] = {}
    for entry in entries:
        details = entry.details
        try:
            if entry.action == "traffic":
                yield _traffic(details, served.get(entry.model, {}))
            else:
                yield ACTION_SENTENCES[entry.action](details)
        except (KeyError, TypeError, AttributeError):  # an entry of another version of Raylway
            yield f"{entry.action} {_short(details)}"
        if entry.action in ("traffic", "undeploy"):
            served[entry.model] = details


def document(entries: Sequence[Entry], head: object) -> dict[str, Any]:
    """The entries as stored, and the log's head, as a JSON document."""
    return {"entries": [asdict(entry) for entry in entries], "head": None if head is None else str(head)}


ACTION_SENTENCES: Mapping[str, Callable[[Details], str]] = {
    "register": lambda d: (
        f"registered version {d['version']}{f' as {alias}' if (alias := d['alias']) else ''}"
    ),
    "sign": lambda d: f"signed version {d['version']}",
    "promoting": lambda d: (
        f"starts to make version {d['version']} the champion instead of {_short(d['before'])}"
    ),
    "promote": lambda d: f"made version {d['version']} the champion instead of {_short(d['before'])}",
    "promote undone": lambda d: f"kept the champion: the promotion of version {d['version']} came too late",
    "undeploy": lambda d: "removed the endpoint",
}
"""Sentences for all actions but `traffic`. app.registry and app.serving.traffic define the actions."""


def _traffic(details: Details, previous: Details) -> str:
    """The variants and settings that are served; if there are previous ones, only the changes."""
    if previous:
        parts = [*_variants(details["variants"], previous["variants"])]
    else:
        parts = [f"serves {', '.join(map(_variant, details['variants'].items()))}"]
    settings, others = _settings(details), _settings(previous) if previous else _defaults()
    changes = [_change(key, others, settings) for key in sorted({*settings, *others})]
    if any(changes):
        parts.append(f"serving: {', '.join(filter(None, changes))}")
    return "; ".join(parts) or "no change"


def _variants(variants: Mapping[str, Details], previous: Mapping[str, Details]) -> Iterator[str]:
    if added := [_variant((name, variants[name])) for name in variants if name not in previous]:
        yield f"with {', '.join(added)}"
    if removed := [name for name in previous if name not in variants]:
        yield f"without {', '.join(removed)}"
    for key in ("version", "weight", "shadow"):
        new, old = ({name: v[key] for name, v in served.items()} for served in (variants, previous))
        changes = [_change(name, old, new) for name in variants if name in previous]
        if any(changes):
            yield f"{key}{'' if key == 'shadow' else 's'} {', '.join(filter(None, changes))}"


def _variant(item: tuple[str, Details]) -> str:
    name, variant = item
    share = "shadow" if variant["shadow"] else f"weight {_short(variant['weight'])}"
    return f"{name} (version {variant['version']}, {share})"


def _change(key: str, before: Details, after: Details) -> str:
    """A key with its old and new value; empty if they are equal."""
    old, new = before.get(key), after.get(key)
    return "" if old == new else f"{key} {_short(old)} -> {_short(new)}"


def _settings(details: Details) -> dict[str, Any]:
    """An endpoint's settings by their keys below `serving` in a project file, without versions and
    weights."""
    serving = dict(details.get("serving") or {})
    # Salt and policy in effect are those of the traffic.
    values = {**serving, "salt": details["salt"], "policy": details["policy"], "variants": {}}
    for name, variant in serving.get("variants", {}).items():
        alias = {} if variant["version"] == name else {"version": variant["version"]}
        values["variants"][name] = {**alias, "workers": variant["workers"]}
    return dict(_flat(values))


def _defaults() -> dict[str, Any]:
    """Default settings of an endpoint."""
    return dict(_flat(Serving.model_construct(variants={}).model_dump(mode="json")))


def _flat(values: Details, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."
