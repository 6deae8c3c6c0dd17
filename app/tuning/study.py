"""The trials of a sweep in SQL, by Optuna's storage: what is written there is what was done."""

import contextlib
import fcntl
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError

from app.errors import UserError
from app.state import database
from app.state.home import database_url, home, make_private, private_file

WAIT_S = 300.0
"""How long a database may be locked or away before the sweep gives up."""
FACTS = "raylway"
"""The study's attribute that says what its trials have in common."""
Direction = Literal["maximize", "minimize"]
T = TypeVar("T")


def url() -> str:
    """The database of studies, as SQLAlchemy and optuna-dashboard take it.

    In PostgreSQL they are in a schema of their own: Optuna and MLflow both call a table `alembic_version`.
    """
    base = database_url("optuna.db")
    if not base.startswith("postgresql"):
        return base
    return f"{base}{'&' if '?' in base else '?'}options=-csearch_path%3Doptuna"


class Study:
    """A stored study that this process has for itself; made by `opened`.

    Every call waits for a database that is locked or away, for WAIT_S, and then raises UserError.
    """

    def __init__(
        self, name: str, storage: RDBStorage, study_id: int, say: Callable[[str], None], hold: "_Hold"
    ):
        self.name = name
        self._hold = hold
        self._storage = storage
        self._id = study_id
        self._say = say
        self._ids: dict[int, int] = {}
        """The storage's id of each trial, by its number."""

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        found = self._patiently(lambda: self._storage.get_all_trials(self._id, deepcopy=False))
        self._ids |= {trial.number: trial._trial_id for trial in found}
        return found

    def trial(self, number: int) -> FrozenTrial:
        """One of them, as it is stored now."""
        trial_id = self._ids[number]
        return self._patiently(lambda: self._storage.get_trial(trial_id))

    def begin(self, params: Mapping[str, Any], distributions: Mapping[str, Any], token: str) -> int:
        """Store a trial that runs now; returns its number. `token` is its own, also if asked again."""
        frozen = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={"token": token},
        )

        def write() -> int:
            # The answer to a first try may have been lost, and the trial be there.
            for trial in self._storage.get_all_trials(self._id, deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("token") == token:
                    return trial._trial_id
            return self._storage.create_new_trial(self._id, template_trial=frozen)

        trial_id = self._patiently(write)
        number = self._patiently(lambda: self._storage.get_trial_number_from_id(trial_id))
        self._ids[number] = trial_id
        return number

    def resume(self, number: int) -> None:
        """Have a trial that was left run again."""
        trial_id = self._ids[number]
        self._patiently(lambda: self._storage.set_trial_state_values(trial_id, TrialState.RUNNING))

    def report(self, number: int, step: int, value: float) -> None:
        """What a running trial has reached after so many epochs."""
        trial_id = self._ids[number]
        self._patiently(lambda: self._storage.set_trial_intermediate_value(trial_id, step, value))

    def finish(
        self, number: int, state: TrialState, values: Sequence[float] | None, facts: Mapping[str, Any]
    ) -> None:
        """End a trial. `facts` are JSON values that are kept with it."""
        trial_id = self._ids[number]

        def write() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):  # a first try that was not answered
                for key, value in facts.items():
                    self._storage.set_trial_user_attr(trial_id, key, value)
                self._storage.set_trial_state_values(trial_id, state, values)

        self._patiently(write)

    def _release(self) -> None:
        """Trials that run in nobody's hands wait to be gone on with: same number, same parameters."""
        for trial in self.trials():
            if trial.state == TrialState.RUNNING:
                trial_id = trial._trial_id
                self._patiently(
                    lambda: self._storage.set_trial_state_values(trial_id, TrialState.WAITING)  # noqa: B023
                )

    def _patiently(self, call: Callable[[], T]) -> T:
        return _patiently(call, self._say, self._hold.renew)


@contextlib.contextmanager
def opened(
    name: str, directions: Sequence[Direction], facts: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Study]:
    """A study for the time of the block, made if there is none; trials that another process left wait.

    `facts` (JSON values) are what makes its trials comparable; `say` hears what a person should know. Raises
    UserError if a sweep elsewhere has the study, or if its trials were made with other facts.
    """
    if url() == f"sqlite:///{home() / 'optuna.db'}":
        private_file(home() / "optuna.db")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _patiently(_storage, say)
    with contextlib.closing(_hold_of(name, storage)) as hold:
        hold.take()
        made = _patiently(
            lambda: optuna.create_study(
                storage=storage, study_name=name, directions=list(directions), load_if_exists=True
            ),
            say,
        )
        if FACTS not in made.user_attrs:
            made.set_user_attr(FACTS, dict(facts))
        elif changed := _changed(made.user_attrs[FACTS], json.loads(json.dumps(facts))):
            raise UserError(
                f"the study {name!r} was begun with other settings, and its trials do not compare with new "
                f"ones: {'; '.join(changed)}. Set them back, or begin another with --set sweep.study="
                f"{name}-2 (its sweep.warm_start: [{name}] learns from this one, if the space is the same)"
            )
        study = Study(name, storage, made._study_id, say, hold)
        study._release()
        yield study


def load(name: str, say: Callable[[str], None] = lambda _: None) -> optuna.Study:
    """A stored study to look at. Raises UserError if there is none, saying which there are."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url().startswith("sqlite") and not (home() / "optuna.db").exists():
        raise UserError(f"there is no study {name!r}; make one with `raylway sweep`")
    storage = _patiently(functools.partial(_storage, poolclass=sqlalchemy.NullPool), say)
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise UserError(f"there is no study {name!r}; there are {', '.join(sorted(names)) or 'none'}")
    return optuna.load_study(storage=storage, study_name=name)


def _storage(**arguments: Any) -> RDBStorage:
    target = url()
    arguments |= {"pool_pre_ping": True}
    if target.startswith("sqlite"):
        arguments["connect_args"] = {"timeout": 20}
    else:
        with database.engine(target, poolclass=sqlalchemy.NullPool).begin() as connection:
            connection.execute(sqlalchemy.text("CREATE SCHEMA IF NOT EXISTS optuna"))
    return RDBStorage(target, engine_kwargs=arguments)


class _Hold(Protocol):
    """Keeps a study from other sweeps, until this process closes it or dies."""

    def take(self) -> None:
        """Raises UserError if another process has the study."""

    def renew(self) -> None:
        """Take it again after the database was away, which may have lost it. Raises as `take` does."""

    def close(self) -> None: ...


def _hold_of(name: str, storage: RDBStorage) -> _Hold:
    return _FileLock(name) if storage.url.startswith("sqlite") else _DatabaseLock(name, storage)


class _FileLock:
    """Beside a database that is a file; the kernel gives it back if this process dies."""

    def __init__(self, name: str):
        self._name = name
        path = home() / "sweeps" / name / "lock"
        make_private(path.parent)
        self._file = path.open("a+")

    def take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise _taken(self._name, self._file.read()) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def renew(self) -> None:
        """The kernel has not lost it."""

    def close(self) -> None:
        self._file.close()


class _DatabaseLock:
    """Of a connection to PostgreSQL, whose end gives it back."""

    def __init__(self, name: str, storage: RDBStorage):
        self._name = name
        self._storage = storage
        self._connection: sqlalchemy.Connection | None = None

    def take(self) -> None:
        connection = self._storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._connection = connection
        lock = sqlalchemy.text("SELECT pg_try_advisory_lock(hashtext(:name))")
        if not connection.execute(lock, {"name": f"raylway {self._name}"}).scalar():
            raise _taken(self._name, "another process")

    def renew(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()  # or the lock would be its own rival
            self._connection.close()
            self._connection = None
        self.take()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._storage.remove_session()
        self._storage.engine.dispose()  # a connection that went back to the pool would keep the lock


def _taken(name: str, owner: str) -> UserError:
    return UserError(
        f"the study {name!r} is being swept by {owner or 'another process'}; wait for that one, stop it, or "
        f"begin another study with --set sweep.study={name}-2"
    )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """The keys whose values differ, with both values, in words."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key, "nothing"), now.get(key, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changed(old, new, f"{at}{key}.")
        elif old != new:
            found.append(f"{at}{key} was {json.dumps(old)} and is {json.dumps(new)}")
    return found


def _patiently(
    call: Callable[[], T], say: Callable[[str], None], back: Callable[[], None] = lambda: None
) -> T:
    """Call, and again while the database is locked or away; `back` comes before the call that follows."""
    deadline, said = time.monotonic() + WAIT_S, False
    while True:
        try:
            if said:
                back()
            return call()
        except (StorageInternalError, OperationalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            if not isinstance(cause, OperationalError):
                raise
            reason = str(cause.orig).strip().splitlines()[0]
            if time.monotonic() > deadline:
                raise UserError(
                    f"the database of studies has not answered for {WAIT_S:g} s ({reason}); what was stored "
                    "is kept, and the same command goes on from there"
                ) from None
            if not said:
                say(f"the database of studies does not answer ({reason}); waiting for it")
                said = True
            time.sleep(1.0)
