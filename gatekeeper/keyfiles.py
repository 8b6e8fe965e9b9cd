"""Where the keys of a ring come from: the environment, settings, and the files that `gatekeeper keys` keeps.

A file of keys is a JWK Set (RFC 7517). Beside the members of that RFC a key has `state`, `iat` (when it was made)
and `since` (when it came into its state), seconds since the epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gatekeeper.errors import GatekeeperError, MissingExtra, SettingsError
from gatekeeper.keys import ALGORITHMS, ENCRYPTION, HMAC_BYTES, Key, KeyRingError, KeyState, Ring
from gatekeeper.settings.keys import KeySettings
from gatekeeper.settings.values import resolved
from gatekeeper.upkeep import keep_looking

GREATEST: Final = 1 << 20
"""The greatest file of keys, in bytes."""

LOOK_EVERY: Final = 5.0
"""The seconds between two looks at a file of keys."""

_KINDS: Final = {"RS256": "RSA", "PS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}


class KeyFileError(GatekeeperError):
    """A file of keys cannot be read or written, or is none. The message never shows a key."""


class Keys:
    """The ring that settings describe, kept up to date with the files that it comes from.

    - `entries`: as in `settings.keys`: the first is active, the others retiring, unless they say so themselves
    - `warn`: is told of a file that cannot be read any more, or is wrong; the keys that were right hold on

    Raises SettingsError with all that is wrong.
    """

    def __init__(self, entries: Sequence[KeySettings], warn: Callable[[str], object] = lambda text: None) -> None:
        self._entries = entries
        self._warn = warn
        self._seen = self._look()
        self._told = ""
        self.ring = Ring(self._read())
        if self._seen:
            keep_looking("gatekeeper-keys", self, LOOK_EVERY)

    def _read(self) -> list[Key]:
        keys: list[Key] = []
        problems = []
        for place, entry in enumerate(self._entries):
            try:
                keys += _keys_of(entry, KeyState.RETIRING if keys else KeyState.ACTIVE)
            except (KeyRingError, KeyFileError, ValueError, MissingExtra) as error:
                problems.append(f"keys[{place}]: {error}")
        if not problems:
            try:
                Ring(keys)
            except KeyRingError as error:
                problems.append(str(error))
        if problems:
            raise SettingsError(problems)
        return keys

    def _look(self) -> list[object]:
        """What the files are like."""
        found: list[object] = []
        for entry in self._entries:
            if not entry.key.startswith("file:"):
                continue
            try:
                status = Path(entry.key.removeprefix("file:")).stat()
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                found.append(getattr(error, "errno", None))
        return found

    def __call__(self) -> float:
        """Read what has changed. How many seconds until the next look."""
        seen = self._look()
        if seen != self._seen:
            try:
                self.ring.replace(self._read())
                self._seen, self._told = seen, ""
            except (SettingsError, KeyRingError) as error:  # the latter of what is made of the ring
                if str(error) != self._told:
                    self._warn(f"the keys are as they were: {error}")
                self._told = str(error)
        return LOOK_EVERY


def _keys_of(entry: KeySettings, state: KeyState) -> list[Key]:
    if entry.key.startswith("file:"):
        raw = _read_file(Path(entry.key.removeprefix("file:")))
        if raw.lstrip().startswith(b"{"):
            if entry.id or entry.state or entry.algorithm:
                raise KeyFileError(
                    "expected no id, state or algorithm beside a file with a JWK Set: they are in it"
                )
            return [key for key, _ in parse_keys(raw)]
        secret = raw.strip()
    else:
        secret = resolved(entry.key).strip().encode()
    algorithm = entry.algorithm or "HS256"
    if b"-----BEGIN" in secret and entry.algorithm is None:
        raise KeyFileError(f"expected an algorithm beside a PEM: {', '.join(_KINDS)}")
    if algorithm == ENCRYPTION:
        try:
            secret = urlsafe_b64decode(secret + b"=" * (-len(secret) % 4))
        except ValueError:
            raise KeyFileError(f"expected 32 bytes in base64url for {ENCRYPTION}") from None
    id = entry.id or hashlib.sha256(b"gatekeeper-kid" + secret).hexdigest()[:8]
    return [Key(id, algorithm, secret, KeyState(entry.state or state))]


def exposed(entries: Sequence[KeySettings]) -> list[str]:
    """The files of keys that others than their owner may read, a line each."""
    found = []
    for place, entry in enumerate(entries):
        if entry.key.startswith("file:"):
            try:
                mode = Path(entry.key.removeprefix("file:")).stat().st_mode
            except (OSError, ValueError):
                continue
            if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IXGRP & ~stat.S_IXOTH:
                found.append(f"keys[{place}]: others than its owner may read the file (chmod 600)")
    return found


def parse_keys(raw: bytes) -> list[tuple[Key, int]]:
    """The keys of a JWK Set, each with when it came into its state. Raises KeyFileError, KeyRingError."""
    try:
        document = json.loads(raw)
        members = document["keys"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise KeyFileError(
            'expected a JWK Set: {"keys": […]}, as `gatekeeper keys generate --file` makes it'
        ) from None
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise KeyFileError("expected a list of keys in the JWK Set")
    return [_parse_key(place, member) for place, member in enumerate(members)]


def _parse_key(place: int, member: Mapping[str, Any]) -> tuple[Key, int]:
    id, algorithm, state = member.get("kid"), member.get("alg"), member.get("state", "active")
    created, since = member.get("iat"), member.get("since", 0)
    if not isinstance(id, str) or algorithm not in ALGORITHMS:
        raise KeyFileError(f"key {place} of the set: expected kid, and alg: {', '.join(ALGORITHMS)}")
    if state not in list(KeyState):
        raise KeyFileError(f"key {place} of the set: expected a state: {', '.join(KeyState)}")
    if not isinstance(created, int | None) or not isinstance(since, int):
        raise KeyFileError(f"key {place} of the set: expected iat and since in seconds")
    try:
        if algorithm in _KINDS:
            secret = (
                _jwk(algorithm)
                .import_key(
                    {name: value for name, value in member.items() if name not in ("state", "iat", "since")}
                )
                .as_pem(private="d" in member)
            )
        else:
            text = member["k"]
            secret = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except MissingExtra:
        raise
    except Exception:  # its messages may quote the key
        raise KeyFileError(f"key {place} of the set: expected the members of a key for {algorithm}") from None
    return Key(id, algorithm, secret, KeyState(state), created), since


def _jwk(algorithm: str) -> Any:
    try:
        from joserfc import jwk
    except ImportError:
        raise MissingExtra(f"a key for {algorithm}", "jwt") from None
    return getattr(jwk, {"RSA": "RSAKey", "EC": "ECKey", "OKP": "OKPKey"}[_KINDS[algorithm]])


def _document(keys: Sequence[tuple[Key, int]]) -> bytes:
    members = []
    for key, since in keys:
        if key.algorithm in _KINDS:
            member = dict(_jwk(key.algorithm).import_key(key.secret).as_dict(private=key.is_private))
        else:
            member = {"kty": "oct", "k": urlsafe_b64encode(key.secret).rstrip(b"=").decode()}
        member |= {"kid": key.id, "alg": key.algorithm, "state": str(key.state), "since": since}
        if key.created is not None:
            member["iat"] = key.created
        members.append(member)
    return json.dumps({"keys": members}, indent=2).encode() + b"\n"


def generate(algorithm: str = "HS256", state: KeyState = KeyState.PENDING, now: int | None = None) -> Key:
    """A new key, drawn at random. Raises KeyRingError for an algorithm that is none, MissingExtra."""
    created = int(time.time()) if now is None else now
    id = f"{time.strftime('%Y%m%d', time.gmtime(created))}-{secrets.token_hex(3)}"
    if algorithm not in _KINDS:
        return Key(id, algorithm, secrets.token_bytes(HMAC_BYTES.get(algorithm, 32)), state, created)
    parameter: Any = {"RSA": 3072, "EC": "P-256", "OKP": "Ed25519"}[_KINDS[algorithm]]
    pem = _jwk(algorithm).generate_key(parameter).as_pem(private=True)
    return Key(id, algorithm, pem, state, created)


def load_file(path: Path) -> list[tuple[Key, int]]:
    """The keys of a file, each with when it came into its state. Raises KeyFileError, KeyRingError."""
    return parse_keys(_read_file(path))


def save_file(path: Path, keys: Sequence[tuple[Key, int]]) -> None:
    """Write a file of keys: in one step, and for its owner alone. Raises KeyFileError."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_document(keys))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


def rotated(keys: Sequence[tuple[Key, int]], now: int, keep: int) -> list[tuple[Key, int]]:
    """The keys one step further: the oldest pending one is active, the active one retires.

    Keys that have been retiring for `keep` seconds are left out; sessions under them are no longer. Without a
    pending key a new one is active at once: servers that have not read the file yet do not know it.
    """
    pending = [key for key, _ in keys if key.state is KeyState.PENDING]
    active = [key for key, _ in keys if key.state is KeyState.ACTIVE]
    next_one = pending[0] if pending else generate(active[0].algorithm if active else "HS256", now=now)
    found = [(_in_state(next_one, KeyState.ACTIVE), now)]
    for key, since in keys:
        if key is next_one or key.state is KeyState.REVOKED:
            continue
        if key.state is KeyState.ACTIVE:
            found.append((_in_state(key, KeyState.RETIRING), now))
        elif key.state is KeyState.PENDING or now - since < keep:
            found.append((key, since))
    return found


def _in_state(key: Key, state: KeyState) -> Key:
    return Key(key.id, key.algorithm, key.secret, state, key.created)


def _read_file(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise KeyFileError(f"{path}: expected a regular file")
        with path.open("rb") as file:
            raw = file.read(GREATEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise KeyFileError(f"{path}: {reason}") from None
    if len(raw) > GREATEST:
        raise KeyFileError(f"{path}: expected at most {GREATEST} bytes")
    return raw
