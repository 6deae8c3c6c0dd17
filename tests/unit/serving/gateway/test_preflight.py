import json
import socket
import subprocess

import pytest
from joserfc.jwk import ECKey, KeySet

from app.config import Serving
from app.errors import UserError
from app.serving.gateway import preflight

SERVING = {"variants": {"champion": {"version": "1", "weight": 1}}}


@pytest.mark.parametrize(("host", "address"), [("127.9.9.9", "127.9.9.9"), ("localhost", "127.0.0.1")])
def test_a_host_is_resolved_to_an_address_of_this_machine(host, address):
    assert preflight.resolve_host(host) == address


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "2001:db8::1", "127.0.0.1:80", "a b"])
def test_other_hosts_are_refused(host):
    with pytest.raises(UserError, match=r"serving\.host.*must be an address of this machine"):
        preflight.resolve_host(host)


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(UserError, match=rf"port {port} must be free on {host}.*serving\.grpc_port"):
                preflight.require_free_port(host, port, "serving.grpc_port")
    preflight.require_free_port("127.0.0.1", port, "serving.grpc_port")


def test_missing_or_invalid_files_are_refused(tmp_path):
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "1"]
    for name in ("one", "other"):
        paths = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem"]
        subprocess.run([*command, *paths], check=True, capture_output=True)
    keys = KeySet([ECKey.generate_key("P-256", auto_kid=True)]).as_dict(private=False)
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (tmp_path / "empty.json").write_text("{}")

    def serving(certificate: str, key: str, jwks: str) -> Serving:
        tls = {"certificate": str(tmp_path / certificate), "key": str(tmp_path / key)}
        auth = {"issuer": "i", "jwks": jwks if jwks.startswith("http") else str(tmp_path / jwks)}
        return Serving.model_validate({**SERVING, "tls": tls, "auth": auth})

    preflight.check_files(serving("one.pem", "one.key", "keys.json"))
    preflight.check_files(serving("one.pem", "one.key", "https://issuer.example/keys"))
    for files in (("one.pem", "other.key"), ("missing.pem", "one.key"), ("one.key", "one.pem")):
        with pytest.raises(UserError, match=r"serving\.tls"):
            preflight.check_files(serving(*files, "keys.json"))
    for jwks in ("missing.json", "empty.json", "one.pem"):
        with pytest.raises(UserError, match=r"serving\.auth\.jwks"):
            preflight.check_files(serving("one.pem", "one.key", jwks))
