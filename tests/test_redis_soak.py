"""Long trials of the Redis store, by `make soak`: millions of steps through a real server, and servers that die."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from random import Random

import pytest

from gatekeeper.commands import Hit, Verdict
from gatekeeper.errors import StoreError
from gatekeeper.ratelimit.algorithms import ALGORITHMS
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.stores.redis import RedisStore
from gatekeeper.testing import VirtualClock
from tests.oracles import NS, ORACLES, ExactLog, Oracle
from tests.redis_servers import PATIENT, prefix, running, shared_server
from tests.test_redis_store import Trial

pytestmark = pytest.mark.soak

STEPS = 1_000_000
AT_ONCE = 100


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_million_random_steps_agree_with_the_oracle(algorithm: str) -> None:
    random = Random(30)
    clock = VirtualClock()
    rate = Rate(7, 60)
    limit = Rule("soak", [rate], algorithm=algorithm).limits[0]
    oracles: dict[str, Oracle] = defaultdict(lambda: ORACLES[algorithm](*rate))

    async def main() -> None:
        store = RedisStore(shared_server().unix_url, prefix=prefix(), clock=clock, timeout=PATIENT)
        for _ in range(STEPS // AT_ONCE):
            clock.advance(random.choice([0, 0, 0, 0.01, 0.3, 1, 60 / 64, 2, 5]))
            hits: list[Hit] = [
                (limit, f"key{random.randrange(200)}", random.choice([1, 1, 1, 2, 7])) for _ in range(AT_ONCE)
            ]
            replies = await asyncio.gather(*(store.aask([hit]) for hit in hits))
            now = clock()
            for (_, key, cost), (verdict,) in zip(hits, replies, strict=True):
                oracle = oracles[key]
                assert isinstance(verdict, Verdict)
                assert verdict.allowed == oracle.hit(now, cost)
                assert verdict.remaining == oracle.remaining(now)
                if isinstance(oracle, ExactLog):  # what has left the window for good need not be summed again
                    tick = now // (rate.period * NS // 64)
                    oracle.hits = [(at, cost) for at, cost in oracle.hits if tick - at <= 64]
        await store.aclose()

    asyncio.run(main())


def test_the_twins_answer_as_the_algorithms_do_over_a_thousand_histories() -> None:
    for seed in range(1000):
        clock = VirtualClock()
        store = RedisStore(
            shared_server().unix_url, prefix=prefix(), clock=clock, timeout=PATIENT, cache_refusals=False
        )
        trial = Trial(store, clock, Random(seed))
        for _ in range(200):
            trial.step()
        store.close()


def test_a_server_that_dies_again_and_again_is_found_each_time() -> None:
    async def main() -> None:
        limit = Rule("soak", [Rate(10**6, 3600)]).limits[0]
        slowest = 0.0
        end = False

        async def client(store: RedisStore, name: str) -> None:
            nonlocal slowest
            while not end:
                begun = time.monotonic()
                await store.aask([(limit, name, 1)])
                slowest = max(slowest, time.monotonic() - begun)
                await asyncio.sleep(0.001)

        with running() as server:
            store = RedisStore(server.url, timeout=0.1)
            clients = [asyncio.create_task(client(store, f"key{number}")) for number in range(20)]
            for round_ in range(30):
                for _ in range(1000):
                    (reply,) = await store.aask([(limit, "probe", 1)])
                    if isinstance(reply, Verdict):
                        break
                    await asyncio.sleep(0.01)
                assert isinstance(reply, Verdict), round_
                if round_ % 2:
                    await asyncio.to_thread(server.kill)
                    await asyncio.sleep(0.2)
                    await asyncio.to_thread(server.start)
                else:
                    server.pause()
                    await asyncio.sleep(0.3)
                    server.resume()
            end = True
            await asyncio.gather(*clients)
            assert slowest < 1.0
            assert not isinstance(reply, StoreError)
            await store.aclose()

    asyncio.run(main())
