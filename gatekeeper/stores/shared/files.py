"""The files of a shared store as a process has them open: made, checked, swept, and given up at a fork."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple, NoReturn
from weakref import WeakValueDictionary

from gatekeeper.errors import MissingExtra, StoreError

try:
    import lmdb
except ImportError:
    raise MissingExtra("The shared store", "shared") from None

from gatekeeper.stores.shared.heads import HEADS_BYTES, Heads, Transaction

SCHEMA: Final = 1
"""The version of the layout of counters. Those of another are dropped."""

LEAST_SIZE: Final = 1 << 20

NEW_KEYS_UP_TO: Final = 0.75
"""The part of the pages that new keys may fill; the states of the keys that are held may grow further."""

_STATES_UP_TO: Final = 0.875  # of the pages
_UNMEASURED: Final = 16  # states that may grow before it is seen whether there is room

_BOOT: Final = ".boot"
_DATA: Final = ".mdb"
_LOCK: Final = ".mdb-lock"
_HEADS: Final = ".heads"
_LOCK_BYTES: Final = 16_384  # more than LMDB wants for its table of readers
_ENGINE: Final[dict[str, Any]] = {"lib_version": 0} if int(lmdb.__version__.partition(".")[0]) >= 3 else {}
_MARK: Final = "gatekeeper shared store, layout "
_PATIENCE: Final = 10.0  # seconds to wait for a process that opens the files
_FORK_PATIENCE: Final = 2.0  # seconds to wait before a fork for another thread's transaction
_SECOND: Final = 1_000_000_000

_LOG: Final = logging.getLogger("gatekeeper")
_DAMAGE: Final = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.MapResizedError)
_OURS: Final = (-30790, -30789)  # of LMDB's codes those of this process: too many readers, too many thread keys

ID: Final = 4
"""Bytes of a key's name that tell the space."""


class Kind(NamedTuple):
    """What is kept in the files, and how.

    - `name`: what their names begin with
    - `layout`: the version of the layout of keys and values. What was written in another is dropped.
    - `durable`: whether a commit is on the disk when it returns, and so outlives the boot; else it does not
    """

    name: str
    layout: int
    durable: bool = False


def counters() -> Kind:
    return Kind("gatekeeper", SCHEMA)


def expires_of(value: bytes) -> int:
    """When a value expires: its first 8 bytes."""
    return int.from_bytes(value[:8], "little")


class Full(Exception):
    """What is left of the map is kept for what makes room again: to delete takes pages, too."""


FULL: Final = (Full, lmdb.MapFullError)


class Files:
    """The files of one kind in a folder as this process has them open, once for all its stores.

    LMDB's locks belong to (process, file): to open a file twice, or to close one's second handle of it, would drop
    the locks of the first. `lock` is held through each transaction, for the writers' mutex belongs to a thread.
    """

    def __init__(self, folder: str, size: int, kind: Kind) -> None:
        self.folder = folder
        self.kind = kind
        self.size = size  # what is wanted; once open, what is
        self.users = 0
        self.lock = Lock()
        self.since = 0  # new keys since the last sweep
        self.growths = 0  # since it was last measured
        self.tight = False
        self.look_at = 0
        self.begin: Callable[[None, None, bool], Transaction] = self._first
        self._hand = os.urandom(ID)  # where the next sweep begins: each process has its own
        self._env: lmdb.Environment | None = None
        self._heads: Heads | None = None
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
            if expires_of(cursor.value()) <= now:
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
        self.tight = full >= NEW_KEYS_UP_TO
        return held["entries"], full

    def grow(self, txn: Transaction) -> None:
        """A value is about to become longer. Raises Full."""
        self.growths += 1
        if (self.tight or self.growths >= _UNMEASURED) and self.measured(txn)[1] >= _STATES_UP_TO:
            raise Full

    def look(self, now: int) -> None:
        """Once a second: whether the files are still those that others open."""
        self.look_at = now + _SECOND
        if self._env is None:
            return
        self.forget_dead()
        if identity_of(self._path(_DATA)) != self._identity and not self._succeeded():
            self._shut()

    def forget_dead(self) -> None:
        """Nobody reads, but LMDB itself does for an instant when it opens: who died there would hold all pages."""
        if self._env is not None:
            with suppress(lmdb.Error):
                self._env.reader_check()

    def broken(self, error: lmdb.Error) -> None:
        """An error after which the environment is of no more use is answered by opening it anew."""
        damaged = isinstance(error, _DAMAGE)
        if damaged or isinstance(error, lmdb.PanicError | lmdb.LockError | lmdb.BadTxnError):
            self._shut()
            if damaged:
                with suppress(OSError, StoreError), self._locked_boot() as boot:
                    if identity_of(self._path(_DATA)) == self._identity:  # nobody has made them anew already
                        os.ftruncate(boot, 0)
                        self._tell_damage(error)

    def release(self) -> None:
        """One of the stores is closed."""
        with _registry, self.lock:
            self.users -= 1
            if self.users <= 0:
                self._shut()
                if OPEN.get(self._path("")) is self:
                    del OPEN[self._path("")]

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

    def _path(self, end: str) -> str:
        return os.path.join(self.folder, self.kind.name + end)

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
                lasts = "durable" if self.kind.durable else f"boot {boot_id()}"
                wanted = f"{_MARK}{self.kind.layout}, {lasts}\n".encode()
                env = self._found() if os.pread(boot, 4096, 0) == wanted else None
                if env is None:
                    os.ftruncate(boot, 0)
                    os.pwrite(boot, bytes(len(wanted)), 0)  # so that there is room for it at the end
                    env = self._made()
                    os.pwrite(boot, wanted, 0)
                    if self.kind.durable:
                        self._sync(boot)
        except OSError as error:
            raise StoreError(f"{self.folder}: the shared store cannot use it: {error.strerror}") from None
        except lmdb.Error as error:
            reason = _reason(error)
            if getattr(error, "code", 0) in (errno.EAGAIN, errno.EACCES):  # fcntl: somebody has our pid's lock
                reason += " (containers that share it must share their process ids, too)"
            raise StoreError(f"{self.folder}: the shared store cannot be opened: {reason}") from None
        self._env = env
        self._identity = identity_of(self._path(_DATA))
        self._trouble = None
        self.begin = env.begin if self._heads is None else self._heads.guarded(env.begin)
        self.look_at = 0

    def _found(self) -> lmdb.Environment | None:
        """The files as they are there; None if they are damaged, or not all there. Raises OSError, lmdb.Error."""
        try:
            # Its size, whatever is wanted: LMDB would cut the file to a smaller one under the others.
            size = os.stat(self._path(_DATA)).st_size
            if size < LEAST_SIZE:
                return None
            self.size = size
            env = self._environment()
            told = env.info()
            if told["map_size"] <= size and told["last_txnid"] < 1 << 63:
                return env
            self._undo(env)  # pages behind the end are SIGBUS, and after the last number LMDB ends the process
            raise lmdb.CorruptedError(self._path(_DATA))
        except FileNotFoundError:
            return None
        except lmdb.Error as error:
            code = getattr(error, "code", 0)
            # What LMDB itself says is said of the files, and so is the one that it says of a wrong size of pages.
            # What the system says (no memory, no rights, too many files) may pass.
            if not isinstance(error, _DAMAGE) and code != errno.EINVAL and (code >= 0 or code in _OURS):
                raise
            self._tell_damage(error)
            return None

    def _tell_damage(self, error: lmdb.Error) -> None:
        _LOG.warning(
            "%s: the shared store is damaged (%s) and is made anew: what was kept there is lost",
            self._path(""),
            type(error).__name__,
        )

    def _environment(self) -> lmdb.Environment:
        """LMDB's environment, with pages changed in place where we know the file's format, to guard its heads.

        Else they are written by system calls, which nothing can tear, and which double the time of a decision. So
        are those of durable files, whose commits wait for the disk anyway.
        """
        self._heads = None
        if self.kind.durable:
            return self._opened(False)
        env = self._opened(True)
        try:
            heads = Heads(self._path(_DATA), self._path(_HEADS), env.stat()["psize"])
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
            sync=self.kind.durable,
            metasync=self.kind.durable,
            map_async=not self.kind.durable,
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
            self._reserve(_HEADS, 0, HEADS_BYTES)
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

    def _sync(self, boot: int) -> None:
        """What is said of the files, and their names, are on the disk before anything is committed to them."""
        os.fsync(boot)
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

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
                while not is_locked(file):
                    if time.monotonic() >= deadline:
                        raise StoreError(f"{self.folder}: another process has been opening it for {_PATIENCE:g} s")
                    time.sleep(0.005)
                status = os.fstat(file)
                if (status.st_dev, status.st_ino) == identity_of(path):
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
        return text.startswith(_MARK) and not text.startswith(f"{_MARK}{self.kind.layout},")


class Closed:
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


def is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def identity_of(path: str) -> tuple[int, int]:
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
        raise StoreError(f"{path}: others may write to it: name a folder of its own in it, or one with mode 700")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(f"{path}: cannot be written to: chmod 700")


def opened(path: str, size: int, kind: Kind) -> Files:
    """The files of a folder, opened by the first store of that kind in this process. Raises StoreError."""
    if not os.path.isabs(path):
        raise StoreError("expected an absolute path, such as /dev/shm/gatekeeper")
    path = path.rstrip("/") or "/"
    _checked_folder(path)
    folder = os.path.realpath(path)
    with _registry:
        place = os.path.join(folder, kind.name)
        files = OPEN.get(place)
        if files is None:
            files = OPEN[place] = Files(folder, size, kind)
        files.users += 1
        return files


def is_made(path: str) -> bool:
    """Whether there is a store in a folder, of this boot or an earlier one. Nothing is made or opened."""
    return os.path.exists(os.path.join(path, counters().name + _DATA))


OPEN: Final[WeakValueDictionary[str, Files]] = WeakValueDictionary()
_LEFT: Final[list[lmdb.Environment]] = []  # a parent's, not to be touched in the child
_HELD: Final[list[Files]] = []  # while the process is forked
CLOSED: Final = Closed()
_registry = Lock()


def _forked_in_use(db: None, parent: None, write: bool) -> NoReturn:
    raise StoreError("the shared store was in use by a thread when the process was forked: start workers afresh")


def _before_fork() -> None:
    # No transaction may be open while the process is copied. Another thread's may wait for a stopped process: not
    # for ever.
    _registry.acquire()
    for files in list(OPEN.values()):
        if files.lock.acquire(timeout=_FORK_PATIENCE):
            _HELD.append(files)


def _after_in_parent() -> None:
    for files in _HELD:
        files.lock.release()
    _HELD.clear()
    _registry.release()


def _after_in_child() -> None:
    global _registry
    for files in list(OPEN.values()):
        # A program in C that forks may not have told before: then a lock that is free says the same.
        files.forked(files in _HELD or not files.lock.locked())
    _HELD.clear()
    CLOSED.lock = Lock()
    _registry = Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
