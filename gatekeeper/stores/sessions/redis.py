"""Sessions in Redis or Valkey, on the connections that limits are asked on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from hiredis import ReplyError

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import StoreError
from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.redis.asking import told
from gatekeeper.stores.redis.packing import Script, command, slot_of
from gatekeeper.stores.redis.routes import Rounds

GREATEST: Final = 1 << 20
"""The most bytes of a session."""

_MOST_OWNED: Final = 10_000

# A value is its version, the digest of its owner, and the session: "17 5feceb… {…}".
_SAVE: Final = Script(
    b"""
local held = redis.call('GET', KEYS[1])
local version = held and string.match(held, '^%d+') or ''
if version ~= ARGV[1] then
    return held
end
local new = string.format('%d', (tonumber(version) or 0) + 1)
redis.call('SET', KEYS[1], new .. ' ' .. ARGV[2] .. ' ' .. ARGV[3], 'PX', ARGV[4])
return tonumber(new)
"""
)
_DELETE: Final = Script(
    b"""
local held = redis.call('GET', KEYS[1])
redis.call('DEL', KEYS[1])
return held
"""
)


class RedisSessions:
    """A SessionStore in Redis (5 or newer) or Valkey.

    - `store`: the RedisStore whose connections, timeout and breaker it shares
    - `prefix`: what all keys begin with (default "gatekeeper")
    - `owns`: whether closing it closes the store

    A session lies under `PREFIX:s:{KEY}` and expires by the server's clock. Which sessions an owner has lies in a
    sorted set under `PREFIX:o:{DIGEST}`. On a cluster the two are in different slots: what is lost between them
    makes the set name a session that is gone (it is passed over), never miss one, for the set is written first.
    """

    local = False

    def __init__(
        self,
        store: RedisStore,
        *,
        prefix: str = "gatekeeper",
        owns: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._prefix = prefix.encode()
        self._owns = owns
        self._clock = clock

    def ask(self, command: SessionCommand) -> Any:
        return self._store.run(self._answer(command))

    async def aask(self, command: SessionCommand) -> Any:
        return await self._store.arun(self._answer(command))

    def sweep(self) -> int:
        """Nothing: the server drops what has expired."""
        return 0

    async def asweep(self) -> int:
        return 0

    def close(self) -> None:
        if self._owns:
            self._store.close()

    async def aclose(self) -> None:
        if self._owns:
            await self._store.aclose()

    def _answer(self, asked: SessionCommand) -> Rounds[Any]:
        try:
            if isinstance(asked, Load):
                (held,) = yield from self._sent([(asked.key, command(b"GET", self._name(asked.key)))])
                return _record(held)
            if isinstance(asked, Save):
                return (yield from self._save(asked))
            if isinstance(asked, Delete):
                return (yield from self._delete(asked.key))
            assert isinstance(asked, Owned)
            return (yield from self._owned(asked.owner))
        except StoreError as error:
            return error

    def _save(self, save: Save) -> Rounds[int | Record | None]:
        if len(save.data) > GREATEST:
            raise StoreError(f"a session has more than {GREATEST} bytes")
        digest = b"-" if save.owner is None else _digest(save.owner)
        version = b"" if save.version is None else b"%d" % save.version
        call = _SAVE.call(self._name(save.key), version, digest, save.data, b"%d" % (save.ttl * 1000))
        packets = [(save.key, call)]
        if save.owner is not None:
            expires = b"%d" % (int(self._clock()) + save.ttl + 1)
            index, tag = self._index(digest), digest.decode()
            packets = [
                (tag, command(b"ZADD", index, expires, save.key.encode())),
                # As long as anything in it may live: a year is the longest life that settings allow.
                (tag, command(b"EXPIRE", index, b"%d" % (366 * 86_400))),
                *packets,
            ]
        *_, answer = yield from self._sent(packets)
        return answer if isinstance(answer, int) else _record(answer)

    def _delete(self, key: str) -> Rounds[Record | None]:
        (held,) = yield from self._sent([(key, _DELETE.call(self._name(key)))])
        record = _record(held)
        if record is not None and (digest := held.split(b" ", 2)[1]) != b"-":
            yield from self._sent([(digest.decode(), command(b"ZREM", self._index(digest), key.encode()))])
        return record

    def _owned(self, owner: str) -> Rounds[list[tuple[str, Record]]]:
        digest = _digest(owner)
        index, tag = self._index(digest), digest.decode()
        now = int(self._clock())
        _, names = yield from self._sent(
            [
                (tag, command(b"ZREMRANGEBYSCORE", index, b"-inf", b"%d" % now)),
                (tag, command(b"ZREVRANGE", index, b"0", b"%d" % (_MOST_OWNED - 1))),
            ]
        )
        keys = [name.decode() for name in names]
        found = yield from self._sent([(key, command(b"GET", self._name(key))) for key in keys])
        # One that is not there is passed over, and stays in the set until its time: it may be about to be written.
        return [
            (key, record)
            for key, held in zip(keys, found, strict=True)
            if (record := _record(held)) is not None and held.split(b" ", 2)[1] == digest
        ]

    def _sent(self, packets: Sequence[tuple[str, bytes]]) -> Rounds[list[Any]]:
        """The server's answers to commands, each with the text that decides its slot. Raises StoreError."""
        if not packets:
            return []
        answers = yield from self._store.core.carry_out(
            [(slot_of(tag.encode()), packet, None) for tag, packet in packets]
        )
        for answer in answers:
            if isinstance(answer, ReplyError):
                raise told(answer)
            if isinstance(answer, StoreError):
                raise answer
        return answers

    def _name(self, key: str) -> bytes:
        return b"%b:s:{%b}" % (self._prefix, key.encode())

    def _index(self, digest: bytes) -> bytes:
        return b"%b:o:{%b}" % (self._prefix, digest)


def _digest(owner: str) -> bytes:
    return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest().encode()


def _record(held: bytes | None) -> Record | None:
    """What is held under a key. Raises StoreError for what somebody else has put there."""
    if held is None:
        return None
    version, _, rest = held.partition(b" ")
    _, space, data = rest.partition(b" ")
    if not version.isdigit() or not space:
        raise StoreError("what is stored under the key of a session was not written by Gatekeeper")
    return Record(data, int(version))
