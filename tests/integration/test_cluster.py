"""Start and stop real clusters, each with its own state directory."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import ray

from app.cluster import guardian
from app.cluster import session as session_module
from app.cluster.local import UpResult, down, up
from app.cluster.ports import free_ports
from app.cluster.session import session
from app.errors import UserError
from tests.bundles import build
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration

RAY = Path(sys.executable).with_name("ray")


def at(home: Path, call):
    """The result of `call()` with `home` as the state directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(home))
        patch.delenv("RAY_ADDRESS", raising=False)
        return call()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    assert not ray.is_initialized(), "these tests must run before those that join a cluster in this process"
    home = tmp_path_factory.mktemp("home")
    result = at(home, up)
    yield home, result
    at(home, down)


def shell_environment(result: UpResult) -> dict[str, str]:
    """The environment of a shell after the exports that `up` prints; they do not include RAYLWAY_HOME."""
    exports = "\n".join(line for line in str(result).splitlines() if line.startswith(("export", "unset")))
    printed = subprocess.run(["bash", "-c", f"{exports}\nenv -0"], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in printed.stdout.split("\0") if line)


def submit(result: UpResult, directory: Path, *entrypoint: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", directory, "--", *entrypoint],
        env=shell_environment(result),
        capture_output=True,
        text=True,
        timeout=180,
    )


def members(result: UpResult) -> list[psutil.Process]:
    head = psutil.Process(result.cluster.pid)
    return [head, *head.children(recursive=True)]


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()
    except OSError:
        return False
    return True


def test_a_job_runs_with_this_python_and_home_and_joins_its_cluster(running, tmp_path):
    home, result = running
    (tmp_path / "job.py").write_text(
        "import os, sys\n"
        "from app.cluster.session import session\n"
        "with session():\n"
        "    import ray\n"
        "    print(ray.get_runtime_context().gcs_address, sys.executable)\n"
        "    seen = ray.remote(lambda: (os.environ['RAYLWAY_HOME'], os.nice(0)))\n"
        "    print('worker', ray.get(seen.remote()))\n"
    )
    process = submit(result, tmp_path, "python", "job.py")
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{result.cluster.address} {sys.executable}" in process.stdout
    assert f"worker ({str(home)!r}, 0)" in process.stdout


def test_the_jobs_api_refuses_requests_without_the_token(running):
    _, result = running
    url = f"{result.cluster.dashboard_url}/api/jobs/"
    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        assert httpx.get(url, headers=headers, trust_env=False).status_code in (401, 403)


def test_the_ports_of_a_cluster_listen_on_loopback_only(running):
    _, result = running
    sockets = [socket for process in members(result) for socket in process.net_connections("tcp")]
    hosts = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_a_second_up_returns_the_running_cluster(running):
    home, result = running
    again = at(home, up)
    assert not again.started
    assert again.cluster == result.cluster


def test_a_session_joins_the_running_cluster_and_leaves_it_running(running):
    home, result = running

    def join():
        with session():
            import ray

            assert ray.get_runtime_context().gcs_address == result.cluster.address

    before = dict(os.environ)
    at(home, join)
    assert result.cluster.alive()
    assert dict(os.environ) == before


def test_a_session_without_a_running_cluster_starts_one_and_stops_it(running, tmp_path, monkeypatch):
    _, result = running
    create, owned = session_module.create_directory, []
    monkeypatch.setattr(session_module, "create_directory", lambda: owned.append(create()) or owned[0])
    children = set(psutil.Process().children(recursive=True))

    def start():
        with session():
            import ray

            assert ray.get_runtime_context().gcs_address != result.cluster.address
            assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == 0

    at(tmp_path, start)
    assert [directory.path.exists() for directory in owned] == [False]
    assert all(gone(child) for child in set(psutil.Process().children(recursive=True)) - children)


def test_a_session_refuses_a_cluster_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(UserError, match="RAY_ADDRESS"), session():
        pass


HELLO = """
import sys
from app.cluster.session import session

with session():
    from ray import serve

    @serve.deployment
    class Hello:
        async def __call__(self, request):
            return "hello"

    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Hello.bind())
"""


def test_down_stops_a_cluster_with_its_applications_and_no_other_cluster(running, tmp_path):
    _, other = running
    (home := tmp_path / "home").mkdir()
    (port,) = free_ports(1)
    result = at(home, up)
    try:
        environment = {**os.environ, "RAYLWAY_HOME": str(home)}
        subprocess.run([sys.executable, "-c", HELLO, str(port)], cwd=ROOT, env=environment, check=True)
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text == "hello"
        processes = members(result)
        assert any(process.name() == "haproxy" for process in processes)
        # `down` finds remaining processes by their mark.
        assert {process.environ().get(guardian.MARK) for process in processes} == {result.cluster.directory}
    finally:
        stopped = at(home, down)
    assert stopped == result.cluster
    assert [process for process in processes if not gone(process)] == []
    assert not listens(result.cluster.dashboard_url)
    assert not listens(f"http://127.0.0.1:{port}")
    assert not Path(result.cluster.directory).exists()
    assert sorted(path.name for path in home.iterdir()) == ["auth_token", "cluster.lock", "logs"]
    assert at(home, down) is None
    assert other.cluster.alive()
    assert listens(other.cluster.dashboard_url)


def test_up_replaces_a_head_that_was_killed(tmp_path):
    first = at(tmp_path, up)
    processes = members(first)
    os.kill(first.cluster.pid, signal.SIGKILL)
    psutil.wait_procs(processes[:1], timeout=30)
    assert not first.cluster.alive()
    # The guardian removes the rest of the cluster.
    wait_until(lambda: not Path(first.cluster.directory).exists() and all(map(gone, processes)))
    second = at(tmp_path, up)
    try:
        assert second.started
        assert second.cluster.pid != first.cluster.pid
    finally:
        at(tmp_path, down)


def wait_until(condition, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s"
        time.sleep(0.05)


def marked(directory: str) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(guardian.MARK) == directory:
                processes.append(process)
    return processes


def test_replicas_answer_haproxy_only_and_the_endpoint_ends_when_its_command_is_killed(tmp_path):
    """Covers the time from the first answer of the port until the cluster is gone."""
    (port,) = free_ports(1)
    variants = {"champion": {"version": "1", "weight": 1}}
    serving = {"host": "::1", "port": port, "num_cpus": 0.1, "variants": variants}
    command = [
        sys.executable,
        "-m",
        "tests.endpoint",
        build(tmp_path / "bundle", seed=1),
        json.dumps(serving),
    ]
    environment = {**os.environ, "RAYLWAY_HOME": str(tmp_path / "home")}
    served = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    answers, url = [], f"http://[::1]:{port}"
    try:
        with httpx.Client(trust_env=False, timeout=30) as client:

            def ready() -> bool:
                assert served.poll() is None
                with contextlib.suppress(httpx.TransportError):  # HAProxy does not listen yet
                    answers.append(client.get(f"{url}/v2/health/ready"))
                return bool(answers) and answers[-1].status_code == 200

            wait_until(ready)
            statuses = [answer.status_code for answer in answers]
            assert set(statuses[:-1]) == {503}
            assert all(answer.json()["error"] for answer in answers[:-1])
            assert served.stdout.readline().strip() == url
            (directory,) = {
                mark
                for process in psutil.Process(served.pid).children(recursive=True)
                if (mark := process.environ().get(guardian.MARK))
            }
            members = marked(directory)
            assert any(process.name() == "haproxy" for process in members)
            names = ("ServeReplica", "Proxy")
            replicas = [p for p in members if any(name in p.name() for name in names)]
            ports = [
                socket.laddr.port
                for process in replicas
                for socket in process.net_connections("tcp")
                if socket.status == psutil.CONN_LISTEN and socket.laddr.ip == "127.0.0.1"
            ]
            assert len(ports) >= 3, "two replicas and Serve's own proxy"
            for path in ("/v2/models/smoke", "/-/healthz", "/-/routes", "/"):
                assert client.get(url + path).status_code != 403
                for headers in ({}, {"x-raylway-gateway": "x"}):
                    for replica_port in ports:
                        response = client.get(f"http://127.0.0.1:{replica_port}{path}", headers=headers)
                        assert response.json() == {"error": "forbidden", "violations": []}
    finally:
        served.kill()
        served.communicate()
    wait_until(lambda: not Path(directory).exists() and not marked(directory))
    assert all(map(gone, members))
    assert not listens(url)
