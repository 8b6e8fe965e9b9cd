"""The Redis store when servers stop, pause, die and come back, and the state machine that spares them."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from gatekeeper.commands import Batch, Verdict
from gatekeeper.errors import StoreError
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import RateLimit, Rule
from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.redis.breaker import (
    FAILURES,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    NEXT,
    Breaker,
    Condition,
    Event,
)
from gatekeeper.stores.redis.packing import slot_of, tag_of
from tests.redis_servers import PATIENT, Server, cluster, cluster_url, masters, prefix, running, until

SLACK = 0.4
"""Seconds by which a wait may be longer than the timeout on a machine that runs other tests, too."""


def limit(amount: int = 10**6, name: str = "rule") -> RateLimit:
    """A limit whose refusals do not last, so that the server is asked each time."""
    one = Rule(name, [Rate(amount, 3600)]).limits[0]
    one.refusals_last = False
    return one


# The breaker.


def opened(draw: float = 0.0, now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES):
        assert breaker.allows(now)
        breaker.failed(now, draw)
    return breaker


def test_every_event_is_answered_in_every_condition() -> None:
    for condition, event in itertools.product(Condition, Event):
        possible = not (
            (event is Event.DUE and condition is Condition.CLOSED)
            or (event is Event.TOO_OFTEN and condition is not Condition.CLOSED)
        )
        assert ((condition, event) in NEXT) is possible
    assert {NEXT[condition, Event.ANSWERED] for condition in Condition} == {Condition.CLOSED}


def test_fewer_failures_than_five_in_a_row_open_nothing() -> None:
    breaker = Breaker()
    for _ in range(10):
        for _ in range(FAILURES - 1):
            breaker.failed(0.0, 0.5)
        assert breaker.allows(0.0)
        assert not breaker.is_calm
        breaker.answered()
        assert breaker.is_calm


def test_an_open_breaker_lets_one_probe_through_after_its_pause() -> None:
    breaker = opened(draw=1.0)
    assert repr(breaker) == "<Breaker open, 5 failures>"
    assert not breaker.allows(FIRST_PAUSE - 0.001)
    assert breaker.allows(FIRST_PAUSE)
    assert repr(breaker) == "<Breaker probing, 5 failures>"
    assert not any(breaker.allows(FIRST_PAUSE + 0.01 * turn) for turn in range(10))
    breaker.answered()
    assert all(breaker.allows(FIRST_PAUSE) for _ in range(10))


def test_pauses_double_up_to_a_bound_and_begin_anew_after_an_answer() -> None:
    breaker, now, pauses = opened(draw=1.0), 0.0, []
    for _ in range(9):
        begun = now
        while not breaker.allows(now):
            now += 0.01
        pauses.append(now - begun)
        breaker.failed(now, 1.0)
    for pause, before in zip(pauses[1:6], pauses, strict=False):
        assert pause == pytest.approx(2 * before, abs=0.03)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE, abs=0.02)
    breaker.answered()
    for _ in range(FAILURES):
        breaker.failed(now, 1.0)
    assert not breaker.allows(now + FIRST_PAUSE - 0.01)
    assert breaker.allows(now + FIRST_PAUSE)


@pytest.mark.parametrize(("draw", "pause"), [(0.0, 0.05), (0.5, 0.075), (0.999, 0.09995)])
def test_chance_shortens_a_pause_to_half_at_most(draw: float, pause: float) -> None:
    assert not opened(draw).allows(pause - 0.0001)
    assert opened(draw).allows(pause + 0.0001)


def test_failures_that_come_late_do_not_prolong_a_pause() -> None:
    breaker = opened(draw=1.0)
    for _ in range(200):
        breaker.failed(0.09, 1.0)
    assert breaker.allows(0.1)
    breaker.failed(0.1, 1.0)
    assert breaker.allows(0.3 + 0.001)


def test_a_late_answer_closes_and_a_lost_probe_is_followed_by_another() -> None:
    breaker = opened(draw=1.0)
    breaker.answered()
    assert breaker.condition is Condition.CLOSED
    breaker = opened(draw=1.0)
    assert breaker.allows(0.1)
    assert not breaker.allows(0.1 + LONGEST_PAUSE - 0.01)
    assert breaker.allows(0.1 + LONGEST_PAUSE)


# Real servers.


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as own:
        yield own


Ask = Callable[[Batch], "Verdict | StoreError"]


@pytest.fixture(params=["blocking", "awaiting"])
def ask(request: pytest.FixtureRequest, server: Server) -> Iterator[Ask]:
    """Asks a store with a timeout of 0.1 s."""
    with closing(RedisStore(server.url, timeout=0.1)) as store, asyncio.Runner() as runner:

        async def awaiting(batch: Batch) -> Verdict | StoreError:
            await asyncio.sleep(0.001)  # a loop that runs has seen what happened before
            return (await store.aask(batch))[0]

        if request.param == "blocking":
            yield lambda batch: store.ask(batch)[0]
        else:
            yield lambda batch: runner.run(awaiting(batch))


def one_hit() -> Batch:
    return Batch([(limit(), "key", 1)])


def timed(ask: Ask) -> tuple[Verdict | StoreError, float]:
    begun = time.monotonic()
    return ask(one_hit()), time.monotonic() - begun


def test_a_stopped_server_costs_one_timeout_a_question_then_nothing_and_is_found_again(
    server: Server, ask: Ask
) -> None:
    assert isinstance(until(lambda: ask(one_hit())), Verdict)
    server.pause()
    try:
        waits = []
        for _ in range(60):
            reply, waited = timed(ask)
            assert isinstance(reply, StoreError)
            assert waited < 0.1 + SLACK
            waits.append(waited)
        # Five to open, and now and then a probe.
        assert sum(waited > 0.05 for waited in waits) <= 15
        assert sorted(waits)[len(waits) // 2] < 0.02
        assert "127.0.0.1" not in str(reply)
        assert str(server.port) not in str(reply)
    finally:
        server.resume()
    until(lambda: isinstance(ask(one_hit()), Verdict), every=0.01)
    assert all(isinstance(ask(one_hit()), Verdict) for _ in range(50))


def test_a_killed_server_is_found_again_when_it_is_back_without_scripts_and_counts(
    server: Server, ask: Ask
) -> None:
    for _ in range(3):
        assert ask(one_hit())
    server.kill()
    for _ in range(20):
        reply, waited = timed(ask)
        assert isinstance(reply, StoreError)
        assert waited < 0.1 + SLACK
    server.start()
    first = until(lambda: isinstance(reply := ask(one_hit()), Verdict) and reply, every=0.01)
    assert first.remaining == 10**6 - 1, "the counts died with it"
    assert all(isinstance(ask(one_hit()), Verdict) for _ in range(50))


def test_a_restart_between_two_questions_goes_unnoticed(server: Server, ask: Ask) -> None:
    for _ in range(3):
        assert isinstance(until(lambda: ask(one_hit())), Verdict)
        server.kill()
        server.start()
    assert isinstance(ask(one_hit()), Verdict)


def test_what_a_server_does_too_late_is_given_back(server: Server) -> None:
    async def main() -> None:
        one = limit(1000)
        store, watch = RedisStore(server.url, timeout=0.1), RedisStore(server.url, timeout=PATIENT)
        assert (await store.aask([(one, "key", 1)]))[0].allowed
        server.call("CLIENT", "PAUSE", 400)
        replies = await asyncio.gather(*(store.aask([(one, "key", 1)]) for _ in range(20)))
        assert all(isinstance(reply, StoreError) for (reply,) in replies)

        async def remaining() -> int:
            (reply,) = await watch.aask(Batch([(one, "key", 0)], spend=False))
            assert isinstance(reply, Verdict)
            return reply.remaining

        for _ in range(400):
            if await remaining() == 999:
                break
            await asyncio.sleep(0.005)
        assert await remaining() == 999
        await store.aclose()
        await watch.aclose()

    asyncio.run(main())


def test_a_connection_on_which_the_server_was_late_is_closed_once_its_answers_are_read(server: Server) -> None:
    async def main() -> None:
        one = limit(1000)
        store = RedisStore(server.url, timeout=0.05)
        for _ in range(4):
            assert (await store.aask([(one, "key", 1)]))[0].allowed
            server.call("CLIENT", "PAUSE", 150)
            assert not (await store.aask([(one, "key", 1)]))[0].allowed
            for _ in range(400):  # a new connection, once the server goes on
                if (await store.aask([(one, "key", 0)]))[0].allowed:
                    break
                await asyncio.sleep(0.01)

        def others() -> int:
            return bytes(server.call("CLIENT", "LIST")).count(b"\n") - 1  # all but who asks

        for _ in range(400):
            if others() == 1:
                break
            await asyncio.sleep(0.01)
        assert others() == 1
        await store.aclose()

    asyncio.run(main())


def test_under_load_no_question_waits_much_longer_than_the_timeout_while_the_server_is_paused(
    server: Server,
) -> None:
    async def main() -> None:
        store, one = RedisStore(server.url, timeout=0.1), limit()
        waits: list[float] = []
        errors: list[StoreError] = []
        end = time.monotonic() + 2.0

        async def client(name: str) -> None:
            while time.monotonic() < end:
                begun = time.monotonic()
                (reply,) = await store.aask([(one, name, 1)])
                waits.append(time.monotonic() - begun)
                if isinstance(reply, StoreError):
                    errors.append(reply)
                await asyncio.sleep(0.002)

        clients = [asyncio.create_task(client(f"key{number}")) for number in range(30)]
        await asyncio.sleep(0.3)
        assert not errors
        server.call("CLIENT", "PAUSE", 600)
        await asyncio.gather(*clients)
        assert errors
        assert max(waits) < 0.1 + SLACK
        # While it was paused most were refused at once; then it closed, and all were answered.
        assert sum(wait > 0.09 for wait in waits) < 30 * 8
        assert all(
            isinstance(reply, Verdict) for (reply,) in [await store.aask([(one, "key", 1)]) for _ in range(9)]
        )
        await store.aclose()

    asyncio.run(main())


def test_threads_find_a_server_that_was_restarted_under_load(server: Server) -> None:
    with closing(RedisStore(server.url, timeout=0.2)) as store:
        one, stop = limit(), threading.Event()
        waits: list[float] = []

        def work(name: str) -> None:
            while not stop.is_set():
                begun = time.monotonic()
                store.ask([(one, name, 1)])
                waits.append(time.monotonic() - begun)
                time.sleep(0.001)

        threads = [threading.Thread(target=work, args=(f"key{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(waits) > 50)
            server.kill()
            count = len(waits)
            until(lambda: len(waits) > count + 50)
            server.start()
            until(lambda: isinstance(store.ask([(one, "key", 1)])[0], Verdict))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert max(waits) < 0.2 + SLACK
        assert all(isinstance(store.ask([(one, "key", 1)])[0], Verdict) for _ in range(50))


def test_one_process_sends_one_probe_at_a_time(server: Server) -> None:
    async def main() -> None:
        store, one = RedisStore(server.url, timeout=0.1), limit()
        await store.aask([(one, "key", 1)])
        server.pause()
        try:
            await asyncio.gather(*(store.aask([(one, "key", 1)]) for _ in range(50)))
            for _ in range(10):
                begun = time.monotonic()
                replies = await asyncio.gather(*(store.aask([(one, "key", 1)]) for _ in range(50)))
                assert all(isinstance(reply, StoreError) for (reply,) in replies)
                told = [str(reply) for (reply,) in replies]
                assert sum("not asked" not in text for text in told) <= 1
                assert time.monotonic() - begun < 0.1 + SLACK
        finally:
            server.resume()
        await store.aclose()

    asyncio.run(main())


def test_a_busy_loop_is_not_a_dead_store(server: Server) -> None:
    async def main() -> None:
        store, one = RedisStore(server.url, timeout=0.1), limit()
        await store.aask([(one, "key", 1)])
        for _ in range(5):
            question = asyncio.create_task(store.aask([(one, "key", 1)]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.25)  # noqa: ASYNC251  # the loop is busy: that is what is tried
            (reply,) = await question
            assert isinstance(reply, Verdict)
        await store.aclose()

    asyncio.run(main())


def test_a_busy_uvloop_is_not_a_dead_store_either(server: Server) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        store, one = RedisStore(server.url, timeout=0.1), limit()
        await store.aask([(one, "key", 1)])
        for _ in range(5):
            question = asyncio.create_task(store.aask([(one, "key", 1)]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.25)  # noqa: ASYNC251
            (reply,) = await question
            assert isinstance(reply, Verdict)
        # No aclose: the loop closes what the store has on it.

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_all_connections_in_use_is_an_error_after_the_timeout(server: Server) -> None:
    with closing(RedisStore(server.url, timeout=0.3, max_connections=1)) as store:
        one = limit()
        assert store.ask([(one, "key", 1)])[0].allowed
        server.pause()
        replies: list[Verdict | StoreError] = []

        def work() -> None:
            replies.append(store.ask([(one, "key", 1)])[0])

        threads = [threading.Thread(target=work) for _ in range(3)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            server.resume()
        assert all(isinstance(reply, StoreError) for reply in replies)
        until(lambda: isinstance(store.ask([(one, "key", 1)])[0], Verdict))


def test_no_server_at_all_is_an_error_and_not_an_exception() -> None:
    for url in (
        "redis://127.0.0.1:1",
        "unix:///nonexistent/socket",
        "redis://nonexistent.invalid",
        "redis+cluster://127.0.0.1:1,127.0.0.1:2",
        "redis+sentinel://127.0.0.1:1/front",
    ):
        with closing(RedisStore(url, timeout=0.5)) as store:
            for _ in range(8):
                for (reply,) in (store.ask(one_hit()), asyncio.run(store.aask(one_hit()))):
                    assert isinstance(reply, StoreError)
                    assert "127" not in str(reply)
                    assert "nonexistent" not in str(reply)
            with pytest.raises(StoreError):
                store.keys(limit())


# A cluster.


def keys_of(node: Server) -> list[str]:
    """Some keys whose slots this master has."""
    ranges = [(low, high) for low, high, (_, port, *_), *_ in node.call("CLUSTER", "SLOTS") if port == node.port]
    return [
        key
        for number in range(200)
        if any(low <= slot_of(tag_of(key := f"key{number}", listed=False)) <= high for low, high in ranges)
    ]


@pytest.mark.parametrize("awaits", [False, True])
def test_when_a_master_dies_only_its_slots_fail_until_its_replica_has_taken_over(awaits: bool) -> None:
    with cluster(replicas=1) as nodes:
        first, second, third, replica = nodes
        one = limit()
        dead, alive = keys_of(first)[:10], [*keys_of(second)[:10], *keys_of(third)[:10]]
        with (
            closing(RedisStore(cluster_url(nodes[:3]), timeout=0.5, prefix=prefix())) as store,
            asyncio.Runner() as runner,
        ):

            def ask(*keys: str) -> list[Verdict | StoreError]:
                batch = Batch([(one, key, 1) for key in keys])
                return runner.run(store.aask(batch)) if awaits else store.ask(batch)

            assert all(isinstance(ask(key)[0], Verdict) for key in dead + alive)
            first.kill()
            for key in dead:
                assert isinstance(ask(key)[0], StoreError)
            for key in alive:
                assert isinstance(ask(key)[0], Verdict)
            mixed = ask(dead[0], alive[0], alive[-1])
            assert [isinstance(reply, Verdict) for reply in mixed] == [False, True, True]
            until(lambda: replica.call("CLUSTER", "FAILOVER", "TAKEOVER") == b"OK")
            until(lambda: all(replica.port in masters(node) for node in (second, third, replica)))
            until(lambda: isinstance(ask(dead[0])[0], Verdict))
            assert all(isinstance(ask(key)[0], Verdict) for key in dead + alive)
