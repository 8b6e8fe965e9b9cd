"""Counters that the processes of one machine share, in LMDB on memory-backed files: exact, and with no server.

A batch is one write transaction, so it is atomic over processes, and a process killed in the middle of it has done
nothing. There are no read transactions: a reader holds on to old pages, and for as long as it stands still.

A folder has four files. `gatekeeper.boot` says for which boot and in which layout the counters were written, and
is locked while the others are opened or made; `gatekeeper.mdb` and `gatekeeper.mdb-lock` are LMDB's, and
`gatekeeper.heads` guards the first (see `_Heads`). Nothing is ever flushed: no counter outlives the boot, for its
times are of the monotonic clock. After another boot the files are made anew *before* LMDB looks into them, since a
crash of the machine may have torn them.

Why a process may be killed at any moment: what it wrote lies in pages of the kernel and stays. A transaction writes
only pages that the last two commits do not refer to, and one that does not get to the end of its commit was never
begun. The lock is a robust mutex: the kernel hands it on when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, Final, NoReturn, TypeAlias
from weakref import WeakValueDictionary

from gatekeeper.commands import Batch, Hits, Limit, Receipt, Replies, State, Verdict
from gatekeeper.errors import MissingExtra, StoreError

try:
    import lmdb
except ImportError:
    raise MissingExtra("The shared store", "shared") from None

OVERFLOW: Final = "\0overflow"
"""Marks the receipt of a hit whose charge lies in the bucket that new keys beyond the bound share."""

SCHEMA: Final = 1
"""The version of the layout of keys and values. Counters of another are dropped."""

BYTES_A_KEY: Final = 268
"""What a key is given in the map by default (256 MiB for a million): pages two thirds full, and some to spare.

The usual state has ten to a hundred bytes, the longest (`sliding_window` of 10⁹) 330.
"""

LEAST_SIZE: Final = 1 << 20

_BOOT: Final = "gatekeeper.boot"
_DATA: Final = "gatekeeper.mdb"
_LOCK: Final = "gatekeeper.mdb-lock"
_HEADS: Final = "gatekeeper.heads"
_LOCK_BYTES: Final = 16_384  # more than LMDB wants for its table of readers
_HEADS_BYTES: Final = 4096
_ENGINE: Final[dict[str, Any]] = {"lib_version": 0} if int(lmdb.__version__.partition(".")[0]) >= 3 else {}
_MARK: Final = "gatekeeper shared store, layout "
_PATIENCE: Final = 10.0  # seconds to wait for a process that opens the files
_FORK_PATIENCE: Final = 2.0  # seconds to wait before a fork for another thread's transaction
_SECOND: Final = 1_000_000_000

_STEPS: Final = 16  # how many keys one sweep looks at
_EVERY: Final = 4  # new keys between two sweeps: four looks a new key
_LISTED: Final = 512  # keys listed in one transaction
_SPACES: Final = 4096  # remembered

_NEW_KEYS_UP_TO: Final = 0.75  # of the pages; the states of the keys that are held may grow further
_STATES_UP_TO: Final = 0.875  # of the pages
_PAUSES: Final = (0, 0.001, 0.01)  # seconds, if a process that opens the files just holds back pages
_UNMEASURED: Final = 16  # states that may grow before it is seen whether there is room

_ID: Final = 4  # bytes of a key that tell the space
_DIGEST: Final = 12  # bytes of it that tell the key
_EXPIRES: Final = (1 << 64) - 1

_parsed: Final = int.from_bytes

Transaction: TypeAlias = Any  # lmdb.Transaction, generic in its stubs alone


class _Full(Exception):
    """What is left of the map is kept for what makes room again: to delete takes pages, too."""


_FULL: Final = (_Full, lmdb.MapFullError)


class _Space:
    """The table of a limit's keys: what their names in the database begin with, and how the rest is made.

    A name is 4 bytes of the space's digest and 12 of the key's: keys of a space lie together, so that they can be
    listed. Nobody gains by two keys with one digest: they would share a quota.
    """

    __slots__ = ("copy", "listed", "overflow", "prefix")

    def __init__(self, space: str, listed: bool) -> None:
        text = space.encode("utf-8", "surrogatepass")
        seed = b"%d %d %s" % (listed, len(text), text)
        self.prefix = blake2b(seed, digest_size=_ID, person=b"space").digest()
        self.overflow = self.prefix + blake2b(seed, digest_size=_DIGEST, person=b"overflow").digest()
        self.copy = blake2b(seed, digest_size=_DIGEST, person=b"key").copy
        self.listed = listed

    def name(self, key: str) -> bytes:
        digest = self.copy()
        digest.update(key.encode("utf-8", "surrogatepass"))
        return self.prefix + digest.digest()


# A value is one little-endian integer: when it expires (64 bits, nanoseconds), above it the state. For a listed
# limit the key's text follows, and its length in 4 bytes.


def _packed(state: int, expires: int) -> bytes:
    if expires > _EXPIRES:
        expires = _EXPIRES
    return (state << 64 | expires).to_bytes((state.bit_length() + 71) >> 3, "little")


def _state(space: _Space, value: bytes) -> int:
    if space.listed:
        value = value[: -4 - _parsed(value[-4:], "little")]
    return _parsed(value, "little") >> 64


def _expires(value: bytes) -> int:
    return _parsed(value[:8], "little")


class SharedStore:
    """A Store for all processes of one machine that name the same folder, and their threads.

    - `path`: the folder, absolute, on a file system of this machine (best in memory, as /dev/shm). It is made if
      it is not there, for this user alone; its parent must exist.
    - `max_keys`: how many keys it holds at most (default 1,000,000). New keys beyond it share one bucket a rule,
      which still limits them; keys already held are never put out before they expire.
    - `size`: bytes of the file, all reserved at the start (default 268 a key, at least 1 MiB). When three quarters
      are in use, new keys are treated as beyond `max_keys`. The first process to open the folder decides.
    - `clock`: returns nanoseconds, the same in every process, and never goes back; by default the system's
      monotonic clock.

    `overflowed` counts this process's hits that fell into the shared buckets, `failed` its batches that could not
    be carried out and were answered with StoreError.

    Raises StoreError if the folder cannot be used: the message says why, and what to do.
    """

    local = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_keys: int = 1_000_000,
        size: int | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        if max_keys < 1:
            raise StoreError("max_keys: expected at least 1")
        if size is None:
            size = max(LEAST_SIZE, max_keys * BYTES_A_KEY)
        elif size < LEAST_SIZE:
            raise StoreError(f"size: expected at least {LEAST_SIZE} bytes")
        self.max_keys = max_keys
        self.overflowed = 0
        self.failed = 0
        self._clock = clock if clock is not None else time.monotonic_ns
        self._plain: dict[str, _Space] = {}
        self._listed: dict[str, _Space] = {}
        self._files: _Files | _Closed = _opened(os.fspath(path), size)

    @property
    def size(self) -> int:
        """Bytes of the file, as the process that made it decided; 0 once closed."""
        return self._files.size

    def __len__(self) -> int:
        """How many keys are held, those included that have expired and are not yet swept. Raises StoreError."""
        with self._files.transaction() as txn:
            return int(txn.stat()["entries"])

    def ask(self, batch: Hits) -> Replies:
        if len(batch) != 1 or batch.__class__ is not list:
            return self._ask(batch)
        # One hit, as most batches are: its way is written out.
        limit, key, cost = batch[0]
        space = self._plain.get(limit.space)
        if space is None or limit.listed:
            return self._ask(batch)
        digest = space.copy()
        digest.update(key.encode("utf-8", "surrogatepass"))
        name = space.prefix + digest.digest()
        files = self._files
        with files.lock:
            try:
                txn = files.begin(None, None, True)
                try:
                    now = self._clock()
                    value = txn.get(name)
                    if value is None:
                        work = _Work(self, files, txn, now, False)
                        replies = work.carry_out(batch)
                        if work.written:
                            txn.commit()
                        else:
                            txn.abort()
                    else:
                        after, verdict = limit.step(_parsed(value, "little") >> 64, now, cost)
                        if cost and verdict.allowed and after is not None:
                            expires = now + limit.lifetime_ns
                            if expires > _EXPIRES:
                                expires = _EXPIRES
                            made = (after << 64 | expires).to_bytes((after.bit_length() + 71) >> 3, "little")
                            if len(made) > len(value):
                                files.grow(txn)
                            txn.put(name, made)
                            txn.commit()
                        else:
                            txn.abort()
                        replies = [verdict]
                except BaseException:
                    txn.abort()  # nothing, where it has ended
                    raise
                if now >= files.look_at:
                    files.look(now)
                return replies
            except _FULL:
                pass
            except (lmdb.Error, StoreError) as error:
                return self._failure(batch, error)
        return self._ask(batch)

    async def aask(self, batch: Hits) -> Replies:
        return self.ask(batch)

    def keys(self, limit: Limit) -> list[str]:
        found: list[str] = []
        space = self._space(limit)
        if not space.listed:
            return found
        start = space.prefix
        while start:
            with self._files.transaction() as txn:
                now = self._clock()
                start = self._list(txn.cursor(), space, start, now, found)
        return found

    async def akeys(self, limit: Limit) -> list[str]:
        return self.keys(limit)

    def close(self) -> None:
        """Let go of the files. They are not deleted: other processes count in them."""
        files, self._files = self._files, _CLOSED
        if isinstance(files, _Files):
            files.release()

    async def aclose(self) -> None:
        self.close()

    def _space(self, limit: Limit) -> _Space:
        spaces = self._listed if limit.listed else self._plain
        space = spaces.get(limit.space)
        if space is None:
            if len(spaces) >= _SPACES:  # what is forgotten is only worked out anew
                spaces.clear()
            space = spaces[limit.space] = _Space(limit.space, limit.listed)
        return space

    def _ask(self, batch: Hits) -> Replies:
        """Any batch. When the map is full some expired keys are swept, and it is tried again, without new keys."""
        files, full = self._files, False
        with files.lock:
            try:
                for pause in _PAUSES:
                    try:
                        return self._try(files, batch, full)
                    except _Full:
                        if full:
                            break
                    except lmdb.MapFullError:  # for all that is kept free: somebody holds on to old pages
                        time.sleep(pause)
                    full = True
                    self._make_room(files)
                raise StoreError("the shared store is full: give it a greater size")
            except (lmdb.Error, StoreError) as error:
                return self._failure(batch, error)

    # All that follows runs under the lock of the files.

    def _failure(self, batch: Hits, error: lmdb.Error | StoreError) -> Replies:
        self.failed += 1
        if not isinstance(error, StoreError):
            if isinstance(self._files, _Files):
                self._files.broken(error)
            error = StoreError(f"the shared store failed: {type(error).__name__}")
        return [error] * len(batch)

    def _try(self, files: _Files | _Closed, batch: Hits, full: bool) -> Replies:
        """Carry the batch out in one transaction."""
        txn = files.begin(None, None, True)
        try:
            work = _Work(self, files, txn, self._clock(), full)
            replies = work.carry_out(batch)
            if work.written:
                txn.commit()
        finally:
            txn.abort()
        if work.now >= files.look_at:
            files.look(work.now)
        return replies

    def _make_room(self, files: _Files | _Closed) -> None:
        """Let go of what dead readers hold, and sweep, in a transaction of its own: the batch's is given up."""
        files.forget_dead()
        txn = files.begin(None, None, True)
        try:
            if files.sweep(txn, self._clock(), _STEPS):
                txn.commit()
        except lmdb.MapFullError:
            pass  # a deletion, too, takes pages
        finally:
            txn.abort()

    def _list(self, cursor: Any, space: _Space, start: bytes, now: int, found: list[str]) -> bytes:
        """Add to `found` the keys of a listed space from `start` on, a bounded number. Where to go on, or b""."""
        there = cursor.set_range(start)
        for _ in range(_LISTED):
            if not there:
                return b""
            name, value = cursor.item()
            if not name.startswith(space.prefix):
                return b""
            if _expires(value) > now:
                size = _parsed(value[-4:], "little")
                text = value[-4 - size : -4].decode("utf-8", "surrogatepass")
                if space.name(text) == name:  # neither the shared bucket, nor of a space with the same id
                    found.append(text)
            there = cursor.next()
        return bytes(cursor.key()) if there else b""


class _Work:
    """A batch being carried out in a transaction.

    What its commands make of keys is written at once; what its hits make of them is kept back until all are known
    to be admitted, so that a refused batch leaves nothing to be undone.
    """

    __slots__ = ("coming", "files", "full", "now", "store", "txn", "written")

    def __init__(self, store: SharedStore, files: _Files | _Closed, txn: Transaction, now: int, full: bool) -> None:
        self.store = store
        self.files = files
        self.txn = txn
        self.now = now
        self.full = full  # no new key can be taken in
        self.coming = 0  # new keys that are kept back
        self.written = False

    def carry_out(self, batch: Hits) -> Replies:
        now = self.now
        spend = True
        if batch.__class__ is not list:
            assert isinstance(batch, Batch)
            spend = batch.spend
            self._commands(batch)
        replies: Replies = []
        before: list[State] = []  # of each hit: what the key had when the batch came
        first: dict[bytes, State] = {}
        last: dict[bytes, tuple[State, Limit, str]] = {}
        refused = False
        verdict: Verdict
        for limit, key, cost in batch:
            space = self.store._space(limit)
            name = space.name(key)
            state: State = None
            if name not in last:
                name, state = self._find(space, name)
            if name in last:
                state = last[name][0]
            after, verdict = limit.step(state, now, cost)
            if name == space.overflow and verdict.receipt is not None:
                verdict.receipt = (OVERFLOW, verdict.receipt)  # says where the charge lies
            before.append(first.setdefault(name, state))
            if verdict.allowed:
                if spend and cost:
                    self.coming += state is None
                    last[name] = after, limit, key
            elif not limit.shadow:
                refused = True
            replies.append(verdict)
        if not refused:
            for name, (after, limit, key) in last.items():
                self._write(
                    self.store._space(limit), name, key, after, now + limit.lifetime_ns, first[name] is None
                )
        elif spend and len(batch) > 1:
            for place, (limit, _, cost) in enumerate(batch):
                if cost and replies[place].allowed:
                    replies[place] = limit.step(before[place], now, 0)[1]
        return replies

    def _commands(self, batch: Batch) -> None:
        now = self.now
        for limit, key, cost, receipt in batch.gives:
            self._give(limit, key, cost, receipt)
        for limit, key in batch.resets:
            self.written |= self.txn.delete(self.store._space(limit).name(key))
        for limit, key, cost in batch.takes:
            space = self.store._space(limit)
            name, state = self._find(space, space.name(key))
            after, verdict = limit.step(state, now, cost)
            if not verdict.allowed:
                after = limit.step(state, now, min(cost, verdict.remaining))[0]
            if after != state:
                self._write(space, name, key, after, now + limit.lifetime_ns, state is None)

    def _give(self, limit: Limit, key: str, cost: int, receipt: Receipt) -> None:
        space = self.store._space(limit)
        if receipt.__class__ is tuple:
            name, receipt = space.overflow, receipt[1]
        else:
            name = space.name(key)
        value = self.txn.get(name)
        if value is None:
            return
        state = _state(space, value)
        after = limit.give(state, self.now, cost, receipt)
        if after != state:
            # Another process may count by a greater burst, and have charged further ahead than this limit does.
            self._write(space, name, key, after, max(_expires(value), self.now + limit.lifetime_ns), False)

    def _find(self, space: _Space, name: bytes) -> tuple[bytes, State]:
        """Where a key is, or a new one would be, beyond the bound in the shared bucket; and its state."""
        value = self.txn.get(name)
        if value is None:
            if self._has_room():
                return name, None
            self.store.overflowed += 1
            name = space.overflow
            value = self.txn.get(name)
            if value is None:
                return name, None
        # A state that has expired counts for nothing, so it does not matter whether it is still held.
        return name, _state(space, value)

    def _has_room(self) -> bool:
        if not self.full and not self._fits():
            self.full = not (self._sweep() and self._fits())
        return not self.full

    def _fits(self) -> bool:
        """Whether one more key does, in number and in the pages of the map."""
        keys, full = self.files.measured(self.txn)
        return full < _NEW_KEYS_UP_TO and keys + self.coming < self.store.max_keys

    def _write(self, space: _Space, name: bytes, key: str, state: State, expires: int, new: bool) -> None:
        self.written = True
        if state is None:
            self.txn.delete(name)
            return
        value = _packed(state, expires)
        if space.listed:
            text = key.encode("utf-8", "surrogatepass")
            value += text + len(text).to_bytes(4, "little")
        if new or len(value) > len(self.txn.get(name, b"")):
            self.files.grow(self.txn)
        self.txn.put(name, value)
        if new:
            self.files.since += 1
            if self.files.since >= _EVERY:
                self.files.since = 0
                self._sweep()

    def _sweep(self) -> bool:
        swept = self.files.sweep(self.txn, self.now, _STEPS)
        self.written |= swept
        return swept


class _Files:
    """The files of one folder as this process has them open, once for all its stores.

    LMDB's locks belong to (process, file): to open a file twice, or to close one's second handle of it, would drop
    the locks of the first. `lock` is held through each transaction, for the writers' mutex belongs to a thread.
    """

    def __init__(self, folder: str, size: int) -> None:
        self.folder = folder
        self.size = size  # what is wanted; once open, what is
        self.users = 0
        self.lock = Lock()
        self.since = 0  # new keys since the last sweep
        self.growths = 0  # since it was last measured
        self.tight = False
        self.look_at = 0
        self.begin: Callable[[None, None, bool], Transaction] = self._first
        self._hand = os.urandom(_ID)  # where the next sweep begins: each process has its own
        self._env: lmdb.Environment | None = None
        self._heads: _Heads | None = None
        self._identity = (0, 0)
        self._trouble: StoreError | None = None
        self._retry_at = 0.0
        with self.lock:
            self._open()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A transaction to look around in. Raises StoreError."""
        with self.lock:
            try:
                txn = self.begin(None, None, True)
                try:
                    yield txn
                finally:
                    txn.abort()
            except lmdb.Error as error:
                self.broken(error)
                raise StoreError(f"the shared store failed: {type(error).__name__}") from None

    def sweep(self, txn: Transaction, now: int, steps: int) -> bool:
        """Delete what has expired among the next keys in the order of their names. Whether anything was."""
        swept = False
        cursor = txn.cursor()
        there = cursor.set_range(self._hand) or cursor.first()
        for _ in range(steps):
            if not there:  # round again
                there = cursor.first()
                if not there:
                    break
            if _expires(cursor.value()) <= now:
                cursor.delete()
                swept = True
                there = bool(cursor.key())  # which is now the next one
            else:
                there = cursor.next()
        self._hand = bytes(cursor.key()) or b"\0"
        cursor.close()
        return swept

    def measured(self, txn: Transaction) -> tuple[int, float]:
        """How many keys there are, and what part of the map's pages is in use."""
        held = txn.stat()
        pages = held["branch_pages"] + held["leaf_pages"] + held["overflow_pages"]
        full = pages / (self.size // held["psize"])
        self.growths = 0
        self.tight = full >= _NEW_KEYS_UP_TO
        return held["entries"], full

    def grow(self, txn: Transaction) -> None:
        """A value is about to become longer. Raises _Full."""
        self.growths += 1
        if (self.tight or self.growths >= _UNMEASURED) and self.measured(txn)[1] >= _STATES_UP_TO:
            raise _Full

    def look(self, now: int) -> None:
        """Once a second: whether the files are still those that others open."""
        self.look_at = now + _SECOND
        if self._env is None:
            return
        self.forget_dead()
        if _identity(self._path(_DATA)) != self._identity and not self._succeeded():
            self._shut()

    def forget_dead(self) -> None:
        """Nobody reads, but LMDB itself does for an instant when it opens: who died there would hold all pages."""
        if self._env is not None:
            with suppress(lmdb.Error):
                self._env.reader_check()

    def broken(self, error: lmdb.Error) -> None:
        """An error after which the environment is of no more use is answered by opening it anew."""
        damaged = isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError)
        if damaged or isinstance(error, lmdb.PanicError | lmdb.LockError | lmdb.BadTxnError):
            self._shut()
            if damaged:
                with suppress(OSError, StoreError), self._locked_boot() as boot:
                    if _identity(self._path(_DATA)) == self._identity:  # nobody has made them anew already
                        os.ftruncate(boot, 0)

    def release(self) -> None:
        """One of the stores is closed."""
        with _registry, self.lock:
            self.users -= 1
            if self.users <= 0:
                self._shut()
                if _OPEN.get(self.folder) is self:
                    del _OPEN[self.folder]

    def forked(self, held: bool) -> None:
        """In a child: the environment is the parent's, and is opened anew when first asked.

        Its handle is closed: the child's copies of descriptors and maps, and nothing of the parent's. But where
        another thread was in a transaction that it cannot end here, closing would wait for it for ever.
        """
        self.lock = Lock()
        self.since = 0
        if held:
            self._shut()
        elif self._env is not None:
            _LEFT.append(self._env)
            self._env = self._heads = None
            self.begin = _forked_in_use

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _first(self, db: None, parent: None, write: bool) -> Transaction:
        """Stands in for `begin` until the environment is open."""
        if self.users <= 0:
            raise StoreError("the shared store is closed")
        if self._trouble is not None and time.monotonic() < self._retry_at:
            raise self._trouble
        try:
            _checked_folder(self.folder)
            self._open()
        except StoreError as error:
            self._trouble, self._retry_at = error, time.monotonic() + 1
            raise
        return self.begin(db, parent, write)

    def _shut(self) -> None:
        self.begin = self._first
        env, self._env = self._env, None
        heads, self._heads = self._heads, None
        if heads is not None:
            heads.close()
        if env is not None:
            env.close()

    def _open(self) -> None:
        """Open the files, and make them anew if they are not of this boot and layout. Raises StoreError."""
        try:
            with self._locked_boot() as boot:
                wanted = f"{_MARK}{SCHEMA}, boot {boot_id()}\n".encode()
                env = None
                if os.pread(boot, 4096, 0) == wanted:
                    with suppress(
                        FileNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError
                    ):
                        # Its size, whatever is wanted: LMDB would cut the file to a smaller one under the others.
                        size = os.stat(self._path(_DATA)).st_size
                        if size >= LEAST_SIZE:
                            self.size = size
                            env = self._environment()
                if env is None:
                    os.ftruncate(boot, 0)
                    os.pwrite(boot, bytes(len(wanted)), 0)  # so that there is room for it at the end
                    env = self._made()
                    os.pwrite(boot, wanted, 0)
        except OSError as error:
            raise StoreError(f"{self.folder}: the shared store cannot use it: {error.strerror}") from None
        except lmdb.Error as error:
            reason = _reason(error)
            if getattr(error, "code", 0) in (errno.EAGAIN, errno.EACCES):  # fcntl: somebody has our pid's lock
                reason += " (containers that share it must share their process ids, too)"
            raise StoreError(f"{self.folder}: the shared store cannot be opened: {reason}") from None
        self._env = env
        self._identity = _identity(self._path(_DATA))
        self._trouble = None
        self.begin = env.begin if self._heads is None else self._heads.guarded(env.begin)
        self.look_at = 0

    def _environment(self) -> lmdb.Environment:
        """LMDB's environment, with pages changed in place where we know the file's format, to guard its heads.

        Else they are written by system calls, which nothing can tear, and which double the time of a decision.
        """
        self._heads = None
        env = self._opened(True)
        try:
            heads = _Heads(self._path(_DATA), self._path(_HEADS), env.stat()["psize"])
            if heads.are_known(env):
                self._heads = heads
                return env
            heads.close()
        except BaseException:
            env.close()
            raise
        env.close()
        return self._opened(False)

    def _opened(self, in_place: bool) -> lmdb.Environment:
        env = lmdb.open(
            self._path(_DATA),
            map_size=self.size,
            subdir=False,
            mode=0o600,
            writemap=in_place,
            sync=False,
            metasync=False,
            map_async=True,
            readahead=False,
            meminit=False,
            max_dbs=0,  # the unnamed database: a named one costs a page more a commit
            **_ENGINE,
        )
        env.reader_check()
        return env

    def _made(self) -> lmdb.Environment:
        """New files, with all their space reserved: in a full tmpfs a page touched for the first time is SIGBUS."""
        self._remove()
        self.size = -(-self.size // LEAST_SIZE) * LEAST_SIZE
        env = None
        try:
            # The file of locks is written to through a map before anybody could reserve anything.
            self._reserve(_LOCK, 0, _LOCK_BYTES)
            self._reserve(_HEADS, 0, _HEADS_BYTES)
            env = self._environment()
            self._reserve(_DATA, 2 * env.stat()["psize"], self.size)
            return env
        except OSError as error:
            room = os.statvfs(self.folder)
            self._undo(env)
            raise StoreError(
                f"{self.folder}: the shared store cannot reserve {self.size >> 20} MiB ({error.strerror}; "
                f"{room.f_bavail * room.f_frsize >> 20} MiB are free): give it a smaller size or fewer max_keys, "
                "or the folder more room (in a container: --shm-size)"
            ) from None
        except BaseException:
            self._undo(env)
            raise

    def _undo(self, env: lmdb.Environment | None) -> None:
        if self._heads is not None:
            self._heads.close()
            self._heads = None
        if env is not None:
            env.close()
        with suppress(OSError):
            self._remove()

    def _remove(self) -> None:
        """Unlinked and never cut short: who has them mapped keeps what it has."""
        for name in (_DATA, _LOCK, _HEADS):
            with suppress(FileNotFoundError):
                os.unlink(self._path(name))

    def _reserve(self, name: str, start: int, size: int) -> None:
        """Have the file system set the bytes from `start` (all before them is written) to `size` aside."""
        file = os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
                start = size
            zeros = bytes(1 << 20)  # where the system has no such call
            while start < size:
                start += os.pwrite(file, zeros[: size - start], start)
        finally:
            os.close(file)

    @contextmanager
    def _locked_boot(self) -> Iterator[int]:
        """The file of the boot, locked. Raises OSError, and StoreError if it stays locked."""
        path = self._path(_BOOT)
        deadline = time.monotonic() + _PATIENCE
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                while not _is_locked(file):
                    if time.monotonic() >= deadline:
                        raise StoreError(f"{self.folder}: another process has been opening it for {_PATIENCE:g} s")
                    time.sleep(0.005)
                status = os.fstat(file)
                if (status.st_dev, status.st_ino) == _identity(path):
                    yield file
                    return
            finally:
                os.close(file)

    def _succeeded(self) -> bool:
        """Whether a process of another layout has made the files anew: then each keeps to its own."""
        try:
            text = Path(self._path(_BOOT)).read_text("utf-8", "replace")
        except OSError:
            return False
        return text.startswith(_MARK) and not text.startswith(f"{_MARK}{SCHEMA},")


class _Heads:
    """The two heads of LMDB's file, looked at by whoever has just got the writers' lock.

    A commit fills in the older head and then stores its number there, which makes it the newer one. But in LMDB's
    source nothing but the order of the lines says that the root of the tree is stored before the number, and on x86
    compilers store it after (seen in lmdb 3.0.0). Who is killed between these two instructions leaves a head that
    has the new number, and the root of two commits ago, whose pages are free to be written to.

    That can be told: each commit has a new root, and never that of two commits ago, whose page cannot have been
    free. So for each head it is remembered which root was last seen there, with its number; where the number is
    another and the root the same, the head is given what the other one says. So the commit that was never told to
    anybody is undone, and the number stands for one that changed nothing.
    """

    # In LMDB's format 1 (0.9.x, 64 bits), in words of four bytes from the start of a page.
    _MAGIC, _FORMAT, _DEPTH, _ROOT, _NUMBER = 4, 5, 23, 32, 36  # the depth above two bytes of flags
    _SAYS = slice(32, 144)  # in bytes: from the size of the map to the last page, all but the number
    _KNOWN = 0xBEEF_C0DE, 1
    _HALF = 0xFFFF_FFFF  # also the root of an empty tree, which has no depth

    def __init__(self, data: str, seen: str, page: int) -> None:
        self._page = page
        self._data = _mapped(data, 2 * page)
        self._seen_file = _mapped(seen, _HEADS_BYTES)
        self._words = memoryview(self._data).cast("I")
        self._seen = memoryview(self._seen_file).cast("Q")  # for each head: half of the number, and of the root

    def are_known(self, env: lmdb.Environment) -> bool:
        """Whether the file is of the format that we know: it is for all processes, or for none."""
        words, other = self._words, self._page // 4
        if sys.byteorder != "little" or sys.maxsize < 1 << 32:
            return False
        if any((words[at + self._MAGIC], words[at + self._FORMAT]) != self._KNOWN for at in (0, other)):
            return False
        with env.begin(write=True) as txn:  # so that nobody commits meanwhile
            number = (txn.id() - 1) & self._HALF
            return max(words[self._NUMBER], words[other + self._NUMBER]) == number

    def guarded(self, begin: Callable[..., Transaction]) -> Callable[[None, None, bool], Transaction]:
        """`begin`, and a look at the heads."""
        words, seen, half = self._words, self._seen, self._HALF
        root, number = self._ROOT, self._NUMBER
        other_root, other_number = root + self._page // 4, number + self._page // 4
        depth, other_depth, flags = self._DEPTH, self._DEPTH + self._page // 4, 0xFFFF

        def look(db: None, parent: None, write: bool) -> Transaction:
            while True:
                txn = begin(None, None, True)
                # The root of a head whose number is as it was says nothing: a commit may have broken off before.
                last = seen[0]
                if words[number] != last >> 32:
                    if words[root] == last & half and (words[root] != half or words[depth] > flags):
                        self._mend(0)
                        txn.abort()  # it began with what was torn
                        continue
                    seen[0] = words[number] << 32 | words[root]
                last = seen[1]
                if words[other_number] != last >> 32:
                    if words[other_root] == last & half and (
                        words[other_root] != half or words[other_depth] > flags
                    ):
                        self._mend(1)
                        txn.abort()
                        continue
                    seen[1] = words[other_number] << 32 | words[other_root]
                return txn

        return look

    def _mend(self, torn: int) -> None:
        start, sound = torn * self._page, (1 - torn) * self._page
        says = self._data[sound + self._SAYS.start : sound + self._SAYS.stop]
        self._data[start + self._SAYS.start : start + self._SAYS.stop] = says
        number, root = self._words[start // 4 + self._NUMBER], self._words[start // 4 + self._ROOT]
        self._seen[torn] = number << 32 | root  # one store of eight bytes: it cannot be torn itself

    def close(self) -> None:
        self._words.release()
        self._seen.release()
        self._data.close()
        self._seen_file.close()


class _Closed:
    """In the place of the files of a closed store."""

    size = 0
    look_at = 0
    since = 0

    def __init__(self) -> None:
        self.lock = Lock()

    def begin(self, db: None, parent: None, write: bool) -> Transaction:
        raise StoreError("the shared store is closed")

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        yield self.begin(None, None, True)

    def look(self, now: int) -> None:
        pass

    def sweep(self, txn: Transaction, now: int, steps: int) -> bool:
        return False

    def measured(self, txn: Transaction) -> tuple[int, float]:
        return 0, 0.0

    def grow(self, txn: Transaction) -> None:
        pass

    def forget_dead(self) -> None:
        pass


def _mapped(path: str, size: int) -> mmap.mmap:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(file).st_size < size:  # to touch what is not there is SIGBUS
            raise FileNotFoundError(errno.ENOENT, "too short", path)
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(path: str) -> tuple[int, int]:
    """(device, inode) of a file; (0, 0) for none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _reason(error: lmdb.Error) -> str:
    """What LMDB says, without the path that it puts before."""
    return str(error).rpartition(": ")[2]


def boot_id() -> str:
    """What tells this boot of the machine from any other. Raises StoreError where nothing does."""
    if sys.platform == "linux":
        with suppress(OSError):
            return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    else:
        for name in ("kern.bootsessionuuid", "kern.boottime"):  # of macOS; of the BSDs
            with suppress(OSError, subprocess.SubprocessError):
                asked = ["/usr/sbin/sysctl" if sys.platform == "darwin" else "/sbin/sysctl", "-n", name]
                told = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603 - fixed
                return " ".join(told.stdout.split())
    raise StoreError("the shared store cannot tell this boot of the machine from the last one")


def _checked_folder(path: str) -> None:
    """Make the folder if it is not there. Raises StoreError for one that cannot be used."""
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
    except FileNotFoundError:
        raise StoreError(f"{path}: the folder that it lies in is not there: make it first") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: {getattr(error, 'strerror', None) or error}: give another folder") from None
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(f"{path}: a symbolic link: give the folder that it leads to")
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path}: not a folder: give one, or the path of one to be made")
    if status.st_uid != os.geteuid():
        raise StoreError(f"{path}: belongs to another user: give a folder of the user that runs this")
    if status.st_mode & 0o022:
        raise StoreError(f"{path}: others may write to it: chmod 700")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(f"{path}: cannot be written to: chmod 700")


def _opened(path: str, size: int) -> _Files:
    """The files of a folder, opened by the first store of this process that names it. Raises StoreError."""
    if not os.path.isabs(path):
        raise StoreError("expected an absolute path, such as /dev/shm/gatekeeper")
    path = path.rstrip("/") or "/"
    _checked_folder(path)
    folder = os.path.realpath(path)
    with _registry:
        files = _OPEN.get(folder)
        if files is None:
            files = _OPEN[folder] = _Files(folder, size)
        files.users += 1
        return files


_OPEN: Final[WeakValueDictionary[str, _Files]] = WeakValueDictionary()
_LEFT: Final[list[lmdb.Environment]] = []  # a parent's, not to be touched in the child
_HELD: Final[list[_Files]] = []  # while the process is forked
_CLOSED: Final = _Closed()
_registry = Lock()


def _forked_in_use(db: None, parent: None, write: bool) -> NoReturn:
    raise StoreError("the shared store was in use by a thread when the process was forked: start workers afresh")


def _before_fork() -> None:
    # No transaction may be open while the process is copied. Another thread's may wait for a stopped process: not
    # for ever.
    _registry.acquire()
    for files in list(_OPEN.values()):
        if files.lock.acquire(timeout=_FORK_PATIENCE):
            _HELD.append(files)


def _after_in_parent() -> None:
    for files in _HELD:
        files.lock.release()
    _HELD.clear()
    _registry.release()


def _after_in_child() -> None:
    global _registry
    for files in list(_OPEN.values()):
        # A program in C that forks may not have told before: then a lock that is free says the same.
        files.forked(files in _HELD or not files.lock.locked())
    _HELD.clear()
    _CLOSED.lock = Lock()
    _registry = Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
