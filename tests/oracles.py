"""Slow, exact models of the algorithms, written from what they promise and not from how they are built."""

from __future__ import annotations

from fractions import Fraction
from math import floor

NS = 10**9


class ExactLog:
    """sliding_window: every hit is kept with the tick it fell into, and counts for 65 ticks."""

    def __init__(self, limit: int, period: int, burst: int | None = None) -> None:
        self.limit = limit
        self.tick = Fraction(period * NS, 64)
        self.hits: list[tuple[int, int]] = []

    def remaining(self, now: int) -> int:
        tick = floor(now / self.tick)
        self.hits = [(at, cost) for at, cost in self.hits if tick - at <= 64]  # time does not go back
        return self.limit - sum(cost for _, cost in self.hits)

    def hit(self, now: int, cost: int) -> bool:
        if cost > self.remaining(now):
            return False
        self.hits.append((floor(now / self.tick), cost))
        return True


class Bucket:
    """gcra: a bucket of tokens, refilled continuously, one each `period / limit` (in whole nanoseconds)."""

    def __init__(self, limit: int, period: int, burst: int | None = None) -> None:
        self.limit = limit if burst is None else burst
        self.each = -(-period * NS // limit)
        self.tokens = Fraction(self.limit)
        self.at = 0

    def remaining(self, now: int) -> int:
        self.tokens = min(Fraction(self.limit), self.tokens + Fraction(now - self.at, self.each))
        self.at = now
        return floor(self.tokens)

    def hit(self, now: int, cost: int) -> bool:
        if cost > self.remaining(now):
            return False
        self.tokens -= cost
        return True


class TwoCounters:
    """sliding_counter: the hits of the aligned window before count by the part of it that is still in view."""

    def __init__(self, limit: int, period: int, burst: int | None = None) -> None:
        self.limit = limit
        self.period = period * NS
        self.counts: dict[int, int] = {}

    def remaining(self, now: int) -> int:
        window, passed = divmod(now, self.period)
        in_view = 1 - Fraction(passed, self.period)
        estimate = self.counts.get(window, 0) + self.counts.get(window - 1, 0) * in_view
        return floor(self.limit - estimate)

    def hit(self, now: int, cost: int) -> bool:
        if cost > self.remaining(now):
            return False
        window = now // self.period
        self.counts[window] = self.counts.get(window, 0) + cost
        return True


class FirstHitWindow:
    """fixed_window: a window begins with the first hit after the last one ended."""

    def __init__(self, limit: int, period: int, burst: int | None = None) -> None:
        self.limit = limit
        self.period = period * NS
        self.hits: list[tuple[int, int]] = []  # of the window that is open

    def remaining(self, now: int) -> int:
        if self.hits and now >= self.hits[0][0] + self.period:
            self.hits.clear()
        return self.limit - sum(cost for _, cost in self.hits)

    def hit(self, now: int, cost: int) -> bool:
        if cost > self.remaining(now):
            return False
        self.hits.append((now, cost))
        return True


Oracle = ExactLog | Bucket | TwoCounters | FirstHitWindow

ORACLES: dict[str, type[Oracle]] = {
    "sliding_window": ExactLog,
    "gcra": Bucket,
    "sliding_counter": TwoCounters,
    "fixed_window": FirstHitWindow,
}


def most_in_any_window(hits: list[tuple[int, int]], length: int) -> int:
    """The greatest sum of costs of (time, cost) in any closed window of this length."""
    return max((sum(cost for at, cost in hits if start <= at <= start + length) for start, _ in hits), default=0)
