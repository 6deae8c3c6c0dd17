import itertools

import pytest
from pydantic import ValidationError

from app.config import Serving
from app.config.serving import Issuer
from app.errors import UserError
from app.serving.gateway import frontend
from app.serving.gateway.frontend import Backend, Frontend, Gateway, require_compatible

SERVING = {"variants": {"champion": {"version": "1", "weight": 1}}}


def create_frontend(**settings) -> Frontend:
    defaults = {"host": "127.0.0.1", "port": 8000, "certificate": None, "key": None, "grpc_port": None}
    return Frontend(**{**defaults, **settings})


OPEN = Backend(None, 1.0, 1000)
SECURED = Backend(Issuer(issuer="i", jwks="/keys.json"), 1.0, 1000)
FRONTENDS = [
    create_frontend(),
    create_frontend(host="127.0.0.2"),
    create_frontend(host="0.0.0.0"),
    create_frontend(host="::1"),
    create_frontend(host="::"),
    create_frontend(host="192.0.2.1"),
    create_frontend(port=8001),
    create_frontend(certificate="/cert.pem", key="/key.pem"),
    create_frontend(certificate="/cert.pem", key="/other.pem"),
    create_frontend(grpc_port=9000),
    create_frontend(connections_per_address=10),
]


@pytest.mark.parametrize("secured", [True, False])
@pytest.mark.parametrize(("current", "requested"), list(itertools.permutations(FRONTENDS, 2)))
def test_an_endpoint_with_another_frontend_is_refused(current, requested, secured):
    """This holds in any order, and whether or not the endpoints require tokens."""
    for backend in (OPEN, SECURED):
        with pytest.raises(UserError) as refused:
            require_compatible(
                Gateway(current, {"first": backend}), "second", requested, secured, 1, {"first"}
            )
        assert "second" in str(refused.value)
        assert "\n" not in str(refused.value)
        if secured:
            assert "first" in str(refused.value), "the message names both endpoints"
            assert "serving." in str(refused.value)


def test_the_message_has_both_values_of_a_setting():
    current = Gateway(create_frontend(grpc_port=9000), {"one": SECURED})
    with pytest.raises(UserError, match=r"serving\.grpc_port is none instead of 9000"):
        require_compatible(current, "two", create_frontend(), True, 1, {"one"})


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_endpoints_with_the_same_frontend_share_it(frontend):
    require_compatible(Gateway(frontend, {"one": SECURED}), "other", frontend, True, 1, {"one"})


def test_endpoints_that_are_no_longer_deployed_do_not_count():
    current = Gateway(create_frontend(), {"one": SECURED, "removed": OPEN})
    require_compatible(current, "one", create_frontend(host="127.0.0.2"), True, 1, {"one"})
    with pytest.raises(UserError, match=r"serving\.port"):
        require_compatible(current, "one", create_frontend(port=8001), True, 1, {"one"})
    require_compatible(None, "one", create_frontend(port=8001), True, 1, set())


def test_nothing_is_served_beside_an_endpoint_without_a_known_gateway():
    with pytest.raises(UserError, match="older runs on this cluster without a gateway"):
        require_compatible(None, "one", create_frontend(), True, 1, {"older"})


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
def test_unsafe_addresses_are_refused_for_all_endpoints(host, secured, num_nodes, message, others):
    current = Gateway(create_frontend(host=host), dict.fromkeys(others, SECURED))
    with pytest.raises(UserError, match=f"two must.*{message}"):
        require_compatible(current, "two", create_frontend(host=host), secured, num_nodes, others)


def test_merged_settings_accept_the_requests_of_both():
    larger = Backend(SECURED.issuer, 2.0, 2000)
    assert SECURED.merged(larger) == Backend(SECURED.issuer, 1.0, 2000)
    assert larger.merged(larger) == larger
    assert not OPEN.merged(SECURED).secured
    assert not SECURED.merged(OPEN).secured


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
def test_the_url_has_an_address_that_this_machine_can_reach(host, url):
    assert create_frontend(host=host).url == url


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("127.9.9.9", "127.9.9.9"),
    ],
)
def test_the_frontend_has_a_numeric_address(host, address):
    serving = Serving.model_validate({**SERVING, "host": host, "auth": "local"})
    assert frontend.frontend_of(serving).host == address


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_loopback_hosts_need_no_tokens(host):
    assert Serving.model_validate({**SERVING, "host": host}).auth == "none"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost.example", "1", "127.0.0.1:80"])
def test_other_hosts_need_tokens(host):
    with pytest.raises(ValidationError, match="can be reached from other machines, so `auth` must be local"):
        Serving.model_validate({**SERVING, "host": host})
