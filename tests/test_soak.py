"""Long trials, by `make soak`: millions of steps against the oracles, and the memory that they leave behind."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from pathlib import Path
from random import Random

import pytest

from gatekeeper import Limiter
from gatekeeper.commands import Hits, Verdict
from gatekeeper.ratelimit.algorithms import ALGORITHMS
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock
from tests.oracles import NS, ORACLES, ExactLog, Oracle

pytestmark = pytest.mark.soak

STEPS = 1_000_000


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_million_random_steps_agree_with_the_oracle(algorithm: str) -> None:
    random = Random(20)
    clock = VirtualClock()
    store = MemoryStore(clock=clock)
    rate = Rate(7, 60)
    limit = Rule("soak", [rate], algorithm=algorithm).limits[0]
    oracles: dict[str, Oracle] = defaultdict(lambda: ORACLES[algorithm](*rate))
    for step in range(STEPS):
        clock.advance(random.choice([0, 0, 0, 0.01, 0.3, 1, 60 / 64, 2, 5]))
        key, cost = f"key{random.randrange(20)}", random.choice([1, 1, 1, 2, 7])
        hits: Hits = [(limit, key, cost)]
        (verdict,) = store.ask(hits)
        oracle = oracles[key]
        assert verdict.allowed == oracle.hit(clock(), cost), step
        assert isinstance(verdict, Verdict)
        assert verdict.remaining == oracle.remaining(clock()), step
        if isinstance(oracle, ExactLog):  # what has left the window for good need not be summed again
            now = clock() // (rate.period * NS // 64)
            oracle.hits = [(at, cost) for at, cost in oracle.hits if now - at <= 64]


def test_no_window_ever_admits_more_than_the_rate() -> None:
    random = Random(21)
    clock = VirtualClock()
    limiter = Limiter(MemoryStore(clock=clock))
    admitted: list[int] = []
    for _ in range(STEPS):
        clock.advance(random.expovariate(0.2))
        if limiter.hit("7/minute", "key"):
            admitted.append(clock())
    assert len(admitted) > 100_000
    # The eighth after any comes later than a minute: then no closed window of a minute holds eight.
    assert all(later - first > 60 * NS for first, later in zip(admitted, admitted[7:], strict=False))


def test_ten_million_strangers_leave_no_memory_behind() -> None:
    """Each hits once, in two hours of virtual time; what is held never passes the bound."""
    clock = VirtualClock()
    store = MemoryStore(max_keys=50_000, clock=clock)
    limiter = Limiter(store)
    before = after = 0
    for number in range(10_000_000):
        limiter.hit("10/minute", f"stranger:{number}")
        if number % 1000 == 0:
            clock.advance(0.7)
        if number == 1_000_000:
            before = resident()
    after = resident()
    assert len(store) <= 50_001
    assert after - before < 16 * 1024 * 1024


def test_threads_of_a_long_run_admit_exactly_the_limit() -> None:
    clock = VirtualClock()
    limiter = Limiter(MemoryStore(clock=clock))
    for _ in range(50):
        admitted: list[int] = []

        def work(admitted: list[int] = admitted) -> None:
            admitted.append(sum(bool(limiter.hit("5000/hour", "key")) for _ in range(4000)))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(admitted) == 5000
        clock.advance(3700)


def resident() -> int:
    """Resident memory in bytes, where the system tells it."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the system has no /proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096
