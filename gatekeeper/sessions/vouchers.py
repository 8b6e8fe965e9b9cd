"""What a gateway vouches for to the applications behind it: who is asking, and which rules were charged already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from gatekeeper.http.message import Request
from gatekeeper.sessions.tokens import TokenError, Tokens

FIELD: Final = "gatekeeper-identity"
"""The field that carries a voucher. A gateway takes it from each request of a client, whoever that is."""

LIFE: Final = 30
"""The seconds for which a voucher is good: as long as a request may be on its way."""

LONGEST: Final = 8000
"""The characters that a voucher may have: some servers refuse a request with a field of 8 KiB."""

PURPOSE: Final = "identity"
TYPE: Final = "gki+jwt"


class Vouched(NamedTuple):
    """What a voucher says.

    - `user`: None where the gateway did not ask
    - `claims`: what it knows of the user besides
    - `charged`: the digests of the rules that it has charged the request for
    """

    user: str | None
    claims: Mapping[str, Any]
    charged: frozenset[str]


class Vouchers:
    """Writes and reads vouchers: tokens of their own type and under keys of their own, for one request each.

    A voucher is bound to the method, the path and the query of its request, and good for `LIFE` seconds. Who sees
    one could send the very same request with it for so long: so it is believed of trusted proxies alone.

    `clock`: the seconds since the epoch.
    """

    def __init__(self, tokens: Tokens, clock: Callable[[], float]) -> None:
        self._tokens = tokens
        self._clock = clock

    def write(self, request: Request, user: str | None, claims: Mapping[str, Any], charged: Iterable[str]) -> str:
        """A voucher for a request. Raises ValueError for claims that JSON cannot hold, or that are too many."""
        now = int(self._clock())
        told: dict[str, Any] = {"exp": now + LIFE, "req": _digest(request), "charged": list(charged)}
        if user is not None:
            told["sub"] = user
        if claims:
            told["claims"] = dict(claims)
        voucher = self._tokens.seal(told, now)
        if len(voucher) > LONGEST:
            raise ValueError(f"expected claims that make a voucher of at most {LONGEST} characters")
        return voucher

    def read(self, request: Request) -> Vouched | None:
        """What is vouched for a request; None for one without a voucher. Raises TokenError for a wrong one."""
        values = request.fields(FIELD)
        if not values:
            return None
        if len(values) > 1:
            raise TokenError("malformed")
        told = self._tokens.open(values[0], int(self._clock()))
        user, claims, charged = told.get("sub"), told.get("claims", {}), told.get("charged")
        if told.get("req") != _digest(request):
            raise TokenError("foreign")
        if not (isinstance(user, str | None) and isinstance(claims, dict) and isinstance(charged, list)):
            raise TokenError("claims")
        return Vouched(user, claims, frozenset(one for one in charged if isinstance(one, str)))


def _digest(request: Request) -> str:
    # With its length: a path is decoded, and may have a question mark of its own.
    text = f"{request.method} {len(request.path)} {request.path}?{request.query()}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
