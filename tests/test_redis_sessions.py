"""Sessions in Redis: one write with the counters, servers that stop and come back, clusters, what others wrote."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand, Verdict
from gatekeeper.errors import StoreError
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.redis.packing import command
from gatekeeper.stores.sessions.redis import RedisSessions
from tests import test_session_stores as contract
from tests.redis_servers import PATIENT, Server, cluster, cluster_url, prefix, running, shared_server
from tests.session_stores import Trial, key, past, told

A, B = key("a"), key("b")
LIMIT = Rule("rule", [Rate(10**6, 3600)]).limits[0]
SLACK = 0.4
"""Seconds by which a wait may be longer than the timeout on a machine that runs other tests, too."""


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def before() -> str:
    """What the keys of a test begin with, on the server that others use, too."""
    return prefix()


@pytest.fixture
def sessions(before: str) -> Iterator[RedisSessions]:
    with closing(
        RedisSessions(RedisStore(shared_server().unix_url, timeout=PATIENT), prefix=before, owns=True)
    ) as store:
        yield store


def commands(store: RedisSessions) -> list[SessionCommand]:
    save = Save(store, A, b"x", version=None, ttl=60, owner="ann")
    return [save, Load(store, A), Owned(store, "ann"), Delete(store, A)]


def names(server: Server, before: str) -> set[str]:
    return {bytes(name).decode() for name in server.call("KEYS", f"{before}:*")}


class TestOneServer:
    def test_sessions_and_counters_of_one_tick_go_in_one_write(self) -> None:
        """What is asked of sessions and of counters in one turn of the loop is one read of the server's."""
        server = shared_server()

        async def main() -> None:
            counters = RedisStore(server.unix_url, prefix=prefix(), timeout=PATIENT)
            store = RedisSessions(counters, prefix=prefix())

            async def reads() -> tuple[int, int]:
                asked = counters.core.carry_out([(0, command(b"INFO", b"stats"), None)])
                (told,) = await counters.arun(asked)
                lines = dict(line.split(":") for line in told.decode().splitlines() if ":" in line)
                return int(lines["total_reads_processed"]), int(lines["total_connections_received"])

            async def at_once() -> None:
                save = Save(store, key(time.monotonic_ns()), b"x", version=None, ttl=60, owner="ann")
                asked = [counters.aask([(LIMIT, "key", 1)]), store.aask(Load(store, A)), store.aask(save)]
                (verdict,), loaded, saved = await asyncio.gather(*asked)
                assert isinstance(verdict, Verdict)
                assert loaded is None
                assert isinstance(saved, int)

            await at_once()  # which brings the scripts
            before = await reads()
            await at_once()
            after = await reads()
            assert (after[0] - before[0], after[1] - before[1]) == (2, 0), "one for all, and one for INFO"
            await counters.aclose()

        for _ in range(3):  # others may use the server as well
            try:
                asyncio.run(main())
            except AssertionError:
                continue
            return
        asyncio.run(main())

    def test_what_is_gone_leaves_no_key(self, sessions: RedisSessions, before: str) -> None:
        """After sessions were ended, and changed their owner, the server has no key of theirs, and no list."""
        server = shared_server()
        trial = Trial(sessions, lambda seconds: past(server, before, seconds))
        version = trial.create(A, b"x", owner="ann")
        version = trial.renew(A, b"x", version, owner="bob")
        assert len(names(server, before)) == 2
        trial.renew(A, b"x", version, owner=None)
        assert names(server, before) == {f"{before}:s:{{{A}}}"}
        trial.delete(A)
        trial.create(B, b"x", owner="ann")
        trial.delete(B)
        assert names(server, before) == set()

    def test_a_list_expires_with_its_last_session_and_loses_what_expired(
        self, sessions: RedisSessions, before: str
    ) -> None:
        """The list of an owner lives as long as their longest session, and a new one takes off what has expired."""
        server = shared_server()
        trial = Trial(sessions, lambda seconds: past(server, before, seconds))
        trial.create(A, b"x", ttl=1000, owner="ann")
        trial.create(B, b"x", ttl=100, owner="ann")
        (index,) = (name for name in names(server, before) if f"{before}:o:" in name)
        assert 900_000 < server.call("PTTL", index) <= 1_000_000
        trial.advance(200)
        trial.create(key("c"), b"x", ttl=10, owner="ann")
        assert set(server.call("ZRANGE", index, 0, -1)) == {A.encode(), key("c").encode()}
        assert 700_000 < server.call("PTTL", index) <= 800_000
        trial.advance(801)
        assert names(server, before) == set()

    def test_an_entry_of_a_session_that_is_another_s_is_taken_off(
        self, sessions: RedisSessions, before: str
    ) -> None:
        """What stands on a list and is not its owner's is not told, and taken off as the list is read."""
        server = shared_server()
        trial = Trial(sessions, lambda seconds: None)
        trial.create(A, b"x", owner="ann")
        trial.create(B, b"x", owner="bob")
        index = next(name for name in names(server, before) if ":o:" in name)
        owner = "ann" if server.call("ZSCORE", index, A) is not None else "bob"
        for other in (A, B, key("none")):
            server.call("ZADD", index, 10**15, other)
        assert set(trial.owned(owner)) == {A if owner == "ann" else B}
        assert server.call("ZCARD", index) == 1

    def test_no_name_of_a_user_stands_in_the_store(self, sessions: RedisSessions, before: str) -> None:
        """Keys and values of the server have digests of owners, and not their names."""
        server = shared_server()
        Trial(sessions, lambda seconds: None).create(A, b"x", owner="zoe@example.org")
        found = names(server, before)
        assert len(found) == 2
        held = [server.call("GET", name) for name in found if f"{before}:s:" in name]
        assert "zoe" not in f"{found}{held}"

    @pytest.mark.parametrize("value", ["", "short", "x" * 200])
    def test_a_value_that_is_none_of_ours_is_an_error(
        self, sessions: RedisSessions, before: str, value: str
    ) -> None:
        """Under the key of a session, what Gatekeeper did not write is an error and not a session."""
        shared_server().call("SET", f"{before}:s:{{{A}}}", value)
        reply = sessions.ask(Load(sessions, A))
        assert isinstance(reply, StoreError)
        assert "not written by Gatekeeper" in str(reply)

    def test_a_key_of_another_type_is_an_error(self, sessions: RedisSessions, before: str) -> None:
        """A list of the server's in the place of a session is an error of the server's, told by its code alone."""
        shared_server().call("RPUSH", f"{before}:s:{{{A}}}", "x")
        for asked in (commands(sessions)[place] for place in (0, 1, 3)):
            reply = sessions.ask(asked)
            assert isinstance(reply, StoreError)
            assert "WRONGTYPE" in str(reply)

    def test_a_server_that_is_full_refuses_and_forgets_nothing(self, server: Server) -> None:
        """Without memory a save is an error, a load and a delete are not, and what was there is unchanged."""
        with closing(RedisStore(server.url, timeout=PATIENT)) as counters:
            store = RedisSessions(counters)
            version = told(store.ask(Save(store, A, b"x", version=None, ttl=60, owner="ann")), int)
            server.call("CONFIG", "SET", "maxmemory", "1")
            reply = store.ask(Save(store, A, b"y", version=version, ttl=60, owner="ann"))
            assert isinstance(reply, StoreError)
            assert "OOM" in str(reply)
            assert store.ask(Load(store, A)) == Record(b"x", version)
            assert store.ask(Owned(store, "ann")) == [(A, Record(b"x", version))]

    def test_a_store_that_is_given_is_left_open_and_one_of_its_own_closed(self, server: Server) -> None:
        """Closing sessions closes the connections that they opened, and none of the store that was given."""

        def clients() -> int:
            return len(bytes(server.call("CLIENT", "LIST")).splitlines()) - 1  # but the one that asks

        with closing(RedisStore(server.url, timeout=PATIENT)) as counters:
            given = RedisSessions(counters)
            given.ask(Load(given, A))
            given.close()
            assert clients() == 1
            own = RedisSessions(RedisStore(server.url, timeout=PATIENT), owns=True)
            own.ask(Load(own, A))
            assert clients() == 2
            own.close()
            end = time.monotonic() + 10
            while clients() > 1:
                assert time.monotonic() < end
                time.sleep(0.01)

    def test_a_child_has_connections_of_its_own(self, sessions: RedisSessions) -> None:
        """After a fork parent and child each get their own answers."""
        versions = {
            one: told(sessions.ask(Save(sessions, one, one.encode(), version=None, ttl=60)), int) for one in (A, B)
        }
        child = os.fork()
        if child == 0:
            good = all(sessions.ask(Load(sessions, B)) == Record(B.encode(), versions[B]) for _ in range(200))
            os._exit(0 if good else 1)
        for _ in range(200):
            assert sessions.ask(Load(sessions, A)) == Record(A.encode(), versions[A])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestFailures:
    def test_a_server_that_does_not_answer_is_an_error_in_time(self, server: Server) -> None:
        """Of a server that stands still each command is answered with an error, by both faces, within the timeout."""
        with closing(RedisStore(server.url, timeout=0.2)) as counters:
            store = RedisSessions(counters)
            store.ask(Load(store, A))
            server.pause()
            try:
                for asked in commands(store):
                    for ask in (store.ask, lambda asked: asyncio.run(store.aask(asked))):
                        began = time.monotonic()
                        assert isinstance(ask(asked), StoreError)
                        assert time.monotonic() - began < 0.2 + SLACK
            finally:
                server.resume()

    def test_no_error_shows_where_the_server_is(self, server: Server) -> None:
        """The errors of a server that is gone show neither its address nor a password."""
        server.kill()
        with closing(RedisStore(f"redis://:verysecret@127.0.0.1:{server.port}", timeout=PATIENT)) as counters:
            store = RedisSessions(counters)
            for asked in commands(store) * 3:
                for reply in (store.ask(asked), asyncio.run(store.aask(asked))):
                    assert isinstance(reply, StoreError)
                    assert "secret" not in str(reply)
                    assert str(server.port) not in str(reply)

    def test_a_server_that_was_restarted_knows_no_session_and_takes_new_ones(self, server: Server) -> None:
        """What a server that saves nothing has forgotten is gone; the scripts are brought to it again."""
        with closing(RedisStore(server.url, timeout=PATIENT)) as counters:
            store = RedisSessions(counters)
            version = told(store.ask(Save(store, A, b"x", version=None, ttl=60, owner="ann")), int)
            server.kill()
            assert isinstance(store.ask(Load(store, A)), StoreError)
            server.start()
            end = time.monotonic() + 20
            while isinstance(reply := store.ask(Load(store, A)), StoreError):
                assert time.monotonic() < end, reply
                time.sleep(0.01)
            assert reply is None
            assert store.ask(Save(store, A, b"late", version=version, ttl=60)) is None
            assert isinstance(store.ask(Save(store, A, b"new", version=None, ttl=60, owner="ann")), int)
            assert len(store.ask(Owned(store, "ann"))) == 1

    def test_scripts_that_a_server_forgot_are_brought_again(self, server: Server) -> None:
        """After SCRIPT FLUSH every command is carried out as before, once."""
        with closing(RedisStore(server.url, timeout=PATIENT)) as counters:
            store = RedisSessions(counters)
            for _ in range(2):
                for asked in commands(store):
                    assert server.call("SCRIPT", "FLUSH") == b"OK"
                    assert not isinstance(store.ask(asked), StoreError)
            assert store.ask(Load(store, A)) is None

    def test_a_failing_server_is_asked_no_more_by_sessions_either(self, server: Server) -> None:
        """The breaker is one for counters and sessions: what the ones found out spares the others the wait."""
        with closing(RedisStore(server.url, timeout=0.1)) as counters:
            store = RedisSessions(counters)
            server.pause()
            try:
                for _ in range(5):
                    counters.ask([(LIMIT, "key", 1)])
                began = time.monotonic()
                assert isinstance(store.ask(Load(store, A)), StoreError)
                assert time.monotonic() - began < 0.1
            finally:
                server.resume()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Server]]:
    with cluster() as nodes:
        yield nodes


def scenarios() -> list[Callable[[Any, Trial], None]]:
    """The tests of the contract that want nothing but a store."""
    found = [
        test
        for kind in (contract.TestOne, contract.TestTime, contract.TestOwners)
        for test in vars(kind).values()
        if callable(test)
    ]
    return [test for test in found if list(inspect.signature(test).parameters) == ["self", "on"]]


class TestCluster:
    @pytest.fixture
    def on(self, nodes: list[Server]) -> Iterator[Trial]:
        before = prefix()

        def advance(seconds: float) -> None:
            for node in nodes:
                past(node, before, seconds)

        store = RedisStore(cluster_url(nodes), timeout=PATIENT)
        trial = Trial(RedisSessions(store, prefix=before), advance)
        yield trial
        trial.run(store.aclose())
        trial.close()

    @pytest.mark.parametrize("face", ["ask", "aask"])
    @pytest.mark.parametrize("scenario", scenarios())
    def test_the_contract_holds(self, on: Trial, scenario: Callable[[Any, Trial], None], face: str) -> None:
        """On a cluster sessions keep the contract, though a session and its owner's list are on several servers."""
        on.face = face
        scenario(None, on)

    def test_threads_that_count_lose_nothing(self, on: Trial) -> None:
        """Threads that each add one by comparing and setting end at exactly what they added."""
        on.create(A, b"0")

        def work() -> None:
            for _ in range(25):
                record = on.store.ask(Load(on.store, A))
                while isinstance(record, Record):
                    more = b"%d" % (int(record.data) + 1)
                    record = on.store.ask(Save(on.store, A, more, version=record.version, ttl=60, owner="ann"))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told(on.ask(Load(on.store, A)), Record).data == b"100"
        assert set(on.owned("ann")) == {A}
