"""The trials of a sweep, stored in SQL with Optuna."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import OperationalError

from app.errors import UserError
from app.state import engine
from app.state.home import database_url, home, private_file
from app.tuning.locks import Lock, lock_of

WAIT_S = 300.0
"""Time after which a database that is still locked or unreachable ends the sweep."""
RETRY_S = 1.0
"""Pause between attempts to reach the database."""
SQLITE_TIMEOUT_S = 20
"""Maximum time that SQLite itself waits for a lock."""
SHARED_SETTINGS = "raylway"
"""Attribute of a stored study with the settings that all its trials share."""
Direction = Literal["maximize", "minimize"]
T = TypeVar("T")


def url() -> str:
    """URL of the database of studies, for SQLAlchemy and optuna-dashboard.

    In PostgreSQL the studies have their own schema, because Optuna and MLflow both have a table
    `alembic_version`.
    """
    base = database_url("optuna.db")
    if not base.startswith("postgresql"):
        return base
    return f"{base}{'&' if '?' in base else '?'}options=-csearch_path%3Doptuna"


class Study:
    """A stored study that no other process may change, as `opened` yields it.

    Each method waits while the database is locked or unreachable, and raises UserError after WAIT_S.
    """

    def __init__(
        self, name: str, storage: RDBStorage, study_id: int, on_note: Callable[[str], None], lock: Lock
    ):
        self.name = name
        self._lock = lock
        self._storage = storage
        self._id = study_id
        self._on_note = on_note
        self._trial_ids: dict[int, int] = {}
        """Id of each trial in the storage, by its number."""

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        trials = self._retry(lambda: self._storage.get_all_trials(self._id, deepcopy=False))
        self._trial_ids |= {trial.number: trial._trial_id for trial in trials}
        return trials

    def trial(self, number: int) -> FrozenTrial:
        """One trial, as it is stored now."""
        trial_id = self._trial_ids[number]
        return self._retry(lambda: self._storage.get_trial(trial_id))

    def begin(self, params: Mapping[str, Any], distributions: Mapping[str, Any], token: str) -> int:
        """Store a running trial and return its number.

        `token` identifies the trial: a second call with the same token stores nothing and returns the same
        number.
        """
        frozen = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={"token": token},
        )

        def write() -> int:
            # An earlier attempt may have stored the trial before the connection broke.
            for trial in self._storage.get_all_trials(self._id, deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("token") == token:
                    return trial._trial_id
            return self._storage.create_new_trial(self._id, template_trial=frozen)

        trial_id = self._retry(write)
        number = self._retry(lambda: self._storage.get_trial_number_from_id(trial_id))
        self._trial_ids[number] = trial_id
        return number

    def resume(self, number: int) -> None:
        """Mark an interrupted trial as running."""
        trial_id = self._trial_ids[number]
        self._retry(lambda: self._storage.set_trial_state_values(trial_id, TrialState.RUNNING))

    def report(self, number: int, step: int, value: float) -> None:
        """Store the value of a running trial after `step` epochs."""
        trial_id = self._trial_ids[number]
        self._retry(lambda: self._storage.set_trial_intermediate_value(trial_id, step, value))

    def finish(
        self, number: int, state: TrialState, values: Sequence[float] | None, attributes: Mapping[str, Any]
    ) -> None:
        """Store the end of a trial: its state, a value for each objective, and attributes (JSON values)."""
        trial_id = self._trial_ids[number]

        def write() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):  # an earlier attempt stored the end
                for key, value in attributes.items():
                    self._storage.set_trial_user_attr(trial_id, key, value)
                self._storage.set_trial_state_values(trial_id, state, values)

        self._retry(write)

    def release_running(self) -> None:
        """Mark the trials of a dead process as waiting: the sweep resumes them under the same numbers."""
        for trial in self.trials():
            if trial.state == TrialState.RUNNING:
                trial_id = trial._trial_id
                self._retry(
                    lambda: self._storage.set_trial_state_values(trial_id, TrialState.WAITING)  # noqa: B023
                )

    def _retry(self, call: Callable[[], T]) -> T:
        return _retry(call, self._on_note, self._lock.reacquire)


@contextlib.contextmanager
def opened(
    name: str,
    directions: Sequence[Direction],
    shared_settings: Mapping[str, Any],
    on_note: Callable[[str], None],
) -> Iterator[Study]:
    """Lock a study for the time of the block; create it if there is none. Interrupted trials become waiting.

    `shared_settings` (JSON values) must be equal for all trials of a study, so that their values can be
    compared. Raises UserError if another process has the study, or if its trials have other shared settings.
    """
    if url() == f"sqlite:///{home() / 'optuna.db'}":
        private_file(home() / "optuna.db")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _retry(_storage, on_note)
    with contextlib.closing(lock_of(name, storage)) as lock:
        lock.acquire()
        stored = _retry(
            lambda: optuna.create_study(
                storage=storage, study_name=name, directions=list(directions), load_if_exists=True
            ),
            on_note,
        )
        if SHARED_SETTINGS not in stored.user_attrs:
            stored.set_user_attr(SHARED_SETTINGS, dict(shared_settings))
        elif changes := _changes(stored.user_attrs[SHARED_SETTINGS], json.loads(json.dumps(shared_settings))):
            raise UserError(
                f"the study {name!r} was started with other settings, so its trials cannot be compared with "
                f"new ones: {'; '.join(changes)}. Set them back, or start another study with --set "
                f"sweep.study={name}-2 (with sweep.warm_start: [{name}], if the space is the same, it learns "
                "from this one)"
            )
        study = Study(name, storage, stored._study_id, on_note, lock)
        study.release_running()
        yield study


def load(name: str, on_note: Callable[[str], None] = lambda _: None) -> optuna.Study:
    """A stored study, to read only. Raises UserError, with the names of all studies, if there is none."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url().startswith("sqlite") and not (home() / "optuna.db").exists():
        raise UserError(f"there is no study {name!r}; make one with `raylway sweep`")
    storage = _retry(functools.partial(_storage, poolclass=sqlalchemy.NullPool), on_note)
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise UserError(f"there is no study {name!r}; there are {', '.join(sorted(names)) or 'none'}")
    return optuna.load_study(storage=storage, study_name=name)


def _storage(**engine_options: Any) -> RDBStorage:
    target = url()
    engine_options |= {"pool_pre_ping": True}
    if target.startswith("sqlite"):
        engine_options["connect_args"] = {"timeout": SQLITE_TIMEOUT_S}
    else:
        with engine.create(target, poolclass=sqlalchemy.NullPool).begin() as connection:
            connection.execute(sqlalchemy.text("CREATE SCHEMA IF NOT EXISTS optuna"))
    return RDBStorage(target, engine_kwargs=engine_options)


def _changes(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for each dotted key whose values differ."""
    lines = []
    for key in sorted({*stored, *current}):
        old, new = stored.get(key, "nothing"), current.get(key, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} was {json.dumps(old)} and is {json.dumps(new)}")
    return lines


def _retry(
    call: Callable[[], T], on_note: Callable[[str], None], reconnect: Callable[[], None] = lambda: None
) -> T:
    """Make a call, and repeat it while the database is locked or unreachable, for up to WAIT_S.

    Calls `reconnect` before each repetition. Raises UserError after WAIT_S.
    """
    deadline, noted = time.monotonic() + WAIT_S, False
    while True:
        try:
            if noted:
                reconnect()
            return call()
        except (StorageInternalError, OperationalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            if not isinstance(cause, OperationalError):
                raise
            reason = str(cause.orig).strip().splitlines()[0]
            if time.monotonic() > deadline:
                raise UserError(
                    f"the database of studies has not answered for {WAIT_S:g} s ({reason}); what was stored "
                    "is kept, and the same command resumes from there"
                ) from None
            if not noted:
                on_note(f"the database of studies does not answer ({reason}); waiting for it")
                noted = True
            time.sleep(RETRY_S)
