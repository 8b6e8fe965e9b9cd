"""One decision in the shared store, a million keys present, and what four processes at once do to it.

Uncontended: `gatekeeper.Limiter.hit` on the shared store against `hit` of `limits` in the memory of one process,
the same loop over the same keys, chosen at random among the million, on both sides:

- its `FixedWindowRateLimiter`, the cheapest it has. It holds only the keys of the loop, which spares it what it
  does about the others; the bar is that ours takes at most twice its time;
- the same, holding the million, as ours does;
- its `MovingWindowRateLimiter`, which like ours never lets more than the rate into any window.

Ours is the default, `sliding_window`, exact over processes.

Contended: processes that do nothing but hit keys of the million, each decision timed by the wall clock. The
longest are those in which the system lets another process run (there may be fewer processors than processes), and
that process waits for the lock in its turn.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any, Final

import limits
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, Work, interleave, median_ratio, peer
from gatekeeper import Limiter
from gatekeeper.errors import MissingExtra

RATE: Final = "1000000/hour"  # no key comes near its limit, and none expires
PROCESSES: Final = 4
MEMORY: Final = Path("/dev/shm")
PATIENCE: Final = 120.0


def run(quick: bool, progress: Progress) -> Result:
    against = peer("limits")
    try:
        import gatekeeper.stores.shared  # noqa: F401 - only whether it is there
    except MissingExtra as missing:
        raise Skipped(str(missing)) from None
    present, count, rounds = (50_000, 5_000, 3) if quick else (1_000_000, 50_000, 9)
    keys = [f"client:{number:017d}" for number in range(present)]
    with folder() as path:
        ours = Limiter(f"shared://{path}")
        progress("filling")
        our_hits(ours, keys)
        verify(ours)
        rows = alone(ours, keys, count, rounds, against, progress)
        progress(f"{PROCESSES} processes")
        rows += together(path, present, count)
        ours.close()
    return Result(
        rows,
        [
            f"shared: {present:,} keys of 24 characters present; the bar, at most twice the peer's time, "
            "is at least half a time of ours",
            f"shared: with {PROCESSES} processes by the wall clock, on {multiprocessing.cpu_count()} processors",
        ],
    )


def alone(
    ours: Limiter, keys: Sequence[str], count: int, rounds: int, against: str, progress: Progress
) -> list[Row]:
    chosen = Random(7).sample(keys, count)
    few, many = FixedWindowRateLimiter(MemoryStorage()), FixedWindowRateLimiter(MemoryStorage())
    moving = MovingWindowRateLimiter(MemoryStorage())
    their_hits(many, keys)

    def works(number: int) -> Mapping[str, Work]:
        return {
            "ours": lambda: our_hits(ours, chosen),
            "fixed window": lambda: their_hits(few, chosen),
            f"fixed window holding {len(keys):,}": lambda: their_hits(many, chosen),
            "moving window": lambda: their_hits(moving, chosen),
        }

    seconds = interleave(works, rounds, progress=progress)
    mine = seconds.pop("ours")
    return [
        Row(
            what=f"shared: hit, against {against} in memory, {name}",
            unit="µs",
            ours=median(mine) / count * 1e6,
            peer=median(theirs) / count * 1e6,
            ratio=median_ratio(theirs, mine),
            at_least=0.5 if name == "fixed window" else None,
        )
        for name, theirs in seconds.items()
    ]


def our_hits(limiter: Limiter, keys: Sequence[str]) -> None:
    hit = limiter.hit
    for key in keys:
        hit(RATE, key)


def their_hits(limiter: FixedWindowRateLimiter | MovingWindowRateLimiter, keys: Sequence[str]) -> None:
    hit, item = limiter.hit, limits.parse(RATE)
    for key in keys:
        hit(item, key)


def verify(limiter: Limiter) -> None:
    """It counts: the third hit of two is refused. Raises Unfit."""
    outcomes = [limiter.hit("2/hour", "key").allowed for _ in range(3)]
    if outcomes != [True, True, False]:
        raise Unfit(f"hits of 2/hour were answered {outcomes}")


def together(path: Path, present: int, count: int) -> list[Row]:
    """The same with several processes at once, and with one alone timed in the same way."""
    rows = []
    for processes in (1, PROCESSES):
        times = sorted(timed(path, present, count, processes))
        what = f"shared: hit, {processes} process{'es' if processes > 1 else ''}, {{}}"
        rows += [
            Row(what.format("mean"), "µs", fmean(times) / 1e3),
            Row(what.format("99.9 %"), "µs", times[len(times) * 999 // 1000] / 1e3),
        ]
    return rows


def timed(path: Path, present: int, count: int, processes: int) -> array[int]:
    """What each decision took, in nanoseconds, of all processes."""
    context: Any = multiprocessing.get_context("spawn")
    together = context.Barrier(processes)
    times = array("Q")
    workers: list[tuple[Any, Connection]] = []
    for place in range(processes):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(
            target=measure, args=(str(path), present, count, place, together, send), daemon=True
        )
        process.start()
        send.close()
        workers.append((process, receive))
    try:
        for _, receive in workers:
            if not receive.poll(PATIENCE):
                raise Unfit(f"a process did not end within {PATIENCE:g} s")
            times.frombytes(receive.recv_bytes())
    except EOFError:
        raise Unfit("a process failed") from None
    finally:
        for process, receive in workers:
            receive.close()
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()
    return times


def measure(path: str, present: int, count: int, place: int, together: Any, send: Connection) -> None:
    """In a process of its own: hit random keys, and send what each hit took."""
    random, limiter = Random(place), Limiter(f"shared://{path}")
    chosen = [f"client:{random.randrange(present):017d}" for _ in range(count)]
    times = array("Q", bytes(8 * count))
    hit: Callable[[str, str], object] = limiter.hit
    now = time.perf_counter_ns
    for key in chosen[: count // 10]:  # until its pages are mapped
        hit(RATE, key)
    together.wait(PATIENCE)
    for at, key in enumerate(chosen):
        started = now()
        hit(RATE, key)
        times[at] = now() - started
    together.wait(PATIENCE)
    send.send_bytes(times.tobytes())
    limiter.close()


@contextmanager
def folder() -> Iterator[Path]:
    above = tempfile.mkdtemp(prefix="gatekeeper-bench-", dir=MEMORY if MEMORY.is_dir() else None)
    try:
        yield Path(above) / "store"
    finally:
        shutil.rmtree(above)
