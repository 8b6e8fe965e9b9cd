"""Affinity: a client keeps to the upstream that has answered it. It holds a pin, in a cookie or a field.

A pin is 76 characters: 24 bytes in base64url, a dot, an HMAC-SHA256 of that (itsdangerous, by the ring of keys).
The bytes are 6 that stand for the pool, 12 that stand for the upstream, and the second since the epoch in which the
pin ends. What stands for them is a keyed hash, so a pin shows no name and no address; and it stands for the
upstream's id, so an upstream may move, and the order of the settings may change.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final, Literal, NamedTuple

from itsdangerous import BadSignature, Signer

from gatekeeper.http.cookies import set_cookie
from gatekeeper.http.fields import Fields
from gatekeeper.http.message import Request
from gatekeeper.http.parts import cookies
from gatekeeper.keys import Key, KeyState, Ring

REMEMBERED: Final = 4096
"""So many pins that were verified are remembered, of each pool, and as many that were not used since."""

END: Final = "end"
"""What an application says to end a pin, and what a client is told in a field whose pin has ended."""

END_FIELD: Final = "x-gatekeeper-affinity"
"""The field of a response in which the application says it."""

_PURPOSE: Final = "affinity"
_POOL, _UPSTREAM, _ENDS = 6, 12, 6  # bytes
# The last character of 32 bytes has two bits to spare: without them a pin has one text.
_PIN: Final = re.compile(r"[A-Za-z0-9_-]{32}\.[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
_SKEW: Final = 60  # seconds that the clocks of two gateways may differ


class Fault(StrEnum):
    """Why a pin is not followed."""

    FORGED = "forged"
    """None of the keys has signed it; or it is no pin at all."""
    EXPIRED = "expired"
    FOREIGN = "foreign"
    """It is another pool's."""
    REPEATED = "repeated"
    """It stands twice: one may have been planted, by a neighbour that shares the domain."""


class Pin(NamedTuple):
    """What a pin says, verified."""

    id: str | None
    """The upstream's; None if the pool has it no more."""
    expires: int
    """The second since the epoch in which it ends."""
    renews: int
    """The second from which on it is worth a new one; 0 if its key is retiring, or it lasts too long."""


class Held(NamedTuple):
    """What a client holds as it asks, and where it was."""

    pin: Pin | None
    fault: Fault | None = None
    in_cookie: bool = False
    in_field: bool = False
    stays: bool = False
    """Whether the pin outlasts an answer of another upstream: its own is merely full."""


class _Known:
    """What follows from the keys of one version of the ring, and the pins that were verified under them.

    All of it goes when the ring changes, in one step.
    """

    __slots__ = ("fresh", "ids", "pools", "prefixes", "signer", "stale", "version")

    def __init__(self, ring: Ring, pool: str, ids: Iterable[str]) -> None:
        self.version = ring.version  # first: keys that are replaced meanwhile are learnt the next time
        self.signer = Signer(ring.secrets(_PURPOSE), salt=b"gatekeeper", digest_method=hashlib.sha256)
        self.fresh: dict[str, Pin] = {}
        self.stale: dict[str, Pin] = {}
        # The upstreams by what stands for them, each with whether the key is retiring; and what pins begin with.
        self.ids: dict[bytes, tuple[str | None, bool]] = {}
        self.pools: dict[bytes, bool] = {}
        self.prefixes: dict[str, bytes] = {}
        ids = list(ids)
        for key in ring.keys:
            if key.state is KeyState.REVOKED or not key.is_private:
                continue
            is_old = key.state is KeyState.RETIRING
            its_pool = _tag(key, "pool", pool)[:_POOL]
            self.pools[its_pool] = is_old
            for id in ids:
                its_id = _tag(key, "upstream", pool, id)[:_UPSTREAM]
                self.ids[its_id] = id, is_old
                if key.state is KeyState.ACTIVE:  # not `ring.active`, which may be of other keys by now
                    self.prefixes[id] = its_pool + its_id


def _tag(key: Key, *names: str) -> bytes:
    text = "\0".join(names).encode("utf-8", "surrogatepass")  # no name of a pool has a NUL
    return hmac.digest(key.derive("affinity-names"), text, hashlib.sha256)


class Pins:
    """Writes and reads the pins of a pool.

    - `ids`: of its upstreams, in any order
    - `ttl`: how long a pin lasts, in seconds. With less than half of that left it is worth a new one.
    """

    __slots__ = ("_ids", "_known", "_ring", "pool", "ttl")

    def __init__(self, ring: Ring, pool: str, ids: Iterable[str], ttl: int) -> None:
        self._ring = ring
        self._ids = tuple(ids)
        self.pool = pool
        self.ttl = ttl
        self._known = _Known(ring, pool, self._ids)

    def seal(self, id: str, now: int) -> str:
        """A pin to an upstream, from `now` on (seconds since the epoch)."""
        known = self._learnt()
        said = known.prefixes[id] + (now + self.ttl).to_bytes(_ENDS, "big")
        return known.signer.sign(urlsafe_b64encode(said)).decode("ascii")

    def open(self, text: str, now: int) -> Pin | Fault:
        """What a text says that came as a pin. Nothing that a client sends raises an error."""
        known = self._known
        if known.version != self._ring.version:
            known = self._learnt()
        pin = known.fresh.get(text)
        if pin is None:
            found = known.stale.get(text) or self._verify(known, text, now)
            if isinstance(found, Fault):
                return found
            pin = found
            if len(known.fresh) >= REMEMBERED:
                known.stale, known.fresh = known.fresh, {}
            known.fresh[text] = pin
        return pin if now < pin.expires else Fault.EXPIRED

    def _verify(self, known: _Known, text: str, now: int) -> Pin | Fault:
        if not _PIN.fullmatch(text):
            return Fault.FORGED
        try:
            said = urlsafe_b64decode(known.signer.unsign(text))
        except BadSignature:
            return Fault.FORGED
        its_pool, its_id = said[:_POOL], said[_POOL : _POOL + _UPSTREAM]
        if its_pool not in known.pools:
            return Fault.FOREIGN
        expires = int.from_bytes(said[_POOL + _UPSTREAM :], "big")
        if now >= expires:  # it is not remembered: there is no end of what has expired
            return Fault.EXPIRED
        id, is_old = known.ids.get(its_id, (None, known.pools[its_pool]))
        # One that lasts too long was made when `ttl` was longer.
        is_long = expires > now + self.ttl + _SKEW
        return Pin(id, expires, 0 if is_old or is_long else expires - -(-self.ttl // 2))

    def _learnt(self) -> _Known:
        if self._known.version != self._ring.version:
            self._known = _Known(self._ring, self.pool, self._ids)
        return self._known


class Affinity:
    """How the clients of a pool hold their pins: in a cookie, in a field for clients without, or in either.

    - `cookie`, `field`: their names, None for none of that kind; the field's in lower case
    - `strict`: whether a client is refused rather than answered by another upstream than its own
    - `secure`, `samesite`: attributes of the cookie; it is HttpOnly, for the whole host, and ends with the pin
    - `clock`: seconds since the epoch
    """

    __slots__ = ("_clock", "_samesite", "_secure", "cookie", "field", "pins", "strict")

    def __init__(
        self,
        pins: Pins,
        *,
        cookie: str | None = None,
        field: str | None = None,
        strict: bool = False,
        secure: bool = True,
        samesite: Literal["lax", "strict", "none"] = "lax",
        clock: Callable[[], float],
    ) -> None:
        self.pins = pins
        self.cookie = cookie
        self.field = field
        self.strict = strict
        self._secure = secure
        self._samesite = samesite
        self._clock = clock

    def read(self, request: Request) -> Held:
        """What the client of a request holds. Where it sends both, the field is meant."""
        in_field = request.fields(self.field) if self.field is not None else []
        in_cookie = list(cookies(request.fields("cookie"), self.cookie)) if self.cookie is not None else []
        came = in_field or in_cookie
        if not came:
            return NOTHING
        found = Fault.REPEATED if len(came) > 1 else self.pins.open(came[0], int(self._clock()))
        if isinstance(found, Fault):
            return Held(None, found, bool(in_cookie), bool(in_field))
        return Held(found, None, bool(in_cookie), bool(in_field))

    def kept(self, held: Held, id: str) -> Fields:
        """The fields that pin a client to the upstream that answered; none if it is pinned so, for long enough."""
        if held.stays:
            return []
        now, pin = int(self._clock()), held.pin
        if pin is not None and pin.id == id and now < pin.renews:
            return []
        return self._fields(held, self.pins.seal(id, now))

    def ended(self, held: Held) -> Fields:
        """The fields that end the pin of a client; none if it holds none."""
        return self._fields(held, None) if held.in_cookie or held.in_field else []

    def _fields(self, held: Held, pin: str | None) -> Fields:
        """In answer to how the pin came; to who holds none, in each way."""
        fields: Fields = []
        if self.cookie is not None and (held.in_cookie or not held.in_field):
            value = set_cookie(
                self.cookie,
                pin or "",
                max_age=self.pins.ttl if pin is not None else 0,
                secure=self._secure,
                samesite=self._samesite,
            )
            fields.append((b"set-cookie", value))
        if self.field is not None and (held.in_field or not held.in_cookie):
            fields.append((self.field.encode("ascii"), (pin or END).encode("ascii")))
        return fields


NOTHING: Final = Held(None)
"""What a client holds that was never here."""
