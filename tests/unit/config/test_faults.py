"""Messages for invalid values: every key of a project file is set to values of every type that YAML has."""

import copy
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import projectfile
from app.errors import UserError

ROOT = Path(__file__).parents[3]
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, 10**400, -(10**30), float("inf"), float("nan"), 1e308, 5e-324,
    "", "o'brien", "x" * 300, [], [1], [None], ["a", "a"], {}, {"a": 1}, {1: 2}, datetime.date(2020, 1, 1),
]  # fmt: skip
LIBRARY_WORDS = re.compile(
    r"[Ii]nput should|after validation|validation error|constrained|function-|literal\[|\[key\]|pydantic|"
    r"[Vv]alue error|"
    r"valid (list|string|integer|number|boolean|dictionary)|instance of|dictionary|NoneType|\bNone\b|"
    r"\bTrue\b|\bFalse\b|tuple|\bstr\b|(?<!')\b(int|float|dict)\b(?!')|Error\b|Section|object at 0x"
)
SERVING = {
    "auth": {"issuer": "https://a", "jwks": "https://a/keys", "audience": "b"},
    "tls": {"certificate": "a", "key": "b"},
    "grpc_port": 9000,
    "variants": {"champion": {"version": "champion", "weight": 1, "workers": {"min_replicas": 0}}},
    "limits": {"requests_per_s": 5},
}
SWEEP = {
    "space": {
        "training.learning_rate": {"type": "float", "low": 0.1, "high": 1, "step": 0.1},
        "training.batch_size": {"type": "int", "low": 1, "high": 8, "when": {"model.kind": "mlp"}},
        "model.dropout": {"type": "choice", "values": [0.1, 0.2]},
    },
    "points": [{"training.learning_rate": 0.2}],
    "constraints": ["training.epochs < 9"],
    "scheduler": {"kind": "asha"},
}
TRAINING = {"early_stopping": {"patience": 2}, "num_workers": [1, 2]}


def complete_project(name: str) -> dict[str, Any]:
    """A shipped project with every key, including those that its file leaves at their defaults."""
    document = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    document |= {"sweep": SWEEP} if name == "smoke" else {}
    document["training"] |= TRAINING if name == "smoke" else {}
    document["serving"] |= SERVING if name == "smoke" else {}
    return projectfile.Project.model_validate(document).model_dump(mode="json")


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a document; a path has the keys and indices that lead to the value."""
    if path:
        yield path
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths(child, (*path, key))


def with_value(document: dict, path: tuple, value: Any) -> dict:
    """A copy of the document with another value at the path."""
    document = copy.deepcopy(document)
    parent: Any = document
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    return document


@pytest.fixture
def message(tmp_path, monkeypatch):
    """The message with which a document is refused; empty if it is accepted."""
    file = tmp_path / "bad.yaml"
    file.write_text("{}")
    monkeypatch.chdir(tmp_path)

    def message_of(document: dict) -> str:
        # Parsing thousands of documents from YAML would take minutes.
        monkeypatch.setattr(projectfile, "_parsed", lambda text, source: (document, {}, {}))
        try:
            projectfile.load("bad.yaml")
        except UserError as error:
            return str(error)
        return ""

    return message_of


def test_the_complete_projects_are_valid(message):
    for name in ("smoke", "tweets", "movies"):
        assert message(complete_project(name)) == ""


@pytest.mark.parametrize("name", ["smoke", "tweets", "movies"])
def test_a_message_has_the_form_of_a_fault_and_no_words_of_a_library(name, message):
    document = complete_project(name)
    tried: set[tuple] = set()
    for path in paths(document):
        if name != "smoke" and path[0] in ("training", "serving", "sweep"):
            continue
        shape = tuple(0 if isinstance(part, int) else part for part in path)
        if path[:2] == ("data", "columns") and len(path) > 2:
            shape = ("data", "columns", document["data"]["columns"][path[2]]["type"], *path[3:])
        if path[0] == "features" and len(path) > 1:
            shape = ("features", document["features"][path[1]]["encode"], *path[2:])
        if shape in tried:
            continue
        tried.add(shape)
        for value in VALUES:
            for line in message(with_value(document, path, value)).splitlines():
                assert line.startswith("bad.yaml:"), line
                assert len(line) < 1500, line
                text = line.replace("o'brien", "").removeprefix("bad.yaml:1: ")
                assert not LIBRARY_WORDS.search(text), f"{path} = {value!r:.60}: {line}"


@pytest.mark.parametrize("value", [10**30, 10**400, 1e308, float("inf"), float("nan"), 2**63])
@pytest.mark.parametrize(
    "key",
    [
        "seed", "data.source.limit", "data.split.seed", "features.age.bins", "features.workclass.width",
        "training.epochs", "training.batch_size", "training.num_workers", "training.num_cpus",
        "training.max_failures", "training.hang_timeout_s", "training.checkpoints.every_steps",
        "sweep.trials", "sweep.max_hours", "sweep.seed", "sweep.folds", "sweep.retries",
        "serving.port", "serving.grpc_port", "serving.num_cpus", "serving.limits.max_rows",
        "serving.limits.feedback_days", "serving.variants.champion.weight",
        "serving.autoscaling.max_replicas", "serving.autoscaling.downscale_delay_s",
    ],
)  # fmt: skip
def test_a_number_outside_its_range_is_refused_with_one_line(key, value, message):
    document = complete_project("smoke")
    document["features"]["age"] = {"encode": "quantile"}
    line = message(with_value(document, tuple(key.split(".")), value))
    assert line.startswith(f"bad.yaml:1: {key}: must be ")
    assert "\n" not in line
