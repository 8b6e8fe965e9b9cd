"""What a live key takes in memory, and the longest that one insert holds its caller up.

A million keys of 24 characters, one hit each, in a fresh process for each algorithm. Keys are made on the way, so
that only the store keeps them: what is counted is the growth of the resident memory, with keys, tables and
whatever the allocator rounds up. The bars are for ours alone; `limits` (its fixed window) is shown beside it.

Each insert is timed by the wall clock (in other rows it is CPU time): the longest is the pause that a request may
meet while tables grow or the garbage collector runs. A busy machine makes it longer, and no bar is set for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import limits
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, peer, settle
from gatekeeper import Limiter
from gatekeeper.ratelimit.algorithms import ALGORITHMS
from gatekeeper.stores.memory import MemoryStore

RATE: Final = "100/hour"  # long enough that no key expires while others are still being put in
BARS: Final = {"gcra": 250.0, "sliding_window": 400.0}
PEER: Final = "limits"
STATM: Final = Path("/proc/self/statm")


class Footprint(NamedTuple):
    """Of one store: resident bytes a key, the longest insert and the 99.9th percentile in nanoseconds."""

    bytes_a_key: float
    longest_ns: int
    p999_ns: int


def run(quick: bool, progress: Progress) -> Result:
    if not STATM.exists():
        raise Skipped(f"resident memory is read from {STATM}, which is not here")
    against = peer(PEER)
    keys = 100_000 if quick else 1_000_000
    footprints = {}
    for name in (PEER, *ALGORITHMS):
        progress(name)
        footprints[name] = in_fresh_process(name, keys)
    theirs = footprints.pop(PEER)
    rows = []
    for name, ours in footprints.items():
        what = f"memory: {name}, {{}}, beside {against}"
        rows += [
            Row(what.format("a key"), "bytes", ours.bytes_a_key, theirs.bytes_a_key, at_most=BARS.get(name)),
            Row(what.format("insert, 99.9 %"), "µs", ours.p999_ns / 1e3, theirs.p999_ns / 1e3),
            Row(what.format("longest insert"), "ms", ours.longest_ns / 1e6, theirs.longest_ns / 1e6),
        ]
    return Result(rows, [f"memory: {keys:,} keys of 24 characters; inserts are timed by the wall clock"])


def in_fresh_process(name: str, keys: int) -> Footprint:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name, str(keys)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unfit(f"the process that fills {name} failed: {done.stderr.strip() or done.returncode}")
    return Footprint(*json.loads(done.stdout))


def fill(name: str, keys: int) -> Footprint:
    """Put `keys` keys into one store of this process, which should be a fresh one."""
    times = array("Q", bytes(8 * keys))  # written to beforehand, so that it is in the baseline
    insert, _ = opened(name, 1000)
    for number in range(1000):
        insert(f"warm-up:{number:016d}")
    insert, count = opened(name, keys)
    settle()
    before = resident()
    now = time.perf_counter_ns
    for number in range(keys):
        key = f"client:{number:017d}"
        started = now()
        insert(key)
        times[number] = now() - started
    settle()
    grown = resident() - before
    if count() != keys:
        raise Unfit(f"{name} holds {count()} keys and not {keys}")
    in_order = sorted(times)
    return Footprint(grown / keys, in_order[-1], in_order[keys * 999 // 1000])


def opened(name: str, keys: int) -> tuple[Callable[[str], object], Callable[[], int]]:
    """(one hit on a key, how many keys are held)"""
    if name == PEER:
        storage = MemoryStorage()
        theirs, item = FixedWindowRateLimiter(storage), limits.parse(RATE)
        return lambda key: theirs.hit(item, key), lambda: len(storage.storage)
    store = MemoryStore(max_keys=2 * keys)
    ours = Limiter(store, algorithm=name)
    return lambda key: ours.hit(RATE, key), lambda: len(store)


def resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(fill(sys.argv[1], int(sys.argv[2]))))
