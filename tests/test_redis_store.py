"""The Redis store beyond the contract: its Lua twins, its keys, its connections, against real servers."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.commands import NEVER, Batch, Give, Hit, Receipt, Replies, State, Verdict
from gatekeeper.errors import StoreError
from gatekeeper.ratelimit.algorithms import (
    ALGORITHMS,
    NS,
    Algorithm,
    Concurrency,
    FixedWindow,
    Gcra,
    Penalty,
    SlidingCounter,
    SlidingWindow,
)
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import RateLimit, Rule
from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.redis.address import Address, Target
from gatekeeper.stores.redis.packing import slot_of, tag_of, text_of
from gatekeeper.testing import VirtualClock
from tests.oracles import ORACLES, most_in_any_window
from tests.redis_servers import (
    PATIENT,
    Server,
    certificate,
    cluster,
    cluster_url,
    prefix,
    running,
    sentinel,
    shared_server,
    until,
)

each_algorithm = pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))


def bound(algorithm: Algorithm, name: str = "rule") -> RateLimit:
    return RateLimit(
        Rule(name, [Rate(1, 1)]), name, f"{name}/{algorithm.kind}.{algorithm.version}", algorithm, None
    )


def limit(amount: int = 3, period: int = 60, *, name: str = "rule", algorithm: str = "sliding_window") -> RateLimit:
    return Rule(name, [Rate(amount, period)], algorithm=algorithm).limits[0]


def given_back(amount: int = 3, period: int = 60, *, name: str = "rule") -> RateLimit:
    """A limit whose refusals do not last."""
    one = limit(amount, period, name=name)
    one.refusals_last = False
    return one


def seen(replies: Replies) -> list[Verdict]:
    assert all(isinstance(reply, Verdict) for reply in replies), replies
    return [reply for reply in replies if isinstance(reply, Verdict)]


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


Make = Callable[..., RedisStore]


@pytest.fixture
def make(server: Server) -> Iterator[Make]:
    """Makes stores on the shared server, each with keys of its own."""
    made: list[RedisStore] = []

    def store(url: str = server.unix_url, **options: Any) -> RedisStore:
        made.append(RedisStore(url, **{"prefix": prefix(), "timeout": PATIENT, **options}))
        return made[-1]

    yield store
    for one in made:
        one.close()


# The twins.


class Model:
    """A store of the algorithms themselves, in which a refused batch leaves no trace at all."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._states: dict[tuple[str, str], State] = {}

    def ask(self, batch: Batch) -> list[Verdict]:
        now, states = self._clock(), self._states
        for limit, key, cost, receipt in batch.gives:
            state = states.get((limit.space, key))
            if state is not None:
                states[limit.space, key] = limit.give(state, now, cost, receipt)
        for limit, key in batch.resets:
            states.pop((limit.space, key), None)
        for limit, key, cost in batch.takes:
            state = states.get((limit.space, key))
            after, verdict = limit.step(state, now, cost)
            if not verdict.allowed:
                after = limit.step(state, now, min(cost, verdict.remaining))[0]
            states[limit.space, key] = after
        verdicts, refused = [], False
        before: dict[tuple[str, str], State] = {}
        for limit, key, cost in batch:
            state = states.get((limit.space, key))
            after, verdict = limit.step(state, now, cost)
            verdicts.append(verdict)
            if not verdict.allowed:
                refused = refused or not limit.shadow
            elif batch.spend:
                if verdict.receipt is not None:
                    before.setdefault((limit.space, key), state)
                states[limit.space, key] = after
        if refused and batch.spend:
            states.update(before)
            for place, (limit, key, _) in enumerate(batch):
                if verdicts[place].receipt is not None:
                    verdicts[place] = limit.step(states.get((limit.space, key)), now, 0)[1]
        return verdicts


def facts(verdict: Verdict) -> tuple[object, ...]:
    """All of a verdict but the receipt, of which each store has its own."""
    waits = (verdict.reset_ns, verdict.retry_ns)
    return verdict.allowed, verdict.limit, verdict.remaining, *waits, verdict.receipt is None


def any_limit(random: Random, place: int) -> RateLimit:
    """A limit of any kind, with numbers for which the twins are exact to the nanosecond."""
    period = random.choice([1, 2, 60, 60, 3600, 86_400, 30 * 86_400])
    amount = random.choice([1, 2, 3, 7, 10, 100, 1000, 10**9])
    algorithm: Algorithm
    match random.choice(["window", "window", "lease", "gcra", "gcra", "counter", "counter", "fixed", "penalty"]):
        case "window":
            algorithm = SlidingWindow(amount, period)
        case "lease":
            algorithm = Concurrency(amount, period)
        case "gcra":
            algorithm = Gcra(amount, period, random.choice([None, 1, 2, 5, 50]))
            if algorithm.lifetime_ns > 1 << 52:
                algorithm = Gcra(3, 60)
        case "counter":
            algorithm = SlidingCounter(amount, period)
        case "fixed":
            algorithm = FixedWindow(amount, period)
        case _:
            algorithm = Penalty(random.randint(1, 5), period * NS, random.choice([1, 10]) * NS, 40 * NS)
    one = bound(algorithm, f"rule{place}")
    one.shadow = random.random() < 0.15
    return one


class Trial:
    """One random history, through the server and through the model, answer by answer."""

    def __init__(self, store: RedisStore, clock: VirtualClock, random: Random) -> None:
        self.store, self.clock, self.random = store, clock, random
        self.model = Model(clock)
        self.limits = [any_limit(random, place) for place in range(4)]
        self.receipts: list[tuple[Hit, Receipt, Receipt]] = []

    def step(self) -> None:
        random = self.random
        period = random.choice(self.limits).algorithm.window_ns // 1000
        tick = period // 64
        pause = random.choice([0, 0, 0, 1, tick, max(0, tick - 1), period // 7, period, period * 10 // 37])
        # Whole microseconds, as servers tell them.
        self.clock._now += 1000 * random.choice([pause, pause, random.randrange(period // 10 + 1), 2 * period])
        given = [
            self.receipts.pop(random.randrange(len(self.receipts)))
            for _ in range(random.choice([0, 0, 0, 1, 2]))
            if self.receipts
        ]
        hits = [self.hit() for _ in range(random.choice([1, 1, 1, 2, 3, 4, 0]))]
        options: dict[str, Any] = {
            "resets": [self.hit()[:2] for _ in range(random.choice([0] * 9 + [1]))],
            "takes": [self.hit() for _ in range(random.choice([0] * 5 + [1, 2]))],
            "spend": random.random() < 0.8,
        }
        mine: list[Give] = [(*hit, receipt) for hit, receipt, _ in given]
        theirs: list[Give] = [(*hit, receipt) for hit, _, receipt in given]
        expected = self.model.ask(Batch(hits, gives=theirs, **options))
        replies = seen(self.store.ask(Batch(hits, gives=mine, **options)))
        assert [facts(reply) for reply in replies] == [facts(verdict) for verdict in expected]
        for (limit, key, cost), reply, verdict in zip(hits, replies, expected, strict=True):
            if reply.receipt is not None and options["spend"] and random.random() < 0.7:
                part = random.choice([cost, cost, max(1, cost // 2)])
                self.receipts.append(((limit, key, part), reply.receipt, verdict.receipt))

    def hit(self) -> Hit:
        one = self.random.choice(self.limits)
        amount = one.algorithm.limit
        cost = self.random.choice([0, 1, 1, 1, 2, 3, max(1, amount // 3), amount, amount + 1])
        return one, self.random.choice("ab"), cost


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**64))
def test_the_twins_answer_as_the_algorithms_do_over_any_history(seed: int) -> None:
    clock = VirtualClock()
    store = RedisStore(
        shared_server().unix_url, prefix=prefix(), clock=clock, timeout=PATIENT, cache_refusals=False
    )
    trial = Trial(store, clock, Random(seed))
    try:
        for _ in range(40):
            trial.step()
    finally:
        store.close()


@each_algorithm
@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from([0, 1, 10**6, 59 * 10**6, 10**9 + 7, 10**13]), st.integers(1, 4)), max_size=40
    ),
    amount=st.integers(1, 7),
    period=st.sampled_from([60 * 86_400, 360 * 86_400, 10 * 360 * 86_400]),
)
def test_years_admit_no_more_than_the_oracle(
    algorithm: str, steps: list[tuple[int, int]], amount: int, period: int
) -> None:
    clock = VirtualClock()
    store = RedisStore(shared_server().unix_url, prefix=prefix(), clock=clock, timeout=PATIENT)
    one, oracle = limit(amount, period, algorithm=algorithm), ORACLES[algorithm](amount, period)
    try:
        for pause, cost in steps:
            clock._now += pause * 1000
            (verdict,) = seen(store.ask(Batch([(one, "key", cost)], spend=False)))
            if verdict.allowed:
                assert oracle.hit(clock(), cost)
                store.ask([(one, "key", cost)])
                # A token every so many whole microseconds instead of nanoseconds: never above, at most one below.
                assert 0 <= oracle.remaining(clock()) - verdict.remaining <= (algorithm == "gcra")
    finally:
        store.close()


@pytest.mark.parametrize("algorithm", ["sliding_window", "gcra"])
def test_a_clock_that_jumps_back_admits_no_more(algorithm: str, make: Make) -> None:
    random = Random(7)
    for _ in range(20):
        clock = VirtualClock()
        store, one = make(clock=clock, cache_refusals=False), limit(5, 60, algorithm=algorithm)
        hits: list[tuple[int, int]] = []
        true, latest = clock(), 0
        for _ in range(150):
            true += random.choice([0, 1, 3, 10]) * NS
            clock._now = true - random.choice([0, 0, 30, 3600]) * NS
            if seen(store.ask([(one, "key", 1)]))[0].allowed:
                latest = max(latest, clock())  # for the counter time stands still meanwhile
                hits.append((latest, 1))
        assert len(hits) > 5
        # A bucket lets 2N − 1 through in a window, if it was full.
        assert most_in_any_window(hits, 60 * NS - 1) <= (5 if algorithm == "sliding_window" else 9)


def test_what_a_bucket_held_can_be_spent_after_the_clock_jumped_back(make: Make) -> None:
    clock = VirtualClock()
    store, one = make(clock=clock, cache_refusals=False), limit(5, 60, algorithm="gcra")
    assert seen(store.ask([(one, "key", 3)]))[0].allowed
    clock._now -= 3600 * NS
    assert seen(store.ask([(one, "key", 2)]))[0].allowed
    (refused,) = seen(store.ask([(one, "key", 1)]))
    assert refused.retry_after == 3600 + 12


@each_algorithm
def test_the_state_of_a_key_is_one_short_string_that_expires(algorithm: str, server: Server, make: Make) -> None:
    mine = prefix()
    store, one = make(prefix=mine), limit(10**6, 3600, algorithm=algorithm)
    store.ask([(one, "key", 1)])
    (key,) = server.call("KEYS", f"{mine}*")
    assert server.call("TYPE", key) == b"string"
    assert 0 < server.call("PTTL", key) <= one.lifetime_ns / 1e6 + 1
    assert server.call("STRLEN", key) < 40


def test_a_sliding_window_keeps_at_most_65_entries(server: Server, make: Make) -> None:
    clock, mine = VirtualClock(), prefix()
    store, one = make(prefix=mine, clock=clock), limit(10**6, 64)
    for _ in range(200):
        store.ask([(one, "key", 1)])
        clock.advance(1)
    (key,) = server.call("KEYS", f"{mine}*")
    assert server.call("STRLEN", key) == 12 + 65 * 6


def test_looks_and_refusals_write_nothing(server: Server, make: Make) -> None:
    mine = prefix()
    store, one = make(prefix=mine, cache_refusals=False), limit(1)
    batches: list[list[Hit]] = [
        [(one, "key", 1)],
        [(one, "key", 0)],
        [(one, "key", 1), (limit(5, name="other"), "key", 1)],
    ]
    store.ask(Batch([(one, "key", 1)], spend=False))
    assert server.call("KEYS", f"{mine}*") == []
    store.ask([(one, "key", 1)])
    before = server.calls("set")
    for batch in batches:
        store.ask(batch)
    assert server.calls("set") == before


# Calls and keys.


def test_three_rules_of_four_rates_are_one_call_and_one_more_after_the_server_forgot_the_script(make: Make) -> None:
    with running() as own:
        rules = [
            Rule("a", [Rate(5, 60), Rate(50, 3600)]),
            Rule("b", [Rate(9, 60)], algorithm="gcra"),
            Rule("c", [Rate(9, 60)], algorithm="fixed_window"),
        ]
        batch: list[Hit] = [(one, "key", 1) for rule in rules for one in rule.limits]
        store = make(own.url)
        store.ask(batch)
        assert own.calls("eval") == 1, "the server did not know the script"
        before = own.calls("evalsha")
        assert [verdict.remaining for verdict in seen(store.ask(batch))] == [3, 48, 7, 7]
        assert own.calls("evalsha") == before + 1
        assert [verdict.remaining for verdict in seen(asyncio.run(store.aask(batch)))] == [2, 47, 6, 6]
        assert own.calls("evalsha") == before + 2
        own.call("SCRIPT", "FLUSH")
        assert [verdict.remaining for verdict in seen(asyncio.run(store.aask(batch)))] == [1, 46, 5, 5]
        assert seen(store.ask(batch))[0].remaining == 0
        assert own.calls("eval") == 2


def test_all_of_one_tick_goes_as_one_pipeline_in_a_few_writes_on_one_connection(make: Make) -> None:
    with running() as own:

        def told() -> tuple[int, int]:
            lines = bytes(own.call("INFO", "stats")).decode().splitlines()
            told = dict(line.split(":", 1) for line in lines if ":" in line)
            return int(told["total_reads_processed"]), int(told["total_connections_received"])

        async def main() -> None:
            store, one = make(own.url), limit(10_000)
            await store.aask([(one, "key", 1)])
            reads, connections = told()
            replies = await asyncio.gather(*(store.aask([(one, f"key{n}", 1)]) for n in range(50)))
            assert all(reply[0].allowed for reply in replies)
            # `told` connects, is read, and closes: two reads and a connection are its own. Fifty commands are four
            # writes, of sixteen at most; the system may cut or join them.
            assert told()[0] - reads <= 2 + 2 * 4
            assert told()[1] - connections == 2
            await store.aclose()

        asyncio.run(main())


def test_keys_have_rule_and_algorithm_and_text_but_no_amount(server: Server, make: Make) -> None:
    mine = prefix()
    store = make(prefix=mine)
    store.ask([(limit(10, 60, name="login"), "192.0.2.1", 1)])
    assert server.call("KEYS", f"{mine}*") == [b"%b:{192.0.2.1}:login/sliding_window.1/60" % mine.encode()]


@pytest.mark.parametrize("key", ["", "%", "{", "}", "{}", "%7B", "a{b}c", "%25", "ключ", "\ud800", "\0"])
def test_a_tag_tells_its_key_and_has_no_braces(key: str) -> None:
    tag = tag_of(key, listed=False)
    assert tag
    assert not {b"{", b"}"} & {tag[place : place + 1] for place in range(len(tag))}
    assert text_of(tag) == key


def test_long_keys_are_digested_unless_they_are_to_be_listed() -> None:
    assert len(tag_of("k" * 100_000, listed=False)) < 64
    assert tag_of("k" * 201, listed=False) != tag_of("k" * 202, listed=False)
    assert text_of(tag_of("k" * 1000, listed=True)) == "k" * 1000


def test_keys_of_a_glob_are_those_of_the_very_rule(make: Make) -> None:
    store = make(prefix=f"{prefix()}[*]?\\^")
    bans = [bound(Penalty(1, NS, 60 * NS, 60 * NS), name) for name in ("a", "*", "[a]", "a?", "\\a")]
    for place, ban in enumerate(bans):
        ban.listed = True
        store.ask([(ban, f"key{place}", 1)])
    assert [store.keys(ban) for ban in bans] == [[f"key{place}"] for place in range(5)]


@pytest.mark.parametrize("tag", [b"\xff", b"a{b", b"%zz", b""])
def test_keys_of_others_in_the_same_database_are_not_listed(tag: bytes, server: Server, make: Make) -> None:
    mine = prefix()
    store, ban = make(prefix=mine), bound(Penalty(1, NS, 60 * NS, 60 * NS), "a")
    store.ask([(ban, "banned", 1)])
    (name,) = server.call("KEYS", f"{mine}*")
    server.call("SET", name.replace(b"banned", tag), "theirs")
    assert store.keys(ban) == ["banned"]


def test_foreign_data_under_a_key_is_an_error_of_the_batch_that_spends_nothing(server: Server, make: Make) -> None:
    mine = prefix()
    store = make(prefix=mine)
    one, other = limit(3, name="one"), limit(3, name="other")
    name = b"%b:{key}:%b" % (mine.encode(), one.space.encode())
    batches: list[list[Hit]] = [[(other, "key", 1), (one, "key", 1)], [(one, "key", 1)]]
    for words, told in (
        (("SET", name, "something"), "was not written by Gatekeeper"),
        (("HSET", name, "field", "1"), "WRONGTYPE"),
    ):
        server.call("DEL", name)
        server.call(*words)
        for batch in batches:
            for reply in store.ask(batch):
                assert isinstance(reply, StoreError)
                assert told in str(reply)
    assert seen(store.ask([(other, "key", 1)]))[0].remaining == 2


# Refusals that last.


def test_a_refusal_that_lasts_is_answered_from_memory_until_more_is_left(server: Server, make: Make) -> None:
    clock = VirtualClock()
    store, one, other = make(clock=clock), limit(1, 64), limit(9, 64, name="other")
    batch: list[Hit] = [(one, "key", 1), (other, "key", 1)]
    store.ask(batch)
    first = seen(store.ask(batch))
    assert [verdict.allowed for verdict in first] == [False, True]
    before = server.calls("evalsha")
    clock.advance(10)
    for verdicts in (seen(store.ask(batch)), seen(asyncio.run(store.aask(batch)))):
        assert [verdict.retry_after for verdict in verdicts] == [first[0].retry_after - 10, 0]
        assert verdicts[1].remaining == 8
    assert server.calls("evalsha") == before
    clock.advance(first[0].retry_after - 10)
    assert all(seen(store.ask(batch)))


def test_peeks_and_other_costs_and_limits_with_give_back_are_always_asked(server: Server, make: Make) -> None:
    clock = VirtualClock()
    store, one, other = make(clock=clock), limit(1), given_back(1, name="other")
    store.ask([(one, "key", 1), (other, "key", 1)])
    before = server.calls("evalsha")
    asked: list[list[Hit]] = [
        Batch([(one, "key", 1)], spend=False),
        Batch([(one, "key", 1)], spend=False),
        [(one, "key", 1)],
        [(one, "key", 2)],
        [(limit(2), "key", 2)],
        [(other, "key", 1)],
        [(other, "key", 1)],
        [(one, "key", 1), (other, "key", 1)],
        [(one, "key", 1), (other, "key", 1)],
    ]
    for batch in asked:
        store.ask(batch)
    assert server.calls("evalsha") == before + len(asked)
    store.ask([(one, "key", 1)])
    assert server.calls("evalsha") == before + len(asked), "this one is known"
    off = make(clock=clock, cache_refusals=False)
    for _ in range(3):
        off.ask([(one, "key", 1)])
    assert server.calls("evalsha") == before + len(asked) + 3


def test_what_this_process_resets_is_asked_for_again(make: Make) -> None:
    store, one, other = make(), limit(1), limit(1, name="other")
    batch: list[Hit] = [(one, "key", 1), (other, "key", 1)]
    for _ in range(3):
        store.ask(batch)
    store.ask(Batch(resets=[(one, "key"), (other, "key")]))
    assert all(seen(store.ask(batch)))


def test_the_refusals_held_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatekeeper.stores.redis.refusals.MOST", 10)
    store, one = make(), limit(1)
    for number in range(50):
        for _ in range(2):
            store.ask([(one, f"key{number}", 1)])
    assert store._refusals is not None
    assert len(store._refusals) == 10
    assert len(store._refusals._of) == 10


# Cancellation, loops, threads, processes.


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_cancelled_question_leaves_nothing_spent(turns: int, make: Make) -> None:
    async def main() -> None:
        store, one, other = make(), given_back(5), given_back(5, name="other")
        await store.aask([(one, "warm", 1)])
        tasks = [asyncio.create_task(store.aask([(one, "key", 1), (other, "key", 1)])) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[1:]:
            task.cancel()
        answered = sum(
            not isinstance(end, BaseException) for end in await asyncio.gather(*tasks, return_exceptions=True)
        )

        async def remaining() -> int:
            return seen(await store.aask(Batch([(one, "key", 0)], spend=False)))[0].remaining

        for _ in range(500):
            if await remaining() == 5 - answered:
                break
        assert await remaining() == 5 - answered
        await store.aclose()

    asyncio.run(main())


def test_a_store_is_used_from_many_loops_and_threads_and_leaves_no_connection_behind(make: Make) -> None:
    with running() as own:
        store, one = make(own.url), limit(500)
        admitted: list[int] = []

        async def awaiting() -> int:
            replies = await asyncio.gather(*(store.aask([(one, "key", 1)]) for _ in range(100)))
            return sum(reply[0].allowed for reply in replies)

        def work() -> None:
            count = 0
            for _ in range(2):
                count += asyncio.run(awaiting())  # nobody closes anything at the end of these loops
                count += sum(store.ask([(one, "key", 1)])[0].allowed for _ in range(50))
            admitted.append(count)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(admitted) == 500
        store.close()
        store.close()
        gc.collect()
        until(lambda: b"connected_clients:1\r" in own.call("INFO", "clients"))
        # Once closed it can be used again, and closed again.
        assert not store.ask([(one, "key", 1)])[0].allowed


def test_a_forked_process_has_connections_of_its_own(server: Server) -> None:
    script = """
import asyncio, os, sys
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.stores.redis import RedisStore

store = RedisStore(sys.argv[1], prefix=sys.argv[2], timeout=10.0)
one = Rule("rule", [Rate(1000, 60)]).limits[0]
ask = lambda: [store.ask([(one, "key", 1)])[0].remaining for _ in range(100)]
ask()
pid = os.fork()
left = ask() + [asyncio.run(store.aask([(one, "key", 1)]))[0].remaining]
assert len(set(left)) == len(left), "an answer of the other process"
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    print(store.ask([(one, "key", 1)])[0].remaining)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, server.unix_url, prefix()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(1000 - 100 - 2 * 101 - 1)]


# Ways to a server.


def both(store: RedisStore, *hits: Hit) -> list[Replies]:
    return [store.ask(list(hits)), asyncio.run(store.aask(list(hits)))]


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_the_database_of_the_url_is_used(scheme: str, server: Server, make: Make) -> None:
    mine = prefix()
    one = limit()
    store = make(f"{scheme}://127.0.0.1:{server.port}/3", prefix=mine)
    assert [seen(replies)[0].remaining for replies in both(store, (one, "key", 1))] == [2, 1]
    assert server.call("KEYS", f"{mine}*") == []


def test_user_and_password_are_percent_encoded_and_shown_nowhere(make: Make) -> None:
    password = "p@ss:w/rd%#?é"
    with running("--requirepass", password) as own:
        address = f"127.0.0.1:{own.port}"
        for login in (f":{quote(password, safe='')}", f"default:{quote(password, safe='')}"):
            store = make(f"redis://{login}@{address}")
            assert len([seen(replies) for replies in both(store, (limit(), "key", 1))]) == 2
            assert "ss" not in repr(store).removeprefix("<RedisStore ")
        for login, told in (
            ("", "NOAUTH"),
            (":wrongsecret@", "refused the login"),
            ("nobody:wrongsecret@", "refused the login"),
        ):
            for (reply,) in both(make(f"redis://{login}{address}"), (limit(), "key", 1)):
                assert isinstance(reply, StoreError)
                assert told in str(reply)
                assert not any(word in str(reply) for word in ("wrongsecret", "nobody", "127.0.0.1", str(own.port)))


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_tls_checks_the_certificate(scheme: str, tmp_path: Path, make: Make) -> None:
    made, key = certificate(tmp_path)
    with running() as plain:
        # The plain port is what tells that the server runs; TLS has another.
        port = plain.port + 1
        options = ("--tls-port", str(port), "--tls-cert-file", str(made), "--tls-key-file", str(key))
        with running(*options, "--tls-auth-clients", "no"):
            trusted = f"{scheme}://localhost:{port}?ssl_ca_certs={quote(str(made))}"
            for replies in both(make(trusted), (limit(), "key", 1)):
                assert seen(replies)
            for url in (
                f"{scheme}://localhost:{port}",
                f"{scheme}://127.0.0.1:{port}?ssl_ca_certs={quote(str(made))}",
            ):
                for (reply,) in both(make(url), (limit(), "key", 1)):
                    assert isinstance(reply, StoreError)
            for replies in both(make(f"{scheme}://127.0.0.1:{port}?ssl_cert_reqs=none"), (limit(), "key", 1)):
                assert seen(replies)


@pytest.mark.parametrize(
    ("url", "topology", "addresses", "db"),
    [
        ("redis://", "single", [("localhost", 6379)], 0),
        ("redis://host", "single", [("host", 6379)], 0),
        ("valkey://host:1/2", "single", [("host", 1)], 2),
        ("redis://[::1]:7", "single", [("::1", 7)], 0),
        ("redis://[::1]", "single", [("::1", 6379)], 0),
        ("redis://host?db=4", "single", [("host", 6379)], 4),
        ("redis+cluster://a:1,b:2,c", "cluster", [("a", 1), ("b", 2), ("c", 6379)], 0),
        ("valkey+cluster://u:p@a:1,[::2]:2", "cluster", [("a", 1), ("::2", 2)], 0),
        ("redis+sentinel://a,b:2/front/5", "sentinel", [("a", 26379), ("b", 2)], 5),
        ("valkey+sentinel://a/front", "sentinel", [("a", 26379)], 0),
    ],
)
def test_urls_are_read(url: str, topology: str, addresses: list[tuple[str, int]], db: int) -> None:
    target = Target(url)
    assert target.topology == topology
    assert [(address.host, address.port) for address in target.addresses] == addresses
    assert target.db == db
    assert all(address.sentinel == (topology == "sentinel") for address in target.addresses)


def test_urls_of_sockets_and_logins_are_read() -> None:
    target = Target("unix://user:p%40ss@/run/the%20socket?db=2")
    assert target.addresses == (Address("", 0, "/run/the socket"),)
    assert target.login == (b"user", b"p@ss")
    assert target.db == 2
    assert Target("redis://:only@host").login == (b"only",)
    sentinels = Target("redis+sentinel://u:p@a/front?sentinel_password=x")
    assert (sentinels.login, sentinels.sentinel_login, sentinels.service) == ((b"u", b"p"), (b"x",), b"front")


@pytest.mark.parametrize(
    "url",
    [
        "", "secret", "secret://host", "redis:secret", "redis://secret:x:y", "redis://host:secret", "redis://host:0",
        "redis://host:70000", "redis://host/secret", "redis://host/1/secret", "redis://host/-1", "redis://a,b",
        "redis://host?secret=1", "redis://host?db=secret", "redis://[secret", "redis://host#secret",
        "unix://secret/path", "unix://", "redis+cluster://host/1", "redis+sentinel://secret", "redis+secret://host",
        "rediss://host?ssl_cert_reqs=secret", "rediss://host?ssl_ca_certs=/secret", "redis://u:secret@host:x",
        "redis://hos\u2100t:secret@h",
    ],
)  # fmt: skip
def test_a_wrong_url_says_what_was_expected_and_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected redis://.* redis\+sentinel://") as raised:
        RedisStore(url)
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("wrong", ["", "a{b", "a}"])
def test_a_prefix_with_braces_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="expected a prefix"):
        RedisStore("redis://", prefix=wrong)


def test_a_store_without_its_package_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['hiredis'] = None\n"
        "from gatekeeper.errors import MissingExtra\n"
        "try:\n    import gatekeeper.stores.redis\n"
        "except MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert "gatekeeper-http[redis]" in done.stdout


# Clusters and sentinels.


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Server]]:
    with cluster() as started:
        yield started


def spread(nodes: list[Server]) -> dict[int, str]:
    """A key for each master, by its port."""
    keys: dict[int, str] = {}
    for number in range(1000):
        slot = slot_of(tag_of(f"key{number}", listed=False))
        for first, last, (_, port, *_), *_ in nodes[0].call("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                keys.setdefault(port, f"key{number}")
        if len(keys) == 3:
            return keys
    raise AssertionError("no keys for all masters")


def test_the_slot_of_a_tag_is_the_one_the_server_computes(nodes: list[Server]) -> None:
    for text in ("", "a", "192.0.2.1", "{", "}{", "ключ", "k" * 1000):
        tag = tag_of(text, listed=False)
        assert nodes[0].call("CLUSTER", "KEYSLOT", b"gatekeeper:{%b}:rule" % tag) == slot_of(tag)


@pytest.mark.parametrize("scheme", ["redis+cluster", "valkey+cluster"])
def test_counters_spread_over_a_cluster_and_those_of_one_client_stay_together(
    scheme: str, nodes: list[Server], make: Make
) -> None:
    mine = prefix()
    store = make(cluster_url(nodes[:1], scheme), prefix=mine)
    limits = [limit(5, name=f"rule{place}") for place in range(3)]
    assert len(both(store, (limits[0], "warm", 1))) == 2
    before = sum(node.calls("evalsha") for node in nodes)
    for number in range(60):
        assert all(seen(store.ask([(one, f"client{number}", 1) for one in limits])))
    assert sum(node.calls("evalsha") for node in nodes) - before <= 60 + 3
    counts = [len(node.call("KEYS", f"{mine}*client*")) for node in nodes]
    assert sum(counts) == 180
    assert all(counts)


@pytest.mark.parametrize("awaits", [False, True])
def test_a_batch_over_several_slots_is_admitted_whole_or_not_at_all(
    awaits: bool, nodes: list[Server], make: Make
) -> None:
    store = make(cluster_url(nodes))

    def ask(*hits: Hit, spend: bool = True) -> list[Verdict]:
        batch = Batch(hits, spend=spend)
        return seen(asyncio.run(store.aask(batch)) if awaits else store.ask(batch))

    a, b, c = spread(nodes).values()
    limits = {key: limit(amount, name=f"rule{amount}") for key, amount in ((a, 2), (b, 5), (c, 9))}
    batch = [(one, key, 1) for key, one in limits.items()]
    for round_, expected in enumerate([True, True, False, False]):
        verdicts = ask(*batch)
        assert all(verdicts) is expected
        if not expected:
            assert [verdict.remaining for verdict in verdicts] == [0, 3, 7]
            assert [verdict.receipt for verdict in verdicts] == [None] * 3
        else:
            assert [verdict.remaining for verdict in verdicts] == [1 - round_, 4 - round_, 8 - round_]
    assert [ask((one, key, 1), spend=False)[0].remaining for key, one in limits.items()] == [0, 2, 6]
    receipts = ask(*batch[1:])
    store.ask(
        Batch(
            resets=[(limits[a], a)],
            gives=[(*hit, verdict.receipt) for hit, verdict in zip(batch[1:], receipts, strict=True)],
        )
    )
    assert [ask((one, key, 0), spend=False)[0].remaining for key, one in limits.items()] == [2, 3, 7]


def test_a_cancelled_question_of_several_slots_leaves_nothing_spent(nodes: list[Server], make: Make) -> None:
    async def main() -> None:
        store, one = make(cluster_url(nodes)), given_back(5)
        keys = list(spread(nodes).values())
        await store.aask([(one, "warm", 1)])
        for turns in range(6):
            task = asyncio.create_task(store.aask([(one, key, 1) for key in keys]))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        async def left() -> list[int]:
            looks = Batch([(one, key, 0) for key in keys], spend=False)
            return [verdict.remaining for verdict in seen(await store.aask(looks))]

        for _ in range(500):
            if await left() == [5, 5, 5]:
                break
        assert await left() == [5, 5, 5]
        await store.aclose()

    asyncio.run(main())


def test_the_keys_of_all_masters_are_listed(nodes: list[Server], make: Make) -> None:
    store, ban = make(cluster_url(nodes)), bound(Penalty(1, NS, 60 * NS, 60 * NS))
    ban.listed = True
    keys = sorted(spread(nodes).values())
    for key in keys:
        store.ask([(ban, key, 1)])
    assert sorted(store.keys(ban)) == keys
    assert sorted(asyncio.run(store.akeys(ban))) == keys


@pytest.mark.parametrize("awaits", [False, True])
def test_a_slot_that_is_being_moved_and_one_that_has_moved_are_followed(
    awaits: bool, nodes: list[Server], make: Make
) -> None:
    mine = prefix()
    store, one = make(cluster_url(nodes), prefix=mine), limit(100)
    key = f"moving{awaits}"
    slot = slot_of(tag_of(key, listed=False))
    names = {node: bytes(node.call("CLUSTER", "MYID")) for node in nodes}
    source = next(
        node
        for node in nodes
        for first, last, (_, port, *_), *_ in node.call("CLUSTER", "SLOTS")
        if first <= slot <= last and port == node.port
    )
    goal = next(node for node in nodes if node is not source)

    def left() -> int:
        replies = asyncio.run(store.aask([(one, key, 1)])) if awaits else store.ask([(one, key, 1)])
        return seen(replies)[0].remaining

    assert left() == 99
    assert goal.call("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source]) == b"OK"
    assert source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", names[goal]) == b"OK"
    assert left() == 98, "it is still there"
    (name,) = source.call("KEYS", f"{mine}*")
    source.call("MIGRATE", "127.0.0.1", goal.port, name, 0, 5000)
    assert left() == 97, "ASK"
    for node in nodes:
        assert node.call("CLUSTER", "SETSLOT", slot, "NODE", names[goal]) == b"OK"
    assert [left() for _ in range(3)] == [96, 95, 94], "MOVED"


def test_the_server_that_the_sentinels_name_is_used_and_its_successor(make: Make) -> None:
    with sentinel() as (watcher, master, replica):
        mine = prefix()
        store, one = make(f"redis+sentinel://127.0.0.1:{watcher.port}/front", prefix=mine), given_back(100)
        assert [seen(replies)[0].remaining for replies in both(store, (one, "key", 1))] == [99, 98]
        assert len(master.call("KEYS", f"{mine}*")) == 1
        until(lambda: replica.call("KEYS", f"{mine}*"))
        master.kill()
        for reply in store.ask([(one, "key", 1)]):
            assert isinstance(reply, StoreError)
        until(lambda: watcher.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "front")[1] == b"%d" % replica.port)

        def left() -> list[int]:
            replies = [reply for (reply,) in both(store, (one, "key", 1))]
            return [reply.remaining for reply in replies if isinstance(reply, Verdict)]

        until(lambda: len(left()) == 2)
        assert len(replica.call("KEYS", f"{mine}*")) == 1
        assert left()[0] < 98, "what was replicated still counts"


def test_a_server_that_became_a_replica_is_an_error_until_it_is_none(make: Make) -> None:
    with running() as own, running() as other:
        store, one = make(own.url), limit()
        assert seen(store.ask([(one, "key", 1)]))
        own.call("REPLICAOF", "127.0.0.1", other.port)
        for (reply,) in both(store, (one, "key", 1)):
            assert isinstance(reply, StoreError)
            assert "READONLY" in str(reply)
        own.call("REPLICAOF", "NO", "ONE")
        assert seen(store.ask([(one, "key", 1)]))


def test_a_full_server_is_an_error_and_not_a_crash(make: Make) -> None:
    with running() as own:
        store, one, other = make(own.url), limit(), limit(name="other")
        assert seen(store.ask([(one, "key", 1)]))
        own.call("CONFIG", "SET", "maxmemory", "1")
        for reply, _ in both(store, (one, "key", 1), (other, "key", 1)):
            assert isinstance(reply, StoreError)
            assert "OOM" in str(reply)
        own.call("CONFIG", "SET", "maxmemory", "0")
        assert [verdict.remaining for verdict in seen(store.ask([(one, "key", 1), (other, "key", 1)]))] == [1, 2]


def test_a_cost_that_no_limit_has_is_refused_for_ever(make: Make) -> None:
    store = make()
    for algorithm in sorted(ALGORITHMS):
        for cost in (4, 2**40, 2**53 + 1, 10**30):
            (verdict,) = seen(store.ask([(limit(algorithm=algorithm), "key", cost)]))
            assert (verdict.allowed, verdict.remaining, verdict.retry_ns) == (False, 3, NEVER)
