"""Support for the tests of session stores: each of them empty, on time that passes when told to, by both faces."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final
from zlib import crc32

from sqlalchemy import create_engine

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand, SessionStore
from gatekeeper.errors import StoreError
from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.sessions.memory import MemorySessions
from gatekeeper.stores.sessions.redis import RedisSessions
from gatekeeper.stores.sessions.shared import SharedSessions
from gatekeeper.stores.sessions.sql import TABLE, SqlSessions
from tests.databases import shared_database
from tests.redis_servers import PATIENT, Server, prefix, shared_server
from tests.shared_store import counts, joined, started, temporary_folder

_numbers = itertools.count()


class Seconds:
    """A clock that stands still until `advance`: the seconds since the epoch."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Trial:
    """A store on trial. `face` is "ask" or "aask", by which it is asked."""

    def __init__(self, store: SessionStore, advance: Callable[[float], None], face: str = "ask") -> None:
        self.store = store
        self.advance = advance
        self.face = face
        self._runner = asyncio.Runner()

    def ask(self, command: SessionCommand) -> Any:
        if self.face == "ask":
            return self.store.ask(command)
        return self._runner.run(self.store.aask(command))

    def load(self, key: str) -> Record | None:
        found: Record | None = told(self.ask(Load(self.store, key)), Record)
        return found

    def save(
        self, key: str, data: bytes, version: int | None = None, ttl: int = 60, owner: str | None = None
    ) -> int | Record | None:
        save = Save(self.store, key, data, version=version, ttl=ttl, owner=owner)
        reply: int | Record | None = told(self.ask(save), int, Record)
        return reply

    def create(self, key: str, data: bytes, ttl: int = 60, owner: str | None = None) -> int:
        version = self.save(key, data, None, ttl, owner)
        assert isinstance(version, int)
        return version

    def renew(self, key: str, data: bytes, version: int, ttl: int = 60, owner: str | None = None) -> int:
        newer = self.save(key, data, version, ttl, owner)
        assert isinstance(newer, int)
        return newer

    def delete(self, key: str) -> Record | None:
        found: Record | None = told(self.ask(Delete(self.store, key)), Record)
        return found

    def owned(self, owner: str) -> dict[str, Record]:
        found = self.ask(Owned(self.store, owner))
        assert isinstance(found, list), found
        assert len({key for key, _ in found}) == len(found), "a session is told once"
        return dict(found)

    def sweep(self) -> int:
        return self.store.sweep() if self.face == "ask" else self._runner.run(self.store.asweep())

    def run(self, steps: Any) -> Any:
        """Run a coroutine on the loop that this store is asked on."""
        return self._runner.run(steps)

    def close(self) -> None:
        self._runner.run(self.store.aclose())
        self._runner.close()


def told(reply: Any, *kinds: type) -> Any:
    """A reply that must not be an error, but one of these or None."""
    assert not isinstance(reply, StoreError), reply
    assert reply is None or type(reply) in kinds, reply
    return reply


def key(name: object) -> str:
    """The key of a session, as the hash of an id."""
    return hashlib.sha256(f"{name}".encode()).hexdigest()


@contextmanager
def memory() -> Iterator[Trial]:
    clock = Seconds()
    yield Trial(MemorySessions(clock=clock), clock.advance)


@contextmanager
def shared(durable: bool = False) -> Iterator[Trial]:
    clock, folder = Seconds(), temporary_folder()
    try:
        yield Trial(SharedSessions(folder, durable=durable, size=16 << 20, clock=clock), clock.advance)
    finally:
        shutil.rmtree(folder.parent)


def past(server: Server, before: str, seconds: float) -> None:
    """Let time pass for the sessions whose keys begin so: the server's own cannot be moved."""
    for name in server.call("KEYS", f"{before}:[so]:*"):
        left = server.call("PTTL", name)
        if name.startswith(f"{before}:o:".encode()):
            for member in server.call("ZRANGE", name, 0, -1):
                server.call("ZINCRBY", name, round(-seconds * 1000), member)
        server.call("PEXPIRE", name, left - round(seconds * 1000))


@contextmanager
def redis() -> Iterator[Trial]:
    server, before = shared_server(), prefix()
    store = RedisStore(server.unix_url, timeout=PATIENT)
    try:
        yield Trial(RedisSessions(store, prefix=before), lambda seconds: past(server, before, seconds))
    finally:
        store.close()


@contextmanager
def sqlite() -> Iterator[Trial]:
    clock = Seconds()
    with TemporaryDirectory() as folder:
        store = SqlSessions(f"sqlite:///{folder}/sessions.db", create=True, timeout=PATIENT, clock=clock)
        yield Trial(store, clock.advance)


@contextmanager
def server(kind: str) -> Iterator[Trial]:
    clock, engine = Seconds(), create_engine(shared_database(kind).url)
    with engine.begin() as connection:
        TABLE.drop(connection, checkfirst=True)
    engine.dispose()
    yield Trial(SqlSessions(shared_database(kind).url, create=True, timeout=PATIENT, clock=clock), clock.advance)


STORES: Final[dict[str, Callable[[], Any]]] = {
    "memory": memory,
    "redis": redis,
    "sqlite": sqlite,
    "postgresql": lambda: server("postgresql"),
    "mariadb": lambda: server("mariadb"),
    "shared": shared,
    "shared, durable": lambda: shared(durable=True),
}
"""A context for each store, that gives a Trial."""

VIRTUAL: Final = ["memory", "shared", "shared, durable", "sqlite"]
"""Those whose time stands still until it is advanced."""


@contextmanager
def trial(name: str, face: str = "ask") -> Iterator[Trial]:
    with STORES[name]() as made:
        made.face = face
        try:
            yield made
        finally:
            made.close()


def record_of(place: int, number: int) -> bytes:
    """What a worker writes as its so manieth: of any length up to some pages, and telling if it is whole."""
    data = b"%d %d " % (place, number) + bytes([number % 256]) * (number * 7919 % 15_000)
    return data + crc32(data).to_bytes(4, "big")


def is_whole(data: bytes) -> bool:
    return crc32(data[:-4]).to_bytes(4, "big") == data[-4:]


COUNTER: Final = key("counter")
OWN: Final = 20
"""So many sessions of its own a worker has."""


def work(make: Callable[[], SessionStore], rounds: int, counted: Any, place: int) -> None:
    """Add one to the counter so often (0: for ever), which is told after each; and write and end sessions of one's own."""
    store = make()
    number = 0
    while not rounds or number < rounds:
        number += 1
        reply = store.ask(Load(store, COUNTER))
        while isinstance(reply, Record):
            more = b"%d" % (int(reply.data) + 1)
            reply = store.ask(Save(store, COUNTER, more, version=reply.version, ttl=9999, owner="all"))
        assert type(reply) is int, reply
        counted[place] += 1
        own = key((place, number % OWN))
        reply = store.ask(Load(store, own))
        version = reply.version if isinstance(reply, Record) else None
        save = Save(store, own, record_of(place, number), version=version, ttl=9999, owner=f"worker {place}")
        reply = store.ask(save)
        assert type(reply) is int, reply
        if number % 3 == 0:
            reply = store.ask(Delete(store, own))
            assert isinstance(reply, Record), reply
    store.close()


def check_whole(store: SessionStore, workers: int) -> None:
    """The sessions of workers are whole, and listed if and only if they are there."""
    for place in range(workers):
        there = {}
        for number in range(OWN):
            record = told(store.ask(Load(store, key((place, number)))), Record)
            if record is not None:
                assert is_whole(record.data)
                there[key((place, number))] = record
        listed = store.ask(Owned(store, f"worker {place}"))
        assert dict(listed) == there
        assert len(listed) == len(there)


def kill_at_work(make: Callable[[], SessionStore], how: str, kills: int, workers: int = 3) -> None:
    """Kill processes again and again in the middle of their work, and see that nothing they had done is lost."""
    store = make()
    told(store.ask(Save(store, COUNTER, b"0", version=None, ttl=9999, owner="all")), int)
    counted, random = counts(how, workers), Random(9)
    processes = started(how, work, [(make, 0, counted, place) for place in range(workers)])
    try:
        for number in range(kills):
            place = number % workers
            before, end = counted[place], time.monotonic() + 60
            while counted[place] < before + random.randrange(1, 30):
                assert processes[place].is_alive(), processes[place].exitcode
                assert time.monotonic() < end, "the others are stopped"
                time.sleep(random.random() / 100)
            pid = processes[place].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            processes[place].join()
            processes[place] = started(how, work, [(make, 0, counted, place)])[0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    record = told(store.ask(Load(store, COUNTER)), Record)
    assert sum(counted) <= int(record.data) <= sum(counted) + kills + workers
    check_whole(store, workers)
    store.close()


def count_together(make: Callable[[], SessionStore], how: str, rounds: int = 50, workers: int = 4) -> None:
    """Processes that add one to a session again and again end at exactly what they added."""
    store = make()
    told(store.ask(Save(store, COUNTER, b"0", version=None, ttl=9999, owner="all")), int)
    counted = counts(how, workers)
    processes = started(how, work, [(make, rounds, counted, place) for place in range(workers)])
    assert joined(processes) == [0] * workers
    assert int(told(store.ask(Load(store, COUNTER)), Record).data) == sum(counted) == rounds * workers
    check_whole(store, workers)
    store.close()
