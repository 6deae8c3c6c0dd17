"""The audit log as text for people and as a document for programs."""

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from app.cli import audit_text
from app.config import Serving
from app.registry import promotion
from app.serving.traffic import traffic
from app.serving.traffic.traffic import Traffic
from app.state.audit import Audit
from tests.commands import raylway
from tests.traffics import place

MODEL = "income"


def served(**variants: dict[str, Any]) -> Traffic:
    """A traffic of variants, version 1 by default."""
    defaults = {"version": "1", "path": "/bundles/1", "identity": "f" * 64}
    return Traffic.model_validate(
        {"salt": "1", "policy": "weighted", "variants": {n: {**defaults, **v} for n, v in variants.items()}}
    )


def settings(**values: Any) -> Serving:
    variants = {name: {"version": name, "weight": 1} for name in ("champion", "challenger")}
    return Serving.model_validate({"variants": variants, **values})


def sentences(audit: Audit) -> list[str]:
    return list(audit_text.sentences(audit.entries()))


@pytest.fixture
def audit():
    with Audit() as audit:
        yield audit


BOTH = served(champion={"weight": 90}, challenger={"weight": 10})


@pytest.mark.parametrize(
    ("changed", "serving", "sentence"),
    [
        (
            served(champion={"weight": 80}, challenger={"weight": 20}),
            settings(),
            "weights champion 90 -> 80, challenger 10 -> 20",
        ),
        (
            served(champion={"weight": 90}, challenger={"weight": 20}),
            settings(),
            "weights challenger 10 -> 20",
        ),
        (
            served(champion={"weight": 90, "version": "2"}, b={"weight": 0, "shadow": True}),
            settings(),
            "with b (version 1, shadow); without challenger; versions champion 1 -> 2",
        ),
        (BOTH, settings(port=8001), "serving: port 8000 -> 8001"),
        (
            BOTH,
            settings(limits={"requests_per_s": 50}, auth="local"),
            "serving: auth none -> local, limits.requests_per_s none -> 50",
        ),
        (
            BOTH,
            settings(variants={"champion": {"version": "champion", "weight": 9}}),
            "no change",
        ),
        (BOTH.model_copy(update={"salt": "2"}), settings(salt="2"), "serving: salt 1 -> 2"),
    ],
)
def test_a_line_shows_the_settings_that_changed(audit, changed, serving, sentence):
    place(audit, MODEL, BOTH, settings())
    place(audit, "flights", served(champion={"weight": 1}), settings(port=9000))
    place(audit, MODEL, changed, serving)
    assert sentences(audit)[-1] == sentence


def test_the_first_line_of_an_endpoint_shows_what_is_served(audit):
    place(audit, MODEL, BOTH, settings(host="0.0.0.0", auth="local"))
    audit.add(traffic.UNDEPLOY_ACTION, MODEL, {})
    place(audit, MODEL, served(champion={"weight": 1}), settings())
    assert sentences(audit) == [
        "serves champion (version 1, weight 90), challenger (version 1, weight 10); "
        "serving: auth none -> local, host 127.0.0.1 -> 0.0.0.0",
        "removed the endpoint",
        "serves champion (version 1, weight 1)",
    ]


def test_every_action_has_a_sentence():
    actions = {"register", "sign", *promotion.PROMOTIONS, *traffic.ACTIONS}
    assert actions == {*audit_text.ACTION_SENTENCES, traffic.TRAFFIC_ACTION}


def test_actions_of_the_registry_are_sentences(audit):
    audit.add("register", MODEL, {"version": "1", "alias": "champion", "identity": "f" * 64})
    audit.add("register", MODEL, {"version": "2", "alias": None, "identity": "f" * 64})
    audit.add(promotion.PROMOTING, MODEL, {"version": "2", "before": "1"})
    audit.add(promotion.PROMOTED, MODEL, {"version": "2", "before": "1"})
    audit.add("sign", MODEL, {"version": "2"})
    assert sentences(audit) == [
        "registered version 1 as champion",
        "registered version 2",
        "starts to make version 2 the champion instead of 1",
        "made version 2 the champion instead of 1",
        "signed version 2",
    ]


def test_entries_that_this_release_cannot_read_are_shown_as_json(audit):
    audit.add("traffic", MODEL, {"weights": {"champion": 1}})
    audit.add("pause", MODEL, {"hours": 1})
    place(audit, MODEL, served(champion={"weight": 1}), settings())
    assert sentences(audit)[:2] == ['traffic {"weights": {"champion": 1}}', 'pause {"hours": 1}']
    assert sentences(audit)[2].startswith("traffic {")


def test_a_long_line_is_wrapped_in_its_column(audit):
    place(audit, MODEL, BOTH, settings(host="0.0.0.0", auth="local", port=8001, grpc_port=8002))
    audit.add("note", "[red]", {"[bold]": "x" * 500})
    screen = Console(file=io.StringIO(), width=100)
    screen.print(audit_text.table(audit.entries()), soft_wrap=True)
    first, *others = screen.file.getvalue().splitlines()
    assert re.match(r"1  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S+ +income  serves champion \(version 1, ", first)
    column = first.index("serves")
    assert others[0][:column].isspace()
    assert all(len(line) <= 100 for line in (first, *others))
    assert any('[red]   note {"[bold]": "xxx' in line for line in others), "text is not read as markup"


def output(*arguments: str) -> str:
    done = raylway(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_prints_one_json_document_or_a_line_for_each_entry(audit):
    place(audit, MODEL, BOTH, settings())
    audit.add("sign", "flights", {"version": "2"})
    document = json.loads(output("audit", "--json"))
    assert [entry["action"] for entry in document["entries"]] == ["traffic", "sign"]
    assert document["entries"][0]["details"]["serving"]["port"] == 8000
    assert [entry["model"] for entry in json.loads(output("audit", "flights", "--json"))["entries"]] == [
        "flights"
    ]
    *_, line, head = output("audit", "flights").splitlines()
    assert line.rstrip().endswith("flights  signed version 2")
    assert head == f"head: {document['head']}"
