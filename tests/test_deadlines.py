"""The wheel of deadlines, on a clock that is turned by hand, against a dictionary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any, Final, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.proxy.deadlines import GRAIN, Deadlines, Timed

LATEST: Final = 2 * GRAIN + 1e-6
"""How late a thing may expire where the loop is in time: the grain, and the turn that was just over."""


class Timer:
    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Loop:
    """The clock and the timers of an event loop."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._timers: list[tuple[float, int, Timer]] = []
        self._number = count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(lambda: call(*args))
        heappush(self._timers, (self.now + delay, next(self._number), timer))
        return timer

    @property
    def pending(self) -> int:
        return sum(not timer.is_cancelled for _, _, timer in self._timers)

    def advance(self, seconds: float) -> None:
        """Let time pass, and each timer be called when it is due."""
        until = self.now + seconds
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heappop(self._timers)
            self.now = max(self.now, when)
            if not timer.is_cancelled:
                timer.call()
        self.now = until

    def stall(self, seconds: float) -> None:
        """Let time pass in which the loop calls nobody; then those that are due."""
        self.now += seconds
        self.advance(0)


class Thing(Timed):
    """Notes when it expired, and may do something then."""

    def __init__(self, loop: Loop, then: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.loop = loop
        self.then = then
        self.times: list[float] = []

    def expired(self) -> None:
        self.times.append(self.loop.now)
        self.then()


def wheel(loop: Loop) -> Deadlines:
    return Deadlines(cast(asyncio.AbstractEventLoop, loop))


@pytest.mark.parametrize("now", [0.001, 1.0, 999.9999, 12345.6789, 5e6])
@pytest.mark.parametrize("seconds", [0.0, 0.001, GRAIN, GRAIN - 1e-9, GRAIN + 1e-9, 0.3, 1.0, 10.0, 74.99, 3600.0])
def test_a_thing_expires_once_not_before_its_deadline_and_little_after(now: float, seconds: float) -> None:
    loop = Loop(now)
    deadlines, thing = wheel(loop), Thing(loop)
    deadlines.set(thing, seconds)
    assert not thing.times, "not while it is set"
    loop.advance(seconds + 1)
    (at,) = thing.times
    assert now + seconds <= at <= now + seconds + LATEST
    assert loop.pending == 0, "nobody need be woken for nothing"
    loop.advance(100)
    assert len(thing.times) == 1


def test_a_deadline_that_moves_later_is_the_later_one() -> None:
    loop = Loop()
    deadlines, thing = wheel(loop), Thing(loop)
    for _ in range(100):
        deadlines.set(thing, 1)
        loop.advance(0.9)
    assert not thing.times
    loop.advance(0.1 + LATEST)
    assert len(thing.times) == 1


def test_a_deadline_that_moves_earlier_is_the_earlier_one_and_comes_once() -> None:
    loop = Loop()
    deadlines, thing = wheel(loop), Thing(loop)
    deadlines.set(thing, 75)
    deadlines.set(thing, 1)
    loop.advance(1 + LATEST)
    assert len(thing.times) == 1
    loop.advance(100)
    assert len(thing.times) == 1


def test_a_deadline_may_move_to_and_fro() -> None:
    loop = Loop()
    deadlines, thing = wheel(loop), Thing(loop)
    for seconds in (10, 1, 20, 0.5, 5):
        deadlines.set(thing, seconds)
    loop.advance(5)
    assert not thing.times
    loop.advance(LATEST)
    assert len(thing.times) == 1
    loop.advance(100)
    assert len(thing.times) == 1


def test_what_is_cleared_does_not_expire_until_it_is_set_again() -> None:
    loop = Loop()
    deadlines, thing = wheel(loop), Thing(loop)
    deadlines.set(thing, 1)
    loop.advance(0.5)
    deadlines.clear(thing)
    loop.advance(10)
    assert not thing.times
    assert loop.pending == 0
    for again in (3, 0.2):  # later, and earlier, than what it was cleared of
        deadlines.set(thing, 1)
        deadlines.clear(thing)
        deadlines.set(thing, again)
        loop.advance(again)
        assert not thing.times
        loop.advance(LATEST)
        assert len(thing.times) == 1
        thing.times.clear()


def test_a_thing_may_set_clear_and_bring_others_in_while_it_expires() -> None:
    loop = Loop()
    deadlines = wheel(loop)
    other, late = Thing(loop), Thing(loop)

    def then() -> None:
        if len(thing.times) < 3:
            deadlines.set(thing, 1)
        deadlines.clear(other)
        deadlines.set(late, 0)

    thing = Thing(loop, then)
    deadlines.set(thing, 1)
    deadlines.set(other, 1)  # in the same slot, behind it
    loop.advance(10)
    assert [round(at - 1000) for at in thing.times] == [1, 2, 3]
    assert not other.times
    assert len(late.times) == 3
    assert loop.pending == 0


def test_a_loop_that_was_held_up_expires_what_is_due_at_once_and_nothing_else() -> None:
    loop = Loop()
    deadlines = wheel(loop)
    things = [Thing(loop) for _ in range(100)]
    for place, thing in enumerate(things):
        deadlines.set(thing, place)
    loop.stall(49.5)
    assert [len(thing.times) for thing in things] == [1] * 50 + [0] * 50
    loop.advance(60)
    assert [len(thing.times) for thing in things] == [1] * 100


def test_after_a_long_idle_time_it_goes_on() -> None:
    loop = Loop()
    deadlines, thing = wheel(loop), Thing(loop)
    deadlines.set(thing, 1)
    loop.advance(86_400)
    deadlines.set(thing, 1)
    loop.advance(1)
    assert len(thing.times) == 1
    loop.advance(LATEST)
    assert len(thing.times) == 2


def test_closed_it_calls_nobody() -> None:
    loop = Loop()
    deadlines, thing = wheel(loop), Thing(loop)
    deadlines.set(thing, 1)
    deadlines.close()
    loop.advance(10)
    assert not thing.times
    assert loop.pending == 0


class Oracle:
    """A dictionary of deadlines, and a wheel that must agree with it."""

    def __init__(self, things: int, now: float = 1000.0) -> None:
        self.loop = Loop(now)
        self.deadlines = wheel(self.loop)
        self.due: dict[int, float] = {}
        self.things = [Thing(self.loop, lambda place=place: self.came(place)) for place in range(things)]  # type: ignore[misc]
        self.stalled_until = 0.0

    def came(self, place: int) -> None:
        due = self.due.pop(place, None)
        assert due is not None, "it had no deadline"
        assert due <= self.loop.now, "too early"
        assert self.loop.now <= max(due + LATEST, self.stalled_until + LATEST), "too late"

    def set(self, place: int, seconds: float) -> None:
        self.due[place] = self.loop.now + seconds
        self.deadlines.set(self.things[place], seconds)

    def clear(self, place: int) -> None:
        self.due.pop(place, None)
        self.deadlines.clear(self.things[place])

    def pass_by(self, seconds: float, *, stalls: bool = False) -> None:
        if stalls:
            self.stalled_until = self.loop.now + seconds
        (self.loop.stall if stalls else self.loop.advance)(seconds)
        overdue = [due for due in self.due.values() if due + LATEST < self.loop.now]
        assert stalls or not overdue, "forgotten"


spans = st.one_of(
    st.floats(0, 3), st.sampled_from([0.0, GRAIN, 2 * GRAIN, 1.0, 10.0, 30.0, 75.0]), st.floats(0, 100)
)
places = st.integers(0, 5)
moves = st.one_of(
    st.tuples(st.just("set"), places, spans),
    st.tuples(st.just("clear"), places, st.just(0.0)),
    st.tuples(st.just("pass"), st.just(0), spans),
    st.tuples(st.just("stall"), st.just(0), spans),
)


@settings(max_examples=300, deadline=None)
@given(now=st.floats(0.001, 1e6), steps=st.lists(moves, max_size=60))
def test_the_wheel_agrees_with_a_dictionary(now: float, steps: list[tuple[str, int, float]]) -> None:
    oracle = Oracle(6, now)
    for what, place, seconds in steps:
        if what == "set":
            oracle.set(place, seconds)
        elif what == "clear":
            oracle.clear(place)
        else:
            oracle.pass_by(seconds, stalls=what == "stall")
    oracle.pass_by(101)
    assert not oracle.due
    assert oracle.loop.pending == 0


def test_thousands_of_moves_of_hundreds_of_things_agree_with_a_dictionary() -> None:
    random = Random(7)
    oracle = Oracle(300)
    for _ in range(30_000):
        place = random.randrange(300)
        if random.random() < 0.05:
            oracle.clear(place)
        else:
            oracle.set(place, random.choice((0, 0.01, 0.3, 2, 10, 30, 75)) * random.random())
        if random.random() < 0.2:
            oracle.pass_by(random.random() * 0.2, stalls=random.random() < 0.05)
    oracle.pass_by(80)
    assert not oracle.due
    assert oracle.loop.pending == 0
    assert sum(len(thing.times) for thing in oracle.things) > 10_000
