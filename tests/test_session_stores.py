"""Session stores: one contract, every store, blocking and awaiting alike."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand, SessionStore
from gatekeeper.errors import StoreError
from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.sessions.memory import MemorySessions
from gatekeeper.stores.sessions.redis import RedisSessions
from gatekeeper.stores.sessions.shared import SharedSessions
from gatekeeper.stores.sessions.sql import SqlSessions
from tests.redis_servers import PATIENT, prefix, running, shared_server, until

TTL = 600


class Clock:
    """Seconds since the epoch that pass when told."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Subject(NamedTuple):
    """A store under test, asked blocking or awaiting; `clock` is None where time is the server's."""

    store: SessionStore
    ask: Callable[[SessionCommand], Any]
    clock: Clock | None

    def load(self, key: str) -> Any:
        return self.ask(Load(self.store, key))

    def save(
        self, key: str, data: bytes, version: int | None = None, ttl: int = TTL, owner: str | None = None
    ) -> Any:
        return self.ask(Save(self.store, key, data, version=version, ttl=ttl, owner=owner))

    def delete(self, key: str) -> Any:
        return self.ask(Delete(self.store, key))

    def owned(self, owner: str) -> dict[str, bytes]:
        return {key: record.data for key, record in self.ask(Owned(self.store, owner))}


def memory(clock: Clock, path: Path) -> SessionStore:
    return MemorySessions(clock=clock)


def redis(clock: Clock, path: Path) -> SessionStore:
    store = RedisStore(shared_server().unix_url, timeout=PATIENT)
    return RedisSessions(store, prefix=prefix(), owns=True)


def sqlite(clock: Clock, path: Path) -> SessionStore:
    return SqlSessions(f"sqlite:///{path}/sessions.db", create=True, clock=clock)


def shared(clock: Clock, path: Path) -> SessionStore:
    return SharedSessions(path / "shared", clock=clock)


STORES: dict[str, Callable[[Clock, Path], SessionStore]] = {
    "memory": memory,
    "redis": redis,
    "shared": shared,
    "sqlite": sqlite,
}
OWN_TIME = {"redis"}

_numbers = itertools.count()


def key() -> str:
    """Another one at each call."""
    return sha256(f"{os.getpid()} {next(_numbers)}".encode()).hexdigest()


@pytest.fixture(params=[f"{name}, {way}" for name in STORES for way in ("blocking", "awaiting")])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    name, way = request.param.split(", ")
    clock = Clock()
    store = STORES[name](clock, tmp_path)
    shown = None if name in OWN_TIME else clock
    if way == "blocking":
        yield Subject(store, store.ask, shown)
        store.close()
        return
    with asyncio.Runner() as runner:
        yield Subject(store, lambda command: runner.run(store.aask(command)), shown)
        runner.run(store.aclose())


def test_what_was_saved_is_loaded_byte_for_byte(subject: Subject) -> None:
    for data in (b"", b"{}", b'{"a": "\xc3\xa9 b"}', bytes(range(256)), b"x" * 200_000):
        one = key()
        version = subject.save(one, data)
        assert type(version) is int
        assert subject.load(one) == Record(data, version)


def test_what_was_never_saved_is_not_there(subject: Subject) -> None:
    one = key()
    assert subject.load(one) is None
    assert subject.delete(one) is None
    assert subject.save(one, b"x", version=1) is None, "and a save of what was read before does not make it"
    assert subject.load(one) is None


def test_each_write_has_another_version(subject: Subject) -> None:
    one = key()
    versions = [subject.save(one, b"0")]
    for number in range(1, 5):
        versions.append(subject.save(one, str(number).encode(), version=versions[-1]))
    assert len(set(versions)) == 5
    assert subject.load(one) == Record(b"4", versions[-1])


def test_a_save_of_an_older_version_changes_nothing_and_is_told_what_is_there(subject: Subject) -> None:
    one = key()
    first = subject.save(one, b"first")
    second = subject.save(one, b"second", version=first)
    assert subject.save(one, b"late", version=first) == Record(b"second", second)
    assert subject.load(one) == Record(b"second", second)


def test_what_is_there_is_not_created_again(subject: Subject) -> None:
    one = key()
    version = subject.save(one, b"here")
    assert subject.save(one, b"new") == Record(b"here", version)
    assert subject.load(one) == Record(b"here", version)


def test_a_deleted_one_is_told_once_and_never_written_again(subject: Subject) -> None:
    one = key()
    version = subject.save(one, b"here", owner="7")
    assert subject.delete(one) == Record(b"here", version)
    assert subject.delete(one) is None
    assert subject.load(one) is None
    assert subject.save(one, b"late", version=version, owner="7") is None
    assert subject.load(one) is None
    assert subject.owned("7") == {}


def test_one_that_has_expired_is_gone_and_never_written_again(subject: Subject) -> None:
    one = key()
    version = subject.save(one, b"here", ttl=1, owner="expiring")
    if subject.clock is not None:
        subject.clock.now += 1
    else:
        until(lambda: subject.load(one) is None)
    assert subject.load(one) is None
    assert subject.save(one, b"late", version=version) is None
    assert subject.delete(one) is None
    assert subject.owned("expiring") == {}


def test_a_write_gives_it_its_time_anew(subject: Subject) -> None:
    if subject.clock is None:
        pytest.skip("time is the server's")
    one = key()
    version = subject.save(one, b"here")
    for _ in range(4):
        subject.clock.now += TTL - 1
        version = subject.save(one, b"here", version=version)
        assert type(version) is int
    subject.clock.now += TTL
    assert subject.load(one) is None


def test_the_sessions_of_an_owner_are_told_and_nobody_else_s(subject: Subject) -> None:
    owner, other = f"owner {key()}", f"owner {key()}"
    keys = [key() for _ in range(5)]
    for number, one in enumerate(keys):
        subject.save(one, str(number).encode(), owner=owner if number < 3 else other)
    nobody = key()
    subject.save(nobody, b"nobody's")
    assert subject.owned(owner) == {one: str(number).encode() for number, one in enumerate(keys[:3])}
    assert subject.owned(other) == {one: str(number).encode() for number, one in enumerate(keys[3:], 3)}
    subject.delete(keys[0])
    assert list(subject.owned(owner)) != []
    assert keys[0] not in subject.owned(owner)
    assert subject.owned(f"owner {key()}") == {}


def test_a_login_and_a_logout_change_whose_it_is(subject: Subject) -> None:
    one, owner, other = key(), f"Zoë {key()}", "\ud800'; DROP TABLE x; --" + key()
    version = subject.save(one, b"nobody's")
    version = subject.save(one, b"hers", version=version, owner=owner)
    assert subject.owned(owner) == {one: b"hers"}
    version = subject.save(one, b"another's", version=version, owner=other)
    assert subject.owned(owner) == {}
    assert subject.owned(other) == {one: b"another's"}
    subject.save(one, b"nobody's", version=version)
    assert subject.owned(other) == {}


def test_of_many_that_count_at_once_none_is_lost(subject: Subject) -> None:
    one = key()
    subject.save(one, b"0")
    store = subject.store

    def count() -> None:
        for _ in range(25):
            while True:
                record = store.ask(Load(store, one))
                new = str(int(record.data) + 1).encode()
                if isinstance(store.ask(Save(store, one, new, version=record.version, ttl=TTL)), int):
                    break

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert subject.load(one).data == b"100"


def test_of_many_tasks_that_count_at_once_none_is_lost(subject: Subject) -> None:
    store, one = subject.store, key()

    async def count() -> None:
        for _ in range(10):
            while True:
                record = await store.aask(Load(store, one))
                new = str(int(record.data) + 1).encode()
                if isinstance(await store.aask(Save(store, one, new, version=record.version, ttl=TTL)), int):
                    break

    async def all_of_them() -> Any:
        await store.aask(Save(store, one, b"0", version=None, ttl=TTL))
        await asyncio.gather(*(count() for _ in range(10)))
        found = await store.aask(Load(store, one))
        await store.aclose()
        return found

    assert asyncio.run(all_of_them()).data == b"100"


def test_of_many_that_delete_one_only_one_is_told_that_it_was_there(subject: Subject) -> None:
    store, one = subject.store, key()
    subject.save(one, b"here")
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(store.ask(Delete(store, one)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.data for one in found if one is not None] == [b"here"]


def test_an_asker_that_is_cancelled_leaves_a_whole_session(subject: Subject) -> None:
    store, one = subject.store, key()

    async def cancelled() -> Any:
        await store.aask(Save(store, one, b"a" * 1000, version=None, ttl=TTL))
        record = await store.aask(Load(store, one))
        task = asyncio.ensure_future(store.aask(Save(store, one, b"b" * 1000, version=record.version, ttl=TTL)))
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        found = await store.aask(Load(store, one))
        await store.aclose()
        return found

    assert asyncio.run(cancelled()).data in (b"a" * 1000, b"b" * 1000)


def test_sweeping_drops_what_has_expired_and_nothing_else(subject: Subject) -> None:
    if subject.clock is None:
        assert subject.store.sweep() == 0
        return
    kept = key()
    for _ in range(50):
        subject.save(key(), b"short", ttl=10, owner="7")
    subject.save(kept, b"long", ttl=1000, owner="7")
    subject.clock.now += 10
    assert subject.store.sweep() + 0 >= 1
    assert subject.store.sweep() == 0
    assert subject.owned("7") == {kept: b"long"}


def test_closing_it_twice_does_nothing_more(subject: Subject) -> None:
    subject.store.close()
    subject.store.close()


@pytest.mark.parametrize("name", [name for name in STORES if name not in OWN_TIME])
def test_any_history_is_that_of_a_plain_dictionary(name: str, tmp_path: Path) -> None:
    clock = Clock()
    store = STORES[name](clock, tmp_path)
    steps = st.lists(
        st.tuples(
            st.sampled_from(["save", "save", "create", "delete", "load", "owned", "pass", "sweep"]),
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        max_size=40,
    )
    rounds = itertools.count()

    @settings(max_examples=60, deadline=None)
    @given(steps)
    def holds(history: list[tuple[str, int, int]]) -> None:
        salt = next(rounds)
        keys = [sha256(f"{salt} {number}".encode()).hexdigest() for number in range(4)]
        owners = [None, *(f"{salt} owner {number}" for number in range(3))]
        model: dict[str, tuple[bytes, int, float, str | None]] = {}
        ever: dict[str, int] = {}
        for number, (what, place, more) in enumerate(history):
            one, data = keys[place], str(number).encode()
            model = {name: held for name, held in model.items() if clock.now < held[2]}
            held = model.get(one)
            if what == "pass":
                clock.now += (1, 5, 60, TTL)[more]
            elif what == "sweep":
                store.sweep()
            elif what == "load":
                assert store.ask(Load(store, one)) == (None if held is None else Record(held[0], held[1]))
            elif what == "delete":
                assert store.ask(Delete(store, one)) == (None if held is None else Record(held[0], held[1]))
                model.pop(one, None)
            elif what == "owned":
                owner = owners[more] or "nobody"
                found = dict(store.ask(Owned(store, owner)))
                assert found == {name: Record(held[0], held[1]) for name, held in model.items() if held[3] == owner}
            else:
                version = None if what == "create" else ever.get(one, 1)
                answer = store.ask(Save(store, one, data, version=version, ttl=60, owner=owners[more]))
                if held is None and version is not None:
                    assert answer is None
                elif held is not None and held[1] != version:
                    assert answer == Record(held[0], held[1])
                else:
                    assert type(answer) is int
                    model[one] = data, answer, clock.now + 60, owners[more]
                    ever[one] = answer

    holds()
    store.close()


class TestMemory:
    def test_a_full_store_takes_no_new_session_and_keeps_those_it_has(self) -> None:
        clock = Clock()
        store = MemorySessions(most=2, clock=clock)
        for one in ("a", "b"):
            assert store.ask(Save(store, one, b"x", version=None, ttl=10)) is not None
        assert isinstance(store.ask(Save(store, "c", b"x", version=None, ttl=10)), StoreError)
        assert store.ask(Load(store, "a")) is not None
        clock.now += 10
        assert isinstance(store.ask(Save(store, "c", b"x", version=None, ttl=10)), int)

    def test_what_has_expired_is_dropped_as_others_are_asked_for(self) -> None:
        clock = Clock()
        store = MemorySessions(clock=clock)
        for number in range(1000):
            store.ask(Save(store, str(number), b"x", version=None, ttl=10, owner="7"))
        clock.now += 10
        for _ in range(100):
            store.ask(Load(store, "another"))
        assert len(store) == 0


class TestRedis:
    def test_a_server_that_is_gone_is_a_store_error_and_comes_back(self) -> None:
        with running() as server:
            store = RedisSessions(RedisStore(server.url, timeout=0.5), owns=True)
            one = key()
            assert store.ask(Save(store, one, b"x", version=None, ttl=TTL)) == 1
            server.kill()
            assert isinstance(store.ask(Load(store, one)), StoreError)
            server.start()
            # It kept nothing, and knows no script.
            until(lambda: store.ask(Load(store, one)) is None)
            assert store.ask(Save(store, one, b"x", version=None, ttl=TTL)) == 1
            store.close()

    def test_a_session_expires_by_the_server_s_clock(self) -> None:
        server, beginning = shared_server(), prefix()
        store = RedisSessions(RedisStore(server.unix_url, timeout=PATIENT), prefix=beginning, owns=True)
        one = key()
        store.ask(Save(store, one, b"x", version=None, ttl=TTL, owner="7"))
        assert 0 < server.call("PTTL", f"{beginning}:s:{{{one}}}") <= TTL * 1000
        store.close()

    def test_what_is_somebody_else_s_is_neither_read_nor_overwritten(self) -> None:
        server, beginning = shared_server(), prefix()
        store = RedisSessions(RedisStore(server.unix_url, timeout=PATIENT), prefix=beginning, owns=True)
        one = key()
        server.call("SET", f"{beginning}:s:{{{one}}}", "foreign")
        assert isinstance(store.ask(Load(store, one)), StoreError)
        store.close()

    def test_an_owner_s_name_does_not_stand_in_the_store(self) -> None:
        server, beginning = shared_server(), prefix()
        store = RedisSessions(RedisStore(server.unix_url, timeout=PATIENT), prefix=beginning, owns=True)
        store.ask(Save(store, key(), b"x", version=None, ttl=TTL, owner="zoe@example.org"))
        names = server.call("KEYS", f"{beginning}*")
        assert len(names) == 2
        assert not any(b"zoe" in name for name in names)
        store.close()


def counted(path: str, one: str, times: int) -> None:
    """Count in a session, as another process does."""
    store = SharedSessions(path)
    for _ in range(times):
        while True:
            record = store.ask(Load(store, one))
            new = str(int(record.data) + 1).encode()
            if isinstance(store.ask(Save(store, one, new, version=record.version, ttl=TTL)), int):
                break


def written_without_end(path: str) -> None:
    store = SharedSessions(path)
    while True:
        store.ask(Save(store, key(), os.urandom(3000), version=None, ttl=TTL, owner="7"))


class TestShared:
    @pytest.mark.parametrize("way", ["fork", "spawn"])
    def test_of_many_processes_that_count_at_once_none_is_lost(self, tmp_path: Path, way: str) -> None:
        store, one = SharedSessions(tmp_path), key()
        store.ask(Save(store, one, b"0", version=None, ttl=TTL))
        context: Any = multiprocessing.get_context(way)
        processes = [context.Process(target=counted, args=(str(tmp_path), one, 50)) for _ in range(3)]
        for process in processes:
            process.start()
        counted(str(tmp_path), one, 50)
        for process in processes:
            process.join()
            assert process.exitcode == 0
        assert store.ask(Load(store, one)).data == b"200"

    def test_a_process_may_be_killed_at_any_moment(self, tmp_path: Path) -> None:
        self.killed(tmp_path, 5)

    @pytest.mark.soak
    def test_a_hundred_may_be(self, tmp_path: Path) -> None:
        self.killed(tmp_path, 100)

    def are_more(self, store: SharedSessions, than: int) -> bool:
        return len(store.ask(Owned(store, "7"))) > than

    def killed(self, tmp_path: Path, times: int) -> None:
        store, one = SharedSessions(tmp_path), key()
        store.ask(Save(store, one, b"0", version=None, ttl=TTL))
        context = multiprocessing.get_context("spawn")
        for number in range(times):
            process = context.Process(target=written_without_end, args=(str(tmp_path),))
            process.start()
            until(partial(self.are_more, store, 10 * number))
            process.kill()
            process.join()
            record = store.ask(Load(store, one))
            assert record.data == str(number).encode()
            new = str(number + 1).encode()
            assert isinstance(store.ask(Save(store, one, new, version=record.version, ttl=TTL)), int)
            for held, found in store.ask(Owned(store, "7")):
                assert len(found.data) == 3000
                assert store.ask(Load(store, held)) == found

    def test_what_is_not_durable_is_forgotten_when_the_machine_starts_anew(self, tmp_path: Path) -> None:
        one = key()
        for durable in (False, True):
            folder = tmp_path / str(durable)
            store = SharedSessions(folder, durable=durable)
            store.ask(Save(store, one, b"x", version=None, ttl=TTL))
            store.close()
            told = folder / "sessions.boot"
            told.write_bytes(told.read_bytes().replace(b"boot ", b"boot of another time "))
            assert (store.ask(Load(store, one)) is not None) is durable

    def test_a_full_one_takes_no_new_session_and_still_reads_and_deletes(self, tmp_path: Path) -> None:
        store, first = SharedSessions(tmp_path, size=1 << 20), key()
        store.ask(Save(store, first, b"x", version=None, ttl=TTL))
        answer: object = 1
        while isinstance(answer, int):
            answer = store.ask(Save(store, key(), b"x" * 10_000, version=None, ttl=TTL))
        assert isinstance(answer, StoreError)
        assert "full" in str(answer)
        assert store.ask(Load(store, first)) is not None

    def test_its_files_are_for_their_owner_alone(self, tmp_path: Path) -> None:
        store = SharedSessions(tmp_path / "made")
        store.ask(Load(store, key()))
        assert (tmp_path / "made").stat().st_mode & 0o077 == 0
        assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "made").iterdir())

    def test_a_folder_that_cannot_be_made_is_a_store_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        store = SharedSessions(tmp_path / "file" / "folder")
        assert isinstance(store.ask(Load(store, key())), StoreError)


class TestSql:
    def test_without_its_table_it_says_what_makes_it(self, tmp_path: Path) -> None:
        store = SqlSessions(f"sqlite:///{tmp_path}/sessions.db")
        answer = store.ask(Load(store, key()))
        assert isinstance(answer, StoreError)
        assert "create_table" in str(answer)
        store.close()

    def test_errors_show_neither_url_nor_statement(self, tmp_path: Path) -> None:
        store = SqlSessions("postgresql+psycopg://me:hidden@127.0.0.1:1/db")
        answer = store.ask(Load(store, key()))
        assert isinstance(answer, StoreError)
        assert not any(word in str(answer) for word in ("hidden", "127.0.0.1", "SELECT", "me:"))
        store.close()
        with pytest.raises(ValueError, match="expected") as error:
            SqlSessions("nonsense hidden")
        assert "hidden" not in str(error.value)

    def test_a_child_that_was_forked_has_connections_of_its_own(self, tmp_path: Path) -> None:
        store, one = SqlSessions(f"sqlite:///{tmp_path}/sessions.db", create=True), key()
        store.ask(Save(store, one, b"0", version=None, ttl=TTL))

        def look() -> None:
            os._exit(store.ask(Load(store, one)) != Record(b"0", 1))

        process = multiprocessing.get_context("fork").Process(target=look)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert store.ask(Load(store, one)) == Record(b"0", 1)
        store.close()
