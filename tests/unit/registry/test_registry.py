"""Against MLflow itself, with SQLite and files in one state directory for the module: it takes seconds."""

import contextlib
import functools
import json
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import OperationalError

from app.bundle import bundle, copies, manifest, signature
from app.bundle.bundle import Bundle
from app.bundle.manifest import BrokenBundle, seal, verify
from app.bundle.schema import columns_of
from app.errors import Interrupted, UserError
from app.registry import connection, flavor, promotion, registration, runs, versions
from app.serving.traffic import variants
from app.state import audit as audit_module
from app.state import database
from app.state.audit import AUDIT, Audit
from app.state.audit_head import BrokenLog
from tests import killer
from tests.bundles import PASSED, ROWS, build
from tests.versions import project, registered


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """In place of the one of each test."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(home))
        patch.delenv("RAYLWAY_DATABASE_URL", raising=False)
        patch.delenv("RAYLWAY_STORE", raising=False)
        yield home


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two models' bundles that are MLflow models too."""
    folder = tmp_path_factory.mktemp("bundles")
    paths = [build(folder / f"seed-{seed}", seed) for seed in (0, 1)]
    for path in paths:
        flavor.write(path)
        seal(path, {"decision": PASSED})
    return paths


def test_the_first_version_is_the_champion_and_the_second_the_challenger(bundles):
    first, second = (registered("ordered", path, str(path)) for path in bundles)
    assert (first.number, first.aliases) == ("1", (versions.CHAMPION,))
    assert (second.number, second.aliases) == ("2", (versions.CHALLENGER,))
    assert [(v.version, list(v.aliases)) for v in versions.versions("ordered")] == [
        (2, [versions.CHALLENGER]),
        (1, [versions.CHAMPION]),
    ]


def test_a_registered_bundle_is_whole_and_opens(bundles):
    version = registered("whole", bundles[0])
    opened = Bundle(version.path)
    opened.check_example()
    assert versions.resolve("whole", versions.CHAMPION) == versions.resolve("whole", "1") == version


def test_the_same_graph_is_not_registered_twice(bundles):
    first = registered("same", bundles[0])
    assert registered("same", bundles[0], key="another run") == first
    assert len(versions.versions("same")) == 1


def test_a_changed_bundle_is_not_registered(bundles, tmp_path):
    broken = shutil.copytree(bundles[0], tmp_path / "broken")
    (broken / "schema.json").write_text("{}")
    with pytest.raises(BrokenBundle, match=r"schema\.json was changed"):
        registered("broken", broken)
    assert list(versions.versions("broken")) == []


@pytest.mark.parametrize("version", ["3", "0", "challenger", "no-such-alias", "99999999999999999999"])
def test_what_is_not_registered_is_told_with_what_is(bundles, version):
    if versions.find("single", "1") is None:
        registered("single", bundles[0])
    assert versions.find("single", version) is None
    with pytest.raises(UserError) as caught:
        versions.resolve("single", version)
    assert str(caught.value) == (
        f"no version {version!r} of the model 'single' is registered; single has 1 (champion)"
    )


@pytest.mark.parametrize("version", ["1", "champion"])
def test_a_model_without_versions_says_how_to_make_one(version):
    assert versions.find("nothing", version) is None
    with pytest.raises(UserError, match="nothing has no versions; train one with `raylway train`"):
        versions.resolve("nothing", version)


def test_promoting_the_challenger_makes_it_the_champion_and_leaves_no_challenger(bundles):
    for path in bundles:
        registered("promoted", path, str(path))
    chosen = promotion.promote("promoted", versions.CHALLENGER)
    assert (chosen.number, chosen.aliases) == ("2", (versions.CHAMPION,))
    assert versions.find("promoted", versions.CHALLENGER) is None
    assert versions.resolve("promoted", "1").aliases == ()
    entries = [(entry.action, dict(entry.details)) for entry in Audit().entries("promoted")]
    assert [action for action, _ in entries] == ["register", "register", "promoting", "promote"]
    assert entries[1][1]["alias"] == versions.CHALLENGER
    assert entries[2][1] == entries[3][1] == {"version": "2", "before": "1"}
    back = promotion.promote("promoted", "1")
    assert back == versions.resolve("promoted", versions.CHAMPION)
    with pytest.raises(UserError, match="no version '7'"):
        promotion.promote("promoted", "7")
    assert versions.resolve("promoted", versions.CHAMPION).number == "1"


@pytest.fixture(scope="module")
def two_versions(bundles):
    """A model with a champion and a challenger, to be set back by each test."""
    for path in bundles:
        registered("cut", path, f"cut {path}")

    def reset():
        client = connection.client()
        client.set_registered_model_alias("cut", versions.CHAMPION, "1")
        client.set_registered_model_alias("cut", versions.CHALLENGER, "2")

    return reset


class Killed(BaseException):
    """In place of a kill."""


def kill_at(monkeypatch, write, when):
    """Has a promotion killed before or after one of its writes."""
    owner, name = {
        "intent": (Audit, "add"),
        "champion": (MlflowClient, "set_registered_model_alias"),
        "challenger": (MlflowClient, "delete_registered_model_alias"),
        "end": (Audit, "add"),
    }[write]
    original = getattr(owner, name)

    def killed(self, *arguments, **options):
        if owner is Audit and (arguments[0] == promotion.PROMOTING) != (write == "intent"):
            return original(self, *arguments, **options)
        if when == "after":
            original(self, *arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, killed)


@pytest.mark.parametrize(
    ("write", "when", "finisher"),
    [
        ("intent", "before", "the watch"),
        ("intent", "after", "the watch"),
        ("champion", "after", "the watch"),
        ("challenger", "after", "the watch"),
        ("end", "after", "the watch"),
        ("champion", "after", "the same command"),
        ("intent", "after", "another command"),
        ("champion", "after", "another command"),
    ],
)
def test_a_promotion_that_is_killed_is_finished_by_whoever_comes_next(two_versions, write, when, finisher):
    two_versions()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, write, when)
        with pytest.raises(Killed):
            promotion.promote("cut", "2")
    promoted = (write, when) != ("intent", "before")
    with Audit() as audit:
        if finisher == "the same command":
            promotion.promote("cut", "2")
            promoted = True
        elif finisher == "another command":
            promotion.promote("cut", "1")
        else:
            promotion.finish(audit, "cut")
        last = audit.last("cut", promotion.PROMOTIONS)
        assert last is None or last.action == promotion.PROMOTED
        champion = versions.resolve("cut", versions.CHAMPION).number
        if finisher == "another command":
            assert (champion, last.details) == ("1", {"version": "1", "before": "2" if promoted else "1"})
        else:
            assert champion == ("2" if promoted else "1")
        challenger = versions.find("cut", versions.CHALLENGER)
        assert (challenger is None) == promoted
        audit.entries()


def test_a_promotion_that_was_cut_short_does_not_overrule_what_came_later(two_versions, bundles):
    registered("cut", build(bundles[0].parent / "third", seed=3), "cut third")
    two_versions()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "intent", "after")
        with pytest.raises(Killed):
            promotion.promote("cut", "2")
    connection.client().set_registered_model_alias("cut", versions.CHAMPION, "3")  # by MLflow's own page
    with Audit() as audit:
        promotion.finish(audit, "cut")
        assert audit.last("cut", promotion.PROMOTIONS).action == promotion.NOT_PROMOTED
    assert versions.resolve("cut", versions.CHAMPION).number == "3"


def test_of_two_promotions_at_once_one_is_the_end_and_the_log_agrees(two_versions):
    two_versions()
    threads = [threading.Thread(target=promotion.promote, args=("cut", number)) for number in ("1", "2") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Audit() as audit:
        last = audit.last("cut", promotion.PROMOTIONS)
        assert last.action == promotion.PROMOTED
        assert versions.resolve("cut", versions.CHAMPION).number == last.details["version"]
        ended = [e.details for e in audit.entries("cut", promotion.PROMOTED)][-6:]
    befores = [entry["before"] for entry in ended[1:]]
    assert befores == [entry["version"] for entry in ended[:-1]], "each says whom it followed"


@pytest.fixture
def cut_short(bundles):
    """A second version whose registration was killed before it got its alias; yields what finishes it."""
    registered("short", bundles[0])
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "champion", "before")
        with pytest.raises(Killed):
            registered("short", bundles[1], "second")
    yield lambda: registered("short", bundles[1], "second")
    connection.client().delete_registered_model("short")


def test_a_registration_reads_the_log_from_the_creation_of_its_version_on(cut_short, bundles, monkeypatch):
    with Audit() as audit:
        first, *_ = (audit.add("traffic", "flights", {"n": n}) for n in range(5))
    read = []
    seal = audit_module._seal
    monkeypatch.setattr(audit_module, "_seal", lambda *of: read.append(of[1]["number"]) or seal(*of))
    assert cut_short().aliases == (versions.CHALLENGER,)
    assert min(read) == first.number
    read.clear()
    registered("short", bundles[0])
    assert len(read) <= 3, "that it is registered, and that no promotion is unfinished"


def test_what_was_done_since_a_version_was_created_is_proven_before_it_gets_an_alias(
    cut_short, bundles, tmp_path
):
    """The entry of a version that became the challenger meanwhile is hidden among another model's."""
    later = registered("short", build(tmp_path / "third", seed=3), "third")
    assert later.aliases == (versions.CHALLENGER,)
    with Audit() as audit:
        number = audit.last("short", ["register"]).number
    row = AUDIT.update().where(AUDIT.c.number == number)
    with database.connect().begin() as connection:
        connection.execute(row.values(model="flights"))
    try:
        with pytest.raises(BrokenLog, match=f"entry {number}$"):
            cut_short()
    finally:
        with database.connect().begin() as connection:
            connection.execute(row.values(model="short"))
    assert cut_short().aliases == (), "whoever gave aliases meanwhile decided later"
    assert versions.resolve("short", versions.CHALLENGER) == later


def test_a_version_is_signed_where_it_is_kept(bundles, tmp_path):
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    registered("signed", bundles[0], "signed")
    found = versions.sign("signed", "champion", key)
    signature.require(found.path / manifest.MANIFEST, [str(public)])
    verify(found.path)
    assert Audit().entries("signed")[-1].action == "sign"


def epoch(number: int, loss: float) -> dict[str, float]:
    return {"epoch": number, "train_loss": loss, "validation_auc": 0.5 + number / 10}


def losses(run: runs.Run) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in connection.client().get_metric_history(run.id, "train_loss")]


def status(run: runs.Run) -> str:
    return connection.client().get_run(run.id).info.status


def stopped(name: str, key: str, error: BaseException) -> runs.Run:
    """A run whose training broke off in its third epoch."""
    with contextlib.suppress(type(error)), runs.run(project(name), key) as run:
        for number in (0, 1):
            run.log_epoch(epoch(number, 1 - number / 10))
        raise error
    return run


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (RuntimeError(), "FAILED"),
        (UserError("a mistake"), "FAILED"),
        (Interrupted("a checkpoint is kept", signal.SIGTERM), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_a_run_whose_body_raises_says_whether_somebody_stopped_it(error, end):
    assert status(stopped("failed", type(error).__name__, error)) == end


def test_a_run_with_the_same_key_goes_on_and_logs_no_epoch_twice():
    first = stopped("resumed", "key", KeyboardInterrupt())
    with runs.run(project("resumed"), "key") as again:
        assert status(again) == "RUNNING"
        for number in (1, 2, 2):
            again.log_epoch(epoch(number, 0.5))
    assert (again.id, again.resumed, first.resumed) == (first.id, True, False)
    assert losses(again) == [(0, 1.0), (1, 0.9), (2, 0.5)]
    assert status(again) == "FINISHED"


def test_another_key_and_fresh_are_runs_of_their_own():
    with runs.run(project("several"), "key") as first:
        first.log_epoch(epoch(0, 1.0))
    with runs.run(project("several"), "other") as other:
        pass
    with runs.run(project("several"), "key", fresh=True) as fresh:
        fresh.log_epoch(epoch(0, 0.7))
    assert len({first.id, other.id, fresh.id}) == 3
    assert {other.resumed, fresh.resumed} == {False}
    assert losses(first) == [(0, 1.0)]
    assert losses(fresh) == [(0, 0.7)]


def test_a_run_has_the_parameters_results_and_tags():
    with runs.run(project("described"), "key") as run:
        run.log_results({"auc": 0.9}, {"gate": "passed"})
    data = connection.client().get_run(run.id).data
    assert data.metrics == {"auc": 0.9}
    assert data.tags["gate"] == "passed"
    assert data.tags[runs.KEY_TAG] == "key"
    assert data.params.items() >= {"seed": "0", "model.kind": "mlp", "training.epochs": "1"}.items()


def test_mlflows_own_tools_open_the_bundle_and_predict_the_same(bundles):
    version = registered("pyfunc", bundles[0])
    opened = Bundle(version.path)
    columns = columns_of(opened.schema, ROWS)
    mlflow.set_tracking_uri(connection.uri())
    mlflow.set_registry_uri(connection.uri())
    model = mlflow.pyfunc.load_model(f"models:/pyfunc@{versions.CHAMPION}")
    got = model.predict(bundle.feed_of(columns))["probability"]
    np.testing.assert_array_equal(np.ravel(got), opened.predict(columns))


def test_state_is_in_the_home_alone(home, bundles):
    registered("placed", bundles[0])
    assert (home / "mlflow.db").is_file()
    assert list((home / "artifacts" / "placed").rglob("model.onnx"))


@pytest.mark.parametrize(
    "name", ["o'brien", "../x", "a/b", "%2e", "", "a" * 5000, "ünï", "a\ud800b", "a\0b", 'a"b']
)
@pytest.mark.parametrize("version", ["champion", "1", "o'brien", ""])
def test_a_name_that_no_model_can_have_finds_nothing(name, version):
    assert versions.find(name, version) is None
    with pytest.raises(UserError, match="there is no model"):
        versions.resolve(name, version)
    with pytest.raises(UserError, match="there is no model"):
        versions.versions(name)


@pytest.mark.parametrize(
    "version",
    ["o'brien", "../x", "", "a" * 3000, "٣", "-1", "1.5", "99999999999999999999", "a\ud800b", "a\0b"],
)
def test_a_version_that_cannot_be_is_not_found(version):
    assert versions.find("income", version) is None
    with pytest.raises(UserError, match="no version"):
        versions.resolve("income", version)


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


def test_what_is_registered_is_not_written_again(bundles, home):
    version = registered("written", bundles[0])
    entry = connection.client().get_model_version("written", "1")
    folders = (version.path, Path(entry.source.removeprefix("file://")))

    def state():
        return [(f, f.stat().st_ino, f.stat().st_mtime_ns) for of in folders for f in sorted(of.iterdir())]

    before = state()
    assert registered("written", bundles[0]) == version
    assert registered("written", bundles[0], "another run") == version
    assert state() == before


@pytest.mark.parametrize(
    ("decision", "message"),
    [(None, "holds no decision; train it again"), (False, "which refused it: not good enough")],
)
def test_what_has_not_passed_the_gate_is_not_registered_nor_promoted_nor_served(
    bundles, tmp_path, decision, message
):
    registered("gated", bundles[0])
    other = shutil.copytree(bundles[1], tmp_path / "other")
    facts = {} if decision is None else {"decision": {"passed": decision, "reason": "not good enough"}}
    seal(other, facts)
    with runs.run(project("gated"), "other") as run, pytest.raises(UserError, match=message):
        registration.register("gated", run.id, other, run.log_bundle(other))
    # Somebody registers it with MLflow's own tools.
    ours = connection.client()
    number = str(ours.create_model_version("gated", run.log_bundle(other), run_id=run.id).version)
    with pytest.raises(UserError, match=f"gated version {number} must have passed the gate.*{message}"):
        promotion.promote("gated", number)
    ours.set_registered_model_alias("gated", versions.CHALLENGER, number)
    with pytest.raises(UserError, match=f"must have passed the gate.*{message}"):
        variants.open_bundle(versions.resolve("gated", versions.CHALLENGER).path)
    assert versions.resolve("gated", versions.CHAMPION).number == "1"
    ours.delete_model_version("gated", number)


def test_a_manifest_that_was_changed_with_its_bundle_is_found_out(bundles):
    version = registered("forged", bundles[0])
    sealed = verify(version.path)
    before = (version.path / manifest.MANIFEST).read_bytes()
    (version.path / manifest.MANIFEST).write_bytes(manifest.encoded({**sealed, "seed": 17}))
    verify(version.path)
    with pytest.raises(BrokenBundle, match=r"its MANIFEST\.json was changed"):
        versions.resolve("forged", "1")
    (version.path / manifest.MANIFEST).write_bytes(before)
    assert versions.resolve("forged", "1") == version


def test_a_champion_that_changes_after_the_decision_is_found_out(bundles):
    """Two trainings at once: both were judged while there was no champion."""
    judged = [copies.keep(path, {"decision": {**PASSED, "champion": None}}) for path in bundles]
    with runs.run(project("raced"), "key") as run:
        uris = [run.log_bundle(path) for path in judged]
        registration.register("raced", run.id, judged[0], uris[0])
        with pytest.raises(registration.Outdated):
            registration.register("raced", run.id, judged[1], uris[1])
        assert registration.register("raced", run.id, judged[0], uris[0]).number == "1", "registered already"


def test_registrations_at_once(bundles, tmp_path, monkeypatch):
    """The first ever; of the same and of other bundles, in processes of their own: each bundle has one
    version, and one is the champion."""
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / "home"))

    def register(number: int) -> str:
        for _ in range(10):
            with contextlib.suppress(registration.Outdated):
                return registered("together", bundles[number % 2], f"run {number}").number
        raise AssertionError("judged again and again")

    def state() -> list[list[tuple[str, str]]]:
        given = [(str(v.version), alias) for v in versions.versions("together") for alias in v.aliases]
        entries = [(e.details["version"], e.details["alias"]) for e in Audit().entries("together")]
        return [sorted(given), entries]

    numbers = killer.fork_all([functools.partial(register, number) for number in range(4)])
    assert sorted(numbers) == ["1", "1", "2", "2"]
    assert killer.fork(state) == [[["1", "champion"], ["2", "challenger"]]] * 2


def test_a_store_that_mlflow_has_no_means_for_is_refused_before_it_is_noted(monkeypatch):
    monkeypatch.setenv("RAYLWAY_STORE", "nonsense://bucket")
    with (
        pytest.raises(
            UserError, match=r"RAYLWAY_STORE: must be a folder or URL of a store .*; nonsense://bucket: "
        ),
        runs.run(project("elsewhere"), "key"),
    ):
        pass
    monkeypatch.delenv("RAYLWAY_STORE")
    with runs.run(project("elsewhere"), "key") as run:
        assert connection.client().get_run(run.id).info.artifact_uri.startswith("file://")


def test_a_store_that_fails_is_told_with_what_to_do(bundles, monkeypatch):
    def fail(*_):
        raise RuntimeError("no credentials\nand much more")

    with runs.run(project("failing"), "key") as run:
        monkeypatch.setattr(runs.stages, "place", fail)
        with pytest.raises(
            UserError, match=r"must be stored at file://.*, but: RuntimeError: no credentials\. "
        ):
            run.log_bundle(bundles[0])


def test_a_database_that_does_not_answer_is_not_left_to_mlflow(monkeypatch):
    def never(**_):
        raise AssertionError("MLflow would try again for minutes")

    monkeypatch.setattr(connection, "MlflowClient", never)
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(OperationalError, match="Connection refused"):
        versions.versions("income")
