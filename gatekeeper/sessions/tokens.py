"""Tokens of our own: JSON Web Tokens (RFC 7519) that we alone write, read by the rules of RFC 8725.

The cryptography is joserfc's. What is accepted is decided here, before it and after it, and nothing a token says of
itself is believed: the key decides on the algorithm, its purpose on the type, and no field of a header is followed.
"""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeVar

from gatekeeper.errors import GatekeeperError, MissingExtra
from gatekeeper.keys import ASYMMETRIC, ENCRYPTION, HMAC_BYTES, Key, KeyRingError, KeyState, Ring

LONGEST: Final = 32 * 1024
"""A token of more characters is not looked at. (Servers take fewer bytes of fields.)"""

LEEWAY: Final = 60
"""The seconds by which the clock of who issued a token may be ahead of ours."""

REMEMBERED: Final = 2048
"""So many tokens that were verified are remembered, twice: those seen lately, and those seen before them."""

REMEMBERED_CHARACTERS: Final = 2 << 20
"""So many characters they may have in all, twice."""

_LONGEST_REMEMBERED: Final = 4096
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_-]*")
# The last characters of a text in base64url that says nothing in the bits which stand over (RFC 4648, 3.5).
_LAST: Final = {2: frozenset("AQgw"), 3: frozenset("AEIMQUYcgkosw048")}

_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


T = TypeVar("T")


class TokenError(GatekeeperError, ValueError):
    """A text is no token of ours. `reason` is one of `REASONS`, for counters; the client is told nothing of it."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS
        self.reason = reason
        super().__init__(f"no valid token: {reason}")


REASONS: Final = frozenset(
    {"long", "malformed", "header", "key", "signature", "claims", "foreign", "early", "expired"}
)
"""Why a token is none: too long; not of its form; a header with members that we do not write; a key unknown or for
something else; a signature (or a seal) that is wrong; claims missing or of the wrong kind; another's issuer,
audience or type; issued in the future; expired."""


class Claims(Mapping[str, Any]):
    """What a token says, verified, and the key it is under."""

    __slots__ = ("_claims", "key")

    def __init__(self, claims: dict[str, Any], key: Key) -> None:
        self._claims = claims
        self.key = key

    @property
    def is_old(self) -> bool:
        """Whether the key is retiring, so that the token is to be issued anew."""
        return self.key.state is KeyState.RETIRING

    def __getitem__(self, name: str) -> Any:
        return self._claims[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._claims)

    def __len__(self) -> int:
        return len(self._claims)


class Remembered(Generic[T]):
    """What tokens say that were verified, by their texts; bounded.

    In two generations: what is asked for moves into the fresh one, and the stale one is forgotten as a whole.
    """

    __slots__ = ("characters", "fresh", "stale")

    def __init__(self) -> None:
        self.fresh: dict[str, T] = {}
        self.stale: dict[str, T] = {}
        self.characters = 0

    def get(self, token: str) -> T | None:
        found = self.fresh.get(token)
        if found is None:
            found = self.stale.get(token)
            if found is not None:
                self.add(token, found)
        return found

    def add(self, token: str, said: T) -> None:
        if len(token) > _LONGEST_REMEMBERED:
            return
        if len(self.fresh) >= REMEMBERED or self.characters + len(token) > REMEMBERED_CHARACTERS:
            self.stale, self.fresh, self.characters = self.fresh, {}, 0
        self.fresh[token] = said
        self.characters += len(token)


class _Lock(NamedTuple):
    """A key, as it is used for a purpose."""

    key: Key
    algorithm: str
    material: Any
    """As joserfc takes it."""
    way: Any
    """joserfc's algorithm, which signs and verifies; None to encrypt."""
    header: str
    """The first segment of what is written under it."""


class _Known:
    """The keys of one version of the ring, and what was verified under them.

    All of it goes when the ring changes, in one step: a thread that is late with what it verified under a key which
    is revoked by now adds it to what nobody looks into any more.
    """

    __slots__ = ("active", "headers", "locks", "tokens", "version")

    def __init__(self, version: int, locks: dict[str, _Lock], active: _Lock) -> None:
        self.version = version
        self.locks = locks
        self.active = active
        self.headers: dict[str, _Lock] = {}
        self.tokens: Remembered[Claims] = Remembered()


class Tokens:
    """Writes and reads tokens for one purpose.

    - `ring`: its active key signs; or it encrypts, if it is one for A256GCM
    - `issuer`, `audience`: what `iss` and `aud` have to be
    - `longest`: the seconds that a token may be valid for at most, from `iat` to `exp`
    - `encrypt`: whether all keys encrypt (JWE, `dir` with A256GCM) and none signs: who holds a token cannot read it
    - `purpose`: secrets are derived for it, and `typ` names it: a token for one passes for no other

    Raises MissingExtra without joserfc, KeyRingError for a key that cannot be used so; from then on the ring takes
    no such key.
    """

    def __init__(
        self,
        ring: Ring,
        *,
        issuer: str,
        audience: str,
        longest: int,
        encrypt: bool = False,
        purpose: str = "session",
        typ: str = "gks+jwt",
    ) -> None:
        self._jws, self._jwe, self._jwk = joserfc()
        self._ring = ring
        self._issuer = issuer
        self._audience = audience
        self._longest = longest
        self._encrypts = encrypt
        self._purpose = purpose
        self._typ = typ
        self._known = self._renewed()
        ring.checks.append(self._locks)

    def seal(self, claims: Mapping[str, Any], now: int) -> str:
        """A token that says `claims`, among them `exp` (and `iat`, by default now): seconds since the epoch.

        Raises ValueError for a life longer than `longest`, for claims that JSON cannot hold, and for so many that
        the token would not be read again.
        """
        known = self._known
        if known.version != self._ring.version:
            known = self._renewed()
        document = {"iat": now, **claims, "iss": self._issuer, "aud": self._audience}
        problem = self._wrong_times(document)
        if problem:
            raise ValueError(problem)
        try:
            payload = _encode(document).encode()
        except (TypeError, RecursionError):
            raise ValueError("expected claims of texts, numbers, truths, lists and mappings by text") from None
        lock = known.active
        if lock.way is None:
            header = {**self._header_of(lock.key, lock.algorithm), "enc": ENCRYPTION}
            token = str(self._jwe.encrypt_compact(header, payload, lock.material, algorithms=["dir", ENCRYPTION]))
        else:
            signed = f"{lock.header}.{_segment(payload)}"
            token = f"{signed}.{_segment(lock.way.sign(signed.encode(), lock.material))}"
        if len(token) > LONGEST:
            raise ValueError(f"expected claims that make a token of at most {LONGEST} characters")
        return token

    def open(self, token: str, now: int) -> Claims:
        """What a token says, at `now` (seconds since the epoch). Raises TokenError, and nothing else for any text.

        One that was seen before is looked up, and only its time is checked. What is within the claims is shared by
        all who ask: it is not to be changed.
        """
        known = self._known
        if known.version != self._ring.version:
            known = self._renewed()
        claims = known.tokens.get(token)
        if claims is None:
            claims = self._verified(token, known)
            known.tokens.add(token, claims)
        said = claims._claims
        if now >= said["exp"]:
            raise TokenError("expired")
        if said["iat"] > now + LEEWAY:
            raise TokenError("early")
        return claims

    def _verified(self, token: str, known: _Known) -> Claims:
        if len(token) > LONGEST:
            raise TokenError("long")
        segments = token.split(".", 5)
        if len(segments) not in (3, 5) or not all(map(is_canonical, segments)):
            raise TokenError("malformed")
        # A header that was right before need not be read again: it is the same for all tokens under a key.
        lock = known.headers.get(segments[0]) or self._header(segments[0], known)
        if len(segments) != (5 if lock.way is None else 3):
            raise TokenError("malformed")
        payload: bytes | None = None
        try:
            if lock.way is None:
                payload = self._jwe.decrypt_compact(token, lock.material, algorithms=["dir", ENCRYPTION]).plaintext
            elif lock.way.verify(token[: token.rindex(".")].encode(), segment_bytes(segments[2]), lock.material):
                payload = segment_bytes(segments[1])
        except Exception:  # whatever joserfc and what is below it make of hostile bytes
            payload = None
        if payload is None:
            raise TokenError("signature")
        if len(known.headers) < 64:
            known.headers[segments[0]] = lock
        return Claims(self._checked(payload), lock.key)

    def _header(self, segment: str, known: _Known) -> _Lock:
        header = parsed(segment_bytes(segment), "header")
        if header.keys() - {"enc"} != {"alg", "kid", "typ"}:
            raise TokenError("header")
        if header["typ"] != self._typ:
            raise TokenError("foreign")
        id = header["kid"]
        lock = known.locks.get(id) if isinstance(id, str) else None
        if lock is None or header["alg"] != lock.algorithm:
            raise TokenError("key")
        if ("enc" in header) is not (lock.way is None):
            raise TokenError("header")
        if header.get("enc", ENCRYPTION) != ENCRYPTION:
            raise TokenError("key")
        return lock

    def _checked(self, payload: bytes) -> dict[str, Any]:
        claims = parsed(payload, "claims")
        if claims.get("iss") != self._issuer or claims.get("aud") != self._audience:
            raise TokenError("foreign")
        if self._wrong_times(claims):
            raise TokenError("claims")
        return claims

    def _wrong_times(self, claims: Mapping[str, Any]) -> str | None:
        issued, expires = claims.get("iat"), claims.get("exp")
        if type(issued) is not int or type(expires) is not int:  # a truth is no number here
            return "iat, exp: expected whole seconds since the epoch"
        if not 0 <= expires - issued <= self._longest:
            return f"exp: expected at most {self._longest} s after iat"
        return None

    def _renewed(self) -> _Known:
        """The ring has other keys: what was verified under those before is forgotten."""
        version, keys = self._ring.version, self._ring.keys
        locks = self._locks(keys)
        active = next(locks[key.id] for key in keys if key.state is KeyState.ACTIVE)
        known = self._known = _Known(version, locks, active)
        return known

    def _locks(self, keys: tuple[Key, ...]) -> dict[str, _Lock]:
        """The keys that verify, by their ids. Raises KeyRingError."""
        living = [key for key in keys if key.state is not KeyState.REVOKED]
        return {key.id: self._lock(key) for key in living if key.is_private or not self._encrypts}

    def _lock(self, key: Key) -> _Lock:
        if self._encrypts or key.algorithm == ENCRYPTION:
            secret = self._jwk.OctKey.import_key(key.derive(f"{self._purpose}-encrypted"))
            return _Lock(key, "dir", secret, None, "")
        if key.algorithm in ASYMMETRIC:
            material = asymmetric(key)
        else:
            material = self._jwk.OctKey.import_key(key.derive(self._purpose, HMAC_BYTES[key.algorithm]))
        way = self._jws.JWSRegistry.algorithms[key.algorithm]
        header = _encode(self._header_of(key, key.algorithm)).encode()
        return _Lock(key, key.algorithm, material, way, _segment(header))

    def _header_of(self, key: Key, algorithm: str) -> dict[str, str]:
        return {"alg": algorithm, "kid": key.id, "typ": self._typ}


def asymmetric(key: Key) -> Any:
    """A key pair, or a public key, for joserfc. Raises KeyRingError for one that is weak, or of another kind."""
    _, _, jwk = joserfc()
    try:
        if key.algorithm in ("RS256", "PS256"):
            rsa = jwk.RSAKey.import_key(key.secret)
            if rsa.raw_value.key_size < 2048:
                raise KeyRingError(f"key {key.id}: expected an RSA key of 2048 bits or more")
            return rsa
        if key.algorithm == "ES256":
            ec = jwk.ECKey.import_key(key.secret)
            if ec.curve_name != "P-256":
                raise KeyRingError(f"key {key.id}: expected a key on the curve P-256 for ES256")
            return ec
        okp = jwk.OKPKey.import_key(key.secret)
        if okp.curve_name != "Ed25519":
            raise KeyRingError(f"key {key.id}: expected an Ed25519 key for EdDSA")
    except KeyRingError:
        raise
    except Exception:  # its messages may quote the key
        raise KeyRingError(f"key {key.id}: expected the PEM of a key for {key.algorithm}") from None
    return okp


def joserfc() -> tuple[Any, Any, Any]:
    """The library, once tokens are used: others do without it, and importing it takes a while."""
    try:
        from joserfc import jwe, jwk, jws
    except ImportError:
        raise MissingExtra("a token", "jwt") from None
    return jws, jwe, jwk


def is_canonical(segment: str) -> bool:
    """Whether a segment is base64url without padding, in the one way to write it: else a token has many texts."""
    over = len(segment) % 4
    return over != 1 and _SEGMENT.fullmatch(segment) is not None and (not over or segment[-1] in _LAST[over])


def segment_bytes(segment: str) -> bytes:
    return urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def _segment(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def parsed(document: bytes, reason: str) -> dict[str, Any]:
    """A JSON object in which no member stands twice, and every number is finite. Raises TokenError."""
    try:
        found = _decode(document.decode("utf-8"))
    except (ValueError, RecursionError):
        raise TokenError(reason) from None
    if not isinstance(found, dict):
        raise TokenError(reason)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member stands twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):  # 1e999
        raise ValueError("a number is infinite")
    return number


_decode: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite).decode
