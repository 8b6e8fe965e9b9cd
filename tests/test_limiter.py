"""Limiter and decorators: limits without any framework."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import gatekeeper
from gatekeeper import Gatekeeper, Limited, Limiter, SettingsError, StoreError
from gatekeeper.commands import Hits, Replies
from gatekeeper.ratelimit.rates import RateError
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock, virtual_store


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def limiter(clock: VirtualClock) -> Limiter:
    return Limiter(virtual_store(clock))


@pytest.fixture
def gk(clock: VirtualClock) -> Gatekeeper:
    return Gatekeeper({}, store=virtual_store(clock))


def test_a_verdict_tells_what_is_left_and_how_long_to_wait(limiter: Limiter, clock: VirtualClock) -> None:
    verdict = limiter.hit("2/minute", "user:7")
    assert verdict
    assert (verdict.limit, verdict.remaining, verdict.retry_after) == (2, 1, 0.0)
    assert verdict.reset_after == 60 + 60 / 64
    limiter.hit("2/minute", "user:7")
    refused = limiter.hit("2/minute", "user:7")
    assert not refused
    assert refused.retry_after == 60 + 60 / 64
    assert repr(refused) == "<Verdict refused, retry after 60.9375 s, 0 of 2 left, reset after 60.9375 s>"
    clock.advance(refused.retry_after)
    assert limiter.hit("2/minute", "user:7")


def test_rates_and_keys_are_kept_apart(limiter: Limiter) -> None:
    assert limiter.hit("1/minute", "a")
    assert not limiter.hit("1/minute", "a")
    assert limiter.hit("1/minute", "b")
    assert limiter.hit("2/minute", "a")
    assert limiter.hit("1/hour", "a")
    assert not limiter.hit("1 per minute", "a"), "the same rate in other words"


def test_a_name_keeps_what_was_used_when_the_amount_changes(limiter: Limiter) -> None:
    limiter.hit("3/minute", "a", 3, name="api")
    assert not limiter.hit("3/minute", "a", name="api")
    assert limiter.hit("300/minute", "a", name="api").remaining == 296
    assert limiter.hit("3/minute", "a", name="other")


def test_several_rates_are_spent_together_or_not_at_all(limiter: Limiter, clock: VirtualClock) -> None:
    outcomes = [bool(limiter.hit("2/minute; 3/hour", "a")) for _ in range(5)]
    assert outcomes == [True, True, False, False, False]
    clock.advance(61)
    assert limiter.hit("2/minute; 3/hour", "a")
    refused = limiter.hit("2/minute; 3/hour", "a")
    assert refused.limit == 3, "the verdict is of the rate that refused"


def test_peek_spends_nothing_and_reset_forgets(limiter: Limiter) -> None:
    assert all(limiter.peek("1/minute", "a") for _ in range(3))
    assert limiter.hit("1/minute", "a")
    assert not limiter.peek("1/minute", "a")
    limiter.reset("1/minute", "a")
    assert limiter.hit("1/minute", "a")


def test_awaiting_does_the_same(limiter: Limiter) -> None:
    async def main() -> list[bool]:
        outcomes = [bool(await limiter.ahit("1/minute", "a")), bool(await limiter.ahit("1/minute", "a"))]
        outcomes.append(bool(await limiter.apeek("1/minute", "a")))
        await limiter.areset("1/minute", "a")
        return [*outcomes, bool(await limiter.ahit("1/minute", "a"))]

    assert asyncio.run(main()) == [True, False, False, True]


def test_a_cost_above_the_limit_never_passes(limiter: Limiter) -> None:
    assert limiter.hit("5/minute", "a", 6).retry_after == float("inf")
    assert limiter.hit("5/minute", "a", 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("5/fortnight", "a"), RateError, "expected a rate"),
        (("0/minute", "a"), RateError, "expected a rate"),
        (("5/minute", 7), TypeError, "key: expected a string, and not int"),
        (("5/minute", None), TypeError, "key: expected a string"),
        (("5/minute", b"a"), TypeError, "key: expected a string"),
        (("5/minute", "a", 0), ValueError, "cost: expected at least 1"),
        (("5/minute", "a", -3), ValueError, "cost: expected at least 1"),
        (("5/minute", "a", 1.5), TypeError, "cost: expected an integer"),
        (("5/minute", "a", True), TypeError, "cost: expected an integer"),
        (("5/minute", "a", 1.0), TypeError, "cost: expected an integer"),
        (("5/minute", "a", 1, "a/b"), ValueError, "name: expected"),
        (("5/minute", "a", 1, ""), ValueError, "name: expected"),
        ((None, "a"), RateError, "expected a rate"),
    ],
)
def test_a_wrong_argument_is_a_clear_error_that_spends_nothing(
    limiter: Limiter, arguments: Any, error: type[Exception], message: str
) -> None:
    for method in (limiter.hit, limiter.peek):
        with pytest.raises(error, match=message):
            method(*arguments)
    assert limiter.hit("1/minute", "a")


@pytest.mark.parametrize(
    "store", ["memory", "redis://user:hunter2@host:x", "nosql://user:hunter2@host", "", "memory:/", "memory://x", 7]
)
def test_a_store_it_does_not_know_is_refused_without_showing_the_url(store: Any) -> None:
    with pytest.raises((SettingsError, TypeError)) as error:
        Limiter(store)
    assert "hunter2" not in str(error.value)


def test_an_algorithm_it_does_not_know_is_refused() -> None:
    with pytest.raises(SettingsError, match="algorithm"):
        Limiter(algorithm="leaky")
    assert Limiter(algorithm="gcra").hit("2/minute", "a").reset_after <= 30


def test_long_keys_are_bounded_and_stay_distinct(limiter: Limiter) -> None:
    assert limiter.hit("1/minute", "k" * 1_000_000)
    assert not limiter.hit("1/minute", "k" * 1_000_000)
    assert limiter.hit("1/minute", "k" * 1_000_001)
    assert isinstance(limiter.store, MemoryStore)
    assert all(len(key) <= 128 for shard in limiter.store._shards for key in shard.fresh)


def test_rates_made_up_in_operation_do_not_pile_up() -> None:
    limiter = Limiter()
    for number in range(1, 5000):
        limiter.hit(f"{number}/minute", "a", name="tier")
    assert len(limiter._limits) <= 4096


def test_a_store_that_does_not_answer_is_an_error_of_its_own() -> None:
    class Down(MemoryStore):
        def ask(self, batch: Hits) -> Replies:
            return [StoreError("down")] * len(batch)

    with pytest.raises(StoreError, match="down"):
        Limiter(Down()).hit("5/minute", "a")


class TestDecorators:
    def test_a_function_has_a_quota_of_its_own_outside_of_requests(
        self, gk: Gatekeeper, clock: VirtualClock
    ) -> None:
        @gk.limit("2/minute")
        def add(one: int, two: int = 0) -> int:
            """Adds."""
            return one + two

        @gk.limit("2/minute")
        def other() -> None: ...

        assert [add(1), add(1, two=2)] == [1, 3]
        with pytest.raises(Limited, match=r"retry after 60\.938 s") as refused:
            add(1)
        assert refused.value.verdict.remaining == 0
        other()
        clock.advance(61)
        assert add(4) == 4
        assert (add.__name__, add.__doc__) == ("add", "Adds.")
        assert str(inspect.signature(add)) == "(one: 'int', two: 'int' = 0) -> 'int'"

    def test_asynchronous_functions_stay_asynchronous(self, gk: Gatekeeper) -> None:
        @gk.limit("1/minute")
        async def work() -> str:
            return "done"

        assert inspect.iscoroutinefunction(work)
        assert asyncio.run(work()) == "done"
        with pytest.raises(Limited):
            asyncio.run(work())

    def test_methods_and_partials_can_be_limited(self, gk: Gatekeeper) -> None:
        class Service:
            @gk.limit("2/minute")
            def work(self) -> str:
                return "done"

            @staticmethod
            @gk.limit("1/minute")
            def fixed() -> str:
                return "fixed"

        assert [Service().work(), Service().work(), Service.fixed()] == ["done", "done", "fixed"]
        with pytest.raises(Limited):
            Service().work()

    def test_two_limits_on_a_function_both_hold(self, gk: Gatekeeper) -> None:
        @gk.limit("2/minute", name="minute")
        @gk.limit("3/hour", name="hour")
        def work() -> None: ...

        work()
        work()
        with pytest.raises(Limited):
            work()

    def test_what_cannot_be_limited_is_refused_when_decorating(self, gk: Gatekeeper) -> None:
        def generator() -> Iterator[int]:
            yield 1

        async def async_generator() -> AsyncIterator[int]:
            yield 1

        class Class: ...

        class Callable:
            def __call__(self) -> None: ...

        wrapped = functools.partial(generator)
        things: list[Any] = [generator, async_generator, Class, Callable(), wrapped, 7, None, staticmethod(len)]
        for thing in [*things, classmethod(generator)]:  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="limit: expected"):
                gk.limit("5/minute")(thing)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rate": "5/fortnight"}, "rate: expected a rate"),
            ({"rate": "5/minute", "key": "address"}, "key: expected ip, ip/BITS"),
            ({"rate": "5/minute", "cost": 0}, "cost: expected"),
            ({"rate": "5/minute", "cost": 6}, "expected a cost within the rate"),
            ({"rate": "5/minute", "name": "a b"}, "name: expected"),
        ],
    )
    def test_a_wrong_limit_is_refused_when_decorating(
        self, gk: Gatekeeper, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(SettingsError, match=message):

            @gk.limit(**arguments)
            def work() -> None: ...

    def test_concurrent_calls_admit_exactly_the_limit(self, gk: Gatekeeper) -> None:
        @gk.limit("3/minute")
        async def work() -> str:
            await asyncio.sleep(0)
            return "done"

        async def main() -> list[Any]:
            return await asyncio.gather(*[work() for _ in range(10)], return_exceptions=True)

        outcomes = asyncio.run(main())
        assert outcomes.count("done") == 3
        assert sum(isinstance(outcome, Limited) for outcome in outcomes) == 7


def test_the_public_names_are_lazy_and_complete() -> None:
    for name in gatekeeper.__all__:
        assert getattr(gatekeeper, name).__name__ == name
    assert set(gatekeeper.__all__) <= set(dir(gatekeeper))
    with pytest.raises(AttributeError, match="nothing"):
        gatekeeper.nothing  # noqa: B018


def test_virtual_time_does_not_go_back(clock: VirtualClock) -> None:
    with pytest.raises(ValueError, match="not negative"):
        clock.advance(-1)
