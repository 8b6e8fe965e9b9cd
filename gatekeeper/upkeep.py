"""What goes on beside the requests: leases are renewed, files of networks are read again.

One thread for a Gatekeeper, begun once there is something to do, ended with its last work. It asks the store
blocking, whatever the application does.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from gatekeeper.commands import Batch, Hits, Replies, Verdict
from gatekeeper.errors import SettingsError
from gatekeeper.http.addresses import Network, NetworkError, Networks, parse_network
from gatekeeper.settings import read_file
from gatekeeper.ticket import Charge, Ticket

MOST_NETWORKS: Final = 1_000_000
"""The most networks of a file."""

GREATEST_LIST: Final = 32 * 1024 * 1024
"""The greatest file of networks, in bytes."""

_LEASE: Final = "concurrency"
_PAUSE: Final = 0.25  # seconds between two looks at the leases
_BEGINNING: Final = threading.Lock()
os.register_at_fork(
    before=_BEGINNING.acquire, after_in_parent=_BEGINNING.release, after_in_child=_BEGINNING.release
)


class Leases:
    """The tickets whose leases must be renewed while they last.

    A lease of a period is renewed every third of it: given back and taken anew in one step.
    """

    def __init__(self, ask: Callable[[Hits], Replies]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._held: dict[Ticket, float] = {}
        self._pid = 0
        self._error: Exception | None = None

    def __len__(self) -> int:
        return len(self._held)

    def add(self, ticket: Ticket) -> None:
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            self._held[ticket] = time.monotonic()

    def discard(self, ticket: Ticket) -> None:
        with self._lock:
            self._held.pop(ticket, None)

    def _begin(self) -> None:
        """The first ticket, or the first since this process was forked: what it inherited is its parent's."""
        with _BEGINNING:
            if self._pid == os.getpid():
                return
            self._lock, self._held = threading.Lock(), {}
            self._pid = os.getpid()
        start_thread("gatekeeper-leases", self, _PAUSE)

    def __call__(self) -> float:
        """Renew what is due. How many seconds until the next look."""
        now = time.monotonic()
        with self._lock:
            due = [(ticket, _period(ticket)) for ticket in self._held]
            due = [(ticket, period) for ticket, period in due if now - self._held[ticket] >= period / 3]
        for ticket, _ in due:
            self._renew(ticket)
        error, self._error = self._error, None
        if error is not None:  # told once a look, not once a ticket
            raise error
        return _PAUSE

    def _renew(self, ticket: Ticket) -> None:
        # While they are asked for, the receipts are ours: who ends the request meanwhile finds none.
        with self._lock:
            if ticket not in self._held:
                return
            self._held[ticket] = time.monotonic()
            charges = [charge for charge in ticket.charges if _is_lease(charge)]
            receipts = [charge.verdict.receipt for charge in charges]
            for charge in charges:
                charge.verdict.receipt = None
        for charge, receipt in zip(charges, receipts, strict=True):
            limit, key, cost, verdict = charge
            local = limit.standin is None
            replies = self._asked(Batch([(limit, key, cost)], gives=[(limit, key, cost, receipt)], local=local))
            # Where the store did not answer the old lease may still stand.
            renewed = replies[0].receipt if replies and isinstance(replies[0], Verdict) else receipt
            with self._lock:
                if ticket in self._held:
                    verdict.receipt = renewed
                    continue
            if renewed is not None:
                self._asked(Batch(gives=[(limit, key, cost, renewed)], local=local))

    def _asked(self, batch: Batch) -> Replies:
        """What the store replies; nothing, where one of the user's own raised: the receipts must not be lost."""
        try:
            return self._ask(batch)
        except Exception as error:
            self._error = error
            return []


def _is_lease(charge: Charge) -> bool:
    return charge.limit.kind == _LEASE and charge.verdict.receipt is not None


def _period(ticket: Ticket) -> float:
    """The shortest of the leases of a ticket, in seconds."""
    return min(
        (hit[0].algorithm.window_ns / 1e9 for hit in ticket.hits if hit[0].kind == _LEASE),  # type: ignore[attr-defined]
        default=60.0,
    )


class NetworkFiles:
    """Sets of networks, part of which stand in files that are read again when they change.

    A file has a network or an address a line; what stands behind a `#` is a comment. Of a file that cannot be read
    any more, or is wrong, the last that was right holds on; `log` is told.
    """

    def __init__(self, every: float, log: Callable[[str], object]) -> None:
        self._every = every
        self._log = log
        self._sets: list[tuple[Networks, list[Network], list[Path]]] = []
        self._watching = False
        self._told: set[str] = set()
        self._read: dict[Path, tuple[object, list[Network]]] = {}

    def networks(self, texts: Sequence[str], where: str) -> Networks:
        """The set of what the texts say: networks, and `file:PATH`. Raises SettingsError."""
        fixed = [parse_network(text) for text in texts if not text.startswith("file:")]
        paths = [Path(text.removeprefix("file:")) for text in texts if text.startswith("file:")]
        problems = []
        for path in paths:
            try:
                self._load(path)
            except (OSError, ValueError) as error:
                problems.append(f"{where}: {_told(path, error)}")
        if problems:
            raise SettingsError(problems)
        found = Networks([*fixed, *(network for path in paths for network in self._read[path][1])])
        if paths:
            self._sets.append((found, fixed, paths))
        return found

    def watch(self) -> None:
        """Look at the files from time to time, if there are any."""
        if self._sets and not self._watching:
            self._watching = True
            keep_looking("gatekeeper-files", self, self._every)

    def __call__(self) -> float:
        """Read what has changed. How many seconds until the next look."""
        changed: set[Path] = set()
        for path in list(self._read):
            try:
                if self._load(path):
                    changed.add(path)
                    self._told.clear()
            except (OSError, ValueError) as error:
                told = _told(path, error)
                if told not in self._told:  # once, and not at every look
                    self._log(told)
                self._told.add(told)
        for found, fixed, paths in self._sets:
            if changed.intersection(paths):
                found.replace([*fixed, *(network for path in paths for network in self._read[path][1])])
        return self._every

    def _load(self, path: Path) -> bool:
        """Read a file if it is not as it was. Raises OSError or ValueError."""
        status = path.stat()
        version = status.st_mtime_ns, status.st_size, status.st_ino
        if path in self._read and self._read[path][0] == version:
            return False
        networks = self._read[path][1] if path in self._read else []
        self._read[path] = version, networks  # what is wrong is told once
        self._read[path] = version, _parse(read_file(path, GREATEST_LIST).decode("utf-8"))
        return True


def _parse(text: str) -> list[Network]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].strip()
        if word:
            try:
                found.append(parse_network(word))
            except NetworkError as error:
                raise ValueError(f"line {number}: {error}") from None
        if len(found) > MOST_NETWORKS:
            raise ValueError(f"expected at most {MOST_NETWORKS} networks")
    return found


def _told(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{path}: {reason}"


def keep_looking(name: str, work: Any, pause: float) -> None:
    """As `start_thread`, and in the children of a fork as well: threads do not outlive one."""
    start_thread(name, work, pause)
    held = weakref.ref(work)

    def again() -> None:
        work = held()
        if work is not None:
            start_thread(name, work, pause)

    os.register_at_fork(after_in_child=again)


def start_thread(name: str, work: Any, pause: float) -> None:
    """Call an object after a pause, and again after each that it returns (seconds), until nobody else holds it."""
    held = weakref.ref(work)
    pid = os.getpid()

    def loop() -> None:
        seconds = pause
        while True:
            time.sleep(seconds)
            work = held()
            if work is None or os.getpid() != pid:
                return
            try:
                seconds = work()
            except Exception:  # a store of the user's own, say: the next look may do better
                logging.getLogger("gatekeeper").exception("%s: a look failed", name)
            del work

    threading.Thread(target=loop, name=name, daemon=True).start()
