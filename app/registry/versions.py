"""MLflow: runs, metrics and registered versions. The only file that imports it."""

import base64
import contextlib
import functools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

# Before the import: MLflow reads both when it is first imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

import mlflow
import mlflow.onnx
import sqlalchemy
from mlflow.entities import Metric, Param, RunStatus, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from app.bundle import copies, manifest, signature
from app.bundle.manifest import BrokenBundle, identity, require_passed, verify
from app.config import Project
from app.config.project import NAME, require_name
from app.errors import Interrupted, UserError, described
from app.state import database, files, stages
from app.state.audit import Audit, Entry
from app.state.audit_head import Head
from app.state.home import database_url, home, make_private, private_file

CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTING, PROMOTED, NOT_PROMOTED = PROMOTIONS = ("promoting", "promote", "promote undone")
"""In the audit log: a promotion that begins, and how it ended."""
KEY_TAG = "raylway.key"
"""On a run: the key of its bundle, by which a restarted run is found again."""
STUDY_TAG, TRIAL_TAG = "raylway.study", "raylway.trial"
"""On the run of a sweep: the name of its study; on those below it: the number of the trial."""
IDENTITY_TAG = "raylway.identity"
"""On a version: its bundle's identity, by which the same bundle is not registered twice."""
CANDIDATE_TAG = "raylway.candidate"
"""On a version: the identity of its bundle before the gate's decision was added."""
SIGNATURE_TAG = "raylway.signature"
"""On a version: the signature of its manifest, base64."""
HEAD_TAG = "raylway.audit_head"
"""On a version: the audit log's newest entry (`app.state.audit_head.Head`) when the version was created."""
BUSY_TIMEOUT_S = 60
ALIAS_ACTIONS = ("register", "promote")
"""In the audit log: what gives aliases."""


@dataclass(frozen=True)
class Version:
    """A registered version with its bundle."""

    name: str
    number: str
    aliases: tuple[str, ...]
    identity: str
    """The SHA-256 of its bundle's manifest."""

    @property
    def path(self) -> Path:
        """The bundle's folder, which `resolve` and `find` have filled."""
        return copies.folder(self.identity)


class Outdated(UserError):
    """The champion changed between the gate's decision and the registration."""


def uri() -> str:
    """Where MLflow keeps its tables."""
    url = database_url("mlflow.db")
    # Several commands write at once; SQLite's driver would give up after 5 s.
    return f"{url}?timeout={BUSY_TIMEOUT_S}" if url.startswith("sqlite") else url


def client() -> MlflowClient:
    """A client of our MLflow, whose tables are made at the first call."""
    make_private(home() / "artifacts")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    file = home() / "mlflow.db"
    if not uri().startswith("sqlite"):
        _require_answer(uri())
    elif not file.exists():
        _make_tables(file)
    return MlflowClient(tracking_uri=uri(), registry_uri=uri())


@functools.cache
def _require_answer(url: str) -> None:
    """Raise what a first connection does: MLflow would try again for minutes, without a word."""
    with database.engine(url, poolclass=sqlalchemy.NullPool).connect():
        pass


def _make_tables(file: Path) -> None:
    """MLflow makes its tables in many steps, and a file with some of them is of no use to it."""
    with files.locked(file):
        if file.exists():
            return
        draft = private_file(files.private(file))
        SqlAlchemyStore(f"sqlite:///{draft}", str(home() / "artifacts")).engine.dispose()
        draft.rename(file)


class Run:
    """An MLflow run that a restarted training continues."""

    def __init__(self, client: MlflowClient, run_id: str, resumed: bool):
        self._client = client
        self.id = run_id
        self.resumed = resumed
        history = client.get_metric_history(run_id, "train_loss") if resumed else []
        self._logged = {metric.step for metric in history}

    def log_epoch(self, metrics: Mapping[str, float]) -> None:
        """The metrics of an epoch, unless they are there: a resumed training repeats its last one."""
        step = int(metrics["epoch"])
        if step in self._logged:
            return
        self._logged.add(step)
        now = int(time.time() * 1000)
        values = [Metric(_named(n), value, now, step) for n, value in metrics.items() if n != "epoch"]
        self._client.log_batch(self.id, metrics=values)

    def log_results(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self.id, metrics=[Metric(_named(name), value, now, 0) for name, value in metrics.items()]
        )
        for name, value in tags.items():
            self._client.set_tag(self.id, name, value)

    def log_bundle(self, path: Path) -> str:
        """Store a bundle with the run's artifacts, under a name of its own; returns its URI.

        It is written once: what is there already, and whole, stays as it is.
        """
        root = self._client.get_run(self.id).info.artifact_uri
        name = f"bundle-{identity(path)[:16]}"
        try:
            self._store(path, root, name)
        except UserError:
            raise
        except Exception as error:  # of whatever library MLflow reaches the store with
            raise UserError(
                f"the bundle must be stored at {root}, where RAYLWAY_STORE led in this project's first run, "
                f"but: {described(error)}. Make it reachable, and give the command again: nothing is lost"
            ) from error
        return f"{root}/{name}"

    def _store(self, path: Path, root: str, name: str) -> None:
        if (local := _local(root)) is not None:
            stages.place(local / name, lambda draft: manifest.copy(path, draft))
        elif _stored_manifest(f"{root}/{name}") != (path / manifest.MANIFEST).read_bytes():
            for file in verify(path)["files"]:
                self._client.log_artifact(self.id, str(path / file), name)
            # Last: a bundle without it was not uploaded to its end.
            self._client.log_artifact(self.id, str(path / manifest.MANIFEST), name)


@contextlib.contextmanager
def run(project: Project, key: str, *, fresh: bool = False) -> Iterator[Run]:
    """The MLflow run that makes the bundle with this key: the one there is, or a new one.

    It ends FINISHED, KILLED if somebody stopped it, or FAILED if the body raises otherwise; a process that
    is killed leaves it RUNNING.
    """
    ours = client()
    experiment_id = _experiment(ours, project.name)
    query = f"tags.`{KEY_TAG}` = '{key}'"
    found = ours.search_runs([experiment_id], query, ViewType.ACTIVE_ONLY, max_results=1)
    if found and not fresh:
        current = Run(ours, found[0].info.run_id, resumed=True)
        ours.update_run(current.id, status="RUNNING")
    else:
        created = ours.create_run(experiment_id, run_name=project.model.kind, tags={KEY_TAG: key})
        current = Run(ours, created.info.run_id, resumed=False)
        ours.log_batch(current.id, params=[Param(k, str(v)) for k, v in _parameters(project)])
    with _ending(ours, current.id):
        yield current


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is logged of a trial of a sweep."""

    number: int
    status: str
    """FINISHED, KILLED (stopped early) or FAILED, as MLflow calls it."""
    parameters: Mapping[str, Any]
    curves: Sequence[tuple[str, int, float]]
    """Metric, epoch and value."""
    values: Mapping[str, float]
    tags: Mapping[str, str]
    started: datetime | None
    ended: datetime | None


class SweepRuns:
    """The run of a study, and a nested run for each trial; written behind, so that no trial waits."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str):
        self.id = run_id
        self._client = client
        self._experiment = experiment_id
        query = f"tags.`mlflow.parentRunId` = '{run_id}'"
        found = client.search_runs([experiment_id], query, ViewType.ACTIVE_ONLY, max_results=50_000)
        # One that is not ended was being written when the process was killed.
        self._runs = {r.data.tags[TRIAL_TAG]: r.info for r in found if TRIAL_TAG in r.data.tags}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._written: list[Future[None]] = []

    def log(self, trial: Trial) -> None:
        """Have a finished trial logged, unless it is."""
        self._written.append(self._writer.submit(self._log, trial))

    def _log(self, trial: Trial) -> None:
        known = self._runs.get(str(trial.number))
        if known is not None and known.status != "RUNNING":
            return
        if known is None:
            tags = {"mlflow.parentRunId": self.id, TRIAL_TAG: str(trial.number), **trial.tags}
            known = self._client.create_run(
                self._experiment,
                start_time=_milliseconds(trial.started),
                run_name=f"trial {trial.number}",
                tags=tags,
            ).info
        at = _milliseconds(trial.ended)
        metrics = [Metric(_named(name), value, at, step) for name, step, value in trial.curves]
        metrics += [Metric(_named(name), value, at, 0) for name, value in trial.values.items()]
        params = [Param(key, str(value)) for key, value in trial.parameters.items()]
        for first in range(0, max(1, len(metrics)), 1000):  # MLflow takes no more at once
            self._client.log_batch(known.run_id, metrics[first : first + 1000], params if first == 0 else [])
        self._client.set_terminated(known.run_id, trial.status, at)

    def close(self) -> None:
        """Until all is written. Raises what went wrong."""
        self._writer.shutdown()
        for written in self._written:
            written.result()


def _milliseconds(time_: datetime | None) -> int:
    return int((time_ or datetime.now()).timestamp() * 1000)


@contextlib.contextmanager
def sweep(project: Project, study: str) -> Iterator[SweepRuns]:
    """The MLflow run of a study, the one there is or a new one; its trials are runs below it."""
    ours = client()
    experiment_id = _experiment(ours, project.name)
    query = f"tags.`{STUDY_TAG}` = '{study}'"
    found = ours.search_runs([experiment_id], query, ViewType.ACTIVE_ONLY, max_results=1)
    if found:
        run_id = found[0].info.run_id
        ours.update_run(run_id, status="RUNNING")
    else:
        run_id = ours.create_run(
            experiment_id, run_name=f"sweep {study}", tags={STUDY_TAG: study}
        ).info.run_id
    runs = SweepRuns(ours, experiment_id, run_id)
    with _ending(ours, run_id):
        try:
            yield runs
        finally:
            runs.close()


def _experiment(ours: MlflowClient, name: str) -> str:
    """The id of a project's experiment, which is made at the first call."""
    experiment = ours.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    artifacts = os.environ.get("RAYLWAY_STORE") or (home() / "artifacts").as_uri()
    try:
        # MLflow would note it for good, and find out when the first bundle is stored.
        get_artifact_repository(artifacts)
    except (MlflowException, ImportError) as error:
        raise UserError(
            f"RAYLWAY_STORE: must be a folder or URL of a store that MLflow has the means for; {artifacts}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    try:
        return ours.create_experiment(name, artifact_location=f"{artifacts}/{name}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return _experiment(ours, name)  # another process made it meanwhile


@contextlib.contextmanager
def _ending(ours: MlflowClient, run_id: str) -> Iterator[None]:
    """End a run FINISHED, KILLED if somebody stops it, or FAILED if the block raises otherwise."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        ours.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
        raise
    except BaseException:
        ours.set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))
        raise
    ours.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))


def _parameters(project: Project) -> Iterator[tuple[str, Any]]:
    yield "seed", project.seed
    for section in ("model", "training"):
        for key, value in getattr(project, section).model_dump().items():
            yield f"{section}.{key}", value


def _named(metric: str) -> str:
    """MLflow takes no @."""
    return metric.replace("@", "_at_")


def register(name: str, run_id: str, path: Path, uri: str) -> Version:
    """Register the bundle in a folder, which `Run.log_bundle` has stored at `uri`; or finish a registration
    that was interrupted. A bundle that is registered already keeps its version.

    The first version becomes the champion, a later one the challenger. Raises UserError if the gate did not
    let the bundle pass, and Outdated if the champion is not the one that it was compared with.
    """
    manifest = verify(path)
    require_passed(manifest, f"a version of {name}")
    ours = client()
    # The registry's tables hold nothing that would stop two versions or two aliases at once.
    with database.alone(f"registry-{name}"), Audit() as audit:
        _create_model(ours, name)
        _finish_promotion(audit, name)
        entry = _with_tag(name, IDENTITY_TAG, identity(path))
        if entry is None:
            champion = find(name, CHAMPION)
            judged = manifest["decision"].get("champion")
            if (champion and champion.identity) != (judged and judged["identity"]):
                raise Outdated(f"{name} has another champion than the one that this was compared with")
            tags = {
                IDENTITY_TAG: identity(path),
                CANDIDATE_TAG: manifest.get("candidate", ""),
                HEAD_TAG: str(audit.head() or ""),
                "raylway.data_version": manifest.get("data_version", ""),
            }
            entry = ours.create_model_version(name, uri, run_id=run_id, tags=tags)
        _finish(ours, audit, name, entry)
    return resolve(name, str(entry.version))


def _create_model(ours: MlflowClient, name: str) -> None:
    try:
        ours.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _finish(ours: MlflowClient, audit: Audit, name: str, entry: Any) -> None:
    """Give a new version its alias, unless that is done. Whoever gave aliases since it was created decided
    later, and is not overruled."""
    number = str(entry.version)
    head = entry.tags.get(HEAD_TAG)
    created = Head.parse(head) if head else None
    registered = audit.backwards(name, ("register",), since=created)
    if any(e.details["version"] == number for e in registered):
        return
    # That nobody gave an alias is proven by the whole log since then, not by a search for such entries.
    later = [e for e in audit.entries(name, since=created) if e.action in ALIAS_ACTIONS]
    aliases = ours.get_registered_model(name).aliases
    given = [alias for alias, version in aliases.items() if str(version) == number]
    alias = given[0] if given else None if later else CHALLENGER if CHAMPION in aliases else CHAMPION
    if alias and not given:
        ours.set_registered_model_alias(name, alias, number)
    details = {"version": number, "alias": alias, "identity": entry.tags[IDENTITY_TAG]}
    audit.add("register", name, details)


def registered_candidate(name: str, candidate: str) -> Version | None:
    """The version whose bundle had this identity before the gate's decision was added."""
    entry = _with_tag(name, CANDIDATE_TAG, candidate)
    return None if entry is None else resolve(name, str(entry.version))


def _with_tag(name: str, tag: str, value: str) -> Any:
    """MLflow's entry of the first version with a tag, or None."""
    return next((entry for entry in reversed(_entries(name)) if entry.tags.get(tag) == value), None)


def resolve(name: str, version: str) -> Version:
    """The version with a number or an alias; its bundle is fetched if it is elsewhere.

    Raises UserError if there is none, saying which there are.
    """
    require_name(name)
    found = find(name, version)
    if found is None:
        known = ", ".join(_described(v) for v in versions(name))
        hint = f"{name} has {known}" if known else f"{name} has no versions; train one with `raylway train`"
        shown = version if len(version) <= 40 else f"{version[:30]}..."
        raise UserError(f"no version {shown!r} of the model {name!r} is registered; {hint}")
    return found


def find(name: str, version: str) -> Version | None:
    """Like `resolve`, but None if there is none."""
    if not re.fullmatch(NAME, name) or not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", version):
        return None
    ours = client()
    try:
        if version.isdecimal():
            if len(version) > 9:  # more than the registry's tables hold
                return None
            found = ours.get_model_version(name, version)
        else:
            found = ours.get_model_version_by_alias(name, version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return Version(name, str(found.version), tuple(found.aliases), _kept(name, found))


def _kept(name: str, entry: Any) -> str:
    """Have a version's bundle among those that are kept here; returns its identity."""
    identity = entry.tags.get(IDENTITY_TAG)
    if identity is None or not copies.folder(identity).exists():
        fetched = _fetched(name, entry)
        if identity not in (None, fetched):
            raise UserError(
                f"{name} version {entry.version}: the bundle at {entry.source} is not the one that was "
                "registered; restore it, or train and register another version"
            )
        identity = fetched
    path = copies.require(identity)
    if signed := entry.tags.get(SIGNATURE_TAG):
        signature.put(path / manifest.MANIFEST, base64.b64decode(signed))
    return identity


def _fetched(name: str, entry: Any) -> str:
    """Fetch a version's bundle from MLflow's store; returns its identity."""
    local = _local(entry.source)
    try:
        if local is not None:
            return copies.keep(local).name
        with tempfile.TemporaryDirectory() as folder:
            fetched = mlflow.artifacts.download_artifacts(entry.source, dst_path=folder, tracking_uri=uri())
            return copies.keep(Path(fetched)).name
    except (BrokenBundle, MlflowException, OSError) as error:
        raise UserError(
            f"{name} version {entry.version}: its bundle cannot be fetched from {entry.source}: {error}"
        ) from None


def _local(uri: str) -> Path | None:
    """The folder that a file's URI or path names; None for a store elsewhere."""
    return Path(local_file_uri_to_path(uri)) if is_local_uri(uri) else None


def _stored_manifest(uri: str) -> bytes | None:
    """The manifest of a bundle in a store elsewhere; None if it is not there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = mlflow.artifacts.download_artifacts(f"{uri}/{manifest.MANIFEST}", dst_path=folder)
        except (MlflowException, OSError):
            return None
        return Path(file).read_bytes()


def versions(name: str) -> Sequence[Any]:
    """MLflow's entries of all versions of a model, the newest first. Raises UserError for a name none has."""
    require_name(name)
    ours = client()
    # Searching leaves the aliases out.
    return [ours.get_model_version(name, entry.version) for entry in _entries(name)]


def _entries(name: str) -> Sequence[Any]:
    """MLflow's entries of all versions, the newest first, without their aliases."""
    return client().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])


def promote(name: str, version: str, on_wait: Callable[[str], None] | None = None) -> Version:
    """Make a version the champion; if it was the challenger, there is none until the next one.

    `on_wait` is told who is waited for, if somebody else is changing the model's aliases. Raises UserError if
    there is no such version, or it did not pass the gate.
    """
    require_name(name)
    with database.alone(f"registry-{name}", on_wait), Audit() as audit:
        _finish_promotion(audit, name)
        chosen, before = resolve(name, version), _aliases(name).get(CHAMPION)
        require_passed(verify(chosen.path), f"{name} version {chosen.number}")
        # Written before the aliases change: what a kill leaves half done, whoever comes next finishes.
        audit.add(PROMOTING, name, {"version": chosen.number, "before": before})
        _finish_promotion(audit, name)
    return resolve(name, chosen.number)


def finish_promotion(audit: Audit, name: str) -> None:
    """Finish a promotion that was cut short. Raises Busy if somebody is changing the model's aliases."""
    if _unfinished(audit, name):
        with database.alone(f"registry-{name}", wait=False):
            _finish_promotion(audit, name)


def _finish_promotion(audit: Audit, name: str) -> None:
    """The steps of a promotion after its first entry; each may have been done before."""
    begun = _unfinished(audit, name)
    if begun is None:
        return
    ours, number, before = client(), begun.details["version"], begun.details["before"]
    aliases = _aliases(name)
    # Somebody has deleted the version, or given the alias to another one: theirs came later.
    if find(name, number) is None or aliases.get(CHAMPION) not in (before, number):
        audit.add(NOT_PROMOTED, name, begun.details, begun.who, expected=begun.number, among=PROMOTIONS)
        return
    ours.set_registered_model_alias(name, CHAMPION, number)
    if aliases.get(CHALLENGER) == number:
        ours.delete_registered_model_alias(name, CHALLENGER)
    audit.add(PROMOTED, name, begun.details, begun.who, expected=begun.number, among=PROMOTIONS)


def _unfinished(audit: Audit, name: str) -> Entry | None:
    last = audit.last(name, PROMOTIONS)
    return last if last is not None and last.action == PROMOTING else None


def _aliases(name: str) -> dict[str, str]:
    """The versions' numbers by alias."""
    return {alias: str(number) for alias, number in client().get_registered_model(name).aliases.items()}


def sign(name: str, version: str, key: Path) -> Version:
    """Sign a version's bundle with the private key in a file.

    Raises UserError if the bundle is broken, or the file holds no such key.
    """
    chosen = resolve(name, version)
    verify(chosen.path)
    signed = signature.signed((chosen.path / manifest.MANIFEST).read_bytes(), key)
    with database.alone(f"registry-{name}"), Audit() as audit:
        tag = base64.b64encode(signed).decode()
        client().set_model_version_tag(name, chosen.number, SIGNATURE_TAG, tag)
        audit.add("sign", name, {"version": chosen.number})
    return resolve(name, chosen.number)


def _described(entry: Any) -> str:
    aliases = f" ({', '.join(entry.aliases)})" if entry.aliases else ""
    return f"{entry.version}{aliases}"
