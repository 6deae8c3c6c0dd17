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
from app.serving.gateway import auth, issuer
from app.serving.gateway.auth import Authenticator
from app.serving.http import Refused


def create_authenticator(path=None):
    return Authenticator(Issuer(issuer="raylway", audience="raylway", jwks=str(path or issuer.jwks())))


def bearer(token):
    return f"Bearer {token}"


def authenticate(authenticator, header):
    return asyncio.run(authenticator.principal(header))


def signed(key, algorithm="ES256", **changes):
    claims = {
        "iss": "raylway",
        "aud": "raylway",
        "sub": "bob",
        "scope": "predict",
        "exp": int(time.time()) + 60,
    }
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    # jwt.encode cannot write half of a surrogate pair; other issuers may.
    header = {"alg": algorithm, "kid": key.kid}
    return jws.serialize_compact(header, json.dumps(claims).encode(), key, algorithms=[algorithm])


@pytest.fixture
def keys(tmp_path):
    """Private keys of another issuer by type, and the file with its public keys."""
    private_keys = {
        "EC": ECKey.generate_key("P-256", {"alg": "ES256"}, auto_kid=True),
        "RSA": RSAKey.generate_key(2048, {"alg": "RS256"}, auto_kid=True),
    }
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(KeySet(list(private_keys.values())).as_dict(private=False)))
    return private_keys, path


def test_a_token_has_the_principal_and_the_scopes():
    authenticator = create_authenticator()
    header = bearer(issuer.issue("bob", ["predict:income", "feedback"], hours=1))
    assert authenticator.cached(header) is None
    principal = authenticate(authenticator, header)
    assert principal.name == "bob"
    assert authenticator.cached(header) is principal
    principal.require("predict", "income")
    principal.require("feedback", "flights")
    for scope, model in (("predict", "flights"), ("admin", "income")):
        with pytest.raises(Refused, match=f"the scope {scope} or {scope}:{model}") as refused:
            principal.require(scope, model)
        assert refused.value.status == 403
        assert "insufficient_scope" in refused.value.headers["www-authenticate"]


@pytest.mark.parametrize(("key", "algorithm"), [("EC", "ES256"), ("RSA", "RS256")])
def test_tokens_may_be_signed_with_rsa_or_elliptic_curve_keys(keys, key, algorithm):
    private_keys, path = keys
    assert (
        authenticate(create_authenticator(path), bearer(signed(private_keys[key], algorithm))).name == "bob"
    )


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
        ({"sub": "x" * 257}, "sub must have 1 to 256 characters"),
        ({"sub": "a\0b"}, "sub must have"),
        ({"sub": "\ud800"}, "sub must have"),
        ({"nbf": 4_000_000_000}, "nbf|invalid"),  # 2096
    ],
)
def test_invalid_claims_are_refused(keys, changes, message):
    private_keys, path = keys
    with pytest.raises(Refused, match=message) as refused:
        authenticate(create_authenticator(path), bearer(signed(private_keys["EC"], **changes)))
    assert refused.value.status == 401
    assert refused.value.headers["www-authenticate"].startswith("Bearer")


def test_invalid_tokens_are_refused_and_not_cached(keys):
    private_keys, path = keys
    valid = signed(private_keys["EC"])
    head, claims, signature = valid.split(".")
    other = ECKey.generate_key("P-256", {"alg": "ES256"}, auto_kid=True)
    headers = [
        "", "Bearer", "Bearer ", f"Basic {valid}", f"Bearer {valid}x", f"Bearer {head}.{claims}.",
        f"Bearer {head}.{claims[:-2]}.{signature}", "Bearer a.b.c", "Bearer \xff.\xff.\xff",
        f"Bearer {'x' * 9000}",
        # the algorithm none, and a key that is not in the key set
        "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJib2IifQ.", bearer(signed(other)),
    ]  # fmt: skip
    authenticator = create_authenticator(path)
    for header in headers:
        with pytest.raises(Refused) as refused:
            authenticate(authenticator, header)
        assert refused.value.status == 401
        assert authenticator.cached(header) is None


def test_the_public_key_is_not_accepted_as_a_shared_secret(keys):
    private_keys, path = keys
    from joserfc.jwk import OctKey

    secret = OctKey.import_key(path.read_bytes(), {"kid": private_keys["EC"].kid})
    token = jwt.encode(
        {"alg": "HS256", "kid": private_keys["EC"].kid}, {"sub": "eve"}, secret, algorithms=["HS256"]
    )
    with pytest.raises(Refused, match="HS256"):
        authenticate(create_authenticator(path), bearer(token))


def test_a_cached_token_expires(keys, monkeypatch):
    private_keys, path = keys
    authenticator, header = create_authenticator(path), bearer(signed(private_keys["EC"]))
    authenticate(authenticator, header)
    now = time.time() + 60 + auth.LEEWAY_S + 1
    monkeypatch.setattr(auth.time, "time", lambda: now)
    assert authenticator.cached(header) is None


def test_the_token_cache_has_bounded_memory(keys, monkeypatch):
    """A cached token with many short scopes takes 20 times its length."""
    monkeypatch.setattr(auth, "MAX_CACHE_BYTES", 500_000)
    private_keys, path = keys
    authenticator = create_authenticator(path)
    scopes = " ".join(f"{number:x}" for number in range(256, 1256))
    headers = [bearer(signed(private_keys["EC"], sub=f"bob-{number}", scope=scopes)) for number in range(40)]
    authenticate(authenticator, headers[0])
    tracemalloc.start()
    try:
        for header in headers:
            authenticate(authenticator, header)
            assert authenticator.cached(header) is not None
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 2 * 500_000
    finally:
        tracemalloc.stop()


def test_deeply_nested_json_is_refused(keys):
    """The JSON is parsed before the signature is checked, so that any client can send it."""
    private_keys, path = keys
    _, claims, signature = signed(private_keys["EC"]).split(".")
    deep = base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=")
    for token in (f"{deep}.{claims}.{signature}", f"{deep}.{deep}.{signature}"):
        assert len(token) <= 2 * auth.MAX_TOKEN_LENGTH
        with pytest.raises(Refused) as refused:
            authenticate(create_authenticator(path), bearer(token[: auth.MAX_TOKEN_LENGTH]))
        assert refused.value.status == 401
