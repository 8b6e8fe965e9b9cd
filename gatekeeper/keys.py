"""The ring of keys that sign and verify what Gatekeeper hands out: sessions, pins, identities."""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import b64decode
from collections.abc import Callable, Iterable
from enum import StrEnum
from itertools import count
from typing import Final

from gatekeeper.errors import GatekeeperError

HMAC_BYTES: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
"""The fewest bytes of a secret for each (RFC 7518, 3.2: no less than the hash has)."""

ASYMMETRIC: Final = ("RS256", "PS256", "ES256", "EdDSA")
ENCRYPTION: Final = "A256GCM"
ALGORITHMS: Final = (*HMAC_BYTES, *ASYMMETRIC, ENCRYPTION)
"""The names of RFC 7518 and RFC 8037."""

_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PLACEHOLDERS: Final = re.compile(
    rb"change.?me|secret|password|placeholder|example|insecure|your.?(secret|key)|replace|django-insecure|0123456789",
    re.IGNORECASE,
)
_PRIVATE: Final = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----\s(.+?)-----END \1-----", re.DOTALL)
_FEWEST_KINDS: Final = 8  # of bytes in a secret: what has fewer was not drawn at random

_versions = count(1)


class KeyRingError(GatekeeperError, ValueError):
    """A key cannot be used, or keys do not go together. The message never shows a secret."""


class KeyState(StrEnum):
    """Where a key is in its life."""

    PENDING = "pending"
    """It verifies, and does not sign yet: others must have read it before."""
    ACTIVE = "active"
    """It signs. One key of a ring does."""
    RETIRING = "retiring"
    """It verifies still; what it signed is signed anew."""
    REVOKED = "revoked"
    """It does nothing."""


class Key:
    """One key.

    - `id`: 1 to 64 letters, digits, `.`, `_` or `-`; stands as `kid` in tokens
    - `algorithm`: HS256, HS384 or HS512 (a secret of at least 32, 48 or 64 bytes); RS256, PS256, ES256 or EdDSA
      (PEM of the private key, or of the public one where it only verifies); A256GCM (32 bytes; it encrypts)
    - `created`: seconds since the epoch, if known

    Raises KeyRingError for a secret that is too short, or no secret. (What a PEM holds is checked as it is used.)
    """

    __slots__ = ("_derived", "algorithm", "created", "id", "secret", "state")

    def __init__(
        self,
        id: str,
        algorithm: str,
        secret: bytes,
        state: KeyState = KeyState.ACTIVE,
        created: int | None = None,
    ) -> None:
        if not _ID.fullmatch(id):
            raise KeyRingError("key: expected an id of 1 to 64 letters, digits, '.', '_' or '-'")
        if algorithm not in ALGORITHMS:
            raise KeyRingError(f"key {id}: expected an algorithm: {', '.join(ALGORITHMS)}")
        if algorithm in ASYMMETRIC:
            if b"-----BEGIN " not in secret:
                raise KeyRingError(f"key {id}: expected the PEM of a private or a public key for {algorithm}")
        else:
            _check_secret(id, algorithm, secret)
        self.id = id
        self.algorithm = algorithm
        self.secret = secret
        self.state = KeyState(state)
        self.created = created
        self._derived: dict[tuple[str, int], bytes] = {}

    @property
    def is_symmetric(self) -> bool:
        return self.algorithm not in ASYMMETRIC

    @property
    def is_private(self) -> bool:
        """Whether it can sign."""
        return self.is_symmetric or b"PRIVATE KEY-----" in self.secret

    def derive(self, purpose: str, length: int = 32) -> bytes:
        """So many bytes of its own for a purpose: what they sign passes for nothing else. HKDF, SHA-256 (RFC 5869).

        Raises KeyRingError for a public key.
        """
        found = self._derived.get((purpose, length))
        if found is None:
            if not self.is_private:
                raise KeyRingError(f"key {self.id}: expected a private key or a secret, to derive others of it")
            secret = self.secret if self.is_symmetric else self._der()
            found = self._derived[purpose, length] = hkdf(secret, b"gatekeeper/" + purpose.encode(), length)
        return found

    def _der(self) -> bytes:
        """What a PEM holds: two that differ in line ends alone are one key (RFC 7468)."""
        block = _PRIVATE.search(self.secret)
        try:
            return b64decode(b"".join(block[2].split()), validate=True)  # type: ignore[index]
        except (ValueError, TypeError):
            raise KeyRingError(f"key {self.id}: expected the PEM of a private key for {self.algorithm}") from None

    def __repr__(self) -> str:
        return f"<Key {self.id}, {self.algorithm}, {self.state}>"


class Ring:
    """Keys, one of which signs. Raises KeyRingError unless one is active, and each id stands once."""

    __slots__ = ("_by_id", "_secrets", "active", "checks", "keys", "version")

    keys: tuple[Key, ...]
    """In the order in which they were given."""
    active: Key
    version: int
    """Another one after each change, in all rings of the process."""
    checks: list[Callable[[tuple[Key, ...]], object]]
    """Asked before keys are replaced, by who makes something of them; each may raise KeyRingError."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.checks = []
        self.replace(keys)

    def replace(self, keys: Iterable[Key]) -> None:
        """Have other keys from now on; who holds the ring sees them. Raises KeyRingError, and has those it had."""
        keys = tuple(keys)
        active = [key for key in keys if key.state is KeyState.ACTIVE]
        if len(active) != 1:
            raise KeyRingError(f"keys: expected one that is active, and there are {len(active)}")
        if not active[0].is_private:
            raise KeyRingError(f"key {active[0].id}: expected a private key, for it is the active one and signs")
        ids = [key.id for key in keys]
        if len(set(ids)) != len(ids):
            raise KeyRingError("keys: expected an id of its own for each")
        for check in self.checks:
            check(keys)
        # The version comes last: who reads it first, and then the keys, has these or newer ones, and asks again.
        self.keys = keys
        self.active = active[0]
        self._by_id = {key.id: key for key in keys if key.state is not KeyState.REVOKED}
        self._secrets: dict[str, list[bytes]] = {}
        self.version = next(_versions)

    def find(self, id: str) -> Key | None:
        """The key of that id; None if there is none, or it was revoked."""
        return self._by_id.get(id)

    def secrets(self, purpose: str) -> list[bytes]:
        """Derived secrets of all keys that verify, the active one's last: as itsdangerous takes them."""
        known = self._secrets  # before the keys: what is made of old ones is not kept among the new
        found = known.get(purpose)
        if found is None:
            others = [key for key in self._by_id.values() if key is not self.active and key.is_private]
            found = known[purpose] = [key.derive(purpose) for key in (*others, self.active)]
        return found

    def __repr__(self) -> str:
        return f"<Ring {list(self.keys)}>"


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF with SHA-256 and no salt (RFC 5869)."""
    drawn = hmac.digest(bytes(32), secret, hashlib.sha256)
    found, block = b"", b""
    while len(found) < length:
        block = hmac.digest(drawn, block + info + bytes([len(found) // 32 + 1]), hashlib.sha256)
        found += block
    return found[:length]


def _check_secret(id: str, algorithm: str, secret: bytes) -> None:
    if b"-----BEGIN " in secret:  # a public key is known to all, and as a secret would sign for all
        raise KeyRingError(f"key {id}: expected a secret for {algorithm}; a PEM goes with {', '.join(ASYMMETRIC)}")
    fewest = HMAC_BYTES.get(algorithm, 32)
    if algorithm == ENCRYPTION and len(secret) != fewest:
        raise KeyRingError(f"key {id}: expected {fewest} bytes for {algorithm}, and it has {len(secret)}")
    if len(secret) < fewest:
        raise KeyRingError(
            f"key {id}: expected at least {fewest} bytes for {algorithm}, and it has {len(secret)}; "
            "`gatekeeper keys generate` makes one"
        )
    if len(set(secret)) < _FEWEST_KINDS or _PLACEHOLDERS.search(secret):
        raise KeyRingError(
            f"key {id}: expected a secret drawn at random, and this is a placeholder; "
            "`gatekeeper keys generate` makes one"
        )
