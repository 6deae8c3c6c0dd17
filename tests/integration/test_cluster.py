"""Real clusters, started and stopped. Each has a state directory of its own."""

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
from app.cluster.local import Up, down, up
from app.cluster.ports import free_ports
from app.cluster.session import session
from app.errors import UserError
from tests.bundles import build
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration

RAY = Path(sys.executable).with_name("ray")


def at(home: Path, do):
    """`do()` with `home` as the state directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(home))
        patch.delenv("RAY_ADDRESS", raising=False)
        return do()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    assert not ray.is_initialized(), "these tests come before those that join a cluster in this process"
    home = tmp_path_factory.mktemp("home")
    answer = at(home, up)
    yield home, answer
    at(home, down)


def shell_environment(answer: Up) -> dict[str, str]:
    """A user's shell after the printed exports, run by a real shell; RAYLWAY_HOME is not among them."""
    exports = "\n".join(line for line in str(answer).splitlines() if line.startswith(("export", "unset")))
    printed = subprocess.run(["bash", "-c", f"{exports}\nenv -0"], capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in printed.stdout.split("\0") if line)


def submit(answer: Up, directory: Path, *entrypoint: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", directory, "--", *entrypoint],
        env=shell_environment(answer),
        capture_output=True,
        text=True,
        timeout=180,
    )


def members(answer: Up) -> list[psutil.Process]:
    head = psutil.Process(answer.cluster.pid)
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


def test_a_job_runs_with_our_python_and_home_and_joins_its_cluster(running, tmp_path):
    home, answer = running
    (tmp_path / "job.py").write_text(
        "import os, sys\n"
        "from app.cluster.session import session\n"
        "with session():\n"
        "    import ray\n"
        "    print(ray.get_runtime_context().gcs_address, sys.executable)\n"
        "    seen = ray.remote(lambda: (os.environ['RAYLWAY_HOME'], os.nice(0)))\n"
        "    print('worker', ray.get(seen.remote()))\n"
    )
    ran = submit(answer, tmp_path, "python", "job.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{answer.cluster.address} {sys.executable}" in ran.stdout
    assert f"worker ({str(home)!r}, 0)" in ran.stdout


def test_a_job_that_fails_makes_submit_fail(running, tmp_path):
    _, answer = running
    assert submit(answer, tmp_path, "python", "-c", "raise SystemExit(2)").returncode != 0


def test_the_jobs_api_refuses_whoever_has_no_token(running):
    _, answer = running
    url = f"{answer.cluster.dashboard_url}/api/jobs/"
    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        assert httpx.get(url, headers=headers, trust_env=False).status_code in (401, 403)


def test_its_own_ports_listen_on_loopback_only(running):
    _, answer = running
    sockets = [each for process in members(answer) for each in process.net_connections("tcp")]
    hosts = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
    assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_up_again_finds_it(running):
    home, answer = running
    again = at(home, up)
    assert not again.started
    assert again.cluster == answer.cluster


def test_session_joins_it_and_leaves_it_running(running):
    home, answer = running

    def join():
        with session():
            import ray

            assert ray.get_runtime_context().gcs_address == answer.cluster.address

    before = dict(os.environ)
    at(home, join)
    assert answer.cluster.alive()
    assert dict(os.environ) == before


def test_session_starts_its_own_where_none_is_up_and_leaves_nothing(running, tmp_path, monkeypatch):
    _, answer = running
    hold, held = session_module.hold, []
    monkeypatch.setattr(session_module, "hold", lambda: held.append(hold()) or held[0])
    children = set(psutil.Process().children(recursive=True))

    def start():
        with session():
            import ray

            assert ray.get_runtime_context().gcs_address != answer.cluster.address
            assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == 0

    at(tmp_path, start)
    assert [each.directory.exists() for each in held] == [False]
    assert all(gone(each) for each in set(psutil.Process().children(recursive=True)) - children)


def test_session_says_when_the_cluster_to_join_does_not_answer(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(UserError, match="RAY_ADDRESS"), session():
        pass


def test_down_ends_an_application_with_its_cluster_and_no_other_cluster(running, tmp_path):
    _, other = running
    (home := tmp_path / "home").mkdir()
    (work := tmp_path / "work").mkdir()
    (port,) = free_ports(1)
    (work / "job.py").write_text(
        "from app.cluster.session import session\n"
        "with session():\n"
        "    from ray import serve\n"
        "    @serve.deployment\n"
        "    class Hello:\n"
        "        async def __call__(self, request):\n"
        "            return 'hello'\n"
        f"    serve.start(http_options=dict(host='127.0.0.1', port={port}))\n"
        "    serve.run(Hello.bind())\n"
    )
    answer = at(home, up)
    try:
        ran = submit(answer, work, "python", "job.py")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text == "hello"
        processes = members(answer)
        assert any(each.name() == "haproxy" for each in processes)
        # What `down` finds stragglers by.
        assert {each.environ().get(guardian.MARK) for each in processes} == {answer.cluster.directory}
    finally:
        stopped = at(home, down)
    assert stopped == answer.cluster
    assert [each for each in processes if not gone(each)] == []
    assert not listens(answer.cluster.dashboard_url)
    assert not listens(f"http://127.0.0.1:{port}")
    assert not Path(answer.cluster.directory).exists()
    assert sorted(each.name for each in home.iterdir()) == ["auth_token", "cluster.lock", "logs"]
    assert at(home, down) is None
    assert other.cluster.alive()
    assert listens(other.cluster.dashboard_url)


def test_a_head_that_was_killed_is_found_dead_and_replaced(tmp_path):
    first = at(tmp_path, up)
    processes = members(first)
    os.kill(first.cluster.pid, signal.SIGKILL)
    psutil.wait_procs(processes[:1], timeout=30)
    assert not first.cluster.alive()
    # By its guardian.
    wait_until(lambda: not Path(first.cluster.directory).exists() and all(map(gone, processes)))
    second = at(tmp_path, up)
    try:
        assert second.started
        assert second.cluster.pid != first.cluster.pid
    finally:
        at(tmp_path, down)


def wait_until(true, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def marked(directory: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(guardian.MARK) == directory:
                found.append(process)
    return found


def test_what_a_killed_command_served_ends_and_no_replica_answered_a_stranger(tmp_path):
    """From the first moment that the port listens to seconds after the command was killed."""
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
                with contextlib.suppress(httpx.TransportError):  # nobody listens yet
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
            assert any(each.name() == "haproxy" for each in members)
            replicas = [each for each in members if "ServeReplica" in each.name() or "Proxy" in each.name()]
            ports = [
                each.laddr.port
                for process in replicas
                for each in process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN and each.laddr.ip == "127.0.0.1"
            ]
            assert len(ports) >= 3, "both replicas and Serve's own proxy"
            for path in ("/v2/models/smoke", "/-/healthz", "/-/routes", "/"):
                assert client.get(url + path).status_code != 403
                for stranger in ({}, {"x-raylway-front": "x"}):
                    for each in ports:
                        answered = client.get(f"http://127.0.0.1:{each}{path}", headers=stranger)
                        assert answered.json() == {"error": "forbidden", "violations": []}
    finally:
        served.kill()
        served.communicate()
    wait_until(lambda: not Path(directory).exists() and not marked(directory))
    assert all(map(gone, members))
    assert not listens(url)
