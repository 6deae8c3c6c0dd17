"""Random sequences of commands on traffic, registry and audit log, with kills between writes and clock steps.

Invariants are checked after each command. Ray and MLflow are not used: Serve's applications and MLflow's
aliases are dicts.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ray import serve

from app.config import Serving
from app.errors import UserError
from app.monitoring import bandit, follow
from app.monitoring.follow import Follower
from app.registry import promotion, versions
from app.registry.versions import CHALLENGER, CHAMPION, Version
from app.serving.control import deploy, undeploy, weights, workers
from app.serving.traffic import registered, traffic
from app.state import audit as audits
from app.state import audit_head, locks
from app.state.audit import Audit, Conflict
from app.state.records import Records

NAME = "income"


class Killed(BaseException):
    """Replaces SIGKILL: after it, the command writes nothing."""


class World:
    """The state outside of SQL. It counts the writes of a command, and kills the command at one of them."""

    def __init__(self):
        self.applications: dict[str, SimpleNamespace] = {}
        self.aliases: dict[str, str] = {}
        self.broken: set[str] = set()
        """Versions that no replica can load."""
        self.num_versions = 0
        self.now = 1_000_000.0
        self._writes_left: int | None = None
        """Writes until the command is killed; None: never."""

    def write(self):
        """Called before each write. Raises Killed if the command must be killed now."""
        if self._writes_left is not None:
            self._writes_left -= 1
            if self._writes_left < 0:
                raise Killed

    @contextlib.contextmanager
    def killing(self, num_writes):
        """Kill the command in the block after this number of writes, or never if it is None."""
        self._writes_left = num_writes
        try:
            yield
        except Killed:
            pass
        finally:
            self._writes_left = None


class Registry:
    """The part of MLflow's client that concerns aliases."""

    def __init__(self, world):
        self._world = world

    def get_registered_model(self, name):
        return SimpleNamespace(aliases=dict(self._world.aliases))

    def search_model_versions(self, *_, **__):
        return []  # used for the text of an error only

    def set_registered_model_alias(self, name, alias, number):
        self._world.write()
        self._world.aliases[alias] = str(number)

    def delete_registered_model_alias(self, name, alias):
        self._world.write()
        self._world.aliases.pop(alias, None)


class Commands(RuleBasedStateMachine):
    """Commands and monitoring in random order, and the invariants."""

    def __init__(self):
        super().__init__()
        self.world = world = World()
        self.folder = Path(tempfile.mkdtemp())
        self.patch = patch = pytest.MonkeyPatch()
        patch.setenv("RAYLWAY_HOME", str(self.folder))
        patch.delenv("RAYLWAY_DATABASE_URL", raising=False)
        patch.setattr(audits.time, "time", lambda: world.now)
        for module in (versions, promotion):
            patch.setattr(module, "client", lambda: Registry(world))
        patch.setattr(versions, "find", self._find)
        patch.setattr(promotion, "verify", lambda path: {})
        patch.setattr(promotion, "require_passed", lambda *_: None)
        patch.setattr(follow, "open_bundles", lambda *_: {})
        patch.setattr(follow, "common_schema", lambda *_: None)
        patch.setattr(follow, "schema_at", lambda *_: None)
        patch.setattr(serve, "status", lambda: SimpleNamespace(applications=dict(world.applications)))
        patch.setattr(serve, "delete", self._delete)
        patch.setattr(serve, "shutdown", self.world.applications.clear)
        patch.setattr(ray, "get_actor", self._no_actor)
        for module in (workers, deploy):
            patch.setattr(module, "run_application", self._run)
        for module in (weights, deploy, follow):
            patch.setattr(module, "refresh", self._refresh)
        patch.setattr(deploy, "_wait_until_ready", lambda *_: None)
        for owner, name in ((Audit, "add"), (audit_head, "store")):
            patch.setattr(owner, name, self._counted(getattr(owner, name)))
        self.audit, self.records, self.follower = Audit(), Records(), Follower(lambda: 0.0)
        self.read: traffic.TrafficEntry | None = None
        """The entry that a slow writer has read."""

    def teardown(self):
        self.audit.close()
        self.records.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    # Replacements of Serve and of the registry

    def _counted(self, function):
        def counted(*arguments, **options):
            self.world.write()
            return function(*arguments, **options)

        return counted

    def _find(self, name, version):
        number = self.world.aliases.get(version, version)
        if not number.isdecimal() or not 1 <= int(number) <= self.world.num_versions:
            return None
        aliases = tuple(alias for alias, of in self.world.aliases.items() if of == number)
        return Version(name, number, aliases, f"{int(number):064x}")

    def _no_actor(self, *_, **__):
        raise ValueError("Serve's controller has ended")

    def _run(self, bound, application, deployment, route):
        self.world.write()
        self.world.applications[application] = SimpleNamespace(status="RUNNING")

    def _delete(self, application):
        self.world.write()
        self.world.applications.pop(application, None)

    def _refresh(self, name, entry):
        current = traffic.read_current(self.audit, name)
        assert current.number >= entry
        if broken := {v.version for v in current.traffic.variants.values()} & self.world.broken:
            raise UserError(f"{name} cannot load {broken}")

    # Commands and monitoring

    @initialize()
    def register_first(self):
        self.register(broken=False)

    @rule(broken=st.booleans())
    def register(self, broken):
        self.world.num_versions += 1
        number = str(self.world.num_versions)
        if broken and number != "1":
            self.world.broken.add(number)
        alias = CHALLENGER if CHAMPION in self.world.aliases else CHAMPION
        self.world.aliases[alias] = number
        self.audit.add("register", NAME, {"version": number, "alias": alias})

    @rule(kill=st.none() | st.integers(0, 6), number=st.integers(1, 4))
    def promote(self, kill, number):
        with self.world.killing(kill), contextlib.suppress(UserError):
            promotion.promote(NAME, str(number))
            if kill is None:
                assert self.world.aliases[CHAMPION] == str(number)

    @rule(
        kill=st.none() | st.integers(0, 8),
        champion=st.sampled_from([0, 1, 90]),
        challenger=st.sampled_from([0, 10]),
        workers=st.booleans(),
        policy=st.sampled_from(["weighted", "bandit"]),
    )
    def serve(self, kill, champion, challenger, workers, policy):
        variants = {
            CHAMPION: {"version": CHAMPION, "weight": champion},
            CHALLENGER: {"version": CHALLENGER, "weight": challenger, "workers": {} if workers else None},
        }
        with contextlib.suppress(UserError, ValueError):
            serving = Serving.model_validate({"variants": variants, "follow": True, "policy": policy})
            before = traffic.read_current(self.audit, NAME)
            target, _ = registered.registered_traffic(NAME, serving)
            done = False
            with self.world.killing(kill):
                try:
                    with traffic.endpoint_lock(NAME, wait=False):
                        deploy._replace(serving, NAME, target, "http://127.0.0.1:1")
                    done = True
                except UserError:
                    after = traffic.read_current(self.audit, NAME)
                    assert (after and after[1:]) == (before and before[1:]), (
                        "a refused deployment is rolled back"
                    )
            if done:
                current = traffic.read_current(self.audit, NAME)
                assert (current.traffic, current.serving) == (target, serving)
                self._check_applications(current)

    @rule(
        kill=st.none() | st.integers(0, 3), weight=st.sampled_from([0, 5, 1e308]), of_champion=st.booleans()
    )
    def change_weights(self, kill, weight, of_champion):
        name = CHAMPION if of_champion else CHALLENGER
        before = traffic.read_current(self.audit, NAME)
        with self.world.killing(kill), contextlib.suppress(UserError):
            served = weights.set_weights(NAME, {name: weight})
            current = traffic.read_current(self.audit, NAME)
            assert current.traffic == served
            assert current.traffic.variants[name].weight == weight
            others = {n: v for n, v in before.traffic.variants.items() if n != name}
            assert others.items() <= current.traffic.variants.items(), "other variants keep their weights"
            assert current.serving == before.serving

    @rule(kill=st.none() | st.integers(0, 8))
    def watch(self, kill):
        before = traffic.read_current(self.audit, NAME)
        if before is None or before.serving is None:
            return
        with self.world.killing(kill):
            promotion.finish(self.audit, NAME)
            self.follower.follow(self.audit, NAME, before)
            workers.stop_abandoned_workers(self.audit, NAME)
            current = traffic.read_current(self.audit, NAME)
            if NAME in self.follower.faults:
                assert current.traffic == before.traffic, "a fault leaves the traffic unchanged"
            else:
                served = {n: v.version for n, v in current.traffic.variants.items()}
                assert served == {n: v for n, v in self.world.aliases.items() if n in before.serving.variants}
                self._check_applications(current)

    @rule()
    def slow_writer_reads(self):
        self.read = traffic.read_current(self.audit, NAME)

    @precondition(lambda self: self.read is not None)
    @rule(kill=st.none() | st.integers(0, 1), weight=st.sampled_from([3, 4]))
    def slow_writer_writes(self, kill, weight):
        read, self.read = self.read, None
        before = self.audit.last(NAME, traffic.ACTIONS)
        target = traffic.with_weights(read.traffic, dict.fromkeys(read.traffic.weights, weight))
        with self.world.killing(kill):
            try:
                traffic.update(self.audit, NAME, read, target)
            except Conflict:
                assert before.number != read.number
            else:
                assert before.number == read.number or target == read.traffic, "no change is lost"

    @rule(kill=st.none() | st.integers(0, 1), seed=st.integers(0, 3))
    def rebalance(self, kill, seed):
        current = traffic.read_current(self.audit, NAME)
        if current is None:
            return
        random = np.random.default_rng(seed)
        rewards = {v.version: (50, 50 * random.random()) for v in current.traffic.variants.values()}
        self.patch.setattr(self.records, "rewards", lambda model, since: rewards)
        with self.world.killing(kill):
            bandit.rebalance(self.audit, self.records, NAME, current)

    @rule(kill=st.none() | st.integers(0, 4))
    def undeploy(self, kill):
        done = False
        with self.world.killing(kill):
            with contextlib.suppress(UserError):
                undeploy.undeploy(NAME)
            done = True
        if done:
            assert traffic.read_current(self.audit, NAME) is None
            assert not self.world.applications

    @rule(seconds=st.sampled_from([1.0, 3600.0, -3600.0, 86400.0 * 365, -86400.0 * 365]))
    def step_the_clock(self, seconds):
        self.world.now += seconds

    # Invariants

    def _check_applications(self, entry):
        """The applications are the endpoint and the workers of its variants."""
        needed = {v.workers for v in entry.traffic.variants.values()} - {None}
        assert set(self.world.applications) == needed | {NAME}

    @invariant()
    def the_audit_log_has_no_gap(self):
        numbers = [entry.number for entry in self.audit.entries()]
        assert numbers == list(range(1, len(numbers) + 1))

    @invariant()
    def the_weights_of_the_current_traffic_are_valid(self):
        current = traffic.read_current(self.audit, NAME)
        if current is not None:
            assert 0 < sum(current.traffic.weights.values()) < np.inf

    @invariant()
    def the_aliases_are_those_of_the_last_promotion(self):
        last = self.audit.last(NAME, promotion.PROMOTIONS)
        if last is None or last.action != promotion.PROMOTING:  # else the next command finishes it
            promoted = self.audit.last(NAME, (promotion.PROMOTED,))
            champion = promoted.details["version"] if promoted else "1"
            assert self.world.aliases.get(CHAMPION, champion) == champion
            assert self.world.aliases.get(CHALLENGER) != champion

    @invariant()
    def no_lock_is_left(self):
        for name in (f"endpoint {NAME}", f"registry-{NAME}"):
            with locks.exclusive(name, wait=False):
                pass


Commands.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # shrinking takes minutes
)
TestCommands = Commands.TestCase
