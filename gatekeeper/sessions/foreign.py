"""Identity tokens of others: those of an identity provider, which its public keys alone verify (RFC 8725).

They say who asks, and never are a session. What a token says of itself is believed as little as of our own: its
`kid` picks one of the keys that the provider publishes, and that key decides on the algorithm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from gatekeeper.commands import Call, Steps
from gatekeeper.errors import GatekeeperError
from gatekeeper.sessions.tokens import (
    LEEWAY,
    LONGEST,
    Remembered,
    TokenError,
    is_canonical,
    joserfc,
    parsed,
    segment_bytes,
)

KINDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    "ES256": "P-256",
    "ES384": "P-384",
    "ES512": "P-521",
    "EdDSA": "Ed25519",
    "Ed25519": "Ed25519",
}
"""The algorithms that are taken (RFC 7518, 8037, 9864), each with the kind of key that it goes with.

None of them has a secret: who can verify cannot sign.
"""

MOST_KEYS: Final = 128
"""So many keys of a provider are looked at."""

_MEMBERS: Final = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_RSA_BITS: Final = range(2048, 8193)
# The thumbprints say nothing that is not known of the key: they are passed over. All else is refused.
_HEADER: Final = frozenset({"alg", "kid", "typ", "x5t", "x5t#S256"})
_TYPES: Final = frozenset({"jwt", "application/jwt", "at+jwt", "application/at+jwt"})  # RFC 9068 has the latter


class KeySetError(GatekeeperError, ValueError):
    """A document is no JWK Set."""


class UnknownKey(TokenError):
    """A token is under a key that the provider had not published when it was asked last."""

    def __init__(self) -> None:
        super().__init__("key")


class PublicKey(NamedTuple):
    """A key that a provider publishes. `algorithm`: the only one that it is for, if it says so."""

    kind: str
    algorithm: str | None
    material: Any


KeySet: TypeAlias = Mapping[str, tuple[PublicKey, ...]]
"""Keys by their id. Several have one id only where they are of different kinds (RFC 7517, 4.5)."""


class KeySource(Protocol):
    """Where the keys of a provider are had from."""

    keys: KeySet
    """As they were read last; none before that."""

    def is_old(self) -> bool:
        """Whether it is time to read them again, though all that was asked for is there."""

    def is_due(self) -> bool:
        """Whether it is worth waiting for `refresh`: they are being read, or may be read again."""

    def begin(self, nothing: object = None) -> object:
        """Read them again, without waiting for it."""

    def refresh(self, nothing: object = None) -> None:
        """Read them again, and wait for it, for a bounded time. What goes wrong leaves those there were."""

    async def arefresh(self, nothing: object = None) -> None:
        """As `refresh`, awaited."""


class ForeignTokens:
    """Reads the tokens that a provider has issued for us.

    - `issuer`, `audience`: `iss` has to be the one; `aud` the other, or a list with it
    - `source`: where the provider's keys are had from
    - `algorithms`: the names of those taken, of `KINDS`; by default all

    Raises MissingExtra without joserfc.
    """

    def __init__(
        self, source: KeySource, *, issuer: str, audience: str, algorithms: Iterable[str] = tuple(KINDS)
    ) -> None:
        joserfc()
        self._source = source
        self._issuer = issuer
        self._audience = audience
        self._kinds = {name: KINDS[name] for name in algorithms}
        self._seen: tuple[KeySet, Remembered[Mapping[str, Any]]] = source.keys, Remembered()
        self.counts: Counter[str] = Counter()
        """How often a token was none, by the reason."""

    def claims(self, token: str, now: int, *, blocking: bool) -> Steps[Mapping[str, Any] | None]:
        """What a token says at `now` (seconds since the epoch); None if it is none, which is counted.

        For a key that is not known the provider is asked, as far as the source allows. `blocking`: whether the
        home of the request may be blocked meanwhile.
        """
        source = self._source
        if source.is_old():
            yield Call(source.begin, None)
        try:
            try:
                return self.open(token, now)
            except UnknownKey:
                if source.is_due():
                    yield Call(source.refresh if blocking else source.arefresh, None)
            # Though nothing is due: they may have been read just now, for somebody else.
            return self.open(token, now)
        except TokenError as error:
            self.counts[error.reason] += 1
            return None

    def open(self, token: str, now: int) -> Mapping[str, Any]:
        """What a token says, by the keys that are there. Raises UnknownKey, TokenError, and nothing else."""
        keys, seen = self._seen
        if keys is not self._source.keys:
            keys, seen = self._seen = self._source.keys, Remembered()
        claims = seen.get(token)
        if claims is None:
            claims = MappingProxyType(self._verified(token, keys))
            seen.add(token, claims)
        # Its clock and ours are set by different hands.
        if now >= claims["exp"] + LEEWAY:
            raise TokenError("expired")
        if any(name in claims and claims[name] > now + LEEWAY for name in ("iat", "nbf")):
            raise TokenError("early")
        return claims

    def _verified(self, token: str, keys: KeySet) -> dict[str, Any]:
        if len(token) > LONGEST:
            raise TokenError("long")
        segments = token.split(".", 3)
        if len(segments) != 3 or not all(map(is_canonical, segments)):
            raise TokenError("malformed")
        algorithm, key = self._key(parsed(segment_bytes(segments[0]), "header"), keys)
        signed, _, _ = token.rpartition(".")
        try:
            right = _way(algorithm).verify(signed.encode(), segment_bytes(segments[2]), key.material)
        except Exception:  # whatever joserfc and what is below it make of hostile bytes
            right = False
        if not right:
            raise TokenError("signature")
        return self._checked(parsed(segment_bytes(segments[1]), "claims"))

    def _key(self, header: Mapping[str, Any], keys: KeySet) -> tuple[str, PublicKey]:
        if not {"alg", "kid"} <= header.keys() <= _HEADER:
            raise TokenError("header")
        typ, algorithm, id = header.get("typ", "JWT"), header["alg"], header["kid"]
        if not isinstance(typ, str) or typ.lower() not in _TYPES:
            raise TokenError("foreign")
        kind = self._kinds.get(algorithm) if isinstance(algorithm, str) else None
        if kind is None or not isinstance(id, str):
            raise TokenError("key")
        if id not in keys:
            raise UnknownKey
        for key in keys[id]:
            if key.kind == kind and key.algorithm in (None, algorithm):
                return algorithm, key
        raise TokenError("key")

    def _checked(self, claims: dict[str, Any]) -> dict[str, Any]:
        audiences = claims.get("aud")
        if claims.get("iss") != self._issuer or self._audience not in (
            audiences if isinstance(audiences, list) else [audiences]
        ):
            raise TokenError("foreign")
        times = [claims[name] for name in ("iat", "nbf") if name in claims]
        # NumericDate may have a fraction (RFC 7519, 2). A truth is no number here.
        if not all(type(time) in (int, float) for time in (claims.get("exp"), *times)):
            raise TokenError("claims")
        return claims


def parse_key_set(raw: bytes) -> KeySet:
    """The keys of a JWK Set (RFC 7517, 5) that verify. Those that are of no use to us are left out, as it says.

    Raises KeySetError for what is no set.
    """
    try:
        listed = parsed(raw, "key").get("keys")
    except TokenError:
        listed = None
    if not isinstance(listed, list):
        raise KeySetError('expected a JWK Set: {"keys": […]}')
    found: dict[str, dict[str, PublicKey]] = {}
    for member in listed[:MOST_KEYS]:
        key = _public_key(member) if isinstance(member, dict) else None
        if key is not None:
            found.setdefault(member["kid"], {}).setdefault(key.kind, key)
    return {id: tuple(keys.values()) for id, keys in found.items()}


def _public_key(member: Mapping[str, Any]) -> PublicKey | None:
    """A key of a set; None for one that is for something else, weak, or no public key."""
    kty, algorithm, operations = member.get("kty"), member.get("alg"), member.get("key_ops", ["verify"])
    if not isinstance(kty, str) or kty not in _MEMBERS or not isinstance(member.get("kid"), str) or "d" in member:
        return None
    if member.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    if not isinstance(algorithm, str | None):
        return None
    _, _, jwk = joserfc()
    try:
        made = {"RSA": jwk.RSAKey, "EC": jwk.ECKey, "OKP": jwk.OKPKey}[kty].import_key(
            {"kty": kty, **{name: member[name] for name in _MEMBERS[kty]}}
        )
        if kty == "RSA":
            return PublicKey("RSA", algorithm, made) if made.raw_value.key_size in _RSA_BITS else None
        made.get_op_key("verify")
        return PublicKey(made.curve_name, algorithm, made) if made.curve_name in KINDS.values() else None
    except Exception:  # whatever joserfc and what is below it make of a member that is missing or wrong
        return None


class Bearer(NamedTuple):
    """How the user of a request is found in its token: by which `claim`, at the time of `clock` (seconds)."""

    tokens: ForeignTokens
    claim: str
    clock: Callable[[], float]


def _way(algorithm: str) -> Any:
    """joserfc's algorithm. Its EdDSA, which it warns of by name, is Ed25519 with a key of that curve."""
    jws, _, _ = joserfc()
    return jws.JWSRegistry.algorithms["EdDSA" if algorithm == "Ed25519" else algorithm]
