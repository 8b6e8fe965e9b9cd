"""Sessions in files that the processes of one machine share, through LMDB."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Any, Final
from weakref import WeakValueDictionary

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import MissingExtra, StoreError

try:
    import lmdb
except ImportError:
    raise MissingExtra("the shared store", "shared") from None

from gatekeeper.stores.shared.files import boot_id

GREATEST: Final = 1 << 20
"""The most bytes of a session."""

SIZE: Final = 1 << 30
"""The bytes that the file may grow to, unless said otherwise. It grows with what is in it."""

_HEAD: Final = Struct(">QQ32s")  # version, when it expires, the digest of its owner (zeros: nobody)
_NOBODY: Final = bytes(32)
_TIME: Final = Struct(">Q")
_SWEPT: Final = 2  # so many expired ones go with each write
_PORTION: Final = 1000
_MOST_OWNED: Final = 10_000


class SharedSessions:
    """A SessionStore that all processes of one machine share, without a server.

    - `path`: a folder, which is made; its files are for its owner alone
    - `durable`: whether sessions outlive a crash of the machine, at the price of a sync with each write (on most
      disks milliseconds); else they are forgotten when the machine starts anew
    - `size`: the bytes that the file may grow to (default 1 GiB); a write beyond is answered with a StoreError
    - `clock`: the seconds since the epoch, by which sessions expire

    Each command is one transaction: a process may be killed at any moment. One that is stopped (SIGSTOP) within a
    write keeps the others from writing until it goes on.

    Raises StoreError if the files cannot be made, with the first question.
    """

    local = True

    def __init__(
        self,
        path: str | Path,
        *,
        durable: bool = False,
        size: int = SIZE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = str(path)
        self._durable = durable
        self._size = size
        self._clock = clock
        self._files: _Files | None = None
        _stores.add(self)

    def ask(self, command: SessionCommand) -> Any:
        try:
            files = self._files or self._open()
            now = int(self._clock())
            if isinstance(command, Load):
                with files.lock, files.env.begin() as txn:
                    held = _alive(txn.get(bytes.fromhex(command.key), db=files.sessions), now)
                    return None if held is None else held[0]
            if isinstance(command, Owned):
                with files.lock, files.env.begin() as txn:
                    return files.owned(txn, _digest(command.owner), now)
            with files.lock, files.env.begin(write=True) as txn:
                files.sweep(txn, now, _SWEPT)
                if isinstance(command, Save):
                    return files.save(txn, command, now)
                assert isinstance(command, Delete)
                return files.delete(txn, bytes.fromhex(command.key), now)
        except (lmdb.Error, OSError) as error:
            return _told(error)
        except StoreError as error:
            return error

    async def aask(self, command: SessionCommand) -> Any:
        return self.ask(command)

    def sweep(self) -> int:
        try:
            files, count, now = self._files or self._open(), 0, int(self._clock())
            while True:
                with files.lock, files.env.begin(write=True) as txn:
                    swept = files.sweep(txn, now, _PORTION)
                count += swept
                if swept < _PORTION:
                    return count
        except (lmdb.Error, OSError) as error:
            raise _told(error) from None

    async def asweep(self) -> int:
        return self.sweep()

    def close(self) -> None:
        """The files are closed once no store of this process uses them."""
        self._files = None

    async def aclose(self) -> None:
        self.close()

    def _open(self) -> _Files:
        self._files = files = _opened(os.path.realpath(self._path), self._durable, self._size)
        return files


class _Files:
    """The environment of a folder in this process: LMDB allows one."""

    def __init__(self, folder: str, durable: bool, size: int) -> None:
        # Held in each transaction, so that there is none while this process forks.
        self.lock = threading.Lock()
        os.makedirs(folder, mode=0o700, exist_ok=True)
        path = os.path.join(folder, "sessions.mdb")
        descriptor = os.open(os.path.join(folder, "sessions.boot"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # What was not synced may be torn after a crash: so it is not read then, however it ended.
            wanted = b"durable" if durable else b"boot " + boot_id().encode()
            found = os.pread(descriptor, 4096, 0)
            if found != wanted and found != b"durable":
                for name in (path, f"{path}-lock"):
                    with suppress(FileNotFoundError):
                        os.unlink(name)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, wanted, 0)
            self.env = lmdb.open(
                path, map_size=size, subdir=False, max_dbs=3, max_readers=1024, sync=durable, metasync=durable,
                mode=0o600, max_spare_txns=0,
            )  # fmt: skip
            self.env.reader_check()  # who was killed as it read holds pages back
            self.sessions = self.env.open_db(b"sessions")
            self._owners = self.env.open_db(b"owners", dupsort=True)
            self._ends = self.env.open_db(b"ends")
        finally:
            os.close(descriptor)

    def save(self, txn: Any, save: Save, now: int) -> int | Record | None:
        if len(save.data) > GREATEST:
            raise StoreError(f"a session has more than {GREATEST} bytes")
        key = bytes.fromhex(save.key)
        stored = txn.get(key, db=self.sessions)
        held = _alive(stored, now)
        if held is None:
            if save.version is not None:
                return None
            version = 1
        else:
            record, _, _ = held
            if record.version != save.version:
                return record
            version = record.version + 1
        if stored is not None:
            self._forget(txn, key, stored)
        expires, owner = now + save.ttl, _NOBODY if save.owner is None else _digest(save.owner)
        txn.put(key, _HEAD.pack(version, expires, owner) + save.data, db=self.sessions)
        txn.put(_TIME.pack(expires) + key, b"", db=self._ends)
        if save.owner is not None:
            txn.put(owner, key, db=self._owners)
        return version

    def delete(self, txn: Any, key: bytes, now: int) -> Record | None:
        stored = txn.get(key, db=self.sessions)
        if stored is None:
            return None
        held = _alive(stored, now)
        self._forget(txn, key, stored)
        txn.delete(key, db=self.sessions)
        return None if held is None else held[0]

    def owned(self, txn: Any, owner: bytes, now: int) -> list[tuple[str, Record]]:
        found: list[tuple[str, Record]] = []
        with txn.cursor(db=self._owners) as cursor:
            if cursor.set_key(owner):
                for key in cursor.iternext_dup():
                    held = _alive(txn.get(key, db=self.sessions), now)
                    if held is not None:
                        found.append((bytes(key).hex(), held[0]))
                    if len(found) >= _MOST_OWNED:
                        break
        return found

    def sweep(self, txn: Any, now: int, most: int) -> int:
        """Drop so many of those that have expired; how many that were."""
        due: list[bytes] = []
        with txn.cursor(db=self._ends) as cursor:
            for end in cursor.iternext(values=False):
                if _TIME.unpack_from(end)[0] > now or len(due) >= most:
                    break
                due.append(bytes(end[8:]))
        for key in due:
            self._forget(txn, key, txn.get(key, db=self.sessions))
            txn.delete(key, db=self.sessions)
        return len(due)

    def _forget(self, txn: Any, key: bytes, stored: bytes) -> None:
        """Take a session out of the indexes."""
        _, expires, owner = _HEAD.unpack_from(stored)
        txn.delete(_TIME.pack(expires) + key, db=self._ends)
        if owner != _NOBODY:
            txn.delete(owner, key, db=self._owners)


def _alive(stored: bytes | None, now: int) -> tuple[Record, int, bytes] | None:
    """What is stored of a session that has not expired: (record, when it expires, its owner)."""
    if stored is None:
        return None
    version, expires, owner = _HEAD.unpack_from(stored)
    return (Record(bytes(stored[_HEAD.size :]), version), expires, owner) if now < expires else None


def _digest(owner: str) -> bytes:
    return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).digest()


def _told(error: Exception) -> StoreError:
    if isinstance(error, lmdb.MapFullError):
        return StoreError("the shared store of sessions is full; session.size makes it greater")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return StoreError(f"the shared store of sessions cannot be used: {reason}")


_OPENING: Final = threading.Lock()
_OPEN: Final[WeakValueDictionary[str, _Files]] = WeakValueDictionary()
_HELD: Final[list[_Files]] = []  # while the process is forked
_LEFT: Final[list[_Files]] = []  # a parent's, not to be touched in the child
_FORK_PATIENCE: Final = 2.0  # seconds to wait before a fork for another thread's transaction
_stores: Final[weakref.WeakSet[SharedSessions]] = weakref.WeakSet()


def _opened(folder: str, durable: bool, size: int) -> _Files:
    with _OPENING:
        files = _OPEN.get(folder)
        if files is None:
            files = _OPEN[folder] = _Files(folder, durable, size)
        return files


def _before_fork() -> None:
    _OPENING.acquire()
    _HELD.extend(files for files in list(_OPEN.values()) if files.lock.acquire(timeout=_FORK_PATIENCE))


def _after_in_parent() -> None:
    while _HELD:
        _HELD.pop().lock.release()
    _OPENING.release()


def _after_in_child() -> None:
    """The environments are the parent's: the child's copies of descriptors and maps are closed.

    Not where another thread was in a transaction, which nobody can end here.
    """
    for files in list(_OPEN.values()):
        if files in _HELD:
            files.env.close()
        else:
            _LEFT.append(files)
    _HELD.clear()
    _OPEN.clear()
    for store in list(_stores):
        store._files = None
    _OPENING.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
