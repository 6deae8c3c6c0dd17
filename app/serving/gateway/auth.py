"""Authentication and authorization: OAuth2 bearer tokens in the form of JSON Web Tokens (RFC 9068).

Checking a signature takes longer than running a small model. The principal of a token is therefore cached
until the token expires or the issuer's keys change.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from joserfc import jwt
from joserfc.errors import ExpiredTokenError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from app.config.serving import Issuer
from app.serving.gateway.keys import FETCH_TIMEOUT_S, Keys
from app.serving.http import Refused

ALGORITHMS = ["RS256", "ES256"]
"""Accepted signature algorithms."""
LEEWAY_S = 30
"""Tolerated difference between this machine's clock and the issuer's."""
MAX_TOKEN_LENGTH = 8_192
"""Maximum length of a token in characters."""
MAX_CACHE_BYTES = 16 * 2**20
"""Memory limit of the token cache, about 15,000 tokens of usual length. A full cache is emptied."""
CACHE_ENTRY_BYTES = 300
"""Memory of a cached token besides its header, name and scopes."""
SUBJECT_PATTERN = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,256}")
"""Pattern of the claim sub: 1 to 256 characters without control characters."""
SCOPES = ("predict", "feedback", "explain", "admin")
"""Scopes of a token. Each is valid for all models, or for the model that it names, as in `predict:income`."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The sender of a request, as the token identifies it."""

    name: str
    scopes: frozenset[str]
    expires_at: float
    """Time at which the token expires, in seconds since the epoch."""

    def require(self, scope: str, model: str) -> None:
        """Raise Refused with 403 if the token lacks the scope for this model."""
        if scope not in self.scopes and f"{scope}:{model}" not in self.scopes:
            raise Refused(
                403,
                f"the token must have the scope {scope} or {scope}:{model}",
                headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{scope}:{model}"'},
            )


ANONYMOUS = Principal("anonymous", frozenset(SCOPES), float("inf"))
"""Sender of all requests to an endpoint that requires no tokens."""


class Authenticator:
    """Checks the tokens of one issuer."""

    def __init__(
        self,
        issuer: Issuer,
        fetch_timeout_s: float = FETCH_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._claims = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_S,
            iss={"essential": True, "value": issuer.issuer},
            aud={"essential": True, "value": issuer.audience},
            sub={"essential": True},
            exp={"essential": True},
        )
        self.keys = Keys(issuer.jwks, fetch_timeout_s, clock)
        self._cache: dict[str, Principal] = {}
        """Principals by the value of the header authorization."""
        self._cache_bytes = 0
        self._cache_generation = self.keys.generation
        """Generation of the keys that the cached tokens were checked with."""

    def cached(self, authorization: str) -> Principal | None:
        """The principal of an authorization header, if it is cached and still valid; None otherwise."""
        if self._cache_generation != self.keys.generation:
            self._clear_cache()
        principal = self._cache.get(authorization)
        if principal is None or principal.expires_at <= time.time() or not self.keys.are_valid():
            return None
        return principal

    async def principal(self, authorization: str) -> Principal:
        """The principal of an authorization header.

        Raises Refused with 401 if the token is invalid, and with 503 if the issuer's keys cannot be fetched.
        """
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN_LENGTH:
            raise _refusal("the request must have a bearer token: the header `authorization: Bearer ...`")
        try:
            principal = self._check(token, await self.keys.current())
        except InvalidKeyIdError:
            try:
                principal = self._check(token, await self.keys.refetched())
            except InvalidKeyIdError:
                raise _refusal("the token must be signed with one of the issuer's keys") from None
        self._add_to_cache(authorization, principal)
        return principal

    def _add_to_cache(self, authorization: str, principal: Principal) -> None:
        texts = (authorization, principal.name, principal.scopes, *principal.scopes)
        size = CACHE_ENTRY_BYTES + sum(map(sys.getsizeof, texts))
        if self._cache_bytes + size > MAX_CACHE_BYTES or self._cache_generation != self.keys.generation:
            self._clear_cache()
        if authorization not in self._cache:
            self._cache_bytes += size
        self._cache[authorization] = principal

    def _clear_cache(self) -> None:
        self._cache.clear()
        self._cache_bytes = 0
        self._cache_generation = self.keys.generation

    def _check(self, token: str, keys: KeySet) -> Principal:
        """The principal of a token. Raises InvalidKeyIdError if its key is not among `keys`, Refused if it is
        invalid for any other reason."""
        try:
            decoded = jwt.decode(token, keys, algorithms=ALGORITHMS)
            self._claims.validate(decoded.claims)
        except InvalidKeyIdError:
            raise
        except ExpiredTokenError:
            raise _refusal("the token has expired") from None
        except (JoseError, ValueError, TypeError) as error:
            raise _refusal(f"the token is invalid: {error}") from None
        except RecursionError:
            raise _refusal("the token is invalid: its JSON is nested too deeply") from None
        claims = decoded.claims
        subject = claims["sub"]
        # A long subject is refused, not truncated: truncation could merge two principals, whose records and
        # rate limits must stay separate.
        if not (isinstance(subject, str) and SUBJECT_PATTERN.fullmatch(subject)):
            raise _refusal("the token's sub must have 1 to 256 characters, none of them a control character")
        scope = claims.get("scope", "")
        scopes = scope.split() if isinstance(scope, str) else []
        return Principal(subject, frozenset(scopes), float(claims["exp"]) + LEEWAY_S)


def _refusal(error: str) -> Refused:
    return Refused(401, error, headers={"www-authenticate": 'Bearer error="invalid_token"'})
