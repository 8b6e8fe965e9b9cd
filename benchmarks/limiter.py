"""One decision in memory: `gatekeeper.Limiter.hit` and the fixed window of `limits`.

Two comparisons, each with the same plain loop over the same keys on both sides, nothing subtracted:

- a hit alone, for callers that want yes or no;
- the whole answer: allowed, remaining, reset. Our verdict holds it, so it is only read; with `limits` it takes
  `get_window_stats` after the hit, as every middleware does that tells clients their quota.

Ours is the default, `sliding_window`, which never lets more than the rate into any window; theirs is the
cheapest it has, which lets up to twice the rate into one. Both meet 100,000 keys, one hit a key a round. All start
afresh every third round, so that a third of the rounds begin with unknown keys and no key comes near its limit.

`limits` drops expired keys in a timer thread that looks at every key, about every hundredth of a second: its cost
grows with the keys held. It is part of its CPU time, for a process that uses it spends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

import limits
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from benchmarks.measure import Progress, Result, Row, Unfit, Work, interleave, median_ratio, peer
from gatekeeper import Limiter

RATE: Final = "100/minute"
FRESH: Final = 3


def run(quick: bool, progress: Progress) -> Result:
    against = peer("limits")
    rounds, count = (3, 30_000) if quick else (9, 100_000)
    keys = [f"client:{number:017d}" for number in range(count)]
    verify(keys[0])

    works: dict[str, Work] = {}

    def fresh(number: int) -> Mapping[str, Work]:
        if number % FRESH == 0:
            works.update(made(keys))
        return works

    seconds = interleave(fresh, rounds, progress=progress)
    rows = []
    for what, variant, bar in (("hit", "hit", 2.5), ("hit and quota", "answer", 5.0)):
        ours, theirs = seconds[f"our {variant}"], seconds[f"their {variant}"]
        rows.append(
            Row(
                what=f"limiter: {what}, against {against}",
                unit="µs",
                ours=median(ours) / count * 1e6,
                peer=median(theirs) / count * 1e6,
                ratio=median_ratio(theirs, ours),
                at_least=bar,
            )
        )
    return Result(rows)


def made(keys: Sequence[str]) -> dict[str, Work]:
    """The works, each with counters of its own."""
    one, two = Limiter("memory://"), Limiter("memory://")
    three, four = FixedWindowRateLimiter(MemoryStorage()), FixedWindowRateLimiter(MemoryStorage())
    return {
        "our hit": lambda: our_hits(one, keys),
        "their hit": lambda: their_hits(three, keys),
        "our answer": lambda: our_answers(two, keys),
        "their answer": lambda: their_answers(four, keys),
    }


def our_hits(limiter: Limiter, keys: Sequence[str]) -> None:
    hit = limiter.hit
    for key in keys:
        hit(RATE, key)


def their_hits(limiter: FixedWindowRateLimiter, keys: Sequence[str]) -> None:
    hit, item = limiter.hit, limits.parse(RATE)
    for key in keys:
        hit(item, key)


def our_answers(limiter: Limiter, keys: Sequence[str]) -> tuple[bool, int, float]:
    hit = limiter.hit
    answer = (False, 0, 0.0)
    for key in keys:
        verdict = hit(RATE, key)
        answer = verdict.allowed, verdict.remaining, verdict.reset_ns
    return answer


def their_answers(limiter: FixedWindowRateLimiter, keys: Sequence[str]) -> tuple[bool, int, float]:
    hit, stats, item = limiter.hit, limiter.get_window_stats, limits.parse(RATE)
    answer = (False, 0, 0.0)
    for key in keys:
        allowed = hit(item, key)
        window = stats(item, key)
        answer = allowed, window.remaining, window.reset_time
    return answer


def verify(key: str) -> None:
    """Both count: the hundredth hit is the last that is allowed. Raises Unfit."""
    ours, theirs = Limiter("memory://"), FixedWindowRateLimiter(MemoryStorage())
    for hits in (100, 101):
        mine = our_answers(ours, [key] * (hits if hits == 100 else 1))[:2]
        other = their_answers(theirs, [key] * (hits if hits == 100 else 1))[:2]
        if not mine == other == (hits == 100, 0):
            raise Unfit(f"after {hits} hits of {RATE} ours answered {mine}, limits {other}")
