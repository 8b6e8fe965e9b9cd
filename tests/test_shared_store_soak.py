"""Long trials of the shared store, by `make soak`: a hundred processes killed under load, millions of steps."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

import pytest

from gatekeeper.commands import Hits, Verdict
from gatekeeper.ratelimit.algorithms import ALGORITHMS
from gatekeeper.stores.shared import SharedStore
from gatekeeper.testing import VirtualClock
from tests.oracles import NS, ORACLES, ExactLog, Oracle
from tests.shared_store import (
    SIZE,
    barrier,
    counts,
    hit,
    hit_with_strangers,
    joined,
    limit,
    started,
    temporary_folder,
)

pytestmark = pytest.mark.soak

STEPS = 1_000_000
KILLS = 100


@pytest.fixture
def path() -> Iterator[Path]:
    folder = temporary_folder()
    yield folder
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("how", ["fork", "spawn"])
@pytest.mark.parametrize("work", [hit, hit_with_strangers])
def test_a_hundred_processes_killed_under_load_leave_the_others_exact(
    path: Path, work: Callable[..., None], how: str
) -> None:
    """Four at a time. Of each killed one at most one hit was charged that it did not live to count."""
    amount, random = 10**8, Random(work.__name__)
    store, one = SharedStore(path, size=SIZE), limit(amount)
    admitted = counts(how, KILLS + 4)
    alive: dict[int, BaseProcess] = {}
    begun = killed = 0
    try:
        while killed < KILLS:
            while len(alive) < 4:
                (alive[begun],) = started(how, work, [(path, amount, 0, admitted, begun)])
                begun += 1
            newest, deadline = max(alive), time.monotonic() + 60
            while not admitted[newest]:
                assert time.monotonic() < deadline, "the newest was kept out"
                time.sleep(0.001)
            time.sleep(random.random() / 50)
            place = random.choice(list(alive))
            os.kill(alive[place].pid or 0, signal.SIGKILL)
            assert joined([alive.pop(place)]) == [-signal.SIGKILL]
            killed += 1
    finally:
        for process in alive.values():
            process.kill()
        ended = joined(list(alive.values()))
    assert set(ended) == {-signal.SIGKILL}, "those that were not killed had no trouble"
    (look,) = store.ask([(one, "key", 0)])
    assert isinstance(look, Verdict)
    assert sum(admitted) <= amount - look.remaining <= sum(admitted) + begun
    assert sum(admitted) > 10_000
    assert store.ask([(one, "key", look.remaining)])[0].allowed
    assert not store.ask([(one, "key", 1)])[0].allowed
    with store._files.transaction() as txn:
        names = [name for name, _ in txn.cursor()]
    assert names == sorted(set(names))
    assert len(names) == len(store)
    assert store.failed == 0
    store.close()


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_processes_of_a_long_run_admit_exactly_the_limit(path: Path, how: str) -> None:
    for number in range(10):
        folder = path.parent / f"{number}"
        admitted, together = counts(how, 4), barrier(how, 4)
        workers = started(how, hit, [(folder, 123_456, 50_000, admitted, place, together) for place in range(4)])
        assert joined(workers) == [0] * 4
        assert sum(admitted) == 123_456


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_million_random_steps_agree_with_the_oracle(path: Path, algorithm: str) -> None:
    random, clock = Random(20), VirtualClock()
    store = SharedStore(path, size=SIZE, clock=clock)
    one = limit(7, 60, algorithm=algorithm)
    oracles: dict[str, Oracle] = defaultdict(lambda: ORACLES[algorithm](7, 60))
    for step in range(STEPS):
        clock.advance(random.choice([0, 0, 0, 0.01, 0.3, 1, 60 / 64, 2, 5]))
        key, cost = f"key{random.randrange(20)}", random.choice([1, 1, 1, 2, 7])
        hits: Hits = [(one, key, cost)]
        (verdict,) = store.ask(hits)
        oracle = oracles[key]
        assert verdict.allowed == oracle.hit(clock(), cost), step
        assert isinstance(verdict, Verdict)
        assert verdict.remaining == oracle.remaining(clock()), step
        if isinstance(oracle, ExactLog):  # what has left the window for good need not be summed again
            now = clock() // (60 * NS // 64)
            oracle.hits = [(at, cost) for at, cost in oracle.hits if now - at <= 64]
    store.close()


def test_three_million_strangers_stay_within_the_bounds(path: Path) -> None:
    """Each hits once, and many more come in a lifetime than may be held; then fewer."""
    clock = VirtualClock()
    store, one = SharedStore(path, max_keys=50_000, clock=clock), limit(10, 60)
    for number in range(3_000_000):
        hits: Hits = [(one, f"stranger:{number}", 1)]
        assert isinstance(store.ask(hits)[0], Verdict)
        if number % 1000 == 0:
            clock.advance(0.7 if number < 1_000_000 else 2)
            assert len(store) <= 50_001
        if number == 2_000_000:
            store.overflowed = 0
    assert store.overflowed == 0, "thirty thousand in a lifetime leave room for what is not yet swept"
    assert store.failed == 0
    store.close()
