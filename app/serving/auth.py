"""Who asks, and what they may: OAuth2 bearer tokens that are JSON Web Tokens (RFC 9068), checked against the
issuer's keys.

A token's signature takes longer to check than a small model to run, so what was found is kept until the
token expires, or its key is no longer the issuer's.
"""

import asyncio
import json
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from joserfc import jwt
from joserfc.errors import ExpiredTokenError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from app.config.serving import Issuer
from app.serving.protocol import Refused

ALGORITHMS = ["RS256", "ES256"]
REFRESH_S = 60.0
"""How old the keys may be: so long a key that the issuer withdrew is still taken."""
AGAIN_S = 5.0
"""At the earliest so long after they were fetched, an unknown key has them fetched again."""
LEEWAY_S = 30
"""By which clocks may differ."""
MOST = 10_000
"""Tokens that are remembered."""
SUBJECT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,256}")
MAX_LENGTH = 8_192
"""Characters of a token."""

log = logging.getLogger(__name__)


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

    def __init__(self, issuer: Issuer):
        self._issuer = issuer
        self._claims = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_S,
            iss={"essential": True, "value": issuer.issuer},
            aud={"essential": True, "value": issuer.audience},
            sub={"essential": True},
            exp={"essential": True},
        )
        self._keys = KeySet([])
        self._fetched = float("-inf")
        self._fetching = asyncio.Lock()
        self._known: dict[str, Principal] = {}

    def known(self, authorization: str) -> Principal | None:
        """Whose header this is, if that is known already."""
        now = time.time()
        if now - self._fetched > REFRESH_S:
            return None
        principal = self._known.get(authorization)
        return principal if principal is not None and principal.until > now else None

    async def principal(self, authorization: str) -> Principal:
        """Whose header this is. Raises Refused if it has no good token, or the keys cannot be had."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > MAX_LENGTH:
            raise _refusal("a bearer token is needed: the header `authorization: Bearer ...`")
        if time.time() - self._fetched > REFRESH_S:
            await self._fetch(REFRESH_S)
        try:
            principal = self._check(token)
        except InvalidKeyIdError:
            await self._fetch(AGAIN_S)
            try:
                principal = self._check(token)
            except InvalidKeyIdError:
                raise _refusal("the token's key is none of the issuer's") from None
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[authorization] = principal
        return principal

    def _check(self, token: str) -> Principal:
        try:
            decoded = jwt.decode(token, self._keys, algorithms=ALGORITHMS)
            self._claims.validate(decoded.claims)
        except InvalidKeyIdError:
            raise
        except ExpiredTokenError:
            raise _refusal("the token has expired") from None
        except (JoseError, ValueError, TypeError) as error:
            raise _refusal(f"the token is not good: {error}") from None
        claims = decoded.claims
        subject = claims["sub"]
        # Whole, as records and limits go by it: cut off, two principals could become one.
        if not (isinstance(subject, str) and SUBJECT.fullmatch(subject)):
            raise _refusal("the token's sub must be 1 to 256 characters, without control characters")
        scope = claims.get("scope", "")
        scopes = scope.split() if isinstance(scope, str) else []
        return Principal(subject, frozenset(scopes), float(claims["exp"]) + LEEWAY_S)

    async def _fetch(self, older_than_s: float) -> None:
        """Get the issuer's keys, if those there are are older. Raises Refused if there are none."""
        async with self._fetching:
            if time.time() - self._fetched <= older_than_s:
                return
            try:
                keys = KeySet.import_key_set(json.loads(await self._read()))
            except (OSError, httpx.HTTPError, ValueError, KeyError, TypeError, JoseError) as error:
                log.warning("the keys at %s cannot be had: %s", self._issuer.jwks, error)
                if not self._keys:
                    raise Refused(503, "the issuer's keys cannot be had; try again later") from None
                # Rather the old keys than no service; asked for again soon.
                self._fetched = time.time() - REFRESH_S + AGAIN_S
                return
            if keys != self._keys:
                self._known.clear()
            self._keys, self._fetched = keys, time.time()

    async def _read(self) -> str:
        if not self._issuer.jwks.startswith(("http://", "https://")):
            return await asyncio.to_thread(Path(self._issuer.jwks).read_text)
        async with httpx.AsyncClient(timeout=5, follow_redirects=False) as client:
            answer = await client.get(self._issuer.jwks)
            answer.raise_for_status()
            return answer.text


def _refusal(error: str) -> Refused:
    return Refused(401, error, headers={"www-authenticate": 'Bearer error="invalid_token"'})
