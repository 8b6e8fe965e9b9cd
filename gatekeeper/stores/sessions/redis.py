"""Sessions in Redis or Valkey, on the connections that the counters have."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from hiredis import ReplyError

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import StoreError
from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.redis.asking import told
from gatekeeper.stores.redis.packing import Script, command, slot_of
from gatekeeper.stores.redis.routes import Rounds
from gatekeeper.stores.sessions import LONGEST, too_long

_VERSION: Final = 16  # hexadecimal digits
_OWNER: Final = slice(16, 80)  # the SHA-256 of the owner, as hexadecimal digits
_DATA: Final = 80
_NOBODY: Final = b"-" * 64
_PORTION: Final = 100  # sessions that are asked for together
_LONGEST_TTL: Final = 1 << 32  # seconds: the server adds them to its time, in milliseconds


def _script(*names: str) -> Script:
    return Script(b"\n".join(Path(__file__).with_name(f"{name}.lua").read_bytes() for name in names))


_SAVE: Final = _script("index", "save")
_LIST: Final = _script("index", "list")
_DELETE: Final = _script("delete")
_OWNED: Final = _script("index", "owned")


class RedisSessions:
    """A SessionStore in Redis (5 or newer) or Valkey, shared by any number of processes and machines.

    - `store`: whose connections, timeout and breaker are shared: best that of the counters, so that what is asked
      of both in one turn of an event loop goes out in one write
    - `prefix`: what all keys begin with; no braces, which would decide the slot (default "gatekeeper")
    - `owns`: whether closing it closes the store (default False)

    A command is one script call, and atomic. A session is a string, `PREFIX:s:{KEY}`, that expires by itself; the
    sessions of an owner are the members of `PREFIX:o:{SHA-256 of the owner}`, a sorted set by when they expire.

    On a cluster these lie in different slots. So a session is listed first and written then: if that fails, it is
    listed in vain, which is told to nobody. One that is not listed there is none.

    A session has at most 1 MiB. A save that was not answered in time may have been carried out.
    """

    local = False

    def __init__(self, store: RedisStore, *, prefix: str = "gatekeeper", owns: bool = False) -> None:
        if not prefix or "{" in prefix or "}" in prefix:
            raise ValueError("expected a prefix that is not empty and has no braces")
        self._store = store
        self._owns = owns
        before = prefix.encode("utf-8", "surrogatepass")
        self._session = before + b":s:{"
        self._index = before + b":o:{"

    def ask(self, command: SessionCommand) -> Any:
        return self._store.run(self._answer(command))

    async def aask(self, command: SessionCommand) -> Any:
        return await self._store.arun(self._answer(command))

    def sweep(self) -> int:
        """Nothing is to be done: keys expire by themselves."""
        return 0

    async def asweep(self) -> int:
        return 0

    def close(self) -> None:
        if self._owns:
            self._store.close()

    async def aclose(self) -> None:
        if self._owns:
            await self._store.aclose()

    # What is asked, and what the answers mean.

    def _answer(self, asked: SessionCommand) -> Rounds[Any]:
        try:
            return (yield from self._carried_out(asked))
        except StoreError as error:
            return error

    def _carried_out(self, asked: SessionCommand) -> Rounds[Any]:
        if isinstance(asked, Owned):
            return (yield from self._owned(asked))
        if isinstance(asked, Save):
            return (yield from self._save(asked))
        assert isinstance(asked, Load | Delete)
        key = asked.key.encode("ascii")
        name = b"%b%b}" % (self._session, key)
        if isinstance(asked, Load):
            (answer,) = yield from self._sent([(key, command(b"GET", name))])
            return None if answer is None else _record(answer)
        (answer,) = yield from self._sent([(key, _DELETE.call([name], [key, self._reachable()]))])
        if answer is None:
            return None
        record, owner = _record(answer), answer[_OWNER]
        if self._store.core.is_cluster and owner != _NOBODY:
            with suppress(StoreError):  # the session is ended
                yield from self._sent([(owner, command(b"ZREM", b"%b%b}" % (self._index, owner), key))])
        return record

    def _save(self, asked: Save) -> Rounds[Any]:
        if len(asked.data) > LONGEST:
            return too_long(asked.data)
        key, owner = asked.key.encode("ascii"), _digest(asked.owner)
        version = secrets.randbits(60)  # another than any before, whoever seeds what
        ttl = b"%d" % (min(asked.ttl, _LONGEST_TTL) * 1000)
        keys = [b"%b%b}" % (self._session, key)]
        if owner != _NOBODY:
            index = b"%b%b}" % (self._index, owner)
            if self._store.core.is_cluster:
                yield from self._sent([(owner, _LIST.call([index], [key, ttl]))])
            else:
                keys.append(index)
        before = b"" if asked.version is None else b"%016x" % asked.version
        record = b"%016x%b%b" % (version, owner, asked.data)
        call = _SAVE.call(keys, [before, record, ttl, key, self._reachable()])
        (answer,) = yield from self._sent([(key, call)])
        if answer is None:
            return None
        return version if answer == 1 else _record(answer)

    def _owned(self, asked: Owned) -> Rounds[Any]:
        owner = _digest(asked.owner)
        index = b"%b%b}" % (self._index, owner)
        is_cluster = self._store.core.is_cluster
        call = _OWNED.call([index], [owner, b"" if is_cluster else self._session])
        (answer,) = yield from self._sent([(owner, call)])
        if not is_cluster:
            return [(key.decode("ascii"), _record(text)) for key, text in answer]
        found = []
        for start in range(0, len(answer), _PORTION):
            keys = answer[start : start + _PORTION]
            texts = yield from self._sent([(key, command(b"GET", b"%b%b}" % (self._session, key))) for key in keys])
            found += [
                (key.decode("ascii"), _record(text))
                for key, text in zip(keys, texts, strict=True)
                if text is not None and text[_OWNER] == owner
            ]
        return found

    def _sent(self, commands: list[tuple[bytes, bytes]]) -> Rounds[list[Any]]:
        """The answers to commands, each with the tag of its keys, sent together. Raises StoreError."""
        answers = yield from self._store.core.carry_out([(slot_of(tag), packet, None) for tag, packet in commands])
        for answer in answers:
            if isinstance(answer, ReplyError):
                raise told(answer)
            if isinstance(answer, StoreError):
                raise answer
        return answers

    def _reachable(self) -> bytes:
        """What the lists of owners begin with, where a script may reach them."""
        return b"" if self._store.core.is_cluster else self._index


def _digest(owner: str | None) -> bytes:
    if owner is None:
        return _NOBODY
    return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest().encode("ascii")


def _record(text: Any) -> Record:
    """Raises StoreError."""
    try:
        return Record(text[_DATA:], int(text[:_VERSION], 16))
    except (TypeError, ValueError):
        raise StoreError("what is stored under the key of a session was not written by Gatekeeper") from None
