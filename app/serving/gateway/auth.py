"""Who asks, and what they may: OAuth2 bearer tokens that are JSON Web Tokens (RFC 9068), checked against the
issuer's keys.

A token's signature takes longer to check than a small model to run, so its principal is cached until the
token expires or the issuer's keys change.
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
from app.serving.gateway.keys import FETCH_S, Keys
from app.serving.http import Refused

ALGORITHMS = ["RS256", "ES256"]
LEEWAY_S = 30
"""By which clocks may differ."""
MAX_KNOWN_BYTES = 16 * 2**20
"""Memory for tokens that are remembered: about 15,000 of usual length. Beyond it all are forgotten."""
ENTRY_BYTES = 300
"""What a remembered token takes besides its header, name and scopes."""
SUBJECT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,256}")
MAX_LENGTH = 8_192
"""Characters of a token."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who asks."""

    name: str
    scopes: frozenset[str]
    until: float
    """When the token expires, seconds since the epoch."""

    def require(self, scope: str, model: str) -> None:
        """Raise Refused unless they may."""
        if scope not in self.scopes and f"{scope}:{model}" not in self.scopes:
            raise Refused(
                403,
                f"the token must have the scope {scope} or {scope}:{model}",
                headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{scope}:{model}"'},
            )


ANYBODY = Principal("anonymous", frozenset(("predict", "feedback", "explain", "admin")), float("inf"))
"""Who asks where no token is wanted."""


class Authenticator:
    """The tokens of one issuer."""

    def __init__(self, issuer: Issuer, fetch_s: float = FETCH_S, clock: Callable[[], float] = time.monotonic):
        self._claims = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_S,
            iss={"essential": True, "value": issuer.issuer},
            aud={"essential": True, "value": issuer.audience},
            sub={"essential": True},
            exp={"essential": True},
        )
        self.keys = Keys(issuer.jwks, fetch_s, clock)
        self._known: dict[str, Principal] = {}
        self._known_bytes = 0
        self._generation = self.keys.generation
        """Of the keys that `_known` was found with."""

    def known(self, authorization: str) -> Principal | None:
        """Whose header this is, if that is known already."""
        if self._generation != self.keys.generation:
            self._forget()
        principal = self._known.get(authorization)
        if principal is None or principal.until <= time.time() or not self.keys.hold():
            return None
        return principal

    async def principal(self, authorization: str) -> Principal:
        """Whose header this is. Raises Refused if it has no good token, or there are no keys to check it."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > MAX_LENGTH:
            raise _refusal("a bearer token is needed: the header `authorization: Bearer ...`")
        try:
            principal = self._check(token, await self.keys.held())
        except InvalidKeyIdError:
            try:
                principal = self._check(token, await self.keys.newer())
            except InvalidKeyIdError:
                raise _refusal("the token's key is none of the issuer's") from None
        self._remember(authorization, principal)
        return principal

    def _remember(self, authorization: str, principal: Principal) -> None:
        texts = (authorization, principal.name, principal.scopes, *principal.scopes)
        size = ENTRY_BYTES + sum(map(sys.getsizeof, texts))
        if self._known_bytes + size > MAX_KNOWN_BYTES or self._generation != self.keys.generation:
            self._forget()
        if authorization not in self._known:
            self._known_bytes += size
        self._known[authorization] = principal

    def _forget(self) -> None:
        self._known.clear()
        self._known_bytes = 0
        self._generation = self.keys.generation

    def _check(self, token: str, keys: KeySet) -> Principal:
        try:
            decoded = jwt.decode(token, keys, algorithms=ALGORITHMS)
            self._claims.validate(decoded.claims)
        except InvalidKeyIdError:
            raise
        except ExpiredTokenError:
            raise _refusal("the token has expired") from None
        except (JoseError, ValueError, TypeError) as error:
            raise _refusal(f"the token is not good: {error}") from None
        except RecursionError:
            raise _refusal("the token is not good: its JSON is nested too deeply") from None
        claims = decoded.claims
        subject = claims["sub"]
        # Whole, as records and limits go by it: cut off, two principals could become one.
        if not (isinstance(subject, str) and SUBJECT.fullmatch(subject)):
            raise _refusal("the token's sub must be 1 to 256 characters, without control characters")
        scope = claims.get("scope", "")
        scopes = scope.split() if isinstance(scope, str) else []
        return Principal(subject, frozenset(scopes), float(claims["exp"]) + LEEWAY_S)


def _refusal(error: str) -> Refused:
    return Refused(401, error, headers={"www-authenticate": 'Bearer error="invalid_token"'})
