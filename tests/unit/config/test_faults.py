"""Every key of a project file, given values of every kind that a file can hold."""

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
BAD: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, 10**400, -(10**30), float("inf"), float("nan"), 1e308, 5e-324,
    "", "o'brien", "x" * 300, [], [1], [None], ["a", "a"], {}, {"a": 1}, {1: 2}, datetime.date(2020, 1, 1),
]  # fmt: skip
LIBRARIES = re.compile(
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


def whole(name: str, **sections: Any) -> dict[str, Any]:
    """A shipped project with every key, also those that it leaves at their defaults."""
    document = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    document |= {"sweep": SWEEP} if name == "smoke" else {}
    document["training"] |= TRAINING if name == "smoke" else {}
    document["serving"] |= SERVING if name == "smoke" else {}
    return projectfile.Project.model_validate(document).model_dump(mode="json")


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    if at:
        yield at
    for key, below in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(below, (*at, key))


def with_value(document: dict, at: tuple, value: Any) -> dict:
    document = copy.deepcopy(document)
    place: Any = document
    for part in at[:-1]:
        place = place[part]
    place[at[-1]] = value
    return document


@pytest.fixture
def message(tmp_path, monkeypatch):
    """What a person is told of a document; empty if it is taken."""
    file = tmp_path / "bad.yaml"
    file.write_text("{}")
    monkeypatch.chdir(tmp_path)

    def of(document: dict) -> str:
        # Written as YAML and parsed again, thousands of documents would take minutes.
        monkeypatch.setattr(projectfile, "_parsed", lambda text, source: (document, {}, {}))
        try:
            projectfile.load("bad.yaml")
        except UserError as error:
            return str(error)
        return ""

    return of


def test_the_documents_are_valid(message):
    for name in ("smoke", "tweets", "movies"):
        assert message(whole(name)) == ""


@pytest.mark.parametrize("name", ["smoke", "tweets", "movies"])
def test_a_fault_is_told_without_a_librarys_words(name, message):
    document = whole(name)
    done: set[tuple] = set()
    for at in places(document):
        if name != "smoke" and at[0] in ("training", "serving", "sweep"):
            continue
        shape = tuple(0 if isinstance(part, int) else part for part in at)
        if at[:2] == ("data", "columns") and len(at) > 2:
            shape = ("data", "columns", document["data"]["columns"][at[2]]["type"], *at[3:])
        if at[0] == "features" and len(at) > 1:
            shape = ("features", document["features"][at[1]]["encode"], *at[2:])
        if shape in done:
            continue
        done.add(shape)
        for value in BAD:
            said = message(with_value(document, at, value))
            for line in said.splitlines():
                assert line.startswith("bad.yaml:"), line
                assert len(line) < 1500, line
                told = line.replace("o'brien", "").removeprefix("bad.yaml:1: ")
                assert not LIBRARIES.search(told), f"{at} = {value!r:.60}: {line}"


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
def test_a_number_beyond_its_type_is_refused_in_one_line(key, value, message):
    document = whole("smoke")
    document["features"]["age"] = {"encode": "quantile"}
    said = message(with_value(document, tuple(key.split(".")), value))
    assert said.startswith(f"bad.yaml:1: {key}: must be ")
    assert "\n" not in said
