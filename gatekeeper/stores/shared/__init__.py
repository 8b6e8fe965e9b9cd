"""Counters that the processes of one machine share, in LMDB on memory-backed files: exact, and with no server.

A batch is one write transaction, so it is atomic over processes, and a process killed in the middle of it has done
nothing. There are no read transactions: a reader holds on to old pages, and for as long as it stands still.

A folder has four files. `gatekeeper.boot` says for which boot and in which layout the counters were written, and
is locked while the others are opened or made; `gatekeeper.mdb` and `gatekeeper.mdb-lock` are LMDB's, and
`gatekeeper.heads` guards the first (see `heads`). Nothing is ever flushed: no counter outlives the boot, for its
times are of the monotonic clock. After another boot the files are made anew *before* LMDB looks into them, since a
crash of the machine may have torn them.

Why a process may be killed at any moment: what it wrote lies in pages of the kernel and stays. A transaction writes
only pages that the last two commits do not refer to, and one that does not get to the end of its commit was never
begun. The lock is a robust mutex: the kernel hands it on when its holder dies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final

from gatekeeper.commands import Batch, Hits, Limit, Receipt, Replies, State, Verdict
from gatekeeper.errors import MissingExtra, StoreError

try:
    import lmdb
except ImportError:
    raise MissingExtra("The shared store", "shared") from None

from gatekeeper.stores.shared.files import (
    CLOSED,
    FULL,
    ID,
    LEAST_SIZE,
    NEW_KEYS_UP_TO,
    Closed,
    Files,
    Full,
    counters,
    expires_of,
    opened,
)
from gatekeeper.stores.shared.heads import Transaction

__all__ = ["BYTES_A_KEY", "LEAST_SIZE", "OVERFLOW", "SharedStore"]

OVERFLOW: Final = "\0overflow"
"""Marks the receipt of a hit whose charge lies in the bucket that new keys beyond the bound share."""

BYTES_A_KEY: Final = 268
"""What a key is given in the map by default (256 MiB for a million): pages two thirds full, and some to spare.

The usual state has ten to a hundred bytes, the longest (`sliding_window` of 10⁹) 330.
"""

_STEPS: Final = 16  # how many keys one sweep looks at
_EVERY: Final = 4  # new keys between two sweeps: four looks a new key
_LISTED: Final = 512  # keys listed in one transaction
_SPACES: Final = 4096  # remembered
_PAUSES: Final = (0, 0.001, 0.01)  # seconds, if a process that opens the files just holds back pages
_DIGEST: Final = 12  # bytes of a key's name that tell the key
_EXPIRES: Final = (1 << 64) - 1

_parsed: Final = int.from_bytes


class _Space:
    """The table of a limit's keys: what their names in the database begin with, and how the rest is made.

    A name is 4 bytes of the space's digest and 12 of the key's: keys of a space lie together, so that they can be
    listed. Nobody gains by two keys with one digest: they would share a quota.
    """

    __slots__ = ("copy", "listed", "overflow", "prefix")

    def __init__(self, space: str, listed: bool) -> None:
        text = space.encode("utf-8", "surrogatepass")
        seed = b"%d %d %s" % (listed, len(text), text)
        self.prefix = blake2b(seed, digest_size=ID, person=b"space").digest()
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
        self._files: Files | Closed = opened(os.fspath(path), size, counters())

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
            except FULL:
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
        files, self._files = self._files, CLOSED
        if isinstance(files, Files):
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
                    except Full:
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
            if isinstance(self._files, Files):
                self._files.broken(error)
            error = StoreError(f"the shared store failed: {type(error).__name__}")
        return [error] * len(batch)

    def _try(self, files: Files | Closed, batch: Hits, full: bool) -> Replies:
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

    def _make_room(self, files: Files | Closed) -> None:
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
            if expires_of(value) > now:
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

    def __init__(self, store: SharedStore, files: Files | Closed, txn: Transaction, now: int, full: bool) -> None:
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
            self._write(space, name, key, after, max(expires_of(value), self.now + limit.lifetime_ns), False)

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
        return full < NEW_KEYS_UP_TO and keys + self.coming < self.store.max_keys

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
