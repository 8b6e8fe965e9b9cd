"""Sessions in this process's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from threading import Lock
from typing import Any, Final, NamedTuple

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import StoreError
from gatekeeper.stores.sessions import LONGEST, too_long

_SPARE: Final = 64  # ends of what is gone, before they are looked for


class _Held(NamedTuple):
    record: Record
    expires: float
    owner: str | None


class MemorySessions:
    """A SessionStore in memory, for one process and all its threads: for tests, and a single server.

    - `most`: how many sessions it holds at most (default 1,000,000). A new one beyond them is answered with a
      StoreError; none that is alive is put out.
    - `clock`: the seconds since the epoch

    A session has at most 1 MiB.
    """

    local = True

    def __init__(self, *, most: int = 1_000_000, clock: Callable[[], float] = time.time) -> None:
        self.most = most
        self._clock = clock
        self._lock = Lock()
        self._held: dict[str, _Held] = {}
        self._owned: dict[str, set[str]] = {}
        # When a session may be over, so looked at again then. What is gone may still have entries.
        self._ends: list[tuple[float, str]] = []
        self._version = 0

    def __len__(self) -> int:
        """How many sessions are held, those included that have expired and were not yet dropped."""
        return len(self._held)

    def ask(self, command: SessionCommand) -> Any:
        with self._lock:
            now = self._clock()
            self._drop(now, 16)
            if isinstance(command, Load):
                held = self._alive(command.key, now)
                return None if held is None else held.record
            if isinstance(command, Save):
                return self._save(command, now)
            if isinstance(command, Delete):
                held = self._alive(command.key, now)
                self._remove(command.key)
                return None if held is None else held.record
            assert isinstance(command, Owned)
            keys = sorted(self._owned.get(command.owner, ()))
            return [(key, held.record) for key in keys if (held := self._alive(key, now)) is not None]

    async def aask(self, command: SessionCommand) -> Any:
        return self.ask(command)

    def sweep(self) -> int:
        with self._lock:
            return self._drop(self._clock(), len(self._ends))

    async def asweep(self) -> int:
        return self.sweep()

    def close(self) -> None:
        with self._lock:
            self._held.clear()
            self._owned.clear()
            self._ends.clear()

    async def aclose(self) -> None:
        self.close()

    # All that follows runs under the lock.

    def _alive(self, key: str, now: float) -> _Held | None:
        held = self._held.get(key)
        return held if held is not None and now < held.expires else None

    def _save(self, command: Save, now: float) -> int | Record | StoreError | None:
        if len(command.data) > LONGEST:
            return too_long(command.data)
        held = self._alive(command.key, now)
        if held is None:
            if command.version is not None:
                return None
            if len(self._held) >= self.most:
                self._drop(now, len(self._ends))
                if len(self._held) >= self.most:
                    return StoreError(f"the store of sessions is full: it holds {self.most}")
        elif held.record.version != command.version:
            return held.record
        self._remove(command.key)
        self._version += 1
        expires = now + command.ttl
        self._held[command.key] = _Held(Record(command.data, self._version), expires, command.owner)
        if command.owner is not None:
            self._owned.setdefault(command.owner, set()).add(command.key)
        # A session that is written again and again has one entry, which is moved as its time comes.
        if held is None or held.expires > expires:
            heappush(self._ends, (expires, command.key))
            if len(self._ends) > 2 * len(self._held) + _SPARE:
                self._ends = [(one.expires, key) for key, one in self._held.items()]
                heapify(self._ends)
        return self._version

    def _remove(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None and held.owner is not None:
            keys = self._owned[held.owner]
            keys.discard(key)
            if not keys:
                del self._owned[held.owner]

    def _drop(self, now: float, most: int) -> int:
        """Drop what has expired, looking at so many at most; how many that were."""
        found = 0
        for _ in range(most):
            if not self._ends or self._ends[0][0] > now:
                break
            _, key = heappop(self._ends)
            held = self._held.get(key)
            if held is not None and held.expires <= now:
                self._remove(key)
                found += 1
            elif held is not None:
                heappush(self._ends, (held.expires, key))
        return found
