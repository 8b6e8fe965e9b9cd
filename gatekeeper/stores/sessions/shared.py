"""Sessions that the processes of one machine share, in LMDB, beside the counters and in files of their own.

A command is one write transaction, so it is atomic over processes, and a process killed in the middle of it has
done nothing; for why see `gatekeeper.stores.shared`. There are no read transactions here either: a reader holds on
to old pages, and for as long as it stands still.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import MissingExtra, StoreError
from gatekeeper.stores.sessions import LONGEST, too_long

try:
    import lmdb
except ImportError:
    raise MissingExtra("The shared store", "shared") from None

from gatekeeper.stores.shared.files import LEAST_SIZE, Files, Full, Kind, expires_of, opened
from gatekeeper.stores.shared.heads import Transaction

SIZE: Final = 64 << 20

_KIND: Final = Kind("sessions", 1)
_DURABLE: Final = Kind("durable-sessions", 1, durable=True)
_NEW_UP_TO: Final = 0.75  # of the pages
_CHANGED_UP_TO: Final = 0.875  # the rest is for what makes room again: to delete takes pages, too
_STEPS: Final = 16  # how many entries one sweep along the way looks at
_EVERY: Final = 4  # new sessions between two of these
_PORTION: Final = 512  # entries looked at in one transaction
_SECOND: Final = 1_000_000_000
_FULL: Final = "the shared store of sessions is full; session.size makes it greater"
_FAR: Final = (1 << 64) - 1

# A session lies under its mark and key (32 bytes). Its value: when it expires (nanoseconds), its version, whose it
# is (a digest; zeros for nobody's), and then the session itself. An owner's session has a second entry, under its
# mark, the owner and the key, that says but when it expires. Integers are little-endian, of 64 bits.
_SESSION: Final = b"s"
_INDEX: Final = b"o"
_OWNER: Final = slice(16, 32)
_DATA: Final = 32
_NOBODY: Final = bytes(16)


def _name(key: str) -> bytes:
    return _SESSION + bytes.fromhex(key)


def _digest(owner: str | None) -> bytes:
    if owner is None:
        return _NOBODY
    return blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=16, person=b"owner").digest()


def _record(value: bytes) -> Record:
    return Record(value[_DATA:], int.from_bytes(value[8:16], "little"))


class SharedSessions:
    """A SessionStore for all processes of one machine that name the same folder, and their threads.

    - `path`: the folder, absolute, on a file system of this machine. It is made if it is not there, for this user
      alone; its parent must exist. Counters may lie in it, too.
    - `durable`: whether each save is on the disk when it returns, so that sessions outlive a crash of the machine
      and its boot (default False: they outlive all processes, and not the boot). Everybody waits for the disk then;
      an awaiting caller does in a thread. A folder keeps the sessions of both apart.
    - `size`: bytes of the file, all reserved at the start (default 64 MiB, at least 1 MiB). When three quarters are
      in use a new session is answered with a StoreError; none that is alive is put out. The first process to open
      the files decides.
    - `clock`: the seconds since the epoch, the same in every process

    A session has at most 1 MiB. Raises ValueError for a path or size that cannot be. Nothing is made or opened
    before the first question; a folder that cannot be used is an answer that says why.
    """

    local = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durable: bool = False,
        size: int = SIZE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = os.fspath(path)
        if not os.path.isabs(self._path):
            raise ValueError("expected an absolute path, such as /dev/shm/gatekeeper")
        if size < LEAST_SIZE:
            raise ValueError(f"size: expected at least {LEAST_SIZE} bytes")
        self.durable = durable
        self.size = size
        self._clock = clock
        self._files: Files | None = None

    def ask(self, command: SessionCommand) -> Any:
        try:
            if isinstance(command, Owned):
                return self._owned(command)
            if isinstance(command, Save) and len(command.data) > LONGEST:
                return too_long(command.data)
            try:
                return self._written(self._done, command)
            except (Full, lmdb.MapFullError):
                self._written(_make_room)
                return self._written(self._done, command)
        except (Full, lmdb.MapFullError):
            return StoreError(_FULL)
        except StoreError as error:
            return error

    async def aask(self, command: SessionCommand) -> Any:
        if self.durable:
            return await asyncio.to_thread(self.ask, command)
        return self.ask(command)

    def sweep(self) -> int:
        found, start = 0, b"\0"
        try:
            while start:
                more, start = self._written(_swept, start)
                found += more
        except lmdb.MapFullError:
            raise StoreError(_FULL) from None
        return found

    async def asweep(self) -> int:
        return await asyncio.to_thread(self.sweep)

    def close(self) -> None:
        """Let go of the files. They are not deleted: other processes keep sessions in them."""
        files, self._files = self._files, None
        if files is not None:
            files.release()

    async def aclose(self) -> None:
        self.close()

    # How.

    def _open(self) -> Files:
        """Raises StoreError."""
        files = opened(self._path, self.size, _DURABLE if self.durable else _KIND)
        if self._files is not None:  # another thread was faster
            files.release()
            return self._files
        self._files = files
        return files

    def _written(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(files, transaction, now, *arguments)`, committed. Raises StoreError, Full, MapFullError."""
        files = self._files or self._open()
        with files.lock:
            try:
                txn = files.begin(None, None, True)
                try:
                    done = work(files, txn, int(self._clock() * _SECOND), *arguments)
                    txn.commit()
                finally:
                    txn.abort()  # nothing, where it has ended
                now = time.monotonic_ns()
                if now >= files.look_at:
                    files.look(now)
                return done
            except lmdb.MapFullError:
                raise
            except lmdb.Error as error:
                files.broken(error)
                raise StoreError(f"the shared store failed: {type(error).__name__}") from None

    def _done(self, files: Files, txn: Transaction, now: int, command: SessionCommand) -> Any:
        if isinstance(command, Save):
            return self._save(files, txn, now, command)
        assert isinstance(command, Load | Delete)
        name = _name(command.key)
        value = txn.get(name)
        if value is None:
            return None
        if isinstance(command, Delete):
            txn.delete(name)
            _forget(txn, name, value)
        return _record(value) if now < expires_of(value) else None

    def _save(self, files: Files, txn: Transaction, now: int, command: Save) -> int | Record | None:
        name = _name(command.key)
        there = txn.get(name)
        if there is None or expires_of(there) <= now:
            if command.version is not None:
                return None
        elif _record(there).version != command.version:
            return _record(there)
        full = files.measured(txn)[1] + len(command.data) / files.size
        if full >= (_NEW_UP_TO if there is None else _CHANGED_UP_TO):
            raise Full
        if there is not None:
            _forget(txn, name, there)
        version = txn.id()  # of each commit another
        assert isinstance(version, int)
        owner = _digest(command.owner)
        expires = min(now + command.ttl * _SECOND, _FAR).to_bytes(8, "little")
        txn.put(name, b"".join([expires, version.to_bytes(8, "little"), owner, command.data]))
        if owner != _NOBODY:
            txn.put(_INDEX + owner + name[1:], expires)
        if there is None:
            files.since += 1
            if files.since >= _EVERY:
                files.since = 0
                files.sweep(txn, now, _STEPS)
        return version

    def _owned(self, command: Owned) -> list[tuple[str, Record]]:
        found: list[tuple[str, Record]] = []
        prefix = _INDEX + _digest(command.owner)
        start = prefix
        while start:
            start = self._written(_listed, prefix, start, found)
        return found


def _make_room(files: Files, txn: Transaction, now: int) -> None:
    files.forget_dead()  # who died while LMDB opened for it would hold all pages
    files.sweep(txn, now, _PORTION)


def _forget(txn: Transaction, name: bytes, value: bytes) -> None:
    """Take the second entry of a session away."""
    owner = value[_OWNER]
    if owner != _NOBODY:
        txn.delete(_INDEX + owner + name[1:])


def _listed(
    files: Files, txn: Transaction, now: int, prefix: bytes, start: bytes, found: list[tuple[str, Record]]
) -> bytes:
    """Add an owner's sessions from `start` on to `found`, a bounded number. Where to go on, or b""."""
    cursor = txn.cursor()
    there = cursor.set_range(start)
    for _ in range(_PORTION):
        if not there or not cursor.key().startswith(prefix):
            return b""
        key = cursor.key()[len(prefix) :]
        value = txn.get(_SESSION + key)
        if value is not None and now < expires_of(value):
            found.append((key.hex(), _record(value)))
        there = cursor.next()
    return bytes(cursor.key()) if there else b""


def _swept(files: Files, txn: Transaction, now: int, start: bytes) -> tuple[int, bytes]:
    """Delete what has expired from `start` on, among a bounded number. How many sessions; and where to go on."""
    found = 0
    cursor = txn.cursor()
    there = cursor.set_range(start)
    for _ in range(_PORTION):
        if not there:
            return found, b""
        if expires_of(cursor.value()) <= now:
            found += cursor.key().startswith(_SESSION)
            cursor.delete()
            there = bool(cursor.key())  # which is now the next one
        else:
            there = cursor.next()
    return found, bytes(cursor.key())
