"""Each algorithm keeps its promise, against an exact oracle, on a clock that tests move."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.commands import NEVER, State
from gatekeeper.ratelimit.algorithms import ALGORITHMS, Algorithm, SlidingWindow, bind
from gatekeeper.ratelimit.rates import Rate
from tests.oracles import NS, ORACLES, most_in_any_window

NEW: State = None
NAMES = sorted(ALGORITHMS)
START = 1_800_000_000 * NS
each_algorithm = pytest.mark.parametrize("name", NAMES)

small_rates = st.builds(Rate, st.integers(1, 12), st.sampled_from([1, 7, 60, 3600]))
rates = st.one_of(small_rates, st.builds(Rate, st.integers(1, 10**9), st.sampled_from([1, 60, 86_400])))


@st.composite
def walks(draw: st.DrawFn, rate: st.SearchStrategy[Rate] = small_rates) -> tuple[Rate, list[tuple[int, int]]]:
    """A rate, and steps of (nanoseconds that pass, cost), crowded about the seams of windows and ticks."""
    drawn = draw(rate)
    period = drawn.period * NS
    seams = [
        0,
        1,
        period // 64,
        period // 64 - 1,
        period // drawn.amount,
        period // 2,
        period - 1,
        period,
        period + 1,
    ]
    pause = st.one_of(st.just(0), st.sampled_from(seams), st.integers(0, period // 8), st.integers(0, 3 * period))
    cost = st.one_of(st.just(1), st.integers(1, max(1, drawn.amount // 3)), st.integers(1, drawn.amount + 1))
    return drawn, draw(st.lists(st.tuples(pause, cost), min_size=1, max_size=40))


@each_algorithm
@settings(max_examples=250, deadline=None)
@given(walk=walks(rates))
def test_decides_as_the_oracle_does(name: str, walk: tuple[Rate, list[tuple[int, int]]]) -> None:
    rate, steps = walk
    algorithm, oracle = bind(name, rate), ORACLES[name](*rate)
    state, now = NEW, START
    for pause, cost in steps:
        now += pause
        state, verdict = algorithm.step(state, now, cost)
        assert verdict.allowed == oracle.hit(now, cost)
        assert verdict.remaining == oracle.remaining(now)


@each_algorithm
@settings(max_examples=250, deadline=None)
@given(walk=walks(), spare=st.integers(1, 3))
def test_waits_are_exact_and_a_refusal_changes_nothing(
    name: str, walk: tuple[Rate, list[tuple[int, int]]], spare: int
) -> None:
    rate, steps = walk
    algorithm = bind(name, rate)
    state, now = NEW, START
    for pause, cost in steps:
        now += pause
        after, verdict = algorithm.step(state, now, cost)
        if verdict.allowed:
            assert verdict.retry_ns == 0
            assert verdict.receipt is not None
        else:
            assert after == state
            assert verdict.receipt is None
            if cost > rate.amount:
                assert verdict.retry_ns == NEVER or verdict.retry_after > 1e9
            else:
                assert algorithm.step(state, now + verdict.retry_ns, cost)[1].allowed, "retry_after is too early"
                assert not algorithm.step(state, now + verdict.retry_ns - 1, cost)[1].allowed, "it is too late"
        state = after
        left = look(algorithm, state, now)
        assert left == verdict.remaining
        if left == rate.amount:
            assert verdict.reset_ns == 0
        else:
            assert look(algorithm, state, now + verdict.reset_ns) > left, "reset_after is too early"
            assert look(algorithm, state, now + verdict.reset_ns - 1) == left, "it is too late"


@each_algorithm
@settings(max_examples=150, deadline=None)
@given(walk=walks(rates))
def test_a_state_is_forgotten_when_it_ends_and_not_before_its_lifetime(
    name: str, walk: tuple[Rate, list[tuple[int, int]]]
) -> None:
    rate, steps = walk
    algorithm = bind(name, rate)
    state, now = NEW, START
    for pause, cost in steps:
        now += pause
        state, verdict = algorithm.step(state, now, cost)
        end = algorithm.ends(state)
        assert end <= now + algorithm.lifetime_ns
        if state is not None:
            assert look(algorithm, state, end) == rate.amount
            if verdict.allowed:
                assert look(algorithm, state, max(now, end - 1)) < rate.amount or end <= now


@each_algorithm
@settings(max_examples=250, deadline=None)
@given(walk=walks(), data=st.data())
def test_what_is_given_back_was_never_spent(
    name: str, walk: tuple[Rate, list[tuple[int, int]]], data: st.DataObject
) -> None:
    rate, steps = walk
    algorithm = bind(name, rate)
    state, now = NEW, START
    for pause, cost in steps:
        now += pause
        before = look(algorithm, state, now)
        after, verdict = algorithm.step(state, now, cost)
        if verdict.receipt is not None and data.draw(st.booleans()):
            assert look(algorithm, algorithm.give(after, now, cost, verdict.receipt), now) == before
            after = algorithm.give(after, now, cost, verdict.receipt)
        state = after


@settings(max_examples=400, deadline=None)
@given(walk=walks(), data=st.data())
@each_algorithm
def test_late_and_repeated_give_backs_never_break_the_promise(
    name: str, walk: tuple[Rate, list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Whatever is given back when, what remains spent keeps within what the algorithm promises."""
    rate, steps = walk
    algorithm = bind(name, rate)
    state, now = NEW, START
    kept: list[tuple[int, int, int]] = []
    for pause, cost in steps:
        now += pause
        state, verdict = algorithm.step(state, now, cost)
        if verdict.receipt is not None:
            kept.append((now, cost, verdict.receipt))
        wanted: bool = data.draw(st.booleans())
        if kept and wanted:
            place: int = data.draw(st.integers(0, len(kept) - 1))
            _, cost, receipt = kept.pop(place)
            state = algorithm.give(state, now, cost, receipt)
        assert 0 <= look(algorithm, state, now) <= rate.amount
    assert_promise(name, rate, [(at, cost) for at, cost, _ in kept])


@each_algorithm
@settings(max_examples=250, deadline=None)
@given(walk=walks())
def test_the_promise_of_the_algorithm_holds(name: str, walk: tuple[Rate, list[tuple[int, int]]]) -> None:
    rate, steps = walk
    algorithm = bind(name, rate)
    state, now = NEW, START
    admitted = []
    for pause, cost in steps:
        now += pause
        state, verdict = algorithm.step(state, now, cost)
        if verdict.allowed:
            admitted.append((now, cost))
    assert_promise(name, rate, admitted)


def assert_promise(name: str, rate: Rate, admitted: list[tuple[int, int]]) -> None:
    period = rate.period * NS
    if name == "sliding_window":
        assert most_in_any_window(admitted, period) <= rate.amount
    elif name == "gcra":
        for start, _ in admitted:
            for end, _ in admitted:
                within = sum(cost for at, cost in admitted if start <= at <= end)
                assert within * period <= rate.amount * period + rate.amount * (end - start) or end < start
    else:
        # Two neighbouring windows at the most have a part in any one; each holds at most the amount.
        assert most_in_any_window(admitted, period - 1) <= 2 * rate.amount


def test_the_default_admits_at_most_a_64th_of_a_window_later_than_an_exact_log() -> None:
    algorithm = SlidingWindow(1, 60)
    for offset in (0, 1, 10**8, 937_499_999, 937_500_000, 5 * NS):
        state, _ = algorithm.step(None, START + offset, 1)
        _, refused = algorithm.step(state, START + offset, 1)
        assert 60 * NS < refused.retry_ns <= 60 * NS + 60 * NS // 64


@each_algorithm
def test_a_burst_at_one_instant_admits_exactly_the_limit(name: str) -> None:
    algorithm = bind(name, Rate(5, 60))
    state, outcomes = NEW, []
    for _ in range(9):
        state, verdict = algorithm.step(state, START, 1)
        outcomes.append(verdict.allowed)
    assert outcomes == [True] * 5 + [False] * 4


@each_algorithm
def test_a_cost_above_the_limit_is_never_admitted_and_says_so(name: str) -> None:
    algorithm = bind(name, Rate(5, 60))
    for state in (None, algorithm.step(None, START, 2)[0]):
        _, verdict = algorithm.step(state, START, 6)
        assert not verdict.allowed
        assert verdict.retry_after == float("inf")


@each_algorithm
@settings(max_examples=150, deadline=None)
@given(walk=walks(), new=st.integers(1, 3000), later=st.integers(0, 70 * NS))
def test_a_changed_limit_keeps_what_was_used(
    name: str, walk: tuple[Rate, list[tuple[int, int]]], new: int, later: int
) -> None:
    rate, steps = walk
    old, changed = bind(name, rate), bind(name, Rate(new, rate.period))
    state, now = NEW, START
    for pause, cost in steps:
        now += pause
        state, verdict = old.step(state, now, cost)
    used = rate.amount - verdict.remaining
    if name == "gcra":  # its state is a time: a token weighs the more of it the fewer there are
        return
    assert look(changed, state, now) == max(0, new - used)
    after, verdict = changed.step(state, now + later, 1)
    assert verdict.allowed == (look(changed, state, now + later) >= 1)
    assert changed.ends(after) <= now + later + changed.lifetime_ns


@each_algorithm
@settings(max_examples=150, deadline=None)
@given(walk=walks(), back=st.integers(1, 100 * NS))
def test_a_clock_that_stands_behind_admits_nothing_more(
    name: str, walk: tuple[Rate, list[tuple[int, int]]], back: int
) -> None:
    """Processes that share a store may read clocks that differ."""
    rate, steps = walk
    algorithm = bind(name, rate)
    state, now = NEW, START
    for pause, cost in steps:
        now += pause
        state, _ = algorithm.step(state, now, cost)
    left = look(algorithm, state, now)
    admitted = 0
    for _ in range(rate.amount + 1):
        state, verdict = algorithm.step(state, now - back, 1)
        admitted += verdict.allowed
    assert admitted <= left


def test_a_burst_is_the_capacity_of_the_bucket() -> None:
    algorithm = bind("gcra", Rate(60, 60), burst=3)
    state, outcomes = NEW, []
    for second in (0, 0, 0, 0, 1, 1, 100, 100, 100, 100):
        state, verdict = algorithm.step(state, START + second * NS, 1)
        outcomes.append(verdict.allowed)
    assert outcomes == [True, True, True, False, True, False, True, True, True, False]


def test_the_state_of_the_default_stays_small_whatever_the_hits() -> None:
    """65 counts of 14 bits for 10,000 an hour: never a list that grows with the hits."""
    algorithm = SlidingWindow(10_000, 3600)
    state, now = NEW, START
    for _ in range(20_000):
        now += 3600 * NS // 9_999
        state, _ = algorithm.step(state, now, 1)
        assert (state or 0).bit_length() <= 48 + 66 * 14


def look(algorithm: Algorithm, state: State, now: int) -> int:
    """What remains, by a hit of no cost, which must not change a thing."""
    after, verdict = algorithm.step(state, now, 0)
    assert verdict.receipt is None
    assert algorithm.step(after, now, 0)[1].remaining == verdict.remaining
    return verdict.remaining
