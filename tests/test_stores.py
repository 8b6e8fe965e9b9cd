"""The contract of every store, on a clock that tests move. A store joins by adding a line to STORES."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.commands import Batch, Hit, Store, Verdict
from gatekeeper.ratelimit.algorithms import ALGORITHMS, NS, Algorithm, Concurrency, Gcra, Penalty
from gatekeeper.ratelimit.rates import Rate
from gatekeeper.ratelimit.rules import RateLimit, Rule
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock, virtual_store
from tests.oracles import ORACLES
from tests.redis_servers import redis_store
from tests.shared_store import shared_store

STORES: dict[str, Callable[[VirtualClock], Store]] = {
    "memory": virtual_store,
    "redis": redis_store,
    "shared": shared_store,
}

pytestmark = pytest.mark.parametrize("make", STORES.values(), ids=STORES.keys())
each_algorithm = pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))

Make = Callable[[VirtualClock], Store]


def limit(amount: int = 3, period: int = 60, *, name: str = "rule", algorithm: str = "sliding_window") -> RateLimit:
    return Rule(name, [Rate(amount, period)], algorithm=algorithm).limits[0]


def bound(algorithm: Algorithm, name: str = "rule") -> RateLimit:
    rule = Rule(name, [Rate(1, 1)])
    return RateLimit(rule, name, f"{name}/{algorithm.kind}.{algorithm.version}", algorithm, None)


def ask(store: Store, *hits: Hit, spend: bool = True) -> list[Verdict]:
    replies = store.ask(Batch(hits, spend=spend))
    assert all(isinstance(reply, Verdict) for reply in replies)
    return [reply for reply in replies if isinstance(reply, Verdict)]


@each_algorithm
def test_admits_exactly_the_limit_for_each_key(make: Make, algorithm: str) -> None:
    store, one = make(VirtualClock()), limit(5, algorithm=algorithm)
    outcomes = [(key, ask(store, (one, key, 1))[0].allowed) for key in "abababababababab"]
    assert sum(allowed for key, allowed in outcomes if key == "a") == 5
    assert sum(allowed for key, allowed in outcomes if key == "b") == 5


@each_algorithm
def test_a_peek_answers_as_the_hit_would_and_spends_nothing(make: Make, algorithm: str) -> None:
    clock = VirtualClock()
    store, one = make(clock), limit(3, algorithm=algorithm)
    for _ in range(5):
        peeks = [ask(store, (one, "key", 2), spend=False)[0] for _ in range(4)]
        hit = ask(store, (one, "key", 2))[0]
        assert all(peek == hit for peek in peeks)
        clock.advance(7)


@each_algorithm
def test_a_batch_is_admitted_whole_or_not_at_all_in_any_order_of_its_hits(make: Make, algorithm: str) -> None:
    limits = {amount: limit(amount, name=f"rule{amount}", algorithm=algorithm) for amount in (2, 5, 9)}
    for order in itertools.permutations(limits):
        store = make(VirtualClock())
        batch = [(limits[amount], "key", 1) for amount in order]
        outcomes = [all(verdict.allowed for verdict in ask(store, *batch)) for _ in range(6)]
        assert outcomes == [True, True, False, False, False, False]
        for amount in limits:
            assert ask(store, (limits[amount], "key", 1), spend=False)[0].remaining == max(0, amount - 3)


@each_algorithm
def test_a_refused_batch_shows_the_other_quotas_unspent_and_has_no_receipts(make: Make, algorithm: str) -> None:
    small, large = limit(1, name="small", algorithm=algorithm), limit(10, name="large", algorithm=algorithm)
    for batch in itertools.permutations([(small, "key", 1), (large, "key", 1)]):
        store = make(VirtualClock())
        ask(store, *batch)
        verdicts = dict(zip([hit[0].name for hit in batch], ask(store, *batch), strict=True))
        assert not verdicts["small"].allowed
        assert verdicts["large"].allowed
        assert verdicts["large"].remaining == 9
        assert [verdict.receipt for verdict in verdicts.values()] == [None, None]


@each_algorithm
def test_one_key_twice_in_a_batch_is_spent_twice(make: Make, algorithm: str) -> None:
    store, one = make(VirtualClock()), limit(3, algorithm=algorithm)
    assert [verdict.allowed for verdict in ask(store, (one, "key", 2), (one, "key", 2))] == [True, False]
    assert ask(store, (one, "key", 3))[0].allowed, "nothing of the refused batch is spent"


@each_algorithm
def test_a_give_back_undoes_exactly_its_hit(make: Make, algorithm: str) -> None:
    clock = VirtualClock()
    store, one = make(clock), limit(3, algorithm=algorithm)
    ask(store, (one, "key", 1))
    receipt = ask(store, (one, "key", 2))[0].receipt
    assert receipt is not None
    assert not ask(store, (one, "key", 1))[0].allowed
    store.ask(Batch(gives=[(one, "key", 2, receipt)]))
    assert [ask(store, (one, "key", 1))[0].allowed for _ in range(3)] == [True, True, False]


@each_algorithm
def test_a_reset_forgets_one_key_of_one_limit(make: Make, algorithm: str) -> None:
    store = make(VirtualClock())
    one, other = limit(1, algorithm=algorithm), limit(1, name="other", algorithm=algorithm)
    for hit in ((one, "a", 1), (one, "b", 1), (other, "a", 1)):
        ask(store, hit)
    store.ask(Batch(resets=[(one, "a"), (one, "never seen")]))
    assert ask(store, (one, "a", 1))[0].allowed
    assert not ask(store, (one, "b", 1))[0].allowed
    assert not ask(store, (other, "a", 1))[0].allowed


@each_algorithm
def test_a_take_spends_what_there_is_up_to_its_cost(make: Make, algorithm: str) -> None:
    store, one = make(VirtualClock()), limit(10, algorithm=algorithm)
    ask(store, (one, "key", 3))
    store.ask(Batch(takes=[(one, "key", 5), (one, "other", 2)]))
    assert ask(store, (one, "key", 1), spend=False)[0].remaining == 1
    assert ask(store, (one, "other", 1), spend=False)[0].remaining == 7
    store.ask(Batch(takes=[(one, "key", 5), (one, "other", 999)]))
    for key in ("key", "other"):
        verdict = ask(store, (one, key, 1))[0]
        assert not verdict.allowed
        assert verdict.remaining == 0


@each_algorithm
def test_part_of_a_hit_may_be_given_back(make: Make, algorithm: str) -> None:
    store, one = make(VirtualClock()), limit(10, algorithm=algorithm)
    receipt = ask(store, (one, "key", 8))[0].receipt
    store.ask(Batch(gives=[(one, "key", 5, receipt)]))
    assert ask(store, (one, "key", 1), spend=False)[0].remaining == 6


@each_algorithm
def test_a_shadow_refuses_nothing_and_is_unspent_when_another_refuses(make: Make, algorithm: str) -> None:
    shadow, real = limit(1, name="shadow", algorithm=algorithm), limit(3, name="real", algorithm=algorithm)
    shadow.shadow = True
    for batch in itertools.permutations([(shadow, "key", 1), (real, "key", 1)]):
        store = make(VirtualClock())
        seen = [
            {hit[0].name: verdict.allowed for hit, verdict in zip(batch, ask(store, *batch), strict=True)}
            for _ in range(5)
        ]
        assert [one["real"] for one in seen] == [True, True, True, False, False]
        assert [one["shadow"] for one in seen] == [True, False, False, False, False]
        ask(store, (real, "other", 3))
        ask(store, (shadow, "other", 1), (real, "other", 1))
        assert ask(store, (shadow, "other", 1), spend=False)[0].allowed


def test_a_lease_is_held_until_it_is_given_back_or_renewed_no_more(make: Make) -> None:
    clock = VirtualClock()
    store, one = make(clock), bound(Concurrency(2, 60))
    first, second = (ask(store, (one, "key", 1))[0] for _ in range(2))
    refused = ask(store, (one, "key", 1))[0]
    assert not refused.allowed
    assert refused.retry_after == 1
    store.ask(Batch(gives=[(one, "key", 1, first.receipt)]))
    first = ask(store, (one, "key", 1))[0]
    assert first.allowed
    for _ in range(4):
        clock.advance(40)
        renewed = store.ask(Batch([(one, "key", 1)], gives=[(one, "key", 1, second.receipt)]))[0]
        assert isinstance(renewed, Verdict)
        assert renewed.allowed
        second = renewed
    # The first has not been renewed: its holder is gone.
    assert [ask(store, (one, "key", 1))[0].allowed for _ in range(2)] == [True, False]
    store.ask(Batch(gives=[(one, "key", 1, first.receipt), (one, "key", 1, second.receipt)]))
    assert [ask(store, (one, "key", 1))[0].allowed for _ in range(2)] == [True, False]


def test_strikes_ban_a_key_for_longer_each_time_and_are_forgiven_at_last(make: Make) -> None:
    clock = VirtualClock()
    store, one = make(clock), bound(Penalty(3, 60 * NS, 10 * NS, 40 * NS))
    one.listed = True

    def look() -> Verdict:
        return ask(store, (one, "key", 0))[0]

    def strike(times: int) -> None:
        for _ in range(times):
            ask(store, (one, "key", 1))

    for banned in (10, 20, 40, 40):
        strike(2)
        assert look().allowed
        strike(1)
        assert look().retry_after == banned
        assert store.keys(one) == ["key"]
        strike(5)  # what comes during a ban makes it no longer
        clock.advance(banned - 0.001)
        assert not look().allowed
        clock.advance(0.001)
        assert look().allowed
    strike(2)
    clock.advance(60)
    strike(2)
    assert look().allowed, "the first two strikes are too long ago"
    strike(1)
    assert look().retry_after == 10, "free for 40 s since the last ban"
    store.ask(Batch(resets=[(one, "key")]))
    assert look().allowed


def test_the_keys_of_a_listed_limit_can_be_listed(make: Make) -> None:
    store = make(VirtualClock())
    one, other = bound(Penalty(1, NS, NS, NS)), bound(Penalty(1, NS, NS, NS), "other")
    one.listed = other.listed = True
    keys = ["a", "=ключ", "@192.0.2.1", "\0", "with space", "k" * 128]
    assert store.keys(one) == []
    for key in keys:
        ask(store, (one, key, 1))
    ask(store, (other, "c", 1))
    assert sorted(store.keys(one)) == sorted(keys)
    assert sorted(asyncio.run(store.akeys(one))) == sorted(keys)
    store.ask(Batch(resets=[(one, "a")]))
    assert sorted(store.keys(one)) == sorted(keys[1:])
    assert store.keys(other) == ["c"]


def test_a_raised_limit_keeps_what_was_used_and_another_algorithm_begins_anew(make: Make) -> None:
    store = make(VirtualClock())
    ask(store, (limit(3), "key", 3))
    assert ask(store, (limit(300), "key", 1))[0].remaining == 296
    for algorithm in sorted(set(ALGORITHMS) - {"sliding_window"}):
        assert ask(store, (limit(3, algorithm=algorithm), "key", 1))[0].remaining == 2


@pytest.mark.parametrize("key", ["", "\0", "\0overflow", "ключ", "a" * 100_000, "\ud800", "key\nkey", "{tag}:x"])
def test_any_string_is_a_key_of_its_own(make: Make, key: str) -> None:
    store, one = make(VirtualClock()), limit(1)
    assert ask(store, (one, "key", 1))[0].allowed
    assert ask(store, (one, key, 1))[0].allowed
    assert not ask(store, (one, key, 1))[0].allowed


def test_awaiting_gives_the_same_answers(make: Make) -> None:
    async def main(store: Store) -> list[bool]:
        outcomes = [(await store.aask(Batch([(limit(3), "key", 1)])))[0].allowed for _ in range(5)]
        await store.aclose()
        return outcomes

    assert asyncio.run(main(make(VirtualClock()))) == [True, True, True, False, False]


@each_algorithm
def test_threads_admit_exactly_the_limit(make: Make, algorithm: str) -> None:
    store, one, other = make(VirtualClock()), limit(500, algorithm=algorithm), limit(10**6, name="other")
    admitted: list[int] = []

    def work() -> None:
        count = 0
        for _ in range(400):
            count += all(verdict.allowed for verdict in ask(store, (other, "key", 1), (one, "key", 1)))
        admitted.append(count)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) == 500
    assert ask(store, (other, "key", 1), spend=False)[0].remaining == 10**6 - 501


@each_algorithm
@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 0.9375, 1.0, 20.0, 59.0, 60.0, 200.0]), st.integers(0, 7), st.integers(1, 3)
        ),
        max_size=60,
    ),
    amount=st.integers(1, 6),
)
def test_every_key_is_decided_as_its_own_oracle_does(
    make: Make, algorithm: str, steps: list[tuple[float, int, int]], amount: int
) -> None:
    clock = VirtualClock()
    store, one = make(clock), limit(amount, algorithm=algorithm)
    oracles = {key: ORACLES[algorithm](amount, 60) for key in range(8)}
    for pause, key, cost in steps:
        clock.advance(pause)
        verdict = ask(store, (one, f"key{key}", cost))[0]
        assert verdict.allowed == oracles[key].hit(clock(), cost)
        assert verdict.remaining == oracles[key].remaining(clock())


@each_algorithm
def test_no_step_of_a_long_random_walk_differs_from_the_oracle(make: Make, algorithm: str) -> None:
    """30,000 steps for each algorithm in each store; millions are in the long trials."""
    random = Random(11)
    clock = VirtualClock()
    store, one = make(clock), limit(7, algorithm=algorithm)
    oracles = {f"key{number}": ORACLES[algorithm](7, 60) for number in range(20)}
    for step in range(30_000):
        clock.advance(random.choice([0, 0, 0, 0.01, 0.3, 1, 60 / 64, 2, 5]))
        key, cost = f"key{random.randrange(20)}", random.choice([1, 1, 1, 2, 7])
        (verdict,) = store.ask([(one, key, cost)])
        assert isinstance(verdict, Verdict)
        assert verdict.allowed == oracles[key].hit(clock(), cost), step
        assert verdict.remaining == oracles[key].remaining(clock()), step


class TestMemory:
    """What holds of the memory store beyond the contract."""

    @pytest.fixture
    def clock(self, make: Make) -> VirtualClock:
        if make is not virtual_store:
            pytest.skip("of the memory store")
        return VirtualClock()

    def test_keys_that_are_no_longer_hit_are_dropped_without_being_touched(self, clock: VirtualClock) -> None:
        store, one = MemoryStore(clock=clock), limit(3, 60)
        for number in range(5000):
            store.ask(Batch([(one, f"old{number}", 1)]))
        assert len(store) == 5000
        for _ in range(3):
            clock.advance(61)
            for number in range(200):
                store.ask(Batch([(one, f"new{number}-{clock()}", 1)]))
        assert len(store) <= 3 * 200

    def test_an_active_key_is_held_as_long_as_it_counts(self, clock: VirtualClock) -> None:
        store, one = MemoryStore(clock=clock), limit(2, 60)
        for _ in range(50):
            assert ask(store, (one, "key", 2))[0].allowed
            clock.advance(30)
            for number in range(100):
                store.ask(Batch([(one, f"other{number}-{clock()}", 1)]))
            clock.advance(29.9)
            assert not ask(store, (one, "key", 1))[0].allowed
            clock.advance(60 / 64 + 0.1)

    def test_new_keys_beyond_the_bound_share_one_bucket_a_rule_and_are_counted(self, clock: VirtualClock) -> None:
        store, one, other = MemoryStore(max_keys=10, clock=clock), limit(3), limit(3, name="other")
        for number in range(10):
            assert ask(store, (one, f"held{number}", 3))[0].allowed
        outcomes = [ask(store, (one, f"new{number}", 1))[0].allowed for number in range(100)]
        assert outcomes == [True] * 3 + [False] * 97
        assert ask(store, (other, "new", 1))[0].allowed, "another rule has a bucket of its own"
        assert store.overflowed == 101
        assert len(store) <= 12
        # What was held is neither put out nor reset, however many strangers come.
        assert not any(ask(store, (one, f"held{number}", 1))[0].allowed for number in range(10))
        clock.advance(200)
        assert ask(store, (one, "new1", 3))[0].allowed, "room again, once the old have expired"
        for number in range(200):
            store.ask(Batch([(one, f"later{number}", 1)]))
        assert len(store) <= 12

    def test_a_give_back_of_an_overflowed_hit_finds_its_bucket(self, clock: VirtualClock) -> None:
        store, one = MemoryStore(max_keys=1, clock=clock), limit(3)
        ask(store, (one, "held", 1))
        receipt = ask(store, (one, "new", 3))[0].receipt
        assert receipt is not None
        assert not ask(store, (one, "newer", 1))[0].allowed
        store.ask(Batch(gives=[(one, "new", 3, receipt)]))
        assert ask(store, (one, "newer", 1))[0].allowed

    def test_a_give_back_goes_where_the_charge_lies_though_room_has_come_since(self, clock: VirtualClock) -> None:
        store, one = MemoryStore(max_keys=2, clock=clock), limit(3)
        held = [(one, key, 1, ask(store, (one, key, 1))[0].receipt) for key in ("held", "too")]
        overflowed = ask(store, (one, "new", 3))[0].receipt
        store.ask(Batch(gives=held))
        assert ask(store, (one, "new", 3))[0].allowed, "now in a bucket of its own"
        store.ask(Batch(gives=[(one, "new", 3, overflowed)]))
        assert not ask(store, (one, "new", 1))[0].allowed, "what was given back was the shared bucket's"
        assert ask(store, (one, "newer", 3))[0].allowed, "which has room again"

    @pytest.mark.parametrize("short", [False, True])
    def test_a_key_is_held_as_long_as_it_counts_for_a_limit_that_was_raised(
        self, clock: VirtualClock, short: bool
    ) -> None:
        store = MemoryStore(clock=clock)
        low, high = (bound(Gcra(60, 60, burst)) for burst in (1, 1000))
        hit = store.hitter(high) if short else lambda key: ask(store, (high, key, 1))[0]
        ask(store, (low, "key", 1))
        assert sum(hit("key").allowed for _ in range(1100)) == 999
        for second in range(6):
            clock.advance(1)
            for other in (f"other{number}-{second}" for number in range(200)):
                if (
                    hash(other) - hash("key")
                ) % 64:  # in the key's own shard they would say how long that limit lives
                    hit(other)
        assert sum(hit("key").allowed for _ in range(1100)) == 6

    @each_algorithm
    def test_the_short_way_of_a_hit_answers_as_the_long_one(self, clock: VirtualClock, algorithm: str) -> None:
        random = Random(7)
        store, twin = MemoryStore(max_keys=6, clock=clock), MemoryStore(max_keys=6, clock=clock)
        # Of these the second has numbers of the first's width in its states, the third of another.
        one, *lowered = (limit(amount, 60, algorithm=algorithm) for amount in (4, 3, 1))
        hitters = {each: store.hitter(each) for each in (one, *lowered)}
        receipts: list[tuple[str, object]] = []
        for step in range(6000):
            key = f"key{random.randrange(9)}"
            match random.randrange(40):
                case 0 | 1 | 2:
                    clock.advance(random.choice([0.001, 0.9375, 5, 15, 61]))
                case 3 if receipts:
                    key, receipt = receipts.pop(random.randrange(len(receipts)))
                    for each in (store, twin):
                        each.ask(Batch(gives=[(one, key, 1, receipt)]))
                case 4:
                    for each in (store, twin):
                        each.ask(Batch(resets=[(one, key)]))
                case _:
                    which = one if random.randrange(9) else random.choice(lowered)
                    verdict = hitters[which](key)
                    assert verdict == ask(twin, (which, key, 1))[0], step
                    if verdict.receipt is not None:
                        receipts.append((key, verdict.receipt))
            receipts = receipts[-20:]
        store.close()
        assert hitters[one]("key").remaining == 3

    @each_algorithm
    def test_threads_that_take_the_short_way_admit_exactly_the_limit(
        self, clock: VirtualClock, algorithm: str
    ) -> None:
        hit = MemoryStore(clock=clock).hitter(limit(1000, 60, algorithm=algorithm))
        allowed: list[int] = []

        def work() -> None:
            allowed.append(sum(hit("key").allowed for _ in range(2000)))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(allowed) == 1000

    def test_the_count_of_keys_stays_true_over_any_history(self, clock: VirtualClock) -> None:
        random = Random(5)
        store, one = MemoryStore(max_keys=50, clock=clock), limit(4, 60)
        receipts: list[tuple[str, int]] = []
        for _ in range(5000):
            key = f"key{random.randrange(200)}"
            match random.randrange(4):
                case 0:
                    clock.advance(random.choice([0, 1, 20]))
                case 1 if receipts:
                    key, receipt = receipts.pop(random.randrange(len(receipts)))
                    store.ask(Batch(gives=[(one, key, 1, receipt)]))
                case 2:
                    store.ask(Batch(resets=[(one, key)]))
                case _:
                    receipt_or_none = ask(store, (one, key, 1))[0].receipt
                    if receipt_or_none is not None:
                        receipts.append((key, receipt_or_none))
            held = sum(len(shard.fresh) + len(shard.stale) for shard in store._shards)
            assert len(store) == held
            assert held <= 51
        store.close()
        assert len(store) == 0
