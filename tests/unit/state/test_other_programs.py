"""Other programs on the state of Raylway: the tools of MLflow and Optuna, and tools that copy files."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import mlflow
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from app.bundle import copies
from app.bundle.bundle import Bundle
from app.bundle.manifest import identity_of, seal
from app.cluster.ports import free_ports
from app.errors import UserError
from app.registry import connection, flavor, promotion, registration, runs, versions
from app.tuning import study as studies
from tests.bundles import PASSED, build
from tests.versions import project, registered

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    paths = [build(folder / f"seed-{seed}", seed) for seed in range(2)]
    for path in paths:
        flavor.write(path)
        seal(path, {"decision": PASSED})
    return paths


@pytest.fixture(scope="module", autouse=True)
def home(home_with_mlflow):
    """One state directory for the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home_with_mlflow}/mlflow.db")
        yield home_with_mlflow


def source(name: str) -> Path:
    """The folder in which MLflow's tools find a model's champion."""
    entry = connection.client().get_model_version_by_alias(name, versions.CHAMPION)
    return Path(entry.source.removeprefix("file://"))


def intact_champion(name: str) -> versions.Version:
    """The champion, which must be unchanged."""
    version = versions.resolve(name, versions.CHAMPION)
    assert identity_of(version.path) == version.identity
    Bundle(version.path).check_example()
    return version


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def run(*command: str | Path) -> str:
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_mlflow_opens_the_champion_and_writes_a_file_beside_it(bundles, home):
    """Loads the champion as the README shows, and then registers the next candidate."""
    registered("opened", bundles[0])
    mlflow.set_tracking_uri(connection.uri())
    mlflow.set_registry_uri(connection.uri())
    mlflow.onnx.load_model("models:/opened@champion")
    written = names(source("opened")) - names(bundles[0])
    assert written, "MLflow no longer writes there; this test is obsolete"
    intact_champion("opened")
    shutil.rmtree(home / "bundles")  # as on another machine, where the bundle is fetched
    assert names(intact_champion("opened").path) == names(bundles[0])
    second = registered("opened", bundles[1], "second")
    assert (second.number, second.aliases) == ("2", (versions.CHALLENGER,))


def test_a_version_survives_the_commands_of_mlflow(bundles, home, tmp_path):
    registered("commanded", bundles[0])
    run_id = connection.client().get_model_version("commanded", "1").run_id
    path = source("commanded").name
    run(BIN / "mlflow", "runs", "describe", "--run-id", run_id)
    run(BIN / "mlflow", "artifacts", "list", "--run-id", run_id, "--artifact-path", path)
    download = ("artifacts", "download", "--run-id", run_id, "--artifact-path", path)
    run(BIN / "mlflow", *download, "--dst-path", tmp_path)
    Bundle(tmp_path / path).check_example()
    intact_champion("commanded")
    # A deleted run is collected with its artifacts; its registered version still works.
    run(BIN / "mlflow", "runs", "delete", "--run-id", run_id)
    run(BIN / "mlflow", "gc", "--backend-store-uri", connection.uri())
    assert not source("commanded").exists()
    assert promotion.promote("commanded", "1") == intact_champion("commanded")
    assert registered("commanded", bundles[0], "again").number == "1"
    shutil.rmtree(home / "bundles")
    with pytest.raises(UserError, match="commanded version 1: its bundle cannot be fetched from"):
        versions.resolve("commanded", "1")


def test_a_copy_of_the_state_directory_works_in_its_new_place(bundles, home, tmp_path, monkeypatch):
    original = registered("copied", bundles[0])
    for folder in (original.path, source("copied")):
        for name in (".DS_Store", "model.onnx~", ".model.onnx.swp", "hook.py"):
            (folder / name).write_text("raise SystemExit")
        run("touch", *folder.iterdir())
    run("cp", "-a", home, tmp_path / "restored")
    intact_champion("copied")
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path / "restored"))
    restored = intact_champion("copied")
    assert restored == original
    assert restored.path == tmp_path / "restored" / "bundles" / original.identity


def test_a_sweep_continues_after_a_user_changed_its_study_in_optuna_dashboard(home):
    rate = {"rate": FloatDistribution(0.0, 1.0)}

    def opened():
        return studies.opened("watched", ["maximize"], {"project": {}}, print)

    with opened() as study:
        study.finish(study.begin({"rate": 0.5}, rate, "a"), TrialState.COMPLETE, [0.8], {"epochs": 1})
        study.begin({"rate": 0.6}, rate, "b")
    port = free_ports(1)[0]
    command = [BIN / "optuna-dashboard", studies.url(), "--port", str(port), "--host", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as dashboard:
        try:
            url = f"http://127.0.0.1:{port}/api"
            request(f"{url}/studies")
            study_id = studies.load("watched")._study_id
            request(f"{url}/studies/{study_id}")
            request(f"{url}/studies/{study_id}/note", "PUT", b'{"body": "mine", "version": 1}')
            trials = {trial.number: trial._trial_id for trial in studies.load("watched").trials}
            request(f"{url}/trials/{trials[1]}/user-attrs", "POST", b'{"user_attrs": {"mine": 1}}')
            # A user ends a trial that waits to be resumed.
            request(f"{url}/trials/{trials[1]}/tell", "POST", b'{"state": "Fail"}')
            with opened() as study:
                assert [t.state for t in study.trials()] == [TrialState.COMPLETE, TrialState.FAIL]
                number = study.begin({"rate": 0.7}, rate, "c")
                study.report(number, 1, 0.7)
                study.finish(number, TrialState.COMPLETE, [0.9], {"epochs": 1})
            assert [t.value for t in studies.load("watched").trials] == [0.8, None, 0.9]
        finally:
            dashboard.terminate()


def request(url: str, method: str = "GET", body: bytes | None = None) -> None:
    """Send a request to the dashboard, which may still be starting."""
    message = urllib.request.Request(url, body, {"content-type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(900):
        try:
            with opener.open(message, timeout=30) as response:
                assert response.status < 300
                return
        except ConnectionError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


class Store(http.server.BaseHTTPRequestHandler):
    """An artifact store in a folder, with the HTTP interface of MLflow's server."""

    folder: Path
    """Set in the class of each server."""

    def _file(self) -> Path:
        return self.folder / self.path.removeprefix(f"{STORE}/")

    def do_PUT(self) -> None:
        self._file().parent.mkdir(parents=True, exist_ok=True)
        self._file().write_bytes(self.rfile.read(int(self.headers["content-length"])))
        self._answer(200, b"{}")

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        if url.query:
            listed = self.folder / urllib.parse.parse_qs(url.query)["path"][0]
            files = sorted(listed.iterdir()) if listed.is_dir() else []
            listing = [{"path": f.name, "is_dir": f.is_dir(), "file_size": f.stat().st_size} for f in files]
            self._answer(200, json.dumps({"files": listing}).encode())
        elif self._file().is_file():
            self._answer(200, self._file().read_bytes())
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


STORE = "/api/2.0/mlflow-artifacts/artifacts"


@pytest.fixture
def store(tmp_path):
    """The URL of a remote store."""
    handler = type("Handler", (Store,), {"folder": tmp_path / "store"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{STORE}/raylway"
        server.shutdown()


def test_a_remote_store_keeps_bundles_and_an_interrupted_upload_is_repeated(
    bundles, home, store, monkeypatch
):
    monkeypatch.setenv("RAYLWAY_STORE", store)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    first = registered("elsewhere", bundles[0])
    entry = connection.client().get_model_version("elsewhere", "1")
    assert entry.source.startswith(store)
    assert versions.resolve("elsewhere", "1") == first, "each call returns the same folder"
    inode = first.path.stat().st_ino
    versions.resolve("elsewhere", "1")
    assert first.path.stat().st_ino == inode, "the bundle is fetched once"
    shutil.rmtree(home / "bundles")  # as on another machine
    assert intact_champion("elsewhere") == first
    # An interrupted upload: the manifest, which comes last, is missing.
    client, run_id = connection.client(), entry.run_id
    with runs.run(project("elsewhere"), "second") as run:
        sealed = copies.keep(bundles[1], {"decision": {**PASSED, "champion": {"identity": first.identity}}})
        name = f"bundle-{identity_of(sealed)[:16]}"
        client.log_artifact(run.id, str(sealed / "schema.json"), name)
        second = registration.register("elsewhere", run.id, sealed, run.log_bundle(sealed))
    assert run_id != run.id
    shutil.rmtree(home / "bundles")
    Bundle(versions.resolve("elsewhere", second.number).path).check_example()
