"""Policies prefer whom they promise to, health lets in and out as it promises, and a pool puts the two together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import permutations, product
from random import Random as Dice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.upstreams.hashing import Ring
from gatekeeper.upstreams.health import EJECTION, NEXT, NS, Ejection, Event, Health, State
from gatekeeper.upstreams.policies import POLICIES, LeastConnections, Policy, Random, RingOrder, RoundRobin
from gatekeeper.upstreams.pool import Pool, Upstream

Made = Callable[[tuple[Upstream, ...]], Policy]

each_policy = pytest.mark.parametrize("name", sorted(POLICIES))
draws = st.floats(0, 1, exclude_max=True)
fleets = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=7
)  # (weight, in flight) of each


def fleet(*loads: tuple[int, int]) -> list[Upstream]:
    """Upstreams a, b, c … of these (weight, in flight)."""
    made = []
    for place, (weight, in_flight) in enumerate(loads):
        upstream = Upstream("abcdefghijklmnop"[place], port=9001 + place, weight=weight)
        upstream.in_flight = in_flight
        made.append(upstream)
    return made


def names(upstreams: Iterator[Upstream] | Sequence[Upstream]) -> str:
    return "".join(upstream.id for upstream in upstreams)


def evenly(count: int) -> list[float]:
    """Draws that leave out no part of 0 … 1."""
    return [(number + 0.5) / count for number in range(count)]


class TestEveryPolicy:
    @each_policy
    @settings(max_examples=60)
    @given(data=st.data(), loads=fleets, turn=st.integers(0, 10**12), draw=draws, key=st.text(max_size=8))
    def test_an_order_has_each_once_and_asking_changes_nothing(
        self, name: str, data: st.DataObject, loads: list[tuple[int, int]], turn: int, draw: float, key: str
    ) -> None:
        upstreams = data.draw(st.permutations(fleet(*loads)))
        policy = POLICIES[name](upstreams)
        before = [repr(one) for one in upstreams]
        order = list(policy.order(key, turn, draw))
        assert sorted(names(order)) == sorted(names(upstreams))
        next(policy.order("another", turn + 1, draw / 2))
        assert list(policy.order(key, turn, draw)) == order
        assert [repr(one) for one in upstreams] == before

    @each_policy
    @pytest.mark.parametrize("draw", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
    def test_the_ends_of_the_draw_are_no_seam(self, name: str, draw: float) -> None:
        for weights in permutations([1, 1, 3, 1000]):
            upstreams = fleet(*((weight, 0) for weight in weights))
            assert sorted(names(POLICIES[name](upstreams).order("k", 0, draw))) == ["a", "b", "c", "d"]

    @each_policy
    def test_one_upstream_is_always_the_choice(self, name: str) -> None:
        policy = POLICIES[name](fleet((3, 2)))
        assert [names(policy.order("k", turn, turn / 9)) for turn in range(9)] == ["a"] * 9

    @each_policy
    def test_a_hundred_upstreams_each_once(self, name: str) -> None:
        upstreams = [Upstream(f"u{number}", weight=1 + number % 7) for number in range(100)]
        for turn, draw in enumerate(evenly(20)):
            assert len(set(POLICIES[name](upstreams).order("k", turn, draw))) == 100

    @pytest.mark.parametrize("name", ["round_robin", "random", "least_connections"])
    @pytest.mark.parametrize("weights", sorted(set(permutations([1, 1, 2, 4]))))
    def test_shares_are_as_the_weights_and_so_is_what_falls_to_others(
        self, name: str, weights: tuple[int, ...]
    ) -> None:
        upstreams = fleet(*((weight, 0) for weight in weights))
        policy = POLICIES[name](upstreams)
        dice, orders = Dice(7), 8000
        gone = upstreams[0]
        found, without = Counter[Upstream](), Counter[Upstream]()
        for turn in range(orders):
            order = list(policy.order("k", turn, dice.random()))
            found[order[0]] += 1
            without[order[order[0] is gone]] += 1
        for one in upstreams:
            assert found[one] / orders == pytest.approx(one.weight / 8, abs=0.02)
        for one in upstreams[1:]:
            assert without[one] / orders == pytest.approx(one.weight / (8 - gone.weight), abs=0.02)

    def test_names_say_whether_they_need_a_key(self) -> None:
        assert {name for name, policy in POLICIES.items() if policy.needs_key} == {"ring"}


def nginx(weights: Sequence[int], turns: int) -> list[int]:
    """ngx_http_upstream_get_peer, peer by peer."""
    current = [0] * len(weights)
    found = []
    for _ in range(turns):
        total, best = 0, -1
        for peer, weight in enumerate(weights):
            current[peer] += weight
            total += weight
            if best < 0 or current[peer] > current[best]:
                best = peer
        current[best] -= total
        found.append(best)
    return found


class TestRoundRobin:
    @settings(max_examples=150)
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=7))
    def test_turns_are_those_of_nginx(self, weights: list[int]) -> None:
        upstreams = fleet(*((weight, 0) for weight in weights))
        policy = RoundRobin(upstreams)
        turns = 2 * sum(weights) + 3
        assert [upstreams.index(next(policy.order("", turn, 0))) for turn in range(turns)] == nginx(weights, turns)

    def test_turns_of_the_heavy_are_spread_out(self) -> None:
        policy = RoundRobin(fleet((5, 0), (1, 0), (1, 0)))
        assert names([next(policy.order("", turn, 0)) for turn in range(14)]) == "aabacaa" * 2

    def test_a_round_that_would_be_too_long_is_scaled_down(self) -> None:
        weights = [1000, 999, 998, 1] * 10
        upstreams = [Upstream(f"u{place}", weight=weight) for place, weight in enumerate(weights)]
        assert sum(weights) > RoundRobin.LONGEST
        policy = RoundRobin(upstreams)
        turns = Counter(next(policy.order("", turn, 0)) for turn in range(RoundRobin.LONGEST))
        for one in upstreams:
            assert turns[one] / RoundRobin.LONGEST == pytest.approx(one.weight / sum(weights), rel=0.01, abs=1e-4)


class TestRandom:
    @settings(max_examples=100)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    def test_each_has_its_part_of_the_draws(self, weights: list[int]) -> None:
        policy = Random(fleet(*((weight, 0) for weight in weights)))
        parts = sum(weights)
        firsts = names([next(policy.order("", 0, draw)) for draw in evenly(parts)])
        assert firsts == "".join(letter * weight for letter, weight in zip("abcdef", weights, strict=False))

    def test_all_orders_are_equally_likely_for_equal_weights(self) -> None:
        policy = Random(fleet((1, 0), (1, 0), (1, 0), (1, 0)))
        orders = Counter(names(policy.order("", 0, draw)) for draw in evenly(24 * 10))
        assert set(orders) == {"".join(order) for order in permutations("abcd")}
        assert set(orders.values()) == {10}


class TestLeastConnections:
    @settings(max_examples=300)
    @given(fleets, draws)
    def test_the_order_is_sorted_by_load(self, loads: list[tuple[int, int]], draw: float) -> None:
        upstreams = fleet(*loads)
        order = [Fraction(one.in_flight, one.weight) for one in LeastConnections(upstreams).order("", 0, draw)]
        assert order == sorted(Fraction(one.in_flight, one.weight) for one in upstreams)

    @pytest.mark.parametrize("loads", sorted(permutations([0, 1, 2, 3])))
    def test_the_least_is_chosen_in_whatever_order_loads_lie(self, loads: tuple[int, ...]) -> None:
        policy = LeastConnections(fleet(*((1, load) for load in loads)))
        for draw in evenly(12):
            assert [one.in_flight for one in policy.order("", 0, draw)] == [0, 1, 2, 3]

    @pytest.mark.parametrize("loads", sorted(set(permutations([1, 1, 1, 2, 0]))))
    def test_those_that_are_equal_are_chosen_equally_often(self, loads: tuple[int, ...]) -> None:
        policy = LeastConnections(fleet(*((1, load) for load in loads)))
        orders = Counter(names(policy.order("", 0, draw)) for draw in evenly(240))
        assert len(orders) == 6  # the three in the middle in any order
        assert set(orders.values()) == {40}

    def test_among_equals_the_draw_goes_by_weight(self) -> None:
        policy = LeastConnections(fleet((1, 0), (3, 0), (2, 5)))
        assert names([next(policy.order("", 0, draw)) for draw in evenly(4)]) == "abbb"

    def test_in_flight_counts_by_weight(self) -> None:
        for order in permutations([(1, 2), (4, 7), (2, 3)]):
            chosen = next(LeastConnections(fleet(*order)).order("", 0, 0.9))
            assert (chosen.weight, chosen.in_flight) == (2, 3)

    def test_a_load_that_only_grows_is_spread_evenly(self) -> None:
        upstreams = fleet((1, 0), (2, 0), (3, 0))
        policy, dice = LeastConnections(upstreams), Dice(3)
        for _ in range(600):
            next(policy.order("", 0, dice.random())).in_flight += 1
        assert [one.in_flight for one in upstreams] == [100, 200, 300]


class TestRingOrder:
    def test_it_is_the_order_of_the_ring(self) -> None:
        upstreams = fleet((1, 0), (3, 0), (2, 0), (1, 0))
        ring = Ring("abcd", 50, {"b": 3, "c": 2})
        for order in permutations(upstreams):
            policy = RingOrder(order, vnodes=50)
            for number in range(50):
                assert names(policy.order(f"user{number}", 0, 0)) == "".join(ring.owners(f"user{number}"))


class SlowHealth:
    """What `gatekeeper.upstreams.health` promises, from all that has happened."""

    def __init__(self, ejection: Ejection) -> None:
        self.ejection = ejection
        self.told: list[bool] = []  # since it was let back last, or ejected
        self.ejected_at: list[int] = []  # since it was let back last
        self.trials: list[int] = []  # since it was ejected last
        self.times_ejected = 0

    @property
    def is_healthy(self) -> bool:
        return not self.ejected_at

    def is_open(self, now: int) -> bool:
        if self.is_healthy:
            return True
        lasts = min(len(self.ejected_at) * self.ejection.eject_for_ns, self.ejection.eject_at_most_ns)
        if now < self.ejected_at[-1] + lasts:
            return False
        return all(now >= trial + self.ejection.eject_for_ns for trial in self.trials)

    def taken(self, now: int) -> int:
        if not self.is_healthy and self.is_open(now):
            self.trials.append(now)
        return self.times_ejected

    def observe(self, success: bool, now: int, term: int) -> bool:
        if term != self.times_ejected:
            return False
        was_healthy = self.is_healthy
        if success and not was_healthy:
            self.ejected_at, self.trials, self.told = [], [], []
        elif was_healthy:
            self.told.append(success)
            last = self.told[-self.ejection.failures :]
            if len(last) == self.ejection.failures and not any(last):
                self._eject(now)
        elif self.trials:
            self._eject(now)
        return self.is_healthy is not was_healthy

    def _eject(self, now: int) -> None:
        self.ejected_at.append(now)
        self.times_ejected += 1
        self.told, self.trials = [], []


steps = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 5, 9, 10, 11, 20, 35, 100]),  # time that passes
        st.sampled_from(["take", "succeed", "fail", "fail"]),
        st.integers(0, 3),  # which of the requests under way, the newest first
    ),
    max_size=60,
)


class TestHealth:
    @settings(max_examples=400)
    @given(steps, st.integers(1, 3))
    def test_it_does_what_the_model_does(self, walk: list[tuple[int, str, int]], failures: int) -> None:
        ejection = Ejection(failures, 10, 35)
        health, model = Health(ejection), SlowHealth(ejection)
        now, under_way = 0, [health.taken(0)]
        for passed, what, which in walk:
            now += passed
            if what == "take":
                term = health.taken(now)
                assert term == model.taken(now)
                under_way.insert(0, term)
            elif under_way:
                term = under_way.pop(which % len(under_way))
                success = what == "succeed"
                assert health.observe(success, now, term) is model.observe(success, now, term)
            assert health.is_healthy is model.is_healthy
            assert (now >= health.closed_until) is model.is_open(now)
            assert health.ejections == len(model.ejected_at)

    def test_so_many_failures_in_a_row_eject(self) -> None:
        health = Health(Ejection(failures=3))
        told = [health.observe(success, 0, 0) for success in (False, False, True, False, False, False)]
        assert told == [False, False, False, False, False, True]
        assert health.state is State.EJECTED

    def test_ejections_grow_to_the_longest_and_are_forgotten_after_a_trial_that_succeeds(self) -> None:
        health = Health(Ejection(1, 10 * NS, 25 * NS))
        now = 0
        for lasts in (10, 20, 25, 25):
            term = health.taken(now)
            health.observe(False, now, term)
            assert health.closed_until == now + lasts * NS
            now = health.closed_until
        assert health.observe(True, now, health.taken(now)) is True
        assert health.is_healthy
        health.observe(False, now, health.taken(now))
        assert health.closed_until == now + 10 * NS

    def test_one_trial_at_a_time_and_a_lost_one_does_not_block(self) -> None:
        health = Health(Ejection(1, 10, 300))
        health.observe(False, 0, 0)
        health.taken(10)
        assert health.state is State.TRIAL
        assert health.closed_until == 20  # nobody else till then
        health.taken(20)
        assert health.closed_until == 30

    def test_what_was_sent_before_the_ejection_says_nothing_after_it(self) -> None:
        """A service that stops refuses what is new while it still answers what it has."""
        health = Health(Ejection(1, 10, 300))
        old = health.taken(0)
        health.observe(False, 0, health.taken(0))
        assert health.observe(True, 1, old) is False
        trial = health.taken(10)
        assert health.observe(True, 11, old) is False
        assert health.observe(False, 11, old) is False
        assert health.state is State.TRIAL
        assert health.observe(True, 12, trial) is True

    def test_failures_of_the_ejected_do_not_prolong_its_time(self) -> None:
        health = Health(Ejection(1, 10, 300))
        health.observe(False, 0, 0)
        for now in range(1, 9):
            health.observe(False, now, health.taken(now))
        assert (health.ejections, health.closed_until) == (1, 10)

    @pytest.mark.parametrize(("state", "event"), sorted(set(product(State, Event)) - set(NEXT), key=repr))
    def test_what_is_not_in_the_table_changes_nothing(self, state: State, event: Event) -> None:
        health = Health(Ejection(3, 10, 300))
        for _ in range(0 if state is State.HEALTHY else 3):
            health.observe(False, 0, 0)
        if state is State.TRIAL:
            health.taken(10)
        assert health.state is state
        before = repr(health)
        if event is Event.TAKEN:
            health.taken(9)
        else:
            health.observe(event is Event.SUCCEEDED, 9, health.term)
        assert repr(health) == before

    def test_its_repr_says_how_it_is(self) -> None:
        health = Health()
        assert repr(health) == "<Health: healthy, 0 failures>"
        for _ in range(EJECTION.failures):
            health.observe(False, 5, 0)
        assert repr(health) == "<Health: ejected, 1 ejections, closed until 10000000005 ns>"


class InOrder:
    """The order given. Counts how far it was asked."""

    needs_key = True

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams = upstreams
        self.asked: list[tuple[str, int, float]] = []
        self.seen = 0

    def order(self, key: str, turn: int, draw: float) -> Iterator[Upstream]:
        self.asked.append((key, turn, draw))
        for upstream in self.upstreams:
            self.seen += 1
            yield upstream


def eject(upstream: Upstream, now: int = 0) -> None:
    while upstream.health.is_healthy:
        upstream.health.observe(False, now, upstream.health.term)


def abc(*, most: int | None = None) -> Pool:
    return Pool("api", [Upstream(name, max_in_flight=most) for name in "abc"], InOrder)


class TestPool:
    def test_it_goes_by_the_policy_and_counts_turns(self) -> None:
        policy = InOrder(())

        def made(upstreams: tuple[Upstream, ...]) -> InOrder:
            policy.upstreams = upstreams
            return policy

        pool = Pool("api", [Upstream("a"), Upstream("b")], made)
        assert pool.needs_key is True
        assert names(pool.choose("k", 5, 0.25)) == "ab"
        policy.seen = 0
        assert next(pool.choose("l", 5, 0.5)).id == "a"
        assert policy.seen == 1  # no further than asked
        assert policy.asked == [("k", 0, 0.25), ("l", 1, 0.5)]

    @pytest.mark.parametrize("policy", POLICIES.values())
    def test_the_ejected_and_the_full_are_passed_over(self, policy: Made) -> None:
        pool = Pool("api", [Upstream(name, max_in_flight=1) for name in "abcd"], policy)
        eject(pool.upstreams[1])
        pool.take(pool.upstreams[2], 0)
        for draw in evenly(8):
            assert sorted(names(pool.choose("k", 0, draw))) == ["a", "d"]

    def test_one_that_fills_up_meanwhile_is_passed_over(self) -> None:
        pool = abc(most=1)
        candidates = pool.choose("k", 0, 0)
        pool.take(next(candidates), 0)
        pool.take(pool.upstreams[1], 0)
        assert names(candidates) == "c"

    def test_when_none_is_healthy_all_that_are_not_full_are_tried(self) -> None:
        pool = abc(most=1)
        for upstream in pool.upstreams:
            eject(upstream)
        assert names(pool.choose("k", 0, 0)) == "abc"
        candidates = pool.choose("k", 0, 0)
        pool.take(next(candidates), 0)
        pool.take(pool.upstreams[1], 0)  # meanwhile
        assert names(candidates) == "c"

    def test_when_none_is_healthy_one_due_for_its_trial_comes_first(self) -> None:
        pool = abc()
        for upstream, now in zip(pool.upstreams, (5, 5, 0), strict=True):
            eject(upstream, now)
        assert names(pool.choose("k", EJECTION.eject_for_ns, 0)) == "cab"

    def test_healthy_ones_that_are_full_do_not_bring_the_ejected_back(self) -> None:
        pool = abc(most=1)
        eject(pool.upstreams[0])
        for upstream in pool.upstreams[1:]:
            pool.take(upstream, 0)
        assert names(pool.choose("k", 0, 0)) == ""

    def test_success_without_any_healthy_one_lets_back_at_once(self) -> None:
        pool = abc()
        for upstream in pool.upstreams:
            eject(upstream)
        upstream = pool.upstreams[1]
        term = pool.take(upstream, 1)
        assert pool.observe(upstream, True, 2, term) is True
        assert names(pool.choose("k", 2, 0)) == "b"

    def test_after_its_time_an_upstream_has_one_trial_at_a_time(self) -> None:
        pool = abc()
        first = pool.upstreams[0]
        eject(first)
        over = EJECTION.eject_for_ns
        assert names(pool.choose("k", over - 1, 0)) == "bc"
        assert names(pool.choose("k", over, 0)) == "abc"  # to look takes no trial
        term = pool.take(first, over)
        assert names(pool.choose("k", over, 0)) == "bc"
        assert pool.observe(first, True, over + 1, term) is True
        assert names(pool.choose("k", over + 1, 0)) == "abc"

    def test_take_and_release_count(self) -> None:
        pool = abc(most=2)
        upstream = pool.upstreams[0]
        pool.take(upstream, 0)
        assert (upstream.in_flight, upstream.is_full) == (1, False)
        pool.take(upstream, 0)
        assert upstream.is_full
        pool.release(upstream)
        pool.release(upstream)
        with pytest.raises(AssertionError, match="released more often than taken"):
            pool.release(upstream)
        assert upstream.in_flight == 0

    @settings(max_examples=150)
    @given(
        st.sampled_from(sorted(POLICIES)),
        st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.booleans()), min_size=1, max_size=6),
        draws,
    )
    def test_what_is_chosen_is_the_order_filtered(
        self, name: str, drawn: list[tuple[int, int, bool]], draw: float
    ) -> None:
        upstreams = [Upstream(f"u{n}", weight=weight, max_in_flight=2) for n, (weight, _, _) in enumerate(drawn)]
        pool = Pool("api", upstreams, POLICIES[name])
        for upstream, (_, in_flight, ejected) in zip(upstreams, drawn, strict=True):
            upstream.in_flight = in_flight
            if ejected:
                eject(upstream)
        order = list(POLICIES[name](upstreams).order("k", 0, draw))
        healthy = [one for one in order if one.health.is_healthy]
        assert list(pool.choose("k", 0, draw)) == [one for one in healthy or order if one.in_flight < 2]

    @each_policy
    def test_no_upstream_or_one_id_twice_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"^pool api: expected at least one upstream$"):
            Pool("api", [], POLICIES[name])
        with pytest.raises(ValueError, match=r"^pool api: expected each id once: 'a' is there twice$"):
            Pool("api", [Upstream("a"), Upstream("b"), Upstream("a", port=81)], POLICIES[name])
        with pytest.raises(ValueError, match=r"^pool api: expected at least one upstream that does not drain$"):
            Pool("api", [Upstream("a", drains=True)], POLICIES[name])

    @each_policy
    def test_one_that_drains_is_chosen_never_and_kept_first(self, name: str) -> None:
        """Not by weight, not when the others are ejected; only by who is pinned to it."""
        pool = Pool("api", [Upstream("a", drains=True, weight=1000), Upstream("b"), Upstream("c")], POLICIES[name])
        for ejected in ("", "b", "c"):
            for upstream in pool.upstreams:
                if upstream.id == ejected:
                    eject(upstream)
            for draw in evenly(8):
                assert "a" not in names(pool.choose("k", 0, draw))
                assert names(pool.keep("a", "k", 0))[0] == "a"

    @settings(max_examples=150)
    @given(
        st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=6),
        st.integers(0, 6),
        st.text(max_size=5),
    )
    def test_what_is_kept_is_ones_own_and_then_the_ring_filtered(
        self, drawn: list[tuple[int, bool, bool]], place: int, key: str
    ) -> None:
        """Against the plain reading: own first, then the owners on the ring that do not drain, those that can serve."""
        upstreams = [
            Upstream(f"u{n}", max_in_flight=2, drains=drains and n > 0) for n, (_, _, drains) in enumerate(drawn)
        ]
        pool = Pool("api", upstreams, RoundRobin, RingOrder)
        for upstream, (in_flight, ejected, _) in zip(upstreams, drawn, strict=True):
            upstream.in_flight = in_flight
            if ejected:
                eject(upstream)
        by_id = {one.id: one for one in upstreams}
        own = by_id.get(f"u{place}")
        owners = Ring([one.id for one in upstreams if not one.drains]).owners(key)
        order = [*([own] if own else []), *(by_id[id] for id in owners if by_id[id] is not own)]
        healthy = [one for one in order if one.health.is_healthy]
        assert list(pool.keep(f"u{place}", key, 0)) == [one for one in healthy or order if one.in_flight < 2]
        strict = [own] if own and own.health.is_healthy and own.in_flight < 2 else []
        assert list(pool.keep(f"u{place}", key, 0, strict=True)) == strict
        assert pool.is_merely_full(f"u{place}", 0) is (
            own is not None and own.in_flight == 2 and own.health.is_healthy
        )


class TestUpstream:
    @pytest.mark.parametrize(
        ("upstream", "authority"),
        [
            (Upstream("a", "127.0.0.1", 9001), b"127.0.0.1:9001"),
            (Upstream("a", "service.internal"), b"service.internal"),
            (Upstream("a", "::1", 9001), b"[::1]:9001"),
            (Upstream("a", path="/run/a.sock"), b"localhost"),
        ],
    )
    def test_its_authority(self, upstream: Upstream, authority: bytes) -> None:
        assert upstream.authority == authority

    @pytest.mark.parametrize(
        ("upstream", "told"),
        [
            (
                Upstream("http://127.0.0.1:9001", "127.0.0.1", 9001),
                "<Upstream http://127.0.0.1:9001, 0 in flight, healthy>",
            ),
            (
                Upstream("b", path="/run/b.sock", weight=2, max_in_flight=9),
                "<Upstream b, http+unix:///run/b.sock, weight 2, 0 of 9 in flight, healthy>",
            ),
            (Upstream("c", drains=True), "<Upstream c, http://localhost, 0 in flight, drains, healthy>"),
        ],
    )
    def test_its_repr_says_all_that_matters(self, upstream: Upstream, told: str) -> None:
        assert repr(upstream) == told
        eject(upstream)
        assert repr(upstream) == told.replace("healthy", "ejected")
        other = Upstream("z")
        assert (
            repr(Pool("api", [upstream, other], RoundRobin))
            == f"<Pool api: RoundRobin of [{upstream!r}, {other!r}]>"
        )

    def test_wrong_values_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^expected an id that is not empty$"):
            Upstream("")
        with pytest.raises(ValueError, match=r"^a: expected a weight of 1 or more, and not 0$"):
            Upstream("a", weight=0)
        with pytest.raises(ValueError, match=r"^a: expected max_in_flight of 1 or more, and not 0$"):
            Upstream("a", max_in_flight=0)
