import asyncio
import base64
import gc
import json
import time
import tracemalloc

import pytest
from joserfc import jws, jwt
from joserfc.jwk import ECKey, KeySet, RSAKey

from app.config.serving import Issuer
from app.errors import UserError
from app.serving.gateway import auth, issuer
from app.serving.gateway.auth import Authenticator
from app.serving.http import Refused


def authenticator(path=None, audience="raylway"):
    return Authenticator(Issuer(issuer="raylway", audience=audience, jwks=str(path or issuer.jwks())))


def bearer(token):
    return f"Bearer {token}"


def ask(checked, header):
    return asyncio.run(checked.principal(header))


def signed(key, algorithm="ES256", **changes):
    claims = {
        "iss": "raylway",
        "aud": "raylway",
        "sub": "bob",
        "scope": "predict",
        "exp": int(time.time()) + 60,
    }
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    # Not jwt.encode: it cannot write half of a surrogate pair, and others can.
    head = {"alg": algorithm, "kid": key.kid}
    return jws.serialize_compact(head, json.dumps(claims).encode(), key, algorithms=[algorithm])


@pytest.fixture
def keys(tmp_path):
    """Keys of somebody else's issuer, and the file with their public halves."""
    made = {
        "EC": ECKey.generate_key("P-256", {"alg": "ES256"}, auto_kid=True),
        "RSA": RSAKey.generate_key(2048, {"alg": "RS256"}, auto_kid=True),
    }
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(KeySet(list(made.values())).as_dict(private=False)))
    return made, path


def test_a_token_says_who_asks_and_what_they_may():
    checked = authenticator()
    header = bearer(issuer.issue("bob", ["predict:income", "feedback"], hours=1))
    assert checked.known(header) is None
    principal = ask(checked, header)
    assert principal.name == "bob"
    assert checked.known(header) is principal
    principal.require("predict", "income")
    principal.require("feedback", "flights")
    for scope, model in (("predict", "flights"), ("admin", "income")):
        with pytest.raises(Refused, match=f"the scope {scope} or {scope}:{model}") as refused:
            principal.require(scope, model)
        assert refused.value.status == 403
        assert "insufficient_scope" in refused.value.headers["www-authenticate"]


@pytest.mark.parametrize(("key", "algorithm"), [("EC", "ES256"), ("RSA", "RS256")])
def test_an_issuer_elsewhere_signs_with_either_kind_of_key(keys, key, algorithm):
    made, path = keys
    assert ask(authenticator(path), bearer(signed(made[key], algorithm))).name == "bob"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp": 1_000_000_000}, "has expired"),  # 2001
        ({"exp": None}, "exp"),
        ({"iss": "eve"}, "iss"),
        ({"aud": "another"}, "aud"),
        ({"sub": None}, "sub"),
        ({"sub": ""}, "sub"),
        ({"sub": 7}, "sub"),
        ({"sub": "x" * 257}, "sub must be 1 to 256 characters"),
        ({"sub": "a\0b"}, "sub must be"),
        ({"sub": "\ud800"}, "sub must be"),
        ({"nbf": 4_000_000_000}, "nbf|not valid|not good"),  # 2096
    ],
)
def test_claims_that_are_not_good_are_refused(keys, changes, message):
    made, path = keys
    with pytest.raises(Refused, match=message) as refused:
        ask(authenticator(path), bearer(signed(made["EC"], **changes)))
    assert refused.value.status == 401
    assert refused.value.headers["www-authenticate"].startswith("Bearer")


def test_what_is_no_good_token_is_refused(keys):
    made, path = keys
    good = signed(made["EC"])
    head, claims, seal = good.split(".")
    other = ECKey.generate_key("P-256", {"alg": "ES256"}, auto_kid=True)
    bad = [
        "", "Bearer", "Bearer ", f"Basic {good}", f"Bearer {good}x", f"Bearer {head}.{claims}.",
        f"Bearer {head}.{claims[:-2]}.{seal}", "Bearer a.b.c", "Bearer \xff.\xff.\xff",
        f"Bearer {'x' * 9000}",
        # alg none, and the public key as if it were a shared secret
        "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJib2IifQ.", bearer(signed(other)),
    ]  # fmt: skip
    checked = authenticator(path)
    for header in bad:
        with pytest.raises(Refused) as refused:
            ask(checked, header)
        assert refused.value.status == 401
        assert checked.known(header) is None


def test_a_shared_secret_is_no_signature(keys):
    made, path = keys
    from joserfc.jwk import OctKey

    secret = OctKey.import_key(path.read_bytes(), {"kid": made["EC"].kid})
    token = jwt.encode({"alg": "HS256", "kid": made["EC"].kid}, {"sub": "eve"}, secret, algorithms=["HS256"])
    with pytest.raises(Refused, match="HS256"):
        ask(authenticator(path), bearer(token))


def test_a_token_that_is_known_expires_all_the_same(keys, monkeypatch):
    made, path = keys
    checked, header = authenticator(path), bearer(signed(made["EC"]))
    ask(checked, header)
    now = time.time() + 60 + auth.LEEWAY_S + 1
    monkeypatch.setattr(auth.time, "time", lambda: now)
    assert checked.known(header) is None


def test_remembered_tokens_take_bounded_memory(keys, monkeypatch):
    """Each of these takes 20 times its own length: its scopes are small and many."""
    monkeypatch.setattr(auth, "MAX_KNOWN_BYTES", 500_000)
    made, path = keys
    checked = authenticator(path)
    scopes = " ".join(f"{number:x}" for number in range(256, 1256))
    headers = [bearer(signed(made["EC"], sub=f"bob-{number}", scope=scopes)) for number in range(40)]
    ask(checked, headers[0])
    tracemalloc.start()
    try:
        for header in headers:
            ask(checked, header)
            assert checked.known(header) is not None
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 2 * 500_000
    finally:
        tracemalloc.stop()


def test_json_that_is_nested_too_deeply_is_no_token(keys):
    """It is read before the signature is checked, so anybody can send it."""
    made, path = keys
    _, claims, seal = signed(made["EC"]).split(".")
    deep = base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=")
    for token in (f"{deep}.{claims}.{seal}", f"{deep}.{deep}.{seal}"):
        assert len(token) <= 2 * auth.MAX_LENGTH
        with pytest.raises(Refused) as refused:
            ask(authenticator(path), bearer(token[: auth.MAX_LENGTH]))
        assert refused.value.status == 401


def test_the_private_key_is_for_its_owner_and_scopes_are_checked(home):
    issuer.jwks()
    for file in (home / "issuer").iterdir():
        assert file.stat().st_mode & 0o077 == 0
    assert '"d"' not in issuer.jwks().read_text()
    with pytest.raises(UserError, match="'root' is no scope"):
        issuer.issue("bob", ["root"], 1)
