"""Random sequences of commands on traffic, registry and audit log, with kills between any two writes and
clocks that step: what must always hold does. Without Ray: Serve's applications and MLflow's aliases are in
dicts."""

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
    """In place of SIGKILL: from then on the command writes nothing."""


class World:
    """What the commands write to, besides SQL: it counts the writes, and kills the command at one of them."""

    def __init__(self):
        self.applications: dict[str, SimpleNamespace] = {}
        self.aliases: dict[str, str] = {}
        self.broken: set[str] = set()
        """Versions that no replica can load."""
        self.num_versions = 0
        self.now = 1_000_000.0
        self._left: int | None = None

    def write(self):
        """Before each write."""
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Killed

    @contextlib.contextmanager
    def killing(self, after):
        """A command that is killed after so many writes; never, if None."""
        self._left = after
        try:
            yield
        except Killed:
            pass
        finally:
            self._left = None


class Registry:
    """MLflow's client, as far as aliases go."""

    def __init__(self, world):
        self._world = world

    def get_registered_model(self, name):
        return SimpleNamespace(aliases=dict(self._world.aliases))

    def search_model_versions(self, *_, **__):
        return []  # only for an error's text

    def set_registered_model_alias(self, name, alias, number):
        self._world.write()
        self._world.aliases[alias] = str(number)

    def delete_registered_model_alias(self, name, alias):
        self._world.write()
        self._world.aliases.pop(alias, None)


class Commands(RuleBasedStateMachine):
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
        """What a slow writer has read."""

    def teardown(self):
        self.audit.close()
        self.records.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    # What the commands meet

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
        held = traffic.read_current(self.audit, name)
        assert held.number >= entry
        if broken := {v.version for v in held.traffic.variants.values()} & self.world.broken:
            raise UserError(f"{name} does not take it in: {broken}")

    # What people and programs do

    @initialize()
    def begin(self):
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
            wanted, _ = registered.registered_traffic(NAME, serving)
            done = False
            with self.world.killing(kill):
                try:
                    with traffic.endpoint_lock(NAME, wait=False):
                        deploy._replace(serving, NAME, wanted, "http://127.0.0.1:1")
                    done = True
                except UserError:
                    after = traffic.read_current(self.audit, NAME)
                    assert (after and after[1:]) == (before and before[1:]), "undone"
            if done:
                held = traffic.read_current(self.audit, NAME)
                assert (held.traffic, held.serving) == (wanted, serving)
                self._all_needed_run(held)

    @rule(kill=st.none() | st.integers(0, 3), weight=st.sampled_from([0, 5, 1e308]), of=st.booleans())
    def change_weights(self, kill, weight, of):
        name = CHAMPION if of else CHALLENGER
        before = traffic.read_current(self.audit, NAME)
        with self.world.killing(kill), contextlib.suppress(UserError):
            served = weights.set_weights(NAME, {name: weight})
            held = traffic.read_current(self.audit, NAME)
            assert held.traffic == served
            assert held.traffic.variants[name].weight == weight
            kept = {n: v for n, v in before.traffic.variants.items() if n != name}
            assert kept.items() <= held.traffic.variants.items(), "what is not named keeps its weight"
            assert held.serving == before.serving

    @rule(kill=st.none() | st.integers(0, 8))
    def look(self, kill):
        held = traffic.read_current(self.audit, NAME)
        if held is None or held.serving is None:
            return
        with self.world.killing(kill):
            promotion.finish(self.audit, NAME)
            self.follower.follow(self.audit, NAME, held)
            workers.stop_abandoned_workers(self.audit, NAME)
            now = traffic.read_current(self.audit, NAME)
            if NAME in self.follower.faults:
                assert now.traffic == held.traffic, "what is served goes on"
            else:
                served = {n: v.version for n, v in now.traffic.variants.items()}
                assert served == {n: v for n, v in self.world.aliases.items() if n in held.serving.variants}
                self._all_needed_run(now)

    @rule()
    def begin_to_think(self):
        self.read = traffic.read_current(self.audit, NAME)

    @precondition(lambda self: self.read is not None)
    @rule(kill=st.none() | st.integers(0, 1), weight=st.sampled_from([3, 4]))
    def write_what_was_thought(self, kill, weight):
        read, self.read = self.read, None
        before = self.audit.last(NAME, traffic.ACTIONS)
        wanted = traffic.with_weights(read.traffic, dict.fromkeys(read.traffic.weights, weight))
        with self.world.killing(kill):
            try:
                traffic.update(self.audit, NAME, read, wanted)
            except Conflict:
                assert before.number != read.number
            else:
                assert before.number == read.number or wanted == read.traffic, "nobody's change is lost"

    @rule(kill=st.none() | st.integers(0, 1), seed=st.integers(0, 3))
    def rebalance(self, kill, seed):
        held = traffic.read_current(self.audit, NAME)
        if held is None:
            return
        random = np.random.default_rng(seed)
        rewards = {v.version: (50, 50 * random.random()) for v in held.traffic.variants.values()}
        self.patch.setattr(self.records, "rewards", lambda model, since: rewards)
        with self.world.killing(kill):
            bandit.rebalance(self.audit, self.records, NAME, held)

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

    # What must always hold

    def _all_needed_run(self, held):
        needed = {v.workers for v in held.traffic.variants.values()} - {None}
        assert set(self.world.applications) == needed | {NAME}, "no worker too many, none too few"

    @invariant()
    def the_log_is_whole(self):
        numbers = [entry.number for entry in self.audit.entries()]
        assert numbers == list(range(1, len(numbers) + 1))

    @invariant()
    def what_holds_can_be_answered(self):
        held = traffic.read_current(self.audit, NAME)
        if held is not None:
            assert 0 < sum(held.traffic.weights.values()) < np.inf

    @invariant()
    def aliases_are_those_of_the_log(self):
        last = self.audit.last(NAME, promotion.PROMOTIONS)
        if last is None or last.action != promotion.PROMOTING:  # else whoever comes next finishes it
            given = self.audit.last(NAME, (promotion.PROMOTED,))
            champion = given.details["version"] if given else "1"
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
    phases=[Phase.generate],  # to shrink takes minutes
)
TestCommands = Commands.TestCase
