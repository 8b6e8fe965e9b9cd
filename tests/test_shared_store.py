"""What holds of the shared store beyond the contract: several processes, killed ones, full maps, odd folders."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import lmdb
import pytest

from gatekeeper.commands import Batch, Hit, Verdict
from gatekeeper.errors import StoreError
from gatekeeper.ratelimit.algorithms import NS, Penalty
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import RateLimit, Rule
from gatekeeper.stores import shared
from gatekeeper.stores.shared import LEAST_SIZE, SharedStore
from gatekeeper.testing import VirtualClock
from tests.shared_store import (
    SIZE,
    barrier,
    counts,
    hit,
    hit_with_strangers,
    joined,
    limit,
    started,
    temporary_folder,
)

Open = Callable[..., SharedStore]


@pytest.fixture
def path() -> Iterator[Path]:
    folder = temporary_folder()
    yield folder
    subprocess.run(["rm", "-rf", str(folder.parent)], check=True)


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """Opens stores on the one folder, and closes them at the end."""
    stores: list[SharedStore] = []

    def open_store(**settings: object) -> SharedStore:
        store = SharedStore(path, **{"size": SIZE, **settings})  # type: ignore[arg-type]
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        store.close()


def damage(path: Path, word: int, value: int) -> None:
    """Write eight bytes into both heads of the file."""
    with (path / "gatekeeper.mdb").open("r+b") as file:
        for head in (0, 4096):
            file.seek(head + word)
            file.write(value.to_bytes(8, "little"))


def ask(store: SharedStore, *hits: Hit, spend: bool = True) -> list[Verdict]:
    replies = store.ask(list(hits) if spend else Batch(hits, spend=False))
    assert all(isinstance(reply, Verdict) for reply in replies), replies
    return [reply for reply in replies if isinstance(reply, Verdict)]


def used(store: SharedStore, one: RateLimit, key: str = "key") -> int:
    verdict = ask(store, (one, key, 0), spend=False)[0]
    return verdict.limit - verdict.remaining


def bans(name: str = "bans") -> RateLimit:
    algorithm = Penalty(1, 60 * NS, 60 * NS, 60 * NS)
    one = RateLimit(Rule(name, [Rate(1, 1)]), name, f"{name}/penalty.1", algorithm, None)
    one.listed = True
    return one


def closed(store: SharedStore) -> bool:
    store.close()
    return store.size == 0


def forked(work: Callable[[], bool]) -> bool:
    """Whether the work, done in a child of this process, was right."""
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


class TestProcesses:
    @pytest.mark.parametrize("how", ["fork", "spawn"])
    def test_four_processes_admit_exactly_the_limit(self, path: Path, opened: Open, how: str) -> None:
        store, one = opened(), limit(12_345)
        ask(store, (one, "another", 1))  # it is in use here before the others begin
        admitted, together = counts(how, 4), barrier(how, 4)
        workers = started(how, hit, [(path, 12_345, 10_000, admitted, place, together) for place in range(4)])
        assert joined(workers) == [0] * 4
        assert sum(admitted) == 12_345
        assert used(store, one) == 12_345
        assert all(admitted), "none of them was kept out"

    def test_the_store_of_a_parent_is_of_use_in_its_children(self, opened: Open) -> None:
        store, one = opened(), limit(1000)
        ask(store, (one, "key", 1))
        for _ in range(3):
            assert forked(lambda: all(ask(store, (one, "key", 1))[0].allowed for _ in range(100)))
            assert ask(store, (one, "key", 1))[0].allowed
        # A child of a child, and a child that closes what it has inherited.
        assert forked(lambda: forked(lambda: ask(store, (one, "key", 1))[0].allowed))
        assert forked(lambda: closed(store))
        assert used(store, one) == 305

    def test_a_child_that_only_ends_leaves_its_parent_in_peace(self, opened: Open) -> None:
        store, one = opened(), limit(1000)
        for _ in range(5):
            assert ask(store, (one, "key", 1))[0].allowed
            assert forked(lambda: True)
        assert used(store, one) == 5

    def test_a_process_may_fork_while_its_threads_hit(self, opened: Open) -> None:
        store, one = opened(), limit(10**6)
        done = threading.Event()
        hits = [0, 0]

        def work(place: int) -> None:
            while not done.is_set():
                ask(store, (one, "key", 1))
                hits[place] += 1

        threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        try:
            outcomes = [forked(lambda: ask(store, (one, "key", 1))[0].allowed) for _ in range(30)]
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert all(outcomes)
        assert used(store, one) == sum(hits) + 30

    def test_a_child_forked_amid_a_transaction_is_told_so_and_does_not_wait(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, one = opened(), limit(10)
        files = store._files
        assert isinstance(files, shared.files.Files)
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with files.transaction():
                inside.set()
                leave.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait(60)
        monkeypatch.setattr(shared.files, "_FORK_PATIENCE", 0.1)
        try:
            assert forked(lambda: isinstance(store.ask([(one, "key", 1)])[0], StoreError))
        finally:
            leave.set()
            thread.join()
        assert ask(store, (one, "key", 1))[0].allowed

    @pytest.mark.parametrize("work", [hit, hit_with_strangers])
    def test_a_process_killed_at_any_moment_leaves_the_others_exact(
        self, path: Path, opened: Open, work: Callable[..., None]
    ) -> None:
        store, one = opened(), limit(10**8)
        admitted, random, kills = counts("fork", 12), Random(3), 0
        alive = {}
        try:
            for place in range(12):
                (alive[place],) = started("fork", work, [(path, 10**8, 0, admitted, place)])
                wait_for(lambda place=place: admitted[place] > 50)  # type: ignore[misc]
                if len(alive) > 2:
                    place, process = random.choice(list(alive.items()))
                    time.sleep(random.random() / 100)  # that it may be anywhere
                    os.kill(process.pid or 0, signal.SIGKILL)
                    assert joined([alive.pop(place)]) == [-signal.SIGKILL]
                    kills += 1
        finally:
            for process in alive.values():
                process.kill()
            joined(list(alive.values()))
            kills += len(alive)
        # What one was killed after being charged for, before it could count it: at most one hit each.
        assert sum(admitted) <= used(store, one) <= sum(admitted) + kills
        assert store.failed == 0

    def test_what_a_dead_reader_held_is_let_go(self, path: Path) -> None:
        clock = VirtualClock()
        for pause in (2, 0):  # it is looked for every second, and when the map is full
            store, one = SharedStore(path, size=LEAST_SIZE, clock=clock), limit(10**6)
            ask(store, (one, "key", 1))
            with reader(path) as process:
                process.kill()
                process.wait(60)
                files = store._files
                assert isinstance(files, shared.files.Files)
                assert files._env is not None
                assert "no active" not in files._env.readers()
                clock.advance(pause)
                for _ in range(2 if pause else 1000):
                    ask(store, (one, "key", 1))
                assert "no active" in files._env.readers()
            assert store.failed == 0
            store.close()

    def test_a_reader_that_stands_still_makes_the_store_full_until_it_goes(self, opened: Open, path: Path) -> None:
        """Such as a process that is stopped while it opens the files."""
        store, one = opened(size=LEAST_SIZE), limit(10**6)
        ask(store, (one, "key", 1))
        admitted = 1
        with reader(path) as process:
            for _ in range(300):
                reply = store.ask([(one, "key", 1)])[0]
                assert isinstance(reply, Verdict) or "full" in str(reply)
                admitted += reply.allowed
            assert store.failed
            process.kill()
            process.wait(60)
        for _ in range(300):
            admitted += ask(store, (one, "key", 1))[0].allowed
        assert used(store, one) == admitted


@contextmanager
def reader(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that stands in a read transaction."""
    program = """
        import lmdb, sys
        env = lmdb.open(sys.argv[1], map_size=1 << 20, subdir=False, writemap=True)
        txn = env.begin()
        txn.get(b"x")
        print("reading", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path / "gatekeeper.mdb")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "reading\n"
            yield process
        finally:
            process.kill()


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


class TestHeads:
    """A process that was killed between the last two stores of a commit: they are taken back here by hand."""

    PAGE = 4096

    @pytest.fixture
    def data(self, path: Path, opened: Open) -> Iterator[memoryview]:
        files = opened(clock=VirtualClock())._files
        assert isinstance(files, shared.files.Files)
        assert files._env is not None
        self.PAGE = files._env.stat()["psize"]
        with (path / "gatekeeper.mdb").open("r+b") as file, mmap.mmap(file.fileno(), 2 * self.PAGE) as data:
            view = memoryview(data)
            yield view
            view.release()

    def newest(self, data: memoryview) -> int:
        """Where the newest head begins."""
        return max((0, self.PAGE), key=lambda at: int.from_bytes(data[at + 144 : at + 152], "little"))

    def test_a_commit_whose_root_was_not_stored_is_undone(self, opened: Open, data: memoryview) -> None:
        random = Random(4)
        store, one = opened(clock=VirtualClock()), limit(10**6)
        held = {f"{number}": 0 for number in range(300)}
        for key in held:  # so that no root is that of an empty tree
            ask(store, (one, key, 1))
            held[key] = 1
        for _ in range(3000):
            key = random.choice(list(held))
            place = self.PAGE - self.newest(data)
            root = bytes(data[place + 120 : place + 136])  # with the number of entries: stored as one
            hits: list[Hit] = [(one, key, 1)]
            if random.random() < 0.2:
                hits.append((one, f"new{random.random()}", 1))
            ask(store, *hits)
            assert self.newest(data) == place
            if random.random() < 0.2:
                data[place + 120 : place + 136] = root
            else:
                held[key] += 1
        assert {key: used(store, one, key) for key in held} == held
        with store._files.transaction() as txn:
            names = [name for name, _ in txn.cursor()]
        assert names == sorted(set(names))
        assert len(names) == len(store)
        assert store.failed == 0

    def test_it_is_undone_where_the_tree_was_empty_before_or_is_empty_now(
        self, opened: Open, data: memoryview
    ) -> None:
        random = Random(6)
        store, one = opened(clock=VirtualClock()), limit(10**6)
        held = {"a": 0, "b": 0}
        undone = 0
        for _ in range(3000):
            key = random.choice("ab")
            resets = random.random() < 0.6
            changes = not resets or held[key] > 0
            place = self.PAGE - self.newest(data)
            root = bytes(data[place + 120 : place + 136])
            store.ask(Batch(resets=[(one, key)]) if resets else [(one, key, 1)])
            assert (self.newest(data) == place) == changes
            if bytes(data[place + 120 : place + 136]) != root and changes and random.random() < 0.2:
                data[place + 120 : place + 136] = root
                undone += 1
            else:
                held[key] = 0 if resets else held[key] + 1
            if random.random() < 0.5:
                assert {key: used(store, one, key) for key in held} == held
                assert len(store) == sum(map(bool, held.values()))
        assert undone > 100

    def test_it_is_undone_by_the_first_that_opens_the_files_again(self, opened: Open, data: memoryview) -> None:
        store, one = opened(clock=VirtualClock()), limit(10)
        for _ in range(4):
            ask(store, (one, "key", 1))
        place = self.PAGE - self.newest(data)
        root = bytes(data[place + 120 : place + 136])
        ask(store, (one, "key", 1))
        data[place + 120 : place + 136] = root
        for files in list(shared.files.OPEN.values()):
            files.forked(True)  # let go, as in a child
        assert used(store, one) == 4

    def test_a_file_of_an_unknown_format_is_written_by_system_calls(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shared.heads.Heads, "_KNOWN", (0, 0))
        store, one = opened(), limit(2)
        files = store._files
        assert isinstance(files, shared.files.Files)
        assert files._env is not None
        assert not files._env.flags()["writemap"]
        assert [ask(store, (one, "key", 1))[0].allowed for _ in range(3)] == [True, True, False]


class TestFiles:
    def test_stores_on_one_folder_count_together_and_close_apart(self, path: Path, opened: Open) -> None:
        first, second, one = opened(), opened(), limit(2)
        (path.parent / "way").symlink_to(path.parent)
        third = SharedStore(path.parent / "way" / "store", size=SIZE)
        assert [ask(store, (one, "key", 1))[0].allowed for store in (first, second, third)] == [True, True, False]
        first.close()
        first.close()
        assert not ask(second, (one, "key", 1))[0].allowed
        third.close()
        second.close()
        again = opened()
        assert not ask(again, (one, "key", 1))[0].allowed, "closing deletes nothing"

    def test_a_closed_store_answers_with_an_error(self, opened: Open) -> None:
        store, one = opened(), limit(2)
        store.close()
        hit: Hit = (one, "key", 1)
        for batch in ([hit], [hit, hit], Batch([hit], spend=False)):
            replies = store.ask(batch)
            assert len(replies) == len(batch)
            assert all(isinstance(reply, StoreError) for reply in replies)
        with pytest.raises(StoreError, match="closed"):
            store.keys(bans())
        assert store.size == 0

    def test_only_their_owner_can_read_the_files(self, path: Path, opened: Open) -> None:
        mask = os.umask(0)
        try:
            opened()
        finally:
            os.umask(mask)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (path, *path.iterdir())}
        assert modes == {
            "store": 0o700, "gatekeeper.boot": 0o600, "gatekeeper.mdb": 0o600, "gatekeeper.mdb-lock": 0o600,
            "gatekeeper.heads": 0o600,
        }  # fmt: skip

    def test_all_the_space_is_reserved_at_the_start(self, path: Path, opened: Open) -> None:
        assert opened().size == SIZE
        assert (path / "gatekeeper.mdb").stat().st_size == SIZE
        assert (path / "gatekeeper.mdb").stat().st_blocks * 512 >= SIZE

    def test_who_comes_later_takes_the_size_that_is_there(self, path: Path, opened: Open) -> None:
        first, one = opened(), limit(3)
        ask(first, (one, "key", 1))
        assert opened(size=2 * SIZE).size == SIZE
        program = """
            import sys
            from gatekeeper.stores.shared import SharedStore
            print(SharedStore(sys.argv[1], size=1 << 20).size)
        """
        told = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True, check=True
        )
        assert int(told.stdout) == SIZE
        assert (path / "gatekeeper.mdb").stat().st_size == SIZE, "it was not cut short under the first"
        assert used(first, one) == 1

    def test_the_counters_of_another_boot_are_dropped(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        store, one = opened(), limit(1)
        ask(store, (one, "key", 1))
        store.close()
        assert not ask(opened(), (one, "key", 1))[0].allowed
        opened().close()
        monkeypatch.setattr(shared.files, "boot_id", lambda: "another")
        for files in list(shared.files.OPEN.values()):
            files.forked(True)  # let go, as in a child
        assert ask(opened(), (one, "key", 1))[0].allowed
        assert not ask(opened(), (one, "key", 1))[0].allowed

    def test_counters_of_another_layout_are_dropped_and_their_owners_keep_to_their_own(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = VirtualClock()
        store, one = SharedStore(path, size=SIZE, clock=clock), limit(1)
        ask(store, (one, "key", 1))
        program = """
            import sys
            from gatekeeper.ratelimit.rates import Rate
            from gatekeeper.ratelimit.rules import Rule
            from gatekeeper.stores import shared
            shared.files.SCHEMA = 2
            store = shared.SharedStore(sys.argv[1], size=1 << 20)
            print(bool(store.ask([(Rule("rule", [Rate(1, 86_400)]).limits[0], "key", 1)])[0]))
        """
        told = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True, check=True
        )
        assert told.stdout.strip() == "True"
        for _ in range(3):
            clock.advance(2)
            assert not ask(store, (one, "key", 1))[0].allowed
        assert (path / "gatekeeper.boot").read_text().startswith("gatekeeper shared store, layout 2")
        store.close()

    @pytest.mark.parametrize("content", [b"", b"not a database" * 1000, bytes(SIZE)])
    def test_a_damaged_file_is_made_anew(self, path: Path, opened: Open, content: bytes) -> None:
        store, one = opened(), limit(1)
        ask(store, (one, "key", 1))
        store.close()
        (path / "gatekeeper.mdb").write_bytes(content)
        assert ask(opened(), (one, "key", 1))[0].allowed

    @pytest.mark.parametrize(
        ("word", "value"),
        [
            (16, 0),  # LMDB's mark
            (40, 7),  # the size of a page
            (136, 10**6),  # the last page: behind the end of the file
            (136, (1 << 64) - 1),
            (144, (1 << 64) - 1),  # the number of the last commit
        ],
    )
    def test_a_head_that_was_damaged_while_nobody_looked_is_made_anew_with_one_warning(
        self, path: Path, opened: Open, word: int, value: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, one = opened(), limit(2)
        ask(store, (one, "key", 1))
        store.close()
        damage(path, word, value)
        again = opened()
        replies = [again.ask([(one, "key", 1)])[0] for _ in range(3)]
        assert all(isinstance(reply, Verdict) for reply in replies[1:])
        assert used(again, one) == 2, "what was counted is lost"
        assert ["is made anew" in record.getMessage() for record in caplog.records] == [True]
        assert os.stat(path / "gatekeeper.mdb").st_size == SIZE

    def test_a_head_that_tells_of_too_many_pages_while_the_store_is_open_is_made_anew_with_one_warning(
        self, path: Path, opened: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, one = opened(), limit(2)
        ask(store, (one, "key", 1))
        damage(path, 136, 10**6)
        assert isinstance(store.ask([(one, "key", 1)])[0], StoreError)
        assert used(store, one) == 0
        assert ["MapResizedError" in record.getMessage() for record in caplog.records] == [True]

    def test_a_store_is_opened_without_waiting_for_a_process_that_was_stopped_in_a_decision(
        self, path: Path, opened: Open
    ) -> None:
        store, one = opened(), limit(2)
        ask(store, (one, "key", 1))
        store.close()
        stopped = textwrap.dedent("""
            import os, signal, sys
            from gatekeeper.stores.shared import SharedStore
            store = SharedStore(sys.argv[1])
            transaction = store._files.begin(None, None, True)
            print("begun", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        """)
        opening = "import sys; from gatekeeper.stores.shared import SharedStore; SharedStore(sys.argv[1]).close()"
        with subprocess.Popen([sys.executable, "-c", stopped, path], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "begun\n"
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
                subprocess.run([sys.executable, "-c", opening, path], check=True, timeout=30)
            finally:
                process.kill()
        assert used(opened(), one) == 1

    @pytest.mark.parametrize(
        "left", ["gatekeeper.boot", "gatekeeper.mdb", "gatekeeper.mdb-lock", "gatekeeper.heads"]
    )
    def test_what_a_process_left_that_died_while_it_made_the_files_is_made_anew(
        self, path: Path, opened: Open, left: str
    ) -> None:
        path.mkdir(0o700)
        (path / left).write_bytes(b"")
        store, one = opened(), limit(1)
        assert [ask(store, (one, "key", 1))[0].allowed for _ in range(2)] == [True, False]

    def test_files_that_were_deleted_are_noticed_within_a_second(self, path: Path) -> None:
        clock = VirtualClock()
        store, one = SharedStore(path, size=SIZE, clock=clock), limit(1)
        ask(store, (one, "key", 1))
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        clock.advance(1)
        ask(store, (one, "other", 1))
        assert ask(store, (one, "key", 1))[0].allowed
        assert (path / "gatekeeper.mdb").exists()
        # And where they cannot be made again, that is said, by every answer.
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        path.write_text("in the way")
        clock.advance(1)
        ask(store, (one, "third", 1))
        for _ in range(3):
            reply = store.ask([(one, "key", 1)])[0]
            assert isinstance(reply, StoreError)
            assert "not a folder" in str(reply)
        assert store.failed == 3
        store.close()

    def test_a_folder_that_cannot_be_used_is_refused_with_what_to_do(self, path: Path) -> None:
        there = path.parent
        (there / "file").touch()
        (there / "link").symlink_to(there)
        (there / "open").mkdir()
        (there / "open").chmod(0o777)
        for bad, told in (
            ("relative/path", "expected an absolute path"),
            ("", "expected an absolute path"),
            (there / "file", "not a folder"),
            (there / "file" / "below", "another folder"),
            (there / "link", "a symbolic link"),
            (f"{there}/link/", "a symbolic link"),
            (there / "open", "others may write to it: name a folder"),
            (there / "missing" / "store", "make it first"),
            (f"{there}/nul\0", "another folder"),
        ):
            with pytest.raises(StoreError, match=told):
                SharedStore(bad)
        assert sorted(file.name for file in there.iterdir()) == ["file", "link", "open"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
    def test_a_folder_of_another_user_is_refused(self, path: Path) -> None:
        path.mkdir(0o700)
        os.chown(path, 12345, 12345)
        with pytest.raises(StoreError, match="belongs to another user"):
            SharedStore(path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_is_not_writable_is_refused(self, path: Path) -> None:
        path.mkdir(0o500)
        with pytest.raises(StoreError, match="cannot be written to"):
            SharedStore(path)

    def test_a_link_in_place_of_a_file_is_not_followed(self, path: Path) -> None:
        path.mkdir(0o700)
        target = path.parent / "target"
        target.write_text("precious")
        (path / "gatekeeper.boot").symlink_to(target)
        with pytest.raises(StoreError, match="cannot use it"):
            SharedStore(path, size=SIZE)
        (path / "gatekeeper.boot").unlink()
        (path / "gatekeeper.mdb").symlink_to(target)
        (path / "gatekeeper.mdb-lock").symlink_to(target)
        SharedStore(path, size=SIZE).close()
        assert target.read_text() == "precious"

    def test_numbers_out_of_range_are_refused(self, path: Path) -> None:
        for settings in ({"max_keys": 0}, {"size": LEAST_SIZE - 1}, {"size": 0}):
            with pytest.raises(StoreError, match="expected at least"):
                SharedStore(path, **settings)  # type: ignore[arg-type]
        assert not path.exists()

    def test_a_process_that_stays_in_the_opening_is_not_waited_for_for_ever(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path.mkdir(0o700)
        monkeypatch.setattr(shared.files, "_PATIENCE", 0.05)
        with (path / "gatekeeper.boot").open("w") as boot:
            assert shared.files.is_locked(boot.fileno())
            with pytest.raises(StoreError, match="another process has been opening it"):
                SharedStore(path, size=SIZE)


class TestFull:
    def test_space_that_cannot_be_reserved_is_told_at_the_start_and_none_is_kept(self, path: Path) -> None:
        program = f"""
            import resource, sys
            from gatekeeper.errors import StoreError
            from gatekeeper.stores.shared import SharedStore
            resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * LEAST_SIZE}, {2 * LEAST_SIZE}))
            try:
                SharedStore(sys.argv[1], size={2 * SIZE})
            except StoreError as error:
                print(error)
            print(SharedStore(sys.argv[1], size={LEAST_SIZE}).size)
        """
        told = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert f"{path}: the shared store" in told[0]
        assert told[1:] == [str(LEAST_SIZE)]

    @pytest.fixture
    def small(self, path: Path) -> Iterator[Path]:
        """A file system in memory of two mebibytes."""
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(path)]
        if not sys.platform.startswith("linux") or os.geteuid() or subprocess.run(mount, check=False).returncode:
            pytest.skip("needs root on Linux, to mount a small file system")
        try:
            yield path
        finally:
            subprocess.run(["umount", "-l", str(path)], check=True)

    def test_a_file_system_that_is_too_small_is_told_with_what_to_do(self, small: Path) -> None:
        with pytest.raises(StoreError, match=r"cannot reserve 4 MiB .*give it a smaller size"):
            SharedStore(small / "store", size=SIZE)
        assert [file.name for file in (small / "store").iterdir()] == ["gatekeeper.boot"]
        SharedStore(small / "store", size=LEAST_SIZE).close()

    def test_a_full_file_system_refuses_the_start(self, small: Path) -> None:
        fill(small)
        for room in (0, 4096, 8192, 40_000):
            (small / "filling").write_bytes(b"")
            fill(small)
            with (small / "filling").open("r+b") as file:
                file.truncate(file.seek(0, os.SEEK_END) - room)
            with pytest.raises(StoreError, match="store"):
                SharedStore(small / "store", size=LEAST_SIZE)

    def test_a_file_system_that_fills_later_harms_nothing(self, small: Path) -> None:
        store, one = SharedStore(small / "store", size=LEAST_SIZE), limit(5, 60)
        fill(small)
        for number in range(20_000):  # every page is written to
            ask(store, (one, f"{number}", 1))
        assert store.overflowed > 0
        store.close()

    def test_a_full_map_puts_new_keys_together_and_keeps_the_old_ones(self, opened: Open) -> None:
        clock = VirtualClock()
        store, one = opened(size=LEAST_SIZE, clock=clock), limit(3, 60)
        for number in range(50):
            ask(store, (one, f"held{number}", 3))
        outcomes = [ask(store, (one, f"new{number}", 1))[0].allowed for number in range(20_000)]
        assert store.overflowed > 1000
        assert store.failed == 0
        assert not any(ask(store, (one, f"held{number}", 1))[0].allowed for number in range(50))
        taken = outcomes.index(False)
        assert taken > 2000, "a mebibyte holds so many"
        assert not ask(store, (one, "stranger", 1))[0].allowed
        clock.advance(120)
        before = store.overflowed
        for number in range(500):
            ask(store, (one, f"later{number}", 3))
        assert store.overflowed < before + 500, "there is room again, once the old have expired"
        assert not ask(store, (one, "later499", 1))[0].allowed

    def test_a_map_that_fills_with_growing_states_answers_with_errors_and_recovers(self, opened: Open) -> None:
        clock = VirtualClock()
        store, one = opened(size=LEAST_SIZE, clock=clock), limit(10**9, 6400)
        replies = []
        for _ in range(16):  # a state grows by thirty bits a tick of a hundred seconds
            clock.advance(500)
            replies += [store.ask([(one, f"{number}", 1)])[0] for number in range(3000)]
        errors = [reply for reply in replies if isinstance(reply, StoreError)]
        assert errors
        assert all("full" in str(error) for error in errors)
        assert store.failed == len(errors)
        clock.advance(20_000)
        for number in range(3000):
            store.ask([(one, f"later{number}", 1)])
        assert ask(store, (one, "at last", 1))[0].remaining == 10**9 - 1

    def test_a_batch_on_a_full_map_is_spent_whole_or_not_at_all(self, opened: Open) -> None:
        clock = VirtualClock()
        store, many, one = opened(size=LEAST_SIZE, clock=clock), limit(10**9, 6400), limit(10**9, name="one")
        admitted = 0
        for tick in range(16):
            clock.advance(500)
            for number in range(3000):
                replies = store.ask([(one, "key", 1), (many, f"{number}", 1)])
                assert len({isinstance(reply, StoreError) for reply in replies}) == 1, tick
                admitted += all(reply.allowed for reply in replies)
        assert store.failed
        assert used(store, one) == admitted


def fill(folder: Path) -> None:
    with (folder / "filling").open("ab", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


class TestKeys:
    def test_new_keys_beyond_the_bound_share_one_bucket_a_rule_and_are_counted(self, opened: Open) -> None:
        clock = VirtualClock()
        store, one, other = opened(max_keys=10, clock=clock), limit(3, 60), limit(3, 60, name="other")
        for number in range(10):
            assert ask(store, (one, f"held{number}", 3))[0].allowed
        outcomes = [ask(store, (one, f"new{number}", 1))[0].allowed for number in range(100)]
        assert outcomes == [True] * 3 + [False] * 97
        assert ask(store, (other, "new", 1))[0].allowed, "another rule has a bucket of its own"
        assert store.overflowed == 101
        assert len(store) <= 12
        # What was held is neither put out nor reset, however many strangers come.
        assert not any(ask(store, (one, f"held{number}", 1))[0].allowed for number in range(10))
        clock.advance(200)
        assert ask(store, (one, "new1", 3))[0].allowed, "room again, once the old have expired"
        for number in range(200):
            store.ask([(one, f"later{number}", 1)])
        assert len(store) <= 12

    def test_a_batch_of_new_keys_does_not_pass_the_bound(self, opened: Open) -> None:
        store, one = opened(max_keys=10), limit(3)
        for number in range(5):
            ask(store, *[(one, f"{number}-{place}", 1) for place in range(4)])
        assert len(store) == 11
        assert store.overflowed == 10

    def test_a_give_back_of_an_overflowed_hit_finds_its_bucket(self, opened: Open) -> None:
        store, one = opened(max_keys=1), limit(3)
        ask(store, (one, "held", 1))
        receipt = ask(store, (one, "new", 3))[0].receipt
        assert receipt is not None
        assert not ask(store, (one, "newer", 1))[0].allowed
        store.ask(Batch(gives=[(one, "new", 3, receipt)]))
        assert ask(store, (one, "newer", 1))[0].allowed

    def test_a_give_back_goes_where_the_charge_lies_though_room_has_come_since(self, opened: Open) -> None:
        store, one = opened(max_keys=2), limit(3)
        held = [(one, key, 1, ask(store, (one, key, 1))[0].receipt) for key in ("held", "too")]
        overflowed = ask(store, (one, "new", 3))[0].receipt
        store.ask(Batch(gives=held))
        assert ask(store, (one, "new", 1))[0].allowed, "now in a bucket of its own"
        store.ask(Batch(gives=[(one, "new", 3, overflowed)]))
        assert used(store, one, "new") == 1, "what was given back was the shared bucket's"

    def test_an_active_key_is_held_as_long_as_it_counts(self, opened: Open) -> None:
        clock = VirtualClock()
        store, one = opened(clock=clock), limit(2, 60)
        for _ in range(20):
            assert ask(store, (one, "key", 2))[0].allowed
            clock.advance(30)
            for number in range(100):
                store.ask([(one, f"other{number}-{clock()}", 1)])
            clock.advance(29.9)
            assert not ask(store, (one, "key", 1))[0].allowed
            clock.advance(60 / 64 + 0.1)

    def test_churn_leaves_no_more_than_twice_the_live_keys_behind(self, opened: Open) -> None:
        clock = VirtualClock()
        store, one = opened(clock=clock), limit(3, 60)
        most = 0
        for number in range(30_000):
            ask(store, (one, f"stranger{number}", 1))
            clock.advance(0.061)  # a thousand come in a lifetime
            most = max(most, len(store)) if number % 100 == 0 else most
        assert 900 < most < 2000
        assert store.overflowed == 0

    def test_the_keys_of_a_listed_limit_are_listed_however_many(self, opened: Open) -> None:
        clock = VirtualClock()
        store, one, other, plain = opened(clock=clock), bans(), bans("other"), limit(3)
        keys = {f"{'client' * (number % 9)}{number}" for number in range(1500)} | {"\ud800", "k" * 20_000}
        for key in keys:
            ask(store, (one, key, 1))
            ask(store, (plain, key, 1))
        ask(store, (other, "of another", 1))
        assert sorted(store.keys(one)) == sorted(keys)
        assert store.keys(other) == ["of another"]
        assert store.keys(plain) == []
        clock.advance(1000)
        assert store.keys(one) == [], "they have expired"

    def test_the_hits_of_a_refused_batch_were_never_made(self, opened: Open) -> None:
        """Not even a strike, which cannot be given back."""
        store, full, strikes = opened(), limit(1), bans()
        ask(store, (full, "key", 1))
        verdicts = ask(store, (strikes, "key", 1), (full, "key", 1))
        assert [verdict.allowed for verdict in verdicts] == [True, False]
        assert store.keys(strikes) == []
        assert len(store) == 1

    def test_looks_and_refusals_write_nothing(self, opened: Open) -> None:
        store, one = opened(), limit(1)
        ask(store, (one, "key", 1))
        with store._files.transaction() as txn:
            before = txn.id()
        for hits in ([(one, "key", 1)], [(one, "key", 0)], [(one, "new", 0)], [(one, "a", 1), (one, "key", 1)]):
            ask(store, *hits)
        ask(store, (one, "new", 1), spend=False)
        store.ask(Batch(resets=[(one, "new")], gives=[(one, "new", 1, 0)]))
        with store._files.transaction() as txn:
            assert txn.id() == before

    def test_times_and_states_of_any_size_are_kept(self, opened: Open) -> None:
        clock = VirtualClock(start=0)
        store = opened(clock=clock)
        for algorithm in ("gcra", "sliding_window", "fixed_window", "sliding_counter"):
            one = limit(10**9, 315_360_000, algorithm=algorithm)
            one.lifetime_ns <<= 20  # more than the field for it holds
            for key in ("key", "other"):
                hits: list[Hit] = [(one, key, 5 * 10**8)] * (1 if key == "key" else 2)
                assert all(verdict.allowed for verdict in ask(store, *hits))
                ask(store, (one, key, 5 * 10**8))
                clock.advance(0.1)
                assert not ask(store, (one, key, 10**8))[0].allowed


class TestErrors:
    def test_an_error_of_the_database_is_an_answer_and_the_environment_is_opened_anew(
        self, opened: Open, path: Path
    ) -> None:
        store, one = opened(), limit(2)
        ask(store, (one, "key", 1))
        files = store._files
        assert isinstance(files, shared.files.Files)

        def broken(db: None, parent: None, write: bool) -> shared.heads.Transaction:
            raise errors.pop()

        errors: list[lmdb.Error] = [lmdb.PanicError("mdb_txn_begin"), lmdb.DiskError("mdb_txn_begin")]
        files.begin = broken
        reply = store.ask([(one, "key", 1)])[0]
        assert isinstance(reply, StoreError)
        assert str(path) not in str(reply)
        reply = store.ask([(one, "key", 1), (one, "key", 1)])[1]
        assert isinstance(reply, StoreError)
        assert used(store, one) == 1, "opened anew, nothing lost"
        errors.append(lmdb.CorruptedError("mdb_get"))
        files.begin = broken
        with pytest.raises(StoreError):
            len(store)
        assert used(store, one) == 0, "made anew"
        assert store.failed == 2

    def test_an_error_of_a_limit_is_raised_and_leaves_no_transaction_open(self, opened: Open) -> None:
        store, one, wrong = opened(), limit(2), limit(2)

        def step(state: object, now: int, cost: int) -> None:
            raise ZeroDivisionError

        wrong.step = step  # type: ignore[assignment]
        for key in ("new", "key"):
            with pytest.raises(ZeroDivisionError):
                store.ask([(one, "key", 1), (wrong, key, 1)])
            with pytest.raises(ZeroDivisionError):
                store.ask([(wrong, key, 1)])
            assert ask(store, (one, "key", 1))[0].allowed
        assert len(store) == 1

    def test_opening_and_closing_leaks_no_descriptors(self, path: Path, opened: Open) -> None:
        descriptors = Path("/proc/self/fd")
        if not descriptors.exists():
            pytest.skip("the system has no /proc/self/fd")
        before = len(list(descriptors.iterdir()))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        for _ in range(min(soft, 300)):
            opened().close()
        store = SharedStore(path, size=SIZE)
        del store  # not closed, only dropped
        assert len(list(descriptors.iterdir())) <= before + 1
