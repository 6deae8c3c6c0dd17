"""A real PostgreSQL server holds the studies and MLflow's tables."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import sqlalchemy

from app import registry
from app.errors import UserError
from app.tuning import study as studies
from app.tuning import tuner
from app.tuning.progress import Progress
from app.tuning.space import Space
from tests.integration.test_sweep import NO_SCHEDULER, SMOKE, project, run, states

pytestmark = pytest.mark.integration


class Server:
    """A PostgreSQL server on a socket in a folder of its own."""

    def __init__(self, programs: Path, folder: Path):
        self._programs = programs
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        self.folder = folder
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "raylway")
        self.start()
        engine = sqlalchemy.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("CREATE DATABASE raylway"))
        engine.dispose()

    def url(self, database: str = "raylway") -> str:
        return f"postgresql+psycopg://raylway@/{database}?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-o", options, "-l", "/dev/null", "start")

    def stop(self) -> None:
        """As a crash does."""
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._programs / program, *arguments]
        subprocess.run(command, check=True, user=self._user, cwd="/", stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = [Path(p).parent for p in [shutil.which("initdb")] if p]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="raylway-", dir="/tmp") as name:  # sockets have short paths
        started = Server(found[0].resolve(), Path(name))
        yield started
        started.stop()


@pytest.fixture
def database(server, ray_cluster, monkeypatch):
    """`$RAYLWAY_DATABASE_URL`, as people write it."""
    url = server.url().replace("postgresql+psycopg", "postgresql")
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", url)
    return url


def test_the_command_keeps_the_study_and_mlflow_in_one_database(database, raylway):
    done = raylway("sweep", SMOKE, "--trials", "3", "--set", "sweep.study=pg", RAYLWAY_DATABASE_URL=database)
    assert done.returncode == 0, done.stdout + done.stderr
    study = studies.load("pg")
    assert len(study.trials) == 3
    runs = registry.client().search_runs(["1"], "tags.`raylway.trial` != ''")
    assert len(runs) == 3


def test_a_server_that_crashes_and_comes_back_loses_nothing(database, server):
    swept = project("crash", trials=6, scheduler=NO_SCHEDULER)
    crashed = threading.Event()

    def watch(progress: Progress) -> None:
        if len(progress.trials) == 2 and not crashed.is_set():
            crashed.set()
            server.stop()
            threading.Timer(5, server.start).start()

    notes: list[str] = []
    progress = tuner.run(swept, watch, notes.append)
    assert states(progress) == ["COMPLETE"] * 6
    assert any("does not answer" in note for note in notes)
    trials = studies.load("crash").trials
    assert [trial.number for trial in trials] == list(range(6))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}


def test_two_sweeps_of_one_study_cannot_run_at_once(database, raylway):
    swept = project("held")
    with studies.opened("held", ["maximize"], tuner._facts(Space(swept)), print):
        with pytest.raises(UserError, match="is being swept"):
            run(swept)
        done = raylway("sweep", SMOKE, "--set", "sweep.study=held", RAYLWAY_DATABASE_URL=database)
        assert done.returncode == 2
        assert "is being swept" in done.stderr
    assert len(run(swept).trials) == 3


def test_a_server_that_is_not_there_is_said(database, server, monkeypatch):
    monkeypatch.setattr(studies, "WAIT_S", 2.0)
    server.stop()
    try:
        with pytest.raises(UserError, match="the database of studies has not answered"):
            run(project("away"))
    finally:
        server.start()
