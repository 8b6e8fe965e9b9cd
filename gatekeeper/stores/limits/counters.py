"""Counters in a storage of `limits`, by three of its strategies, as steps that yield calls of the storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from gatekeeper.commands import Receipt
from gatekeeper.stores.limits.kinds import COUNTER, FIXED, MOVING, MS, NS, Kind

Call: TypeAlias = tuple[str, tuple[Any, ...]]
"""(method of a storage, its arguments)."""
R = TypeVar("R")
Calls: TypeAlias = Generator[Call, Any, R]


def to_ns(seconds: float) -> int:
    """Nanoseconds, a millisecond rounded up: storages hand times on with fewer digits than they compare."""
    return math.ceil(seconds * NS) + MS if seconds > 0 else 0


class Seen(Protocol):
    """What a look at a counter showed."""

    spent: int
    """Units spent and still counting, rounded down as the storage does."""

    def after(self, cost: int) -> Seen:
        """As it will be once `cost` more are spent."""

    def falls(self, target: int) -> float:
        """Seconds until at most `target` units count, if nothing else comes; 0.0 if no more do."""


class Counter:
    """One key of one limit. What it yields are calls of a storage."""

    __slots__ = ("_clock", "_kind", "amount", "name", "period")

    def __init__(self, name: str, amount: int, period: int, kind: Kind, clock: Callable[[], float]) -> None:
        self.name = name
        self.amount = amount
        self.period = period
        self._kind = kind
        self._clock = clock

    def look(self) -> Calls[Seen]:
        raise NotImplementedError

    def hit(self, cost: int, seen: Any) -> Calls[Receipt | None]:
        """Spend, if there is room for all of it: then a receipt, else None."""
        raise NotImplementedError

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        raise NotImplementedError

    def reset(self) -> Calls[None]:
        yield "clear", (self.name,)


class _MovingSeen:
    __slots__ = ("_oldest", "_period", "spent")

    def __init__(self, spent: int, oldest: float, period: int) -> None:
        self.spent = spent
        self._oldest = oldest  # seconds until the oldest hit leaves the window
        self._period = period

    def after(self, cost: int) -> _MovingSeen:
        return _MovingSeen(self.spent + cost, self._oldest if self.spent else self._period, self._period)

    def falls(self, target: int) -> float:
        if target < 0 or target >= self.spent:
            return 0.0
        # The storage tells the time of the oldest hit alone: for more than one unit only the bound is known.
        return self._oldest if target == self.spent - 1 else self._period


class _Moving(Counter):
    """The moving window: a log of all hits, and so never more than the limit in any window.

    Entries cannot be taken out again: a give-back does nothing.
    """

    __slots__ = ()

    def look(self) -> Calls[_MovingSeen]:
        start, spent = yield "get_moving_window", (self.name, self.amount, self.period)
        oldest = min(max(0.0, start + self.period - self._clock()), self.period) if spent else 0.0
        return _MovingSeen(spent, oldest, self.period)

    def hit(self, cost: int, seen: _MovingSeen) -> Calls[Receipt | None]:
        return MOVING if (yield "acquire_entry", (self.name, self.amount, self.period, cost)) else None

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        yield from ()


class SlidingSeen:
    __slots__ = ("_before", "_before_ends", "_ends", "_here", "_period", "spent")

    def __init__(self, before: int, before_ends: float, here: int, ends: float, period: int) -> None:
        self._before = before
        self._before_ends = before_ends  # seconds until the window before this one counts no more
        self._here = here
        self._ends = ends  # seconds until this window counts no more
        self._period = period
        self.spent = math.floor(before * before_ends / period + here)

    @property
    def left(self) -> float:
        """Seconds until this window is the one before."""
        return max(0.0, self._ends - self._period)

    def after(self, cost: int) -> SlidingSeen:
        ends = self._ends if self._here or self._before else max(self._ends, self._period)
        return SlidingSeen(self._before, self._before_ends, self._here + cost, ends, self._period)

    def falls(self, target: int) -> float:
        if target < 0 or target >= self.spent:
            return 0.0
        period, here, below = self._period, self._here, target + 1  # it is rounded down: it must fall below this
        if here < below:
            return self._before_ends - (below - here) * period / self._before
        return self.left + period * (1 - below / here)


class _SlidingCounter(Counter):
    """The sliding window counter: two windows, of which the earlier counts by how much of it is in view."""

    __slots__ = ()

    def look(self) -> Calls[SlidingSeen]:
        before, before_ends, here, ends = yield "get_sliding_window", (self.name, self.period)
        # Where the windows begin with the first hit, there is none before it.
        return SlidingSeen(before, before_ends, here, ends or 2 * self.period, self.period)

    def hit(self, cost: int, seen: SlidingSeen) -> Calls[Receipt | None]:
        began = self._clock()
        if not (yield "acquire_sliding_window_entry", (self.name, self.amount, self.period, cost)):
            return None
        ended = self._clock()
        # Where the end of the window fell into the call, which window was charged is not known: it stays charged.
        if self._is_aligned:
            at = began if int(began / self.period) == int(ended / self.period) else 0.0
        else:
            at = began + seen.left if ended < began + seen.left else 0.0
        return at

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        if not receipt:
            return
        if self._is_aligned:
            # As `limits.storage.base.TimestampedSlidingWindow` names a window; it is an int in the name.
            yield "decr", (f"{self.name}/{int(receipt / self.period)}", cost)
        elif self._kind.family in ("redis", "valkey", "mongodb"):
            seen = yield from self.look()
            ends = self._clock() + seen.left
            if seen._here >= cost and abs(ends - receipt) < self.period / 4:
                # A negative amount is added like any other; the limit is set so high that none is refused.
                yield "acquire_sliding_window_entry", (self.name, 1 << 31, self.period, -cost)

    def reset(self) -> Calls[None]:
        yield "clear_sliding_window", (self.name, self.period)

    @property
    def _is_aligned(self) -> bool:
        """Whether windows begin at multiples of the period, rather than with a key's first hit."""
        return self._kind.family in ("memory", "memcached")


class _FixedSeen:
    __slots__ = ("_ends", "_period", "spent")

    def __init__(self, spent: int, ends: float, period: int) -> None:
        self.spent = spent
        self._ends = ends
        self._period = period

    @property
    def left(self) -> float:
        """Seconds until the window ends, or one that begins now."""
        return self._ends if self.spent else self._period

    def after(self, cost: int) -> _FixedSeen:
        return _FixedSeen(self.spent + cost, self.left, self._period)

    def falls(self, target: int) -> float:
        return self._ends if 0 <= target < self.spent else 0.0


class _Fixed(Counter):
    """The fixed window: it begins with a key's first hit."""

    __slots__ = ()

    def look(self) -> Calls[_FixedSeen]:
        spent = max(0, (yield "get", (self.name,)))
        left = 0.0
        if spent:
            left = (yield "get_expiry", (self.name,)) - self._clock()
            if self._kind.family in ("redis", "valkey"):
                left += 0.5  # it is told in whole seconds, rounded to the nearest
            if left <= 0:
                left = self.period  # not known: memcached keeps it under a key of its own, which may be gone
        return _FixedSeen(spent, min(left, self.period), self.period)

    def hit(self, cost: int, seen: _FixedSeen) -> Calls[Receipt | None]:
        ends = self._clock() + seen.left
        if (yield "incr", (self.name, self.period, cost)) <= self.amount:
            return ends
        yield from self.give(cost, ends)  # others took of it since it was looked at
        return None

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        if self._clock() >= receipt:
            return
        if self._kind.family in ("memory", "memcached"):
            yield "decr", (self.name, cost)
        elif self._kind.family in ("redis", "valkey", "mongodb"):
            left = yield "incr", (self.name, self.period, -cost)
            if left < 0:  # the window had ended, or was reset: what it did not hold is put back
                yield "incr", (self.name, self.period, -left)


COUNTERS: Final[Mapping[str, type[Counter]]] = {MOVING: _Moving, COUNTER: _SlidingCounter, FIXED: _Fixed}
