import pytest

from app.config.serving import Issuer
from app.errors import UserError
from app.serving.control import grpc_server
from app.serving.gateway import preflight
from app.serving.gateway.frontend import Backend, Frontend, Gateway
from app.serving.names import GRPC

ISSUER = Issuer(issuer="https://one", audience="raylway", jwks="/keys")
OTHER = Issuer(issuer="https://other", audience="raylway", jwks="/keys")


def make_gateway(grpc_port=9000, certificate=None, **issuers):
    key = certificate and certificate.with_suffix(".key")
    frontend = Frontend(
        host="127.0.0.1",
        port=8000,
        certificate=certificate and str(certificate),
        key=key and str(key),
        grpc_port=grpc_port,
    )
    backends = {
        name: Backend(issuer, 10.0, 1000 + number) for number, (name, issuer) in enumerate(issuers.items())
    }
    return Gateway(frontend, backends or {"income": Backend(None, 10.0, 1000)})


@pytest.fixture(autouse=True)
def checked_ports(monkeypatch):
    """The ports that were required to be free."""
    ports = []
    monkeypatch.setattr(preflight, "require_free_port", lambda host, port, setting: ports.append(port))
    return ports


def test_without_a_port_no_server_runs(fake_serve):
    grpc_server.update(make_gateway(grpc_port=None), None)
    assert fake_serve.events == []
    fake_serve.add(GRPC)
    grpc_server.update(make_gateway(grpc_port=None), make_gateway())
    assert fake_serve.events == [("delete", GRPC)]


def test_only_a_new_port_must_be_free(fake_serve, checked_ports):
    grpc_server.update(make_gateway(), None)
    grpc_server.update(make_gateway(), make_gateway())
    assert checked_ports == [9000]
    grpc_server.update(make_gateway(grpc_port=9001), make_gateway())
    assert checked_ports == [9000, 9001]
    assert fake_serve.events == 3 * [("run", GRPC, None)]


def test_the_server_accepts_the_issuers_of_all_endpoints_and_the_largest_message(fake_serve):
    grpc_server.update(make_gateway(income=ISSUER, flights=OTHER, movies=ISSUER), None)
    *_, issuers, max_message_bytes = fake_serve.bound[GRPC].init_args
    assert (sorted(issuer.issuer for issuer in issuers), max_message_bytes) == (
        ["https://one", "https://other"],
        1002,
    )


def test_the_server_requires_no_token_if_an_endpoint_requires_none(fake_serve):
    grpc_server.update(make_gateway(income=ISSUER, open=None), None)
    *_, issuers, _ = fake_serve.bound[GRPC].init_args
    assert issuers == []


def test_a_renewed_certificate_restarts_the_server(fake_serve, tmp_path):
    certificate = tmp_path / "server.pem"
    versions = []
    for content in ("first", "first", "second"):
        certificate.write_text(content)
        certificate.with_suffix(".key").write_text("key")
        grpc_server.update(make_gateway(certificate=certificate), None)
        versions.append(fake_serve.bound[GRPC].version)
    assert versions[0] == versions[1] != versions[2]


def test_the_previous_server_is_restored_if_the_new_one_cannot_start(fake_serve, monkeypatch):
    ports = []

    def fail_on_9001(bound, *_):
        ports.append(bound._bound_deployment.init_args[1])
        if ports[-1] == 9001:
            raise UserError("cannot start")

    monkeypatch.setattr(grpc_server, "run_application", fail_on_9001)
    fake_serve.add(GRPC)
    with pytest.raises(UserError, match="cannot start"):
        grpc_server.update(make_gateway(grpc_port=9001), make_gateway())
    assert (ports, fake_serve.events) == ([9001, 9000], [])
    with pytest.raises(UserError, match="cannot start"):
        grpc_server.update(make_gateway(grpc_port=9001), None)
    assert fake_serve.events == [("delete", GRPC)], "no previous server has to be restored"
