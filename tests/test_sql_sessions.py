"""Sessions in databases: processes, engines that are given, servers that stop and come back, errors that show nothing."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, create_engine, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import StoreError
from gatekeeper.stores.sessions import sql
from gatekeeper.stores.sessions.sql import TABLE, SqlSessions
from tests import test_session_stores as contract
from tests.databases import KINDS, Database, shared_database
from tests.session_stores import Seconds, Trial, count_together, key, kill_at_work, told
from tests.shared_store import joined, started
from tests.test_redis_sessions import scenarios

A, B = key("a"), key("b")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/sessions.db"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(kind: str) -> Database:
    """The server that all tests of this process share, with no table."""
    server = shared_database(kind)
    engine = create_engine(server.url)
    with engine.begin() as connection:
        TABLE.drop(connection, checkfirst=True)
    engine.dispose()
    return server


@pytest.fixture
def own(kind: str) -> Iterator[Database]:
    """A server of one test's own, to be stopped."""
    server = KINDS[kind]()
    yield server
    server.close()


def commands(store: SqlSessions) -> list[SessionCommand]:
    save = Save(store, A, b"x", version=None, ttl=60, owner="ann")
    return [save, Load(store, A), Owned(store, "ann"), Delete(store, A)]


def saved(store: SqlSessions, key: str, data: bytes) -> int:
    version = told(store.ask(Save(store, key, data, version=None, ttl=60, owner="ann")), int)
    assert isinstance(version, int)
    return version


def child(store: SqlSessions) -> None:
    assert told(store.ask(Load(store, A)), Record).data == b"parent's"
    for number in range(20):
        saved(store, key(("child", number)), b"child's")


class TestProcesses:
    @pytest.mark.parametrize("how", ["fork", "spawn"])
    def test_processes_that_share_a_file_lose_nothing(self, url: str, how: str) -> None:
        """Four processes that add one to a session in SQLite again and again end at exactly what they added."""
        count_together(partial(SqlSessions, url, create=True, timeout=60), how, rounds=25)

    def test_processes_that_share_a_server_lose_nothing(self, server: Database) -> None:
        """Four processes that add one to a session in a database end at exactly what they added."""
        count_together(partial(SqlSessions, server.url, create=True, timeout=60), "spawn", rounds=25)

    def test_processes_that_use_a_file_may_be_killed_at_any_moment(self, url: str) -> None:
        """What killed processes had been told is in SQLite's file, their sessions are whole, and the others go on."""
        kill_at_work(partial(SqlSessions, url, create=True, timeout=60), "fork", kills=6)

    def test_a_child_goes_on_with_a_store_of_its_parent(self, url: str) -> None:
        """After a fork parent and child each go on with connections of their own, to a file."""
        self.fork(SqlSessions(url, create=True))

    def test_a_child_goes_on_with_a_store_of_its_parent_on_a_server(self, server: Database) -> None:
        """After a fork parent and child each go on with connections of their own, to a server."""
        self.fork(SqlSessions(server.url, create=True))

    def fork(self, store: SqlSessions) -> None:
        version = saved(store, A, b"parent's")
        processes = started("fork", child, [(store,)])
        for _ in range(50):
            assert store.ask(Load(store, A)) == Record(b"parent's", version)
        assert joined(processes) == [0]
        assert len(store.ask(Owned(store, "ann"))) == 21
        store.close()

    def test_processes_that_make_the_table_at_once_make_one(self, url: str) -> None:
        """Of several processes that find no table each can save: it was made once, with its indexes."""
        assert joined(started("spawn", make_and_save, [(url, place) for place in range(4)])) == [0] * 4
        engine = create_engine(url)
        assert {tuple(index["column_names"]) for index in inspect(engine).get_indexes(TABLE.name)} == {
            ("expires",),
            ("owner",),
        }
        engine.dispose()


def make_and_save(url: str, place: int) -> None:
    store = SqlSessions(url, create=True, timeout=60)
    saved(store, key(place), b"x")
    store.close()


class TestEngines:
    def test_an_engine_that_is_given_serves_both_faces_and_is_left_open(self, url: str) -> None:
        """An application's own Engine is used, from an awaiting caller in a thread, and is not closed with the store."""
        engine = create_engine(url)
        for face in ("ask", "aask"):
            store = SqlSessions(engine, create=True)
            trial = Trial(store, lambda seconds: None, face)
            version = trial.create(key(face), b"x")
            trial.close()
            with engine.connect() as connection:
                found = connection.execute(
                    text("SELECT count(*) FROM gatekeeper_sessions WHERE version = :v"), {"v": version}
                )
                assert found.scalar() == 1
        assert engine.pool.status()
        engine.dispose()

    def test_an_asynchronous_engine_that_is_given_serves_both_faces(self, tmp_path: Path) -> None:
        """An application's own AsyncEngine is used by awaiting callers; blocking ones get an engine of the same database."""

        async def main() -> None:
            engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/db")
            store = SqlSessions(engine, create=True)
            version = await store.aask(Save(store, A, b"x", version=None, ttl=60, owner="ann"))
            assert isinstance(version, int)
            assert await store.aask(Load(store, A)) == Record(b"x", version)
            assert await asyncio.to_thread(store.ask, Load(store, A)) == Record(b"x", version)
            assert await store.aask(Owned(store, "ann")) == [(A, Record(b"x", version))]
            await store.aclose()
            assert await store.aask(Load(store, A)) == Record(b"x", version), "it is left open"
            await engine.dispose()
            store.close()

        asyncio.run(main())

    def test_an_asynchronous_url_serves_both_faces(self, tmp_path: Path) -> None:
        """A URL with a driver for asyncio alone is enough for both faces."""
        store = SqlSessions(f"sqlite+aiosqlite:///{tmp_path}/db", create=True)
        trial = Trial(store, lambda seconds: None)
        version = trial.create(A, b"x")
        trial.face = "aask"
        assert trial.load(A) == Record(b"x", version)
        trial.close()

    def test_without_a_driver_for_asyncio_threads_are_waited_for(
        self, server: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where no driver for asyncio is installed an awaiting caller is served all the same."""
        monkeypatch.setattr(sql, "_AWAITING", {})
        with monkeypatch.context() as patch:
            patch.setattr(sql, "_is_async", lambda url: False)
            trial = Trial(SqlSessions(server.url, create=True), lambda seconds: None, "aask")
        contract.TestOne().test_a_save_of_an_old_version_is_told_the_newer(trial)
        trial.close()

    def test_a_server_s_driver_for_asyncio_is_used(self, server: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a driver for asyncio no thread is needed: an awaiting caller is served without any."""
        monkeypatch.setattr(SqlSessions, "_blocked", None)
        trial = Trial(SqlSessions(server.url, create=True), lambda seconds: None, "aask")
        contract.TestOne().test_a_save_of_an_old_version_is_told_the_newer(trial)
        trial.close()

    def test_each_loop_has_its_connections_and_closes_them(self, server: Database) -> None:
        """One store on many loops, one after the other and at the same time, leaves no connection behind."""
        store = SqlSessions(server.url, create=True)
        saved(store, A, b"x")

        async def some() -> None:
            replies = await asyncio.gather(*(store.aask(Load(store, A)) for _ in range(8)))
            assert all(isinstance(reply, Record) for reply in replies), replies

        for _ in range(3):
            threads = [threading.Thread(target=lambda: asyncio.run(some())) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert store._homes == {}
        store.close()
        engine = create_engine(server.url)
        question = {
            "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'",
            "mysql": "SELECT count(*) FROM information_schema.processlist WHERE user = 'root'",
        }[engine.dialect.name]
        end = time.monotonic() + 20
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while int(connection.execute(text(question)).scalar() or 0) > 1:
                assert time.monotonic() < end
                time.sleep(0.02)
        engine.dispose()

    def test_a_closed_store_can_be_used_again(self, server: Database) -> None:
        """After closing, by either face, the store connects anew when it is asked."""
        trial = Trial(SqlSessions(server.url, create=True), lambda seconds: None)
        version = trial.create(A, b"x")
        for face in ("ask", "aask", "ask", "aask"):
            trial.face = face
            assert trial.load(A) == Record(b"x", version)
            if face == "ask":
                trial.store.close()
            else:
                trial.run(trial.store.aclose())
        trial.close()

    @pytest.mark.parametrize("face", ["ask", "aask"])
    def test_many_that_expired_are_swept_in_portions(self, url: str, face: str) -> None:
        """More than two portions of expired sessions are dropped by one sweep, which says how many they were."""
        clock = Seconds()
        trial = Trial(SqlSessions(url, create=True, clock=clock), clock.advance, face)
        for number in range(20):
            trial.create(key(number), b"x", ttl=10 if number else 1000)
        engine = create_engine(url)
        with engine.begin() as connection:
            rows = [
                {"key": key((0, number)), "data": b"x", "version": number, "expires": 0, "owner": None}
                for number in range(2 * sql._PORTION)
            ]
            connection.execute(TABLE.insert(), rows)
        engine.dispose()
        trial.advance(11)
        assert trial.sweep() == 2 * sql._PORTION + 19
        assert trial.sweep() == 0
        assert trial.load(key(0)) is not None
        trial.close()


class TestDeleting:
    """Where a database cannot tell what it deletes (MySQL), it is looked at first, and deleted if it is still that."""

    @pytest.fixture
    def on(self, url: str) -> Iterator[Trial]:
        clock, engine = Seconds(), create_engine(url)
        engine.dialect.delete_returning = False
        trial = Trial(SqlSessions(engine, create=True, clock=clock), clock.advance)
        yield trial
        trial.close()
        engine.dispose()

    @pytest.mark.parametrize("scenario", scenarios())
    def test_the_contract_holds(self, on: Trial, scenario: Callable[[Any, Trial], None]) -> None:
        """Without RETURNING sessions keep the contract."""
        scenario(None, on)

    def test_of_many_that_delete_what_is_changed_meanwhile_one_is_told(self, on: Trial) -> None:
        """Of threads that delete a session while another changes it, one is told what it was, and it stays gone."""
        for number in range(5):
            one = key(number)
            version = on.create(one, b"x")
            replies: list[object] = []

            def change(one: str, replies: list[object], version: int) -> None:
                reply: object = version
                while isinstance(reply, int):
                    reply = on.store.ask(Save(on.store, one, b"y", version=reply, ttl=60))
                replies.append(reply)

            def end(one: str, replies: list[object]) -> None:
                replies.append(on.store.ask(Delete(on.store, one)))

            threads = [threading.Thread(target=change, args=(one, replies, version))]
            threads += [threading.Thread(target=end, args=(one, replies)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not any(isinstance(reply, StoreError) for reply in replies), replies
            assert sum(isinstance(reply, Record) for reply in replies) == 1
            assert on.load(one) is None


class TestSettingUp:
    @pytest.mark.parametrize(
        "url",
        [
            "",
            "nonsense",
            "nonsense://verysecret@host/db",
            "sqlite://",
            "sqlite:///:memory:",
            "mysql+none://a:verysecret@b/c",
        ],
    )
    def test_a_wrong_url_is_refused_and_not_repeated(self, url: str) -> None:
        """What is no URL of a database that can keep sessions is refused at once, and the error does not show it."""
        with pytest.raises(ValueError, match="expected") as caught:
            SqlSessions(url)
        assert "secret" not in str(caught.value)

    def test_nothing_is_connected_or_made_before_the_first_command(self, tmp_path: Path) -> None:
        """Opening a store touches no file; the first command makes the table, if that was wanted."""
        store = SqlSessions(f"sqlite:///{tmp_path}/db", create=True)
        assert list(tmp_path.iterdir()) == []
        assert store.ask(Load(store, A)) is None
        assert (tmp_path / "db").exists()
        store.close()

    @pytest.mark.parametrize("face", ["ask", "aask"])
    def test_without_its_table_each_command_says_so(self, url: str, face: str) -> None:
        """A table that was not made and not asked for is an error that names it."""
        trial = Trial(SqlSessions(url), lambda seconds: None, face)
        assert isinstance(trial.store, SqlSessions)
        for command in commands(trial.store):
            reply = trial.ask(command)
            assert isinstance(reply, StoreError)
            assert "the table gatekeeper_sessions is not there" in str(reply)
        with pytest.raises(StoreError, match="create_table"):
            trial.sweep()
        trial.close()

    def test_the_table_can_be_made_by_others(self, server: Database) -> None:
        """A table that a tool of migrations made from `TABLE` is as good as one that the store makes."""
        metadata = MetaData()
        TABLE.to_metadata(metadata)
        engine = create_engine(server.url)
        metadata.create_all(engine)
        engine.dispose()
        store = SqlSessions(server.url)
        version = saved(store, A, b"x" * 100_000)
        assert store.ask(Load(store, A)) == Record(b"x" * 100_000, version)
        store.close()


# pymysql and aiosqlite leave a socket or a thread to the collector where connecting fails.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
class TestFailures:
    def test_errors_show_neither_url_nor_sql_nor_data(self, own: Database) -> None:
        """What a database that is gone answers shows no path, no password, no statement and no data."""
        url = re.sub(r"//(\w+)@", r"//\1:verysecret@", own.url)
        own.kill()
        trial = Trial(SqlSessions(url, timeout=5), lambda seconds: None)
        assert isinstance(trial.store, SqlSessions)
        for trial.face in ("ask", "aask"):
            for command in commands(trial.store):
                reply = trial.ask(command)
                assert isinstance(reply, StoreError)
                shown = f"{reply!r} {reply.__cause__!r}"
                assert not any(word in shown for word in ("secret", str(own.folder), "SELECT", "INSERT", A, "ann"))
        trial.close()

    def test_a_server_that_was_restarted_has_its_sessions(self, own: Database) -> None:
        """While the server is gone commands are errors; once it is back, what was saved is there, and nobody restarts us."""
        trial = Trial(SqlSessions(own.url, create=True, timeout=5), lambda seconds: None)
        version = trial.create(A, b"x")
        trial.face = "aask"
        assert trial.load(A) == Record(b"x", version)
        own.kill()
        for trial.face in ("ask", "aask"):
            assert isinstance(trial.ask(Load(trial.store, A)), StoreError)
        own.start()
        for trial.face in ("ask", "aask"):
            assert trial.load(A) == Record(b"x", version)
        trial.close()

    def test_a_server_that_stands_still_is_an_error_in_time(self, own: Database) -> None:
        """An awaiting caller is told in time that a stopped server does not answer; once it goes on, so do we."""
        trial = Trial(SqlSessions(own.url, create=True, timeout=1), lambda seconds: None, "aask")
        version = trial.create(A, b"x")
        own.pause()
        try:
            for _ in range(2):
                began = time.monotonic()
                assert isinstance(trial.ask(Load(trial.store, A)), StoreError)
                assert time.monotonic() - began < 2
        finally:
            own.resume()
        end = time.monotonic() + 30
        while isinstance(reply := trial.ask(Load(trial.store, A)), StoreError):
            assert time.monotonic() < end, reply
        assert reply == Record(b"x", version)
        trial.close()

    def test_a_file_that_cannot_be_used_is_an_error(self, tmp_path: Path) -> None:
        """A file of SQLite that is none, or lies in no folder, is an error by both faces, without its path."""
        (tmp_path / "none").write_bytes(b"this is no database" * 100)
        for place in (tmp_path / "none", tmp_path / "nowhere" / "db"):
            trial = Trial(SqlSessions(f"sqlite:///{place}", create=True), lambda seconds: None)
            for trial.face in ("ask", "aask"):
                reply = trial.ask(Load(trial.store, A))
                assert isinstance(reply, StoreError)
                assert str(tmp_path) not in str(reply)
            trial.close()

    def test_a_file_that_another_holds_locked_is_an_error_in_time(self, url: str) -> None:
        """While another writes to the file for longer than the timeout a save is an error, and a load is not."""
        store = SqlSessions(url, create=True, timeout=0.2)
        version = saved(store, A, b"x")
        engine = create_engine(url)
        with engine.connect() as other:
            other.execute(text("BEGIN IMMEDIATE"))
            other.execute(text("UPDATE gatekeeper_sessions SET expires = expires"))
            assert isinstance(store.ask(Save(store, A, b"y", version=version, ttl=60)), StoreError)
            assert store.ask(Load(store, A)) == Record(b"x", version)
            other.rollback()
        assert isinstance(store.ask(Save(store, A, b"y", version=version, ttl=60)), int)
        engine.dispose()
        store.close()
