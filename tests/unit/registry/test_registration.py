"""Registering bundles, with MLflow and SQLite."""

import contextlib
import functools
import json
import shutil
from pathlib import Path

import pytest

from app.bundle import copies
from app.bundle.bundle import Bundle
from app.bundle.manifest import BrokenBundle, seal
from app.errors import UserError
from app.registry import connection, promotion, registration, runs, versions
from app.serving.traffic import variants
from app.state import audit as audit_module
from app.state import database
from app.state.audit import AUDIT, Audit
from app.state.audit_head import BrokenLog
from tests import killer
from tests.bundles import PASSED, build
from tests.promotions import Killed, kill_at
from tests.versions import project, registered


def test_the_first_version_is_the_champion_and_the_second_the_challenger(bundles):
    first, second = (registered("ordered", path, str(path)) for path in bundles)
    assert (first.number, first.aliases) == ("1", (versions.CHAMPION,))
    assert (second.number, second.aliases) == ("2", (versions.CHALLENGER,))
    assert [(v.version, list(v.aliases)) for v in versions.versions("ordered")] == [
        (2, [versions.CHALLENGER]),
        (1, [versions.CHAMPION]),
    ]


def test_a_registered_bundle_is_complete_and_opens(bundles):
    version = registered("whole", bundles[0])
    opened = Bundle(version.path)
    opened.check_example()
    assert versions.resolve("whole", versions.CHAMPION) == versions.resolve("whole", "1") == version


def test_the_same_bundle_is_not_registered_twice(bundles):
    first = registered("same", bundles[0])
    assert registered("same", bundles[0], key="another run") == first
    assert len(versions.versions("same")) == 1


def test_the_same_graph_with_another_contract_is_another_version(bundles, tmp_path):
    first = registered("contracts", bundles[0])
    other = shutil.copytree(bundles[0], tmp_path / "other")
    schema = json.loads((other / "schema.json").read_text())
    schema["inputs"][0]["contract"]["max"] = 100
    (other / "schema.json").write_text(json.dumps(schema))
    seal(other, {"decision": PASSED})
    second = registered("contracts", other, "other")
    assert (first.number, second.number) == ("1", "2")
    assert (
        Bundle(second.path).manifest["files"]["model.onnx"]
        == (Bundle(first.path).manifest["files"]["model.onnx"])
    )


def test_a_changed_bundle_is_not_registered(bundles, tmp_path):
    broken = shutil.copytree(bundles[0], tmp_path / "broken")
    (broken / "schema.json").write_text("{}")
    with pytest.raises(BrokenBundle, match=r"schema\.json was changed"):
        registered("broken", broken)
    assert list(versions.versions("broken")) == []


def test_a_registered_bundle_is_not_written_again(bundles, home):
    version = registered("written", bundles[0])
    entry = connection.client().get_model_version("written", "1")
    folders = (version.path, Path(entry.source.removeprefix("file://")))

    def state():
        files = [file for folder in folders for file in sorted(folder.iterdir())]
        return [(file, file.stat().st_ino, file.stat().st_mtime_ns) for file in files]

    original = state()
    assert registered("written", bundles[0]) == version
    assert registered("written", bundles[0], "another run") == version
    assert state() == original


@pytest.mark.parametrize(
    ("decision", "message"),
    [(None, "has no decision; train it again"), (False, "which refused it: not good enough")],
)
def test_a_bundle_that_has_not_passed_the_gate_is_not_registered_promoted_or_served(
    bundles, tmp_path, decision, message
):
    registered("gated", bundles[0])
    other = shutil.copytree(bundles[1], tmp_path / "other")
    facts = {} if decision is None else {"decision": {"passed": decision, "reason": "not good enough"}}
    seal(other, facts)
    with runs.run(project("gated"), "other") as run, pytest.raises(UserError, match=message):
        registration.register("gated", run.id, other, run.log_bundle(other))
    # A user registers it with MLflow's own tools.
    client = connection.client()
    number = str(client.create_model_version("gated", run.log_bundle(other), run_id=run.id).version)
    with pytest.raises(UserError, match=f"gated version {number} must have passed the gate.*{message}"):
        promotion.promote("gated", number)
    client.set_registered_model_alias("gated", versions.CHALLENGER, number)
    with pytest.raises(UserError, match=f"must have passed the gate.*{message}"):
        variants.open_bundle(versions.resolve("gated", versions.CHALLENGER).path)
    assert versions.resolve("gated", versions.CHAMPION).number == "1"
    client.delete_model_version("gated", number)


def test_a_champion_that_changed_after_the_decision_is_detected(bundles):
    """Two concurrent trainings were both judged when there was no champion."""
    sealed = [copies.keep(path, {"decision": {**PASSED, "champion": None}}) for path in bundles]
    with runs.run(project("raced"), "key") as run:
        uris = [run.log_bundle(path) for path in sealed]
        registration.register("raced", run.id, sealed[0], uris[0])
        with pytest.raises(registration.Outdated):
            registration.register("raced", run.id, sealed[1], uris[1])
        assert registration.register("raced", run.id, sealed[0], uris[0]).number == "1", "it is registered"


def test_concurrent_registrations_give_each_bundle_one_version(bundles, tmp_path, monkeypatch):
    """The first registrations of a state directory, in several processes: each bundle has one version, and
    one is the champion."""
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / "home"))

    def register(number: int) -> str:
        for _ in range(10):
            with contextlib.suppress(registration.Outdated):
                return registered("together", bundles[number % 2], f"run {number}").number
        raise AssertionError("the champion changed each time")

    def state() -> list[list[tuple[str, str]]]:
        aliases = [(str(v.version), alias) for v in versions.versions("together") for alias in v.aliases]
        entries = [(e.details["version"], e.details["alias"]) for e in Audit().entries("together")]
        return [sorted(aliases), entries]

    numbers = killer.fork_all([functools.partial(register, number) for number in range(4)])
    assert sorted(numbers) == ["1", "1", "2", "2"]
    assert killer.fork(state) == [[["1", "champion"], ["2", "challenger"]]] * 2


@pytest.fixture
def finish_registration(bundles):
    """A second version whose registration was killed before it got its alias; yields a function that finishes
    the registration."""
    registered("short", bundles[0])
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "champion", "before")
        with pytest.raises(Killed):
            registered("short", bundles[1], "second")
    yield lambda: registered("short", bundles[1], "second")
    connection.client().delete_registered_model("short")


def test_a_registration_reads_the_log_from_its_version_on(finish_registration, bundles, monkeypatch):
    with Audit() as audit:
        first, *_ = (audit.add("traffic", "flights", {"n": n}) for n in range(5))
    numbers = []
    seal = audit_module._seal
    monkeypatch.setattr(
        audit_module,
        "_seal",
        lambda previous, values: numbers.append(values["number"]) or seal(previous, values),
    )
    assert finish_registration().aliases == (versions.CHALLENGER,)
    assert min(numbers) == first.number
    numbers.clear()
    registered("short", bundles[0])
    assert len(numbers) <= 3, "the registration, and that no promotion is unfinished"


def test_the_log_is_verified_before_a_version_gets_an_alias(finish_registration, bundles, tmp_path):
    """The entry of a later challenger is hidden: it is changed to another model's."""
    later = registered("short", build(tmp_path / "third", seed=3), "third")
    assert later.aliases == (versions.CHALLENGER,)
    with Audit() as audit:
        number = audit.last("short", ["register"]).number
    row = AUDIT.update().where(AUDIT.c.number == number)
    with database.connect().begin() as connection:
        connection.execute(row.values(model="flights"))
    try:
        with pytest.raises(BrokenLog, match=f"entry {number}$"):
            finish_registration()
    finally:
        with database.connect().begin() as connection:
            connection.execute(row.values(model="short"))
    assert finish_registration().aliases == (), "the other alias is a later decision"
    assert versions.resolve("short", versions.CHALLENGER) == later
