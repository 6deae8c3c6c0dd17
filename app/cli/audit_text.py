"""The audit log for people: a line for each entry, which says what was done, and of settings what changed."""

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
    """The entries as lines."""
    lines = Table.grid(padding=(0, 2))
    for column in ("number", "time", "who", "model"):
        lines.add_column(column, no_wrap=True, justify="right" if column == "number" else "left")
    lines.add_column("what", overflow="fold")
    for entry, said in zip(entries, sentences(entries), strict=True):
        at = datetime.fromtimestamp(entry.at, UTC).isoformat(sep=" ", timespec="seconds")[:19]
        lines.add_row(*map(Text, (str(entry.number), at, entry.who, entry.model, said)))
    return lines


def sentences(entries: Sequence[Entry]) -> Iterator[str]:
    """What each entry says was done."""
    served: dict[str, Details] = {}
    for entry in entries:
        details = entry.details
        try:
            if entry.action == "traffic":
                yield _traffic(details, served.get(entry.model, {}))
            else:
                yield DONE[entry.action](details)
        except (KeyError, TypeError, AttributeError):  # of another version of Raylway
            yield f"{entry.action} {_short(details)}"
        if entry.action in ("traffic", "undeploy"):
            served[entry.model] = details


def document(entries: Sequence[Entry], head: object) -> dict[str, Any]:
    """The entries as they were written, for programs, and the log's head."""
    return {"entries": [asdict(entry) for entry in entries], "head": None if head is None else str(head)}


DONE: Mapping[str, Callable[[Details], str]] = {
    "register": lambda d: (
        f"registered version {d['version']}{f' as {alias}' if (alias := d['alias']) else ''}"
    ),
    "sign": lambda d: f"signed version {d['version']}",
    "promoting": lambda d: (
        f"begins to make version {d['version']} the champion, in place of {_short(d['before'])}"
    ),
    "promote": lambda d: f"made version {d['version']} the champion, in place of {_short(d['before'])}",
    "promote undone": lambda d: f"left the champion as it is: version {d['version']} came too late",
    "undeploy": lambda d: "took the endpoint off",
}
"""What the other actions did. They are named where they are written: app.registry.versions and
app.serving.traffic.traffic."""


def _traffic(details: Details, before: Details) -> str:
    """What is served, if nothing was before, or what changed."""
    if before:
        parts = [*_variants(details["variants"], before["variants"])]
    else:
        parts = [f"serves {', '.join(map(_variant, details['variants'].items()))}"]
    settings, others = _settings(details), _settings(before) if before else _defaults()
    changed = [_change(key, others, settings) for key in sorted({*settings, *others})]
    if any(changed):
        parts.append(f"serving: {', '.join(filter(None, changed))}")
    return "; ".join(parts) or "as before"


def _variants(variants: Mapping[str, Details], before: Mapping[str, Details]) -> Iterator[str]:
    if added := [_variant((name, variants[name])) for name in variants if name not in before]:
        yield f"with {', '.join(added)}"
    if removed := [name for name in before if name not in variants]:
        yield f"without {', '.join(removed)}"
    for key in ("version", "weight", "shadow"):
        now, then = ({name: v[key] for name, v in of.items()} for of in (variants, before))
        changed = [_change(name, then, now) for name in variants if name in before]
        if any(changed):
            yield f"{key}{'' if key == 'shadow' else 's'} {', '.join(filter(None, changed))}"


def _variant(named: tuple[str, Details]) -> str:
    name, variant = named
    share = "shadow" if variant["shadow"] else f"weight {_short(variant['weight'])}"
    return f"{name} (version {variant['version']}, {share})"


def _change(key: str, before: Details, now: Details) -> str:
    """A key with its values before and now; empty if they are the same."""
    then, value = before.get(key), now.get(key)
    return "" if then == value else f"{key} {_short(then)} -> {_short(value)}"


def _settings(details: Details) -> dict[str, Any]:
    """What an endpoint runs with beside its variants, by the keys below `serving` in a project file."""
    serving = dict(details.get("serving") or {})
    # The salt, policy and weights that hold are the traffic's.
    values = {**serving, "salt": details["salt"], "policy": details["policy"], "variants": {}}
    for name, variant in serving.get("variants", {}).items():
        alias = {} if variant["version"] == name else {"version": variant["version"]}
        values["variants"][name] = {**alias, "workers": variant["workers"]}
    return dict(_flat(values))


def _defaults() -> dict[str, Any]:
    """The settings of an endpoint whose project says nothing about them."""
    return dict(_flat(Serving.model_construct(variants={}).model_dump(mode="json")))


def _flat(values: Details, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}..."
