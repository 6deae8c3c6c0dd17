import hmac
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import yaml

from app.cluster import guardian, local, session
from app.cluster.ports import free_block
from app.cluster.record import Cluster, read_record
from app.cluster.session import ensure_token, local_environment
from app.errors import UserError
from app.state import home

CONFIG = Path(__file__).parents[3] / "cluster.yaml"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    for name in (*session.FLAGS, "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def bystander():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def record(state: Path, pid: int, created_s: float, directory: Path) -> Cluster:
    cluster = Cluster(
        address="127.0.0.1:1", dashboard_url="http://127.0.0.1:1", pid=pid, created_s=created_s,
        token_path=str(state / "auth_token"), directory=str(directory),
    )  # fmt: skip
    (state / "cluster.json").write_text(json.dumps(asdict(cluster)))
    return cluster


def test_the_users_environment_overrides_the_flags(monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "7")
    assert session.environment().items() >= (session.FLAGS | {"RAY_worker_niceness": "7"}).items()


@pytest.mark.parametrize(
    ("name", "value", "absolute"),
    [
        ("RAYLWAY_STORE", "artifacts", "{cwd}/artifacts"),
        ("RAYLWAY_STORE", "/srv/artifacts", "/srv/artifacts"),
        ("RAYLWAY_STORE", "s3://bucket/a", "s3://bucket/a"),
        ("RAYLWAY_STORE", "file:///srv/a", "file:///srv/a"),
        ("RAYLWAY_DATABASE_URL", "sqlite:///a.db", "sqlite:///{cwd}/a.db"),
        ("RAYLWAY_DATABASE_URL", "sqlite:////srv/a.db", "sqlite:////srv/a.db"),
        ("RAYLWAY_DATABASE_URL", "postgresql:///a", "postgresql:///a"),
        ("RAYLWAY_DATABASE_URL", "postgresql://host/a", "postgresql://host/a"),
    ],
)
def test_paths_in_the_environment_are_absolute(monkeypatch, tmp_path, name, value, absolute):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    assert session.environment()[name] == absolute.format(cwd=tmp_path)


def test_the_environment_has_this_python_and_the_token_of_the_state_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYLWAY_HOME", "state")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "overrides the file")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    environment = session.environment()
    assert environment["RAYLWAY_HOME"] == str(tmp_path / "state")
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "state" / "auth_token")
    assert "RAY_AUTH_TOKEN" not in environment


def test_sockets_of_a_local_cluster_fit_the_kernels_limit():
    owned = guardian.create_directory()
    directory = owned.path
    try:
        # Serve adds the node's id, 56 digits, to the path; HAProxy binds a name with its pid first.
        path = Path(local_environment(directory)["RAY_SERVE_HAPROXY_SOCKET_PATH"])
        assert len(f"{path.parent}/{'0' * 56}/{path.name}.4194304.tmp") <= 107
    finally:
        owned.destroy()


def test_local_clusters_share_no_port_and_no_secret(tmp_path):
    names = [
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
        home.GATEWAY_SECRET_VARIABLE,
    ]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        blocks = {free_block(500) for _ in range(200)}
        assert not any(first <= server.getsockname()[1] < first + 500 for first in blocks)
    assert len(blocks) > 10
    one, other = (local_environment(tmp_path / name) for name in ("one", "other"))
    assert all(one[name] for name in names)
    assert one[home.GATEWAY_SECRET_VARIABLE] != other[home.GATEWAY_SECRET_VARIABLE]
    folders = [environment[home.GATEWAY_FOLDER_VARIABLE] for environment in (one, other)]
    assert folders == [str(tmp_path / "one"), str(tmp_path / "other")]


def test_a_block_has_no_port_that_is_in_use(monkeypatch):
    first = free_block(500)
    with socket.create_server(("127.0.0.1", first + 7)):
        assert first not in {free_block(500) for _ in range(300)}


def test_the_token_is_created_once_and_only_its_owner_can_read_it(state):
    path = ensure_token()
    token = path.read_text()
    assert len(token) == 64
    path.chmod(0o644)
    assert ensure_token().read_text() == token
    assert path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in state.iterdir()] == ["auth_token"]


def test_down_returns_none_if_nothing_is_up():
    assert local.down() is None


def test_down_removes_the_record_of_a_dead_cluster(state, bystander):
    dead = psutil.Process(bystander.pid)
    record(state, bystander.pid, dead.create_time(), state / "gone")
    bystander.kill()
    bystander.wait()
    assert local.down() is None
    assert read_record() is None


def test_down_never_kills_another_process_with_the_recorded_pid(state, bystander):
    created_s = psutil.Process(bystander.pid).create_time()
    assert record(state, bystander.pid, created_s, state / "gone").alive()
    recycled = record(state, bystander.pid, created_s - 60, state / "gone")
    assert not recycled.alive()
    assert local.down() is None
    assert read_record() is None
    assert bystander.poll() is None


def test_up_returns_the_running_cluster(state, bystander, monkeypatch):
    record(state, bystander.pid, psutil.Process(bystander.pid).create_time(), state / "gone")
    result = local.up()
    assert not result.started
    assert "already up: http://127.0.0.1:1" in str(result)
    assert f"RAY_AUTH_TOKEN_PATH={shlex.quote(f'{state}/auth_token')}" in str(result)
    assert "unset" not in str(result)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert "unset RAY_AUTH_TOKEN" in str(result)


def test_cluster_yaml_passes_rays_validation():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(CONFIG.read_text()))
    validate_config(config)
    assert config["available_node_types"]["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {
        "MarketType": "spot"
    }


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_nodes_start_with_the_flags(commands, tmp_path):
    """Run the command of cluster.yaml with a `ray` that prints its environment."""
    stub = tmp_path / "raylway" / ".venv" / "bin" / "ray"
    stub.parent.mkdir(parents=True)
    stub.write_text('#!/bin/sh\necho "$@"\nenv -0\n')
    stub.chmod(0o755)
    (stub.parent / "python").symlink_to(sys.executable)
    for name in ("pyvenv.cfg", "lib"):
        (stub.parents[1] / name).symlink_to(Path(sys.prefix) / name)
    (tmp_path / "raylway" / "app").symlink_to(CONFIG.parent / "app")
    (tmp_path / ".raylway").mkdir()
    (tmp_path / ".raylway" / "auth_token").write_text("the token\n")
    (tmp_path / ".raylway" / "cluster.env").write_text("RAYLWAY_DATABASE_URL=db\nRAYLWAY_STORE=s3://bucket\n")
    command = yaml.safe_load(CONFIG.read_text())[commands][-1]
    ran = subprocess.run(
        ["bash", "-c", command],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "192.0.2.1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    arguments, _, printed = ran.stdout.partition("\n")
    environment = dict(line.split("=", 1) for line in printed.split("\0") if line)
    assert arguments.startswith("start ")
    assert "--head" in arguments or "--address=192.0.2.1:6379" in arguments
    assert environment.items() >= session.FLAGS.items()
    assert environment["RAYLWAY_HOME"] == f"{tmp_path}/.raylway"
    assert environment["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.raylway/auth_token"
    secret = hmac.new(b"the token", home.GATEWAY_SECRET_VARIABLE.encode(), "sha256").hexdigest()
    assert environment[home.GATEWAY_SECRET_VARIABLE] == secret, "it must be the same on all nodes"
    assert (environment["RAYLWAY_DATABASE_URL"], environment["RAYLWAY_STORE"]) == ("db", "s3://bucket")


def test_cluster_yaml_holds_no_secret_and_no_account():
    text = CONFIG.read_text()
    config = yaml.safe_load(text)
    assert "/home/ubuntu/.raylway/auth_token" in config["file_mounts"]
    assert "RAY_AUTH_TOKEN=" not in text
    assert not any(len(word) == 12 and word.isdigit() for word in text.replace(":", " ").split())


def test_the_commands_sigterm_handler_stays_when_ray_starts():
    def handler(*_):
        pass

    original = signal.signal(signal.SIGTERM, handler)
    try:
        with session._keeping_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: None)  # as ray.init does
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, original)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "null"])
def test_an_unreadable_record_is_refused_with_a_remedy(state, content):
    (state / "cluster.json").write_text(content)
    with pytest.raises(UserError, match=r"cluster\.json: must be what `raylway up` .* Remove it"):
        read_record()


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_the_cluster_interrupts_the_command(monkeypatch, ignored):
    monkeypatch.setattr(session, "PROBE_INTERVAL_S", 0.02)
    server = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{server.getsockname()[1]}"
    lost = threading.Event()
    with session._watching(address, lost):
        pass
    assert not lost.is_set()
    server.close()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        if ignored:  # like a background command, with the SIGTERM handler of all commands
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with pytest.raises(UserError, match=f"the Ray cluster at {address} must run until the command ends"):
            wait_with(address, lost)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert lost.is_set()


def wait_with(address: str, lost: threading.Event) -> None:
    with session._watching(address, lost):
        threading.Event().wait(60)


def test_the_environment_is_changed_for_the_block_and_restored(monkeypatch):
    monkeypatch.setenv("RAYLWAY_TEST_CHANGED", "old")
    monkeypatch.setenv("RAYLWAY_TEST_DELETED", "old")
    values = {**os.environ, "RAYLWAY_TEST_CHANGED": "new", "RAYLWAY_TEST_ADDED": "new"}
    del values["RAYLWAY_TEST_DELETED"]
    before = dict(os.environ)
    with session._environ(values):
        assert dict(os.environ) == values
    assert dict(os.environ) == before


def test_a_variable_that_another_thread_sets_during_the_block_is_kept(monkeypatch):
    monkeypatch.setenv("RAYLWAY_TEST_BOTH", "before")
    monkeypatch.delenv("RAYLWAY_TEST_THREAD", raising=False)

    def set_variables():
        os.environ["RAYLWAY_TEST_THREAD"] = os.environ["RAYLWAY_TEST_BOTH"] = "by the thread"

    with session._environ({**os.environ, "RAYLWAY_TEST_BOTH": "ours"}):
        thread = threading.Thread(target=set_variables)
        thread.start()
        thread.join()
    assert os.environ.pop("RAYLWAY_TEST_THREAD") == "by the thread"
    assert os.environ["RAYLWAY_TEST_BOTH"] == "by the thread"


def test_other_threads_never_miss_a_variable(monkeypatch):
    """The environment is never empty, not even for a moment."""
    monkeypatch.setenv("RAYLWAY_TEST_KEPT", "kept")
    done, missed = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            if "RAYLWAY_TEST_KEPT" not in os.environ:
                missed.append(None)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for number in range(2_000):
            with session._environ({**os.environ, "RAYLWAY_TEST_NUMBER": str(number)}):
                pass
    finally:
        done.set()
        thread.join()
    assert not missed
