"""throttled-py's own cases, in memory: one key, 1,000 a second, one thread and eight.

Its test suite measures `Throttled.limit("/ping", cost=1)` with each of its algorithms, 100,000 times in turn and
from a pool of eight threads. Ours is `Limiter.hit` with the algorithm that promises the same, or more; what it
calls a leaking bucket and a token bucket are one to us (`gcra`). Most answers are refusals, as in its cases. What
the threads of the pool cost is the same on both sides and part of both.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any, Final

from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, Work, interleave, median_ratio, peer
from gatekeeper import Limiter

RATE: Final = "1000/second"
KEY: Final = "/ping"
WORKERS: Final = 8
BAR: Final = 4.0
OURS: Final = {
    "fixed_window": "fixed_window",
    "sliding_window": "sliding_counter",
    "token_bucket": "gcra",
    "leaking_bucket": "gcra",
    "gcra": "gcra",
}
"""Our algorithm for each of its own: its sliding window has two counters."""


def run(quick: bool, progress: Progress) -> Result:
    against = peer("throttled-py")
    try:
        throttled: Any = import_module("throttled")
    except ImportError:
        raise Skipped("throttled-py cannot be imported") from None
    rounds, count = (3, 10_000) if quick else (9, 50_000)
    verify(throttled)
    rows = []
    for way in ("one thread", f"{WORKERS} threads"):
        for theirs, ours in OURS.items():
            works = sides(throttled, theirs, ours, count, WORKERS if way != "one thread" else 1)
            seconds = interleave(lambda number, works=works: works, rounds, progress=progress)  # type: ignore[misc]
            rows.append(
                Row(
                    what=f"{ours}, {way}: against {against}, {theirs}",
                    unit="µs",
                    ours=median(seconds["our"]) / count * 1e6,
                    peer=median(seconds["their"]) / count * 1e6,
                    ratio=median_ratio(seconds["their"], seconds["our"]),
                    at_least=BAR,
                )
            )
    return Result(rows)


def sides(throttled: Any, theirs: str, ours: str, count: int, workers: int) -> dict[str, Work]:
    throttle = throttled.Throttled(using=theirs, quota=throttled.per_sec(1_000), store=throttled.MemoryStore())
    limiter = Limiter("memory://", algorithm=ours)
    hit, limit = limiter.hit, throttle.limit
    return {
        "our": partial(repeated, lambda: hit(RATE, KEY).allowed, count, workers),
        "their": partial(repeated, lambda: limit(KEY, cost=1).limited, count, workers),
    }


def repeated(call: Callable[[], object], count: int, workers: int) -> None:
    def part(times: int) -> None:
        for _ in range(times):
            call()

    if workers == 1:
        part(count)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(part, [count // workers] * workers))


def verify(throttled: Any) -> None:
    """Both count: of 1,500 hits at once some 1,000 are allowed. Raises Unfit."""
    for theirs, ours in OURS.items():
        for _ in range(5):  # a second may end in the middle of it
            throttle = throttled.Throttled(
                using=theirs, quota=throttled.per_sec(1_000), store=throttled.MemoryStore()
            )
            limiter = Limiter("memory://", algorithm=ours)
            allowed = sum(limiter.hit(RATE, KEY).allowed for _ in range(1_500))
            its = sum(not throttle.limit(KEY, cost=1).limited for _ in range(1_500))
            if 1_000 <= allowed <= 1_200 and 1_000 <= its <= 1_200:
                break
        else:
            raise Unfit(f"of 1500 hits {allowed} were allowed by {ours}, {its} by its {theirs}")
