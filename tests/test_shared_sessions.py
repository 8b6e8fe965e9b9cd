"""Sessions in LMDB: several processes, forks, kills, files that are full or of another boot."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from gatekeeper.commands import Delete, Load, Owned, Record, Save
from gatekeeper.errors import StoreError
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.stores import shared
from gatekeeper.stores.sessions.shared import SharedSessions
from gatekeeper.stores.shared import SharedStore
from tests.session_stores import Seconds, count_together, key, kill_at_work, told
from tests.shared_store import joined, started, temporary_folder

A, B = key("a"), key("b")
SIZE = 4 << 20


@pytest.fixture
def path() -> Iterator[Path]:
    folder = temporary_folder()
    yield folder
    shutil.rmtree(folder.parent)


Open = Callable[..., SharedSessions]


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    stores: list[SharedSessions] = []

    def make(**more: object) -> SharedSessions:
        stores.append(SharedSessions(path, **{"size": SIZE, **more}))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def save(store: SharedSessions, key: str, data: bytes, version: int | None = None, ttl: int = 60) -> int:
    reply = store.ask(Save(store, key, data, version=version, ttl=ttl, owner="ann"))
    assert isinstance(reply, int), reply
    return reply


def begin(store: SharedSessions, key: str) -> None:
    save(store, key, b"x")


def let_go() -> None:
    """As in a child, or a new process: the files are opened anew when they are next asked."""
    for files in list(shared.files.OPEN.values()):
        files.forked(True)


class TestProcesses:
    @pytest.mark.parametrize("durable", [False, True])
    @pytest.mark.parametrize("how", ["fork", "spawn"])
    def test_processes_that_count_lose_nothing(self, path: Path, how: str, durable: bool) -> None:
        """Four processes that add one to a session again and again end at exactly what they added."""
        count_together(partial(SharedSessions, path, durable=durable, size=SIZE), how)

    @pytest.mark.parametrize("durable", [False, True])
    def test_processes_may_be_killed_at_any_moment(self, path: Path, durable: bool) -> None:
        """What killed processes had been told is there, their sessions are whole, and the others go on."""
        kill_at_work(partial(SharedSessions, path, durable=durable, size=16 << 20), "fork", kills=10)

    def test_a_child_goes_on_with_a_store_of_its_parent(self, opened: Open) -> None:
        """A store that was opened before a fork is good in the child, and what the child saves is there."""
        store = opened()
        version = save(store, A, b"parent's")

        def child(store: SharedSessions, version: int) -> None:
            save(store, A, b"child's", version)
            save(store, B, b"new")

        assert joined(started("fork", child, [(store, version)])) == [0]
        assert told(store.ask(Load(store, A)), Record).data == b"child's"
        assert len(store.ask(Owned(store, "ann"))) == 2

    def test_a_fork_while_threads_save_harms_neither_side(self, opened: Open) -> None:
        """Children that are forked while threads save can load and save, and no thread gets an error."""
        store = opened()
        done = threading.Event()
        replies: list[object] = []

        def busy(place: int) -> None:
            version = save(store, key(place), b"x")
            while not done.is_set():
                reply = store.ask(Save(store, key(place), b"x", version=version, ttl=60))
                if not isinstance(reply, int):
                    replies.append(reply)
                    return
                version = reply

        threads = [threading.Thread(target=busy, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(5):
                assert joined(started("fork", begin, [(store, key(("child", number)))])) == [0]
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert replies == []


class TestFiles:
    def test_sessions_and_counters_share_a_folder_and_nothing_else(self, path: Path, opened: Open) -> None:
        """Sessions, durable ones and counters lie in files of their own in one folder, for their user alone."""
        counters, limit = SharedStore(path, size=1 << 20), Rule("rule", [Rate(1, 60)]).limits[0]
        store, durable = opened(), opened(durable=True)
        save(store, A, b"one")
        save(durable, A, b"two")
        assert counters.ask([(limit, "key", 1)])[0].allowed
        assert told(store.ask(Load(store, A)), Record).data == b"one"
        assert told(durable.ask(Load(durable, A)), Record).data == b"two"
        assert len(counters) == 1
        files = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
        assert {name.partition(".")[0] for name in files} == {"gatekeeper", "sessions", "durable-sessions"}
        assert set(files.values()) == {0o600}
        counters.close()

    def test_sessions_outlive_the_processes(self, opened: Open) -> None:
        """What was saved is there when all that had the store open have closed it."""
        store = opened()
        version = save(store, A, b"one")
        store.close()
        again = opened()
        assert again.ask(Load(again, A)) == Record(b"one", version)

    @pytest.mark.parametrize("durable", [False, True])
    def test_durable_sessions_outlive_the_boot_and_others_do_not(
        self, opened: Open, durable: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After another boot of the machine durable sessions are there, others are dropped unread, for they may be torn."""
        store = opened(durable=durable)
        version = save(store, A, b"one")
        monkeypatch.setattr(shared.files, "boot_id", lambda: "another")
        let_go()
        assert store.ask(Load(store, A)) == (Record(b"one", version) if durable else None)
        save(store, B, b"two")

    def test_a_durable_save_is_synced_and_another_is_not(self, opened: Open) -> None:
        """LMDB itself says that it flushes each commit of durable sessions, and none of others."""
        for durable in (False, True):
            store = opened(durable=durable)
            save(store, A, b"x")
            files = store._files
            assert files is not None
            assert files._env is not None
            flags = files._env.flags()
            assert flags["sync"] is durable
            assert flags["metasync"] is durable

    @pytest.mark.parametrize("durable", [False, True])
    @pytest.mark.parametrize("damage", [b"", b"not a database" * 1000, bytes(SIZE)])
    def test_a_damaged_file_is_made_anew(self, path: Path, opened: Open, damage: bytes, durable: bool) -> None:
        """Files that are no sessions, or none any more, are made anew: clients log in again, and nothing is stuck."""
        store = opened(durable=durable)
        save(store, A, b"one")
        store.close()
        (path / ("durable-sessions.mdb" if durable else "sessions.mdb")).write_bytes(damage)
        again = opened(durable=durable)
        assert again.ask(Load(again, A)) is None
        save(again, A, b"two")

    def test_a_path_or_size_that_cannot_be_is_refused_at_once(self, tmp_path: Path) -> None:
        """A relative path and a size that is too small are refused before anything is made."""
        with pytest.raises(ValueError, match="absolute"):
            SharedSessions("sessions")
        with pytest.raises(ValueError, match="size"):
            SharedSessions(tmp_path / "sessions", size=1000)

    def test_nothing_is_made_before_the_first_command(self, path: Path) -> None:
        """Opening a store, as `gatekeeper check` does, makes no folder; the first command does."""
        store = SharedSessions(path, size=SIZE)
        assert not path.exists()
        assert store.ask(Load(store, A)) is None
        assert path.exists()
        store.close()

    def test_a_folder_that_cannot_be_used_is_an_answer_that_says_why(self, tmp_path: Path) -> None:
        """Each command is answered with what is wrong with the folder; once that is mended, it is carried out."""
        store = SharedSessions(tmp_path / "none" / "sessions", size=SIZE)
        for command in (Load(store, A), Save(store, A, b"x", version=None, ttl=1), Owned(store, "ann")):
            reply = store.ask(command)
            assert isinstance(reply, StoreError)
            assert "make it first" in str(reply)
        with pytest.raises(StoreError, match="make it first"):
            store.sweep()
        (tmp_path / "none").mkdir()
        save(store, A, b"x")
        store.close()

    def test_a_folder_to_which_others_may_write_is_refused(self, path: Path) -> None:
        """Sessions are not kept where another user could exchange them."""
        path.mkdir()
        path.chmod(0o777)
        store = SharedSessions(path, size=SIZE)
        reply = store.ask(Load(store, A))
        assert isinstance(reply, StoreError)
        assert "others may write" in str(reply)

    def test_a_closed_store_can_be_used_again(self, opened: Open) -> None:
        """What was saved before closing is there when the store is asked again."""
        store = opened()
        version = save(store, A, b"x")
        store.close()
        store.close()
        assert store.ask(Load(store, A)) == Record(b"x", version)


class TestFull:
    @pytest.mark.parametrize("length", [10, 3000, 50_000])
    def test_a_full_store_refuses_new_sessions_and_keeps_the_others(self, opened: Open, length: int) -> None:
        """When it is full a new session is an error that says so; those held are loaded, changed and ended as before."""
        clock = Seconds()
        store = opened(size=1 << 20, clock=clock)
        versions: dict[str, int] = {}
        reply: object = 0
        while isinstance(reply, int):
            one = key(len(versions))
            reply = store.ask(Save(store, one, b"x" * length, version=None, ttl=100, owner="ann"))
            if isinstance(reply, int):
                versions[one] = reply
        assert isinstance(reply, StoreError)
        assert "full" in str(reply)
        assert len(versions) * length > (1 << 20) / 8 or length == 10
        for one in list(versions)[:100]:
            versions[one] = save(store, one, b"y" * length, versions[one], ttl=100)
        assert {one: record.version for one, record in store.ask(Owned(store, "ann"))} == versions
        for one in list(versions)[: len(versions) // 2]:
            assert isinstance(store.ask(Delete(store, one)), Record)
        save(store, key("new"), b"x" * length)

    def test_what_has_expired_makes_room(self, opened: Open) -> None:
        """A store that is full of what has expired takes new sessions without being told to sweep."""
        clock = Seconds()
        store = opened(size=1 << 20, clock=clock)
        for turn in range(4):
            number = 0
            while isinstance(store.ask(Save(store, key((turn, number)), bytes(2000), version=None, ttl=10)), int):
                number += 1
            assert number > 100, f"in turn {turn}"
            clock.advance(11)

    def test_a_session_that_grows_when_there_is_no_room_stays_as_it_was(self, opened: Open) -> None:
        """A change that does not fit is an error that says so, and the session is what it was before."""
        store = opened(size=1 << 20)
        version = save(store, A, b"small")
        reply = store.ask(Save(store, A, bytes(1 << 20), version=version, ttl=60, owner="ann"))
        assert isinstance(reply, StoreError)
        assert "full" in str(reply)
        assert store.ask(Load(store, A)) == Record(b"small", version)
