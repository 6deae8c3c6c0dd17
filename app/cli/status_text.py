"""The endpoints' status as tables for the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table


def renderables(documents: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    """A table for each endpoint, and a line about the watch, which monitors them."""
    if not documents:
        yield "nothing is served"
        return
    for document in documents:
        yield _endpoint(document)
    yield _watch(documents[0]["watch"])


def _watch(watch: dict[str, Any] | None) -> str:
    if watch is None:
        return "watch: does not answer; new aliases are not followed, and bandits set no weights"
    last = f", the last: {watch['last_error']}" if watch["last_error"] else ""
    return f"watch: last round {watch['looked_s_ago']:.0f} s ago, {watch['failures']} failures{last}"


def _endpoint(document: dict[str, Any]) -> Table:
    running, target = (document["replicas"][key] for key in ("running", "target"))
    table = Table(
        title=f"{document['name']}: {document['status']}, {running} of {target} replicas",
        title_justify="left",
        box=None,
        padding=(0, 2),
    )
    for column in ("variant", "version", "share", "requests/s", "p50 ms", "p99 ms", "errors"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, variant in document["variants"].items():
        share = "shadow" if variant["shadow"] else f"{variant['share']:.0%}"
        latencies = [f"{1000 * variant[q]:.1f}" if variant[q] else "" for q in ("p50_s", "p99_s")]
        errors = "" if variant["error_rate"] is None else f"{variant['error_rate']:.2%}"
        rate = f"{variant['requests_per_s']:.1f}"
        workers = f" ({variant['workers'][0]} workers)" if variant["workers"] else ""
        table.add_row(name + workers, variant["version"], share, rate, *latencies, errors)
    if notes := list(_notes(document)):
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _notes(document: dict[str, Any]) -> Iterator[str]:
    yield from (f"fault: {fault}" for fault in document["faults"])
    recording = document["recording"]
    if recording["dropped"]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in recording["dropped"].items())
        yield f"{document['not_recorded']:,} predictions were not recorded ({reasons})"
    for fault in recording["faults"]:
        waiting = f"{recording['waiting']:,} predictions ({recording['waiting_bytes'] / 1e6:.1f} MB)"
        yield f"the database takes no records, {waiting} wait: {fault}"
    if document["not_shadowed"]:
        yield f"{document['not_shadowed']:,} requests were not shadowed"
