"""The contract of every session store, by both faces. A store joins by adding a line to STORES."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from gatekeeper.commands import Delete, Load, Owned, Record, Save
from gatekeeper.errors import StoreError
from gatekeeper.stores.sessions import LONGEST
from gatekeeper.stores.sessions.memory import MemorySessions
from tests.session_stores import STORES, VIRTUAL, Seconds, Trial, key, trial

A, B, C = key("a"), key("b"), key("c")
THREADS, ROUNDS = 4, 25


@pytest.fixture(params=STORES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["ask", "aask"])
def on(name: str, request: pytest.FixtureRequest) -> Iterator[Trial]:
    with trial(name, request.param) as made:
        yield made


class TestOne:
    def test_what_was_saved_is_loaded(self, on: Trial) -> None:
        """A session is loaded as it was saved, with the version that the save told; others are not there."""
        version = on.create(A, b"one")
        assert on.load(A) == Record(b"one", version)
        assert on.load(B) is None

    def test_what_was_never_there_is_not_made_by_a_save_of_what_was_read(self, on: Trial) -> None:
        """A key that nobody created is not there, for a load, a delete and a save of some version."""
        assert on.load(A) is None
        assert on.delete(A) is None
        assert on.save(A, b"x", 1) is None
        assert on.load(A) is None

    @pytest.mark.parametrize(
        "data",
        [b"", b"\x00", bytes(range(256)), b"\r\n$3\r\n", "ü€\U0001f600".encode(), b"x" * 70_000],
        ids=["empty", "nul", "bytes", "lines", "text", "long"],
    )
    def test_any_bytes_come_back_as_they_went(self, on: Trial, data: bytes) -> None:
        """The store does not read what it keeps: any bytes come back, by a load and by a delete."""
        version = on.create(A, data)
        assert on.load(A) == Record(data, version)
        assert on.delete(A) == Record(data, version)

    def test_a_session_as_long_as_may_be_is_kept_and_a_longer_one_refused(self, on: Trial) -> None:
        """A session of 1 MiB is kept; one of a byte more is an error that says so, and changes nothing."""
        longest = Random(5).randbytes(LONGEST)
        version = on.create(A, longest)
        reply = on.ask(Save(on.store, A, longest + b"x", version=version, ttl=60))
        assert isinstance(reply, StoreError)
        assert str(LONGEST) in str(reply)
        assert on.load(A) == Record(longest, version)

    def test_each_write_has_another_version(self, on: Trial) -> None:
        """A version is never that of an earlier write of the session, even if it was ended and begun anew between."""
        versions = [on.create(A, b"same")]
        for _ in range(3):
            versions.append(on.renew(A, b"same", versions[-1]))
        on.delete(A)
        versions.append(on.create(A, b"same"))
        assert len(set(versions)) == 5

    def test_a_new_session_does_not_replace_one_that_is_there(self, on: Trial) -> None:
        """Who creates a session where one is, is told that one, and it stays."""
        version = on.create(A, b"first")
        assert on.save(A, b"second") == Record(b"first", version)
        assert on.load(A) == Record(b"first", version)

    def test_a_save_of_an_old_version_is_told_the_newer(self, on: Trial) -> None:
        """Of two that read the same version, the second to save is told what the first wrote, and writes nothing."""
        read = on.create(A, b"read")
        newer = on.renew(A, b"newer", read)
        assert on.save(A, b"late", read) == Record(b"newer", newer)
        assert on.load(A) == Record(b"newer", newer)

    def test_what_was_deleted_is_not_recreated(self, on: Trial) -> None:
        """A save that comes after the delete is told that the session is gone, and it stays so."""
        version = on.create(A, b"there")
        assert on.delete(A) == Record(b"there", version)
        assert on.save(A, b"late", version) is None
        assert on.load(A) is None

    def test_a_delete_tells_what_was_there_once(self, on: Trial) -> None:
        """The first delete returns the session, a second nothing, and neither touches another one."""
        version, other = on.create(A, b"there"), on.create(B, b"other")
        assert on.delete(A) == Record(b"there", version)
        assert on.delete(A) is None
        assert on.load(B) == Record(b"other", other)

    def test_what_is_ended_may_begin_anew(self, on: Trial) -> None:
        """A session can be created where one was, and a save of the old version does not reach it."""
        old = on.create(A, b"old")
        on.delete(A)
        new = on.create(A, b"new")
        assert on.save(A, b"late", old) == Record(b"new", new)


class TestTime:
    def test_a_session_is_there_until_its_time_and_not_after(self, on: Trial) -> None:
        """It is there shortly before its end; shortly after, it is neither loaded nor deleted."""
        version = on.create(A, b"brief", ttl=100)
        on.advance(95)
        assert on.load(A) == Record(b"brief", version)
        on.advance(6)
        assert on.load(A) is None
        assert on.delete(A) is None

    def test_what_has_expired_is_gone_for_a_save(self, on: Trial) -> None:
        """A save of a session that has expired is told that it is gone, and does not bring it back."""
        version = on.create(A, b"brief", ttl=100)
        on.advance(101)
        assert on.save(A, b"late", version) is None
        assert on.load(A) is None

    def test_a_new_session_may_stand_where_one_has_expired(self, on: Trial) -> None:
        """What has expired is in nobody's way, swept or not, and the new one lives its own time."""
        on.create(A, b"old", ttl=100, owner="before")
        on.advance(101)
        version = on.create(A, b"new", ttl=200, owner="after")
        on.advance(150)
        assert on.load(A) == Record(b"new", version)
        assert on.owned("before") == {}
        assert on.owned("after") == {A: Record(b"new", version)}

    @pytest.mark.parametrize(("first", "second"), [(100, 600), (600, 100)])
    def test_a_save_gives_the_session_its_time_anew(self, on: Trial, first: int, second: int) -> None:
        """The time to live is that of the last save, be it longer than before or shorter."""
        version = on.create(A, b"one", ttl=first)
        on.advance(50)
        again = on.renew(A, b"two", version, ttl=second)
        on.advance(second - 5)
        assert on.load(A) == Record(b"two", again)
        on.advance(6)
        assert on.load(A) is None

    def test_a_sweep_drops_what_has_expired_and_nothing_else(self, on: Trial) -> None:
        """More sessions than a portion has are swept, those that live are not, and there is nothing left to sweep."""
        living = {key(place): on.create(key(place), b"lives", ttl=1000, owner="one") for place in range(5)}
        for place in range(100, 100 + 40):
            on.create(key(place), b"brief", ttl=100 + place % 7, owner="one")
        on.advance(110)
        on.sweep()
        assert on.sweep() == 0
        assert {found: record.version for found, record in on.owned("one").items()} == living


class TestOwners:
    def test_the_sessions_of_an_owner_are_listed_and_nobody_s_else(self, on: Trial) -> None:
        """An owner's sessions are those that were saved as theirs and live; who has none is told so."""
        one, two = on.create(A, b"one", owner="ann"), on.create(B, b"two", owner="ann")
        other = on.create(C, b"other", owner="bob")
        on.create(key("nobody"), b"nobody's")
        assert on.owned("ann") == {A: Record(b"one", one), B: Record(b"two", two)}
        assert on.owned("bob") == {C: Record(b"other", other)}
        assert on.owned("eve") == {}

    def test_a_save_may_change_the_owner(self, on: Trial) -> None:
        """After a login a session is its user's, after another save another's, and then nobody's."""
        version = on.create(A, b"one")
        for owner in ("ann", "bob", None, "ann"):
            version = on.renew(A, b"one", version, owner=owner)
            for name in ("ann", "bob"):
                assert on.owned(name) == ({A: Record(b"one", version)} if name == owner else {})

    def test_what_is_gone_is_not_listed(self, on: Trial) -> None:
        """Of an owner's sessions one that was deleted and one that has expired are not listed, one renewed is."""
        on.create(A, b"deleted", owner="ann")
        on.create(B, b"expired", ttl=100, owner="ann")
        version = on.create(C, b"renewed", ttl=100, owner="ann")
        on.delete(A)
        on.advance(50)
        renewed = on.renew(C, b"renewed", version, ttl=600, owner="ann")
        on.advance(100)
        assert on.owned("ann") == {C: Record(b"renewed", renewed)}

    @pytest.mark.parametrize(
        "owner",
        ["7", "ünïcode \U0001f600", "{a}:b%*?[", "x" * 256, " ", "\0", "\udc80", "\ud800'; DROP TABLE x; --"],
    )
    def test_any_text_may_be_an_owner(self, on: Trial, owner: str) -> None:
        """An owner is any text, told from another that is only nearly the same."""
        version = on.create(A, b"one", owner=owner)
        on.create(B, b"other", owner=owner + "x")
        assert on.owned(owner) == {A: Record(b"one", version)}

    def test_an_owner_of_many_is_told_all(self, on: Trial) -> None:
        """A few hundred sessions of one owner are all listed."""
        versions = {key(place): on.create(key(place), b"%d" % place, owner="ann") for place in range(300)}
        assert {found: record.version for found, record in on.owned("ann").items()} == versions

    def test_a_late_save_of_another_version_changes_no_owner(self, on: Trial) -> None:
        """A save that is refused leaves the owner as it was."""
        old = on.create(A, b"one", owner="ann")
        new = on.renew(A, b"two", old, owner="ann")
        on.save(A, b"late", old, owner="bob")
        on.save(A, b"created", None, owner="eve")
        assert on.owned("bob") == on.owned("eve") == {}
        assert on.owned("ann") == {A: Record(b"two", new)}


class TestAtOnce:
    def test_threads_that_count_lose_nothing(self, name: str) -> None:
        """Threads that each add one by comparing and setting end at exactly what they added."""
        with trial(name) as on:
            on.create(A, b"0")
            trouble: list[object] = []

            def work() -> None:
                for _ in range(ROUNDS):
                    record = on.store.ask(Load(on.store, A))
                    while isinstance(record, Record):
                        more = b"%d" % (int(record.data) + 1)
                        record = on.store.ask(Save(on.store, A, more, version=record.version, ttl=60, owner="ann"))
                    if not isinstance(record, int):
                        trouble.append(record)

            threads = [threading.Thread(target=work) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert trouble == []
            found = on.load(A)
            assert found is not None
            assert int(found.data) == THREADS * ROUNDS

    def test_tasks_that_count_lose_nothing(self, name: str) -> None:
        """Tasks of one loop that each add one by comparing and setting end at exactly what they added."""
        with trial(name, "aask") as on:
            on.create(A, b"0")

            async def work() -> None:
                for _ in range(ROUNDS):
                    record = await on.store.aask(Load(on.store, A))
                    while isinstance(record, Record):
                        more = b"%d" % (int(record.data) + 1)
                        save = Save(on.store, A, more, version=record.version, ttl=60, owner="ann")
                        record = await on.store.aask(save)
                        await asyncio.sleep(0)
                    assert isinstance(record, int), record

            async def all_of_them() -> None:
                await asyncio.gather(*(work() for _ in range(THREADS)))

            on.run(all_of_them())
            found = on.load(A)
            assert found is not None
            assert int(found.data) == THREADS * ROUNDS

    def test_of_many_that_create_or_delete_one_session_one_does(self, name: str) -> None:
        """Of threads that create the same session one succeeds; of those that delete it, one is told what it was."""
        with trial(name) as on:
            for number in range(5):
                one, gate = key(number), threading.Barrier(THREADS)
                replies: list[object] = []

                def work(command: Save | Delete, gate: threading.Barrier, replies: list[object]) -> None:
                    gate.wait(30)
                    replies.append(on.store.ask(command))

                for command in (Save(on.store, one, b"x", version=None, ttl=60), Delete(on.store, one)):
                    replies = []
                    threads = [threading.Thread(target=work, args=(command, gate, replies)) for _ in range(THREADS)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    assert not any(isinstance(reply, StoreError) for reply in replies), replies
                    kinds = [type(reply) for reply in replies]
                    if isinstance(command, Save):
                        assert kinds.count(int) == 1
                        assert kinds.count(Record) == THREADS - 1
                    else:
                        assert kinds.count(Record) == 1
                        assert kinds.count(type(None)) == THREADS - 1

    def test_one_who_is_cancelled_leaves_a_whole_session_or_none(self, name: str) -> None:
        """A save that is cancelled was carried out or was not; the store answers all the same afterwards."""
        with trial(name, "aask") as on:
            version = on.create(A, b"before", owner="ann")

            async def cancelled() -> None:
                for turns in range(6):
                    save = Save(on.store, A, b"after", version=version, ttl=60, owner="bob")
                    task = asyncio.ensure_future(on.store.aask(save))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

            on.run(cancelled())
            found = on.load(A)
            assert found is not None
            assert found.data in (b"before", b"after")
            assert (found.data == b"before") == (found.version == version)
            settled = on.save(A, b"settled", found.version, owner="eve")
            # What was cancelled may still be on its way to another machine: then this one was too late.
            assert isinstance(settled, int) or settled == on.load(A)


class TestEnds:
    def test_a_store_may_be_closed_twice(self, name: str) -> None:
        """Closing again, by either face, does nothing."""
        with trial(name) as on:
            on.create(A, b"one")
            on.store.close()
            on.store.close()
            on.run(on.store.aclose())

    def test_both_faces_see_the_same(self, name: str) -> None:
        """What is saved by one face is loaded by the other."""
        with trial(name) as on:
            version = on.create(A, b"one", owner="ann")
            on.face = "aask"
            assert on.load(A) == Record(b"one", version)
            again = on.renew(A, b"two", version, owner="ann")
            on.face = "ask"
            assert on.owned("ann") == {A: Record(b"two", again)}


class Model(RuleBasedStateMachine):
    """Any sequence of commands, against a dict that is written as the contract reads."""

    store_name: str
    KEYS = st.sampled_from([A, B, C])
    OWNERS = st.sampled_from([None, "ann", "bob"])
    WHICH = st.sampled_from(["none", "current", "old"])

    @initialize(face=st.sampled_from(["ask", "aask"]))
    def begin(self, face: str) -> None:
        self.context = trial(self.store_name, face)
        self.on = self.context.__enter__()
        self.now = 0.0
        self.held: dict[str, tuple[Record, float, str | None]] = {}
        self.old: dict[str, int] = {}

    def alive(self, key: str) -> Record | None:
        held = self.held.get(key)
        return held[0] if held is not None and self.now < held[1] else None

    @rule(key=KEYS, which=WHICH, data=st.binary(max_size=20), ttl=st.integers(1, 20), owner=OWNERS)
    def save(self, key: str, which: str, data: bytes, ttl: int, owner: str | None) -> None:
        there = self.alive(key)
        current = self.held[key][0].version if key in self.held else self.old.get(key)
        version = {"none": None, "current": current, "old": self.old.get(key)}[which]
        reply = self.on.save(key, data, version, ttl, owner)
        if there is None and version is not None:
            assert reply is None
        elif there is not None and version != there.version:
            assert reply == there
        else:
            assert isinstance(reply, int)
            if key in self.held:
                self.old[key] = self.held[key][0].version
            self.held[key] = Record(data, reply), self.now + ttl, owner

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        assert self.on.delete(key) == self.alive(key)
        if key in self.held:
            self.old[key] = self.held.pop(key)[0].version

    @rule(quarters=st.integers(1, 60))
    def advance(self, quarters: int) -> None:
        self.now += quarters / 4
        self.on.advance(quarters / 4)

    @rule()
    def sweep(self) -> None:
        self.on.sweep()
        assert self.on.sweep() == 0

    @invariant()
    def all_is_as_in_the_model(self) -> None:
        if not hasattr(self, "on"):
            return
        for one in (A, B, C):
            assert self.on.load(one) == self.alive(one)
        for owner in ("ann", "bob"):
            expected = {
                key: record for key in self.held if (record := self.alive(key)) and self.held[key][2] == owner
            }
            assert self.on.owned(owner) == expected

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)


@pytest.mark.parametrize("name", VIRTUAL)
def test_any_sequence_of_commands_is_answered_as_a_dict_would(name: str) -> None:
    """Saves of any version, deletes, sweeps and time in any order give what a plain dict gives."""
    machine = type("Machine", (Model,), {"store_name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


class TestMemory:
    def test_a_full_store_refuses_what_is_new_and_puts_nothing_out(self) -> None:
        """Beyond its bound a new session is an error that says so; those held are written on, and make room at their end."""
        clock = Seconds()
        store = MemorySessions(most=2, clock=clock)
        first = store.ask(Save(store, A, b"a", version=None, ttl=10))
        store.ask(Save(store, B, b"b", version=None, ttl=60))
        reply = store.ask(Save(store, C, b"c", version=None, ttl=60))
        assert isinstance(reply, StoreError)
        assert "full" in str(reply)
        assert isinstance(store.ask(Save(store, A, b"a2", version=first, ttl=10)), int)
        clock.advance(11)
        assert isinstance(store.ask(Save(store, C, b"c", version=None, ttl=60)), int)
        assert len(store) == 2

    def test_what_has_expired_is_dropped_as_others_come(self) -> None:
        """Without any sweep the store holds little more than what is alive."""
        clock = Seconds()
        store = MemorySessions(clock=clock)
        for number in range(5000):
            store.ask(Save(store, key(number), b"x", version=None, ttl=10, owner="ann"))
            clock.advance(0.1)
            assert len(store) <= 102
        clock.advance(100)
        assert store.ask(Owned(store, "ann")) == []

    @pytest.mark.parametrize("ends", [True, False])
    def test_the_ends_that_are_remembered_are_no_more_than_the_sessions(self, ends: bool) -> None:
        """Logging in and out again and again, or saving for shorter and longer times, takes no more and more memory."""
        store = MemorySessions(clock=Seconds())
        version = None
        for number in range(2000):
            one = key(number) if ends else A
            version = store.ask(
                Save(store, one, b"x", version=None if ends else version, ttl=100 - 50 * (number % 2), owner="ann")
            )
            assert isinstance(version, int)
            if ends:
                store.ask(Delete(store, one))
        assert len(store._ends) <= 100
