"""Tokens of our own: JSON Web Tokens (RFC 7519) that we alone write, read by the rules of RFC 8725.

The cryptography is joserfc's. What is accepted is decided here, before it and after it, and nothing a token says of
itself is believed: the key decides on the algorithm, its purpose on the type, and no field of a header is followed.
"""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, NoReturn

from gatekeeper.errors import GatekeeperError, MissingExtra
from gatekeeper.keys import ASYMMETRIC, ENCRYPTION, HMAC_BYTES, Key, KeyRingError, KeyState, Ring

LONGEST: Final = 32 * 1024
"""A token of more characters is not looked at. (Servers take fewer bytes of fields.)"""

LEEWAY: Final = 60
"""The seconds by which the clock of who issued a token may be ahead of ours."""

_REMEMBERED: Final = 2048
_LONGEST_REMEMBERED: Final = 4096
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_-]*")
# The last characters of a text in base64url that says nothing in the bits which stand over (RFC 4648, 3.5).
_LAST: Final = {2: frozenset("AQgw"), 3: frozenset("AEIMQUYcgkosw048")}

_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


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
    """What a token says, verified. `is_old` tells that it is under a key that does not sign any more."""

    __slots__ = ("_claims", "is_old")

    def __init__(self, claims: dict[str, Any], is_old: bool) -> None:
        self._claims = claims
        self.is_old = is_old

    def __getitem__(self, name: str) -> Any:
        return self._claims[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._claims)

    def __len__(self) -> int:
        return len(self._claims)


class _Lock(NamedTuple):
    """A key, as it is used for a purpose."""

    key: Key
    algorithm: str
    material: Any


class Tokens:
    """Writes and reads tokens for one purpose.

    - `ring`: its active key signs, or encrypts
    - `issuer`, `audience`: what `iss` and `aud` have to be
    - `longest`: the seconds that a token may be valid for at most, from `iat` to `exp`
    - `encrypt`: whether tokens are encrypted (JWE, `dir` with A256GCM) and not signed: who holds one cannot read it
    - `purpose`: secrets are derived for it, and `typ` names it: a token for one passes for no other

    Raises MissingExtra without joserfc, KeyRingError for a key that cannot be used so.
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
        self._jws, self._jwe, self._jwk = _joserfc()
        self._ring = ring
        self._issuer = issuer
        self._audience = audience
        self._longest = longest
        self._encrypts = encrypt
        self._purpose = purpose
        self._typ = typ
        self._version = 0
        self._locks: dict[str, _Lock] = {}
        self._headers: dict[str, _Lock] = {}
        # What was verified, in two generations, by its text.
        self._fresh: dict[str, Claims] = {}
        self._stale: dict[str, Claims] = {}
        self._refresh()

    def seal(self, claims: Mapping[str, Any], now: int) -> str:
        """A token that says `claims`, among them `exp` (and `iat`, by default now): seconds since the epoch.

        Raises ValueError for a life longer than `longest`, or claims that JSON cannot hold.
        """
        if self._version != self._ring.version:
            self._refresh()
        document = {"iss": self._issuer, "aud": self._audience, "iat": now, **claims}
        if not 0 <= document["exp"] - document["iat"] <= self._longest:
            raise ValueError(f"exp: expected at most {self._longest} s after iat")
        payload = _encode(document).encode()
        key, algorithm, material = self._lock
        header = {"alg": algorithm, "kid": key.id, "typ": self._typ}
        if self._encrypts:
            header["enc"] = ENCRYPTION
            return str(self._jwe.encrypt_compact(header, payload, material, algorithms=["dir", ENCRYPTION]))
        return str(self._jws.serialize_compact(header, payload, material, algorithms=[algorithm]))

    def open(self, token: str, now: int) -> Claims:
        """What a token says, at `now` (seconds since the epoch). Raises TokenError, and nothing else for any text.

        One that was seen before is looked up, and only its time is checked.
        """
        if self._version != self._ring.version:
            self._refresh()
        claims = self._fresh.get(token) or self._stale.get(token)
        if claims is None:
            claims = self._verified(token)
            if len(token) <= _LONGEST_REMEMBERED:
                if len(self._fresh) >= _REMEMBERED:
                    self._stale, self._fresh = self._fresh, {}
                self._fresh[token] = claims
        if now >= claims["exp"]:
            raise TokenError("expired")
        if claims["iat"] > now + LEEWAY:
            raise TokenError("early")
        return claims

    def _verified(self, token: str) -> Claims:
        if len(token) > LONGEST:
            raise TokenError("long")
        segments = token.split(".", 5)
        if len(segments) != (5 if self._encrypts else 3) or not all(map(_is_canonical, segments)):
            raise TokenError("malformed")
        # A header that was right before need not be read again: it is the same for all tokens under a key.
        lock = self._headers.get(segments[0]) or self._header(segments[0])
        try:
            if self._encrypts:
                payload = self._jwe.decrypt_compact(token, lock.material, algorithms=["dir", ENCRYPTION]).plaintext
            else:
                payload = self._jws.deserialize_compact(token, lock.material, algorithms=[lock.algorithm]).payload
        except Exception:  # whatever joserfc and what is below it make of hostile bytes
            raise TokenError("signature") from None
        return Claims(self._checked(payload), lock.key is not self._ring.active)

    def _header(self, segment: str) -> _Lock:
        header = parsed(segment_bytes(segment), "header")
        members = {"alg", "kid", "typ", "enc"} if self._encrypts else {"alg", "kid", "typ"}
        if header.keys() != members:
            raise TokenError("header")
        if header["typ"] != self._typ:
            raise TokenError("foreign")
        id = header["kid"]
        lock = self._locks.get(id) if isinstance(id, str) else None
        if lock is None:
            raise TokenError("key")
        if header["alg"] != lock.algorithm or header.get("enc", ENCRYPTION) != ENCRYPTION:
            raise TokenError("key")
        if len(self._headers) < 64:
            self._headers[segment] = lock
        return lock

    def _checked(self, payload: bytes | None) -> dict[str, Any]:
        claims = parsed(payload or b"", "claims")
        if claims.get("iss") != self._issuer or claims.get("aud") != self._audience:
            raise TokenError("foreign")
        issued, expires = claims.get("iat"), claims.get("exp")
        if type(issued) is not int or type(expires) is not int or not 0 <= expires - issued <= self._longest:
            raise TokenError("claims")
        return claims

    def _refresh(self) -> None:
        """The ring has other keys: forget what was verified under those before."""
        version = self._ring.version
        keys = [key for key in self._ring.keys if key.state is not KeyState.REVOKED]
        self._locks = {key.id: self._lock_of(key) for key in keys if key.is_private or not self._encrypts}
        self._lock = self._locks[self._ring.active.id]
        self._headers, self._fresh, self._stale = {}, {}, {}
        self._version = version

    def _lock_of(self, key: Key) -> _Lock:
        if self._encrypts:
            return _Lock(key, "dir", self._jwk.OctKey.import_key(key.derive(f"{self._purpose}-encrypted")))
        if key.algorithm == ENCRYPTION:
            raise KeyRingError(f"key {key.id}: expected a key that signs, or encrypt = true: {ENCRYPTION} encrypts")
        if key.algorithm in ASYMMETRIC:
            return _Lock(key, key.algorithm, asymmetric(key))
        secret = key.derive(self._purpose, HMAC_BYTES[key.algorithm])
        return _Lock(key, key.algorithm, self._jwk.OctKey.import_key(secret))


def asymmetric(key: Key) -> Any:
    """A key pair, or a public key, for joserfc. Raises KeyRingError for one that is weak, or of another kind."""
    _, _, jwk = _joserfc()
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


def _joserfc() -> tuple[Any, Any, Any]:
    """The library, once tokens are used: others do without it, and importing it takes a while."""
    try:
        from joserfc import jwe, jwk, jws
    except ImportError:
        raise MissingExtra("a token", "jwt") from None
    return jws, jwe, jwk


def _is_canonical(segment: str) -> bool:
    """Whether a segment is base64url without padding, in the one way to write it: else a token has many texts."""
    over = len(segment) % 4
    return over != 1 and _SEGMENT.fullmatch(segment) is not None and (not over or segment[-1] in _LAST[over])


def segment_bytes(segment: str) -> bytes:
    return urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def parsed(document: bytes, reason: str) -> dict[str, Any]:
    """A JSON object in which no member stands twice, and no number is none. Raises TokenError."""
    try:
        found = json.loads(document.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
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
