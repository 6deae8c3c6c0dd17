import itertools
import json
import socket
import subprocess

import pytest
from joserfc.jwk import ECKey, KeySet
from pydantic import ValidationError

from app.config import Serving
from app.config.serving import Issuer
from app.errors import UserError
from app.serving.gateway import frontend
from app.serving.gateway.frontend import Backend, Frontend, Gateway, check
from app.state.home import FRONT

SERVING = {"variants": {"champion": {"version": "1", "weight": 1}}}


def front(**changed) -> Frontend:
    values = {"host": "127.0.0.1", "port": 8000, "certificate": None, "key": None, "grpc_port": None}
    return Frontend(**{**values, **changed})


OPEN = Backend(None, 1.0, 1000)
GUARDED = Backend(Issuer(issuer="i", jwks="/keys.json"), 1.0, 1000)
FRONTS = [
    front(),
    front(host="127.0.0.2"),
    front(host="0.0.0.0"),
    front(host="::1"),
    front(host="::"),
    front(host="192.0.2.1"),
    front(port=8001),
    front(certificate="/cert.pem", key="/key.pem"),
    front(certificate="/cert.pem", key="/other.pem"),
    front(grpc_port=9000),
    front(connections_per_address=10),
]


@pytest.mark.parametrize("secured", [True, False])
@pytest.mark.parametrize(("held", "asked"), list(itertools.permutations(FRONTS, 2)))
def test_nothing_is_served_behind_another_front_than_it_asks_for(held, asked, secured):
    """Whatever the order, and whether or not either asks for a token."""
    for theirs in (True, False):
        with pytest.raises(UserError) as refused:
            check(
                Gateway(held, {"open": OPEN if theirs else GUARDED}), "guarded", asked, secured, 1, {"open"}
            )
        assert "guarded" in str(refused.value)
        assert "\n" not in str(refused.value)
        if secured:
            assert "open" in str(refused.value), "both are named"
            assert "serving." in str(refused.value)


@pytest.mark.parametrize("same", FRONTS)
def test_endpoints_that_ask_for_the_same_front_share_it(same):
    check(Gateway(same, {"one": GUARDED}), "other", same, True, 1, {"one"})


def test_what_is_no_longer_deployed_does_not_count():
    held = Gateway(front(), {"one": GUARDED, "gone": OPEN})
    check(held, "one", front(host="127.0.0.2"), True, 1, {"one"})
    with pytest.raises(UserError, match=r"serving\.port"):
        check(held, "one", front(port=8001), True, 1, {"one"})
    check(None, "one", front(port=8001), True, 1, set())


def test_an_endpoint_of_which_nothing_is_known_is_not_opened():
    with pytest.raises(UserError, match="older runs on this cluster"):
        check(None, "one", front(), True, 1, {"older"})


@pytest.mark.parametrize("others", [set(), {"one"}])
@pytest.mark.parametrize(
    ("host", "secured", "num_nodes", "message"),
    [
        ("0.0.0.0", False, 1, "can be reached"),
        ("192.0.2.1", False, 1, "can be reached"),
        ("127.0.0.1", False, 2, "several nodes"),
        ("192.0.2.1", True, 2, "each of the cluster's 2 nodes"),
    ],
)
def test_the_first_and_every_later_endpoint_is_asked(host, secured, num_nodes, message, others):
    held = Gateway(front(host=host), dict.fromkeys(others, GUARDED))
    with pytest.raises(UserError, match=f"two must.*{message}") as refused:
        check(held, "two", front(host=host), secured, num_nodes, others)
    assert "two" in str(refused.value)


def test_while_replicas_of_two_settings_answer_what_both_take_is_taken():
    larger = Backend(GUARDED.issuer, 2.0, 2000)
    assert GUARDED.beside(larger) == Backend(GUARDED.issuer, 1.0, 2000)
    assert larger.beside(larger) == larger
    assert not OPEN.beside(GUARDED).secured
    assert not GUARDED.beside(OPEN).secured


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("127.0.0.2", "http://127.0.0.2:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_the_url_that_this_machine_reaches_it_by(host, url):
    assert front(host=host).url == url


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("127.9.9.9", "127.9.9.9"),
    ],
)
def test_a_host_becomes_an_address(host, address):
    serving = Serving.model_validate({**SERVING, "host": host, "auth": "local"})
    assert frontend.frontend_of(serving).host == address


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_a_host_that_only_this_machine_reaches_needs_no_tokens(host):
    assert Serving.model_validate({**SERVING, "host": host}).auth == "none"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost.example", "1", "127.0.0.1:80"])
def test_any_other_host_does(host):
    with pytest.raises(ValidationError, match="can be reached from other machines, so `auth` must be local"):
        Serving.model_validate({**SERVING, "host": host})


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "2001:db8::1", "127.0.0.1:80", "a b"])
def test_a_host_that_is_not_this_machines_is_refused(host):
    serving = Serving.model_validate({**SERVING, "host": host, "auth": "local"})
    with pytest.raises(UserError, match=r"serving\.host.*must be an address of this machine"):
        frontend.frontend_of(serving)


def test_a_taken_port_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(UserError, match=rf"port {port} must be free on {host}.*serving\.grpc_port"):
                frontend.require_free(host, port, "serving.grpc_port")
    frontend.require_free("127.0.0.1", port, "serving.grpc_port")


def test_a_front_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv(FRONT, str(tmp_path))
    with pytest.raises(KeyError), frontend.tried(Gateway(front())):
        raise KeyError
    assert frontend.read() is None
    held = Gateway(front(host="127.0.0.2"), {"one": GUARDED})
    with frontend.tried(held):
        pass
    with pytest.raises(KeyError), frontend.tried(Gateway(front())):
        raise KeyError(frontend.read())
    assert frontend.read() == held
    frontend.forget()
    assert list(tmp_path.iterdir()) == []


def test_a_renewed_certificate_has_a_file_of_its_own(tmp_path, monkeypatch):
    """The one before may be needed again, and HAProxy may be reading it."""
    monkeypatch.setenv(FRONT, str(tmp_path / "front"))
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text("1")
    key.write_text("key")
    held = Gateway(front(certificate=str(certificate), key=str(key)))
    pems = lambda: sorted(file.read_text() for file in (tmp_path / "front").glob("*.pem"))  # noqa: E731
    with frontend.tried(held):
        assert pems() == ["1\nkey"]
    certificate.write_text("2")
    with frontend.tried(held):
        assert pems() == ["1\nkey", "2\nkey"]
    assert pems() == ["2\nkey"]


def test_files_that_are_none_are_refused(tmp_path):
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "1"]
    for name in ("one", "other"):
        out = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem"]
        subprocess.run([*made, *out], check=True, capture_output=True)
    keys = KeySet([ECKey.generate_key("P-256", auto_kid=True)]).as_dict(private=False)
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (tmp_path / "no.json").write_text("{}")

    def serving(certificate: str, key: str, jwks: str) -> Serving:
        tls = {"certificate": str(tmp_path / certificate), "key": str(tmp_path / key)}
        auth = {"issuer": "i", "jwks": jwks if jwks.startswith("http") else str(tmp_path / jwks)}
        return Serving.model_validate({**SERVING, "tls": tls, "auth": auth})

    frontend.check_files(serving("one.pem", "one.key", "keys.json"))
    frontend.check_files(serving("one.pem", "one.key", "https://issuer.example/keys"))
    for files in (("one.pem", "other.key"), ("gone.pem", "one.key"), ("one.key", "one.pem")):
        with pytest.raises(UserError, match=r"serving\.tls"):
            frontend.check_files(serving(*files, "keys.json"))
    for jwks in ("gone.json", "no.json", "one.pem"):
        with pytest.raises(UserError, match=r"serving\.auth\.jwks"):
            frontend.check_files(serving("one.pem", "one.key", jwks))
