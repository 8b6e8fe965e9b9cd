"""Deadlines of many connections, cheap to move."""

from __future__ import annotations

import asyncio
from typing import Final

GRAIN: Final = 0.05
"""How much later than its deadline a thing may expire, in seconds."""

_PER_SECOND: Final = round(1 / GRAIN)
_NEVER: Final = 1 << 62


class Timed:
    """A thing with a deadline, in seconds of the event loop's clock."""

    __slots__ = ("deadline", "slot")

    def __init__(self) -> None:
        self.deadline = 0.0
        self.slot = _NEVER

    def expired(self) -> None:
        """The deadline has passed. The thing is forgotten until it is given another."""
        raise NotImplementedError


class Deadlines:
    """A wheel: things in slots of time.

    A deadline that moves later, as nearly all do, is an assignment: the thing is looked at when its slot comes, and
    put into a later one then. So a connection that serves thousands of requests is moved every few seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, dict[Timed, None]] = {}  # in the order in which they came, unlike a set
        self._timer: asyncio.TimerHandle | None = None
        self._at = 0

    def set(self, thing: Timed, seconds: float) -> None:
        """Let the thing expire in so many seconds, whatever was set before."""
        thing.deadline = self._loop.time() + seconds
        if thing.deadline < thing.slot * GRAIN:
            self._put(thing)

    def clear(self, thing: Timed) -> None:
        """Let the thing not expire, until it is given another deadline."""
        thing.deadline = 0.0

    def forget(self, thing: Timed) -> None:
        """Hold the thing no longer: it is gone."""
        thing.deadline = 0.0
        if thing.slot in self._slots:
            self._slots[thing.slot].pop(thing, None)
        thing.slot = _NEVER

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._slots.clear()

    def _put(self, thing: Timed) -> None:
        thing.slot = slot = int(thing.deadline * _PER_SECOND) + 1
        self._slots.setdefault(slot, {})[thing] = None
        if self._timer is None:
            self._at = int(self._loop.time() * _PER_SECOND)
            self._timer = self._loop.call_later(GRAIN, self._turn)

    def _turn(self) -> None:
        now = self._loop.time()
        until = int(now * _PER_SECOND)
        while self._at < until:
            self._at += 1
            for thing in self._slots.pop(self._at, ()):
                if thing.slot != self._at:  # it was put into an earlier slot since
                    continue
                thing.slot = _NEVER
                if not thing.deadline:
                    continue
                if thing.deadline > now:
                    self._put(thing)
                else:
                    thing.deadline = 0.0
                    try:
                        thing.expired()
                    except Exception as error:  # or no deadline of anything would ever come again
                        what = {"message": "a deadline was not handled", "exception": error}
                        self._loop.call_exception_handler(what)
        self._timer = self._loop.call_later(GRAIN, self._turn) if self._slots else None
