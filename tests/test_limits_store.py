"""The store in a storage of `limits`, over memory, a real memcached and a real Redis.

What of the contract (tests/test_stores.py) it can hold is asked of it here by the contract's own tests. Time is
virtual where the storage takes the client's.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import limits
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits.storage import MemoryStorage, Storage

import gatekeeper.stores.limits as module
from gatekeeper.commands import Batch, Hits, Store, Verdict
from gatekeeper.errors import MissingExtra, SettingsError, StoreError
from gatekeeper.ratelimit.algorithms import NS, Concurrency, Penalty
from gatekeeper.ratelimit.rules import RateLimit
from gatekeeper.stores.limits import LimitsStore, MissingDriver, kinds, schemes, unsupported, weaker
from gatekeeper.testing import VirtualClock
from tests import test_stores as contract
from tests.limits_store import PATIENT, Server, serving, stores
from tests.oracles import ORACLES
from tests.test_stores import ask, bound, limit

Make = Callable[..., LimitsStore]

ALGORITHMS = ("fixed_window", "sliding_counter", "sliding_window")
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture(scope="session")
def memcached() -> Iterator[Server]:
    with serving("memcached") as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[Server]:
    with serving("redis") as server:
        yield server


@pytest.fixture(params=["memory", "memcached", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return "memory://" if name == "memory" else request.getfixturevalue(name).url


@pytest.fixture(params=["memcached", "redis"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture
def make(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    opened: list[LimitsStore] = []
    yield stores(url, monkeypatch, opened)
    for store in opened:
        store.close()


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    opened: list[LimitsStore] = []
    yield stores("memory://", monkeypatch, opened)
    for store in opened:
        store.close()


def gives_back(store: LimitsStore, algorithm: str) -> bool:
    return algorithm != "sliding_window" or "memcached" in repr(store)


def allowed(store: Store, *hits: Any) -> list[bool]:
    return [verdict.allowed for verdict in ask(store, *hits)]


class TestTheContract:
    """As far as it holds here, asked by the contract's own tests."""

    @each_algorithm
    @pytest.mark.parametrize(
        "test",
        [
            contract.test_admits_exactly_the_limit_for_each_key,
            contract.test_a_batch_is_admitted_whole_or_not_at_all_in_any_order_of_its_hits,
            contract.test_a_refused_batch_shows_the_other_quotas_unspent_and_has_no_receipts,
            contract.test_one_key_twice_in_a_batch_is_spent_twice,
            contract.test_a_reset_forgets_one_key_of_one_limit,
            contract.test_a_take_spends_what_there_is_up_to_its_cost,
            contract.test_a_shadow_refuses_nothing_and_is_unspent_when_another_refuses,
        ],
        ids=lambda test: test.__name__,
    )
    def test_holds_for_each_algorithm(self, make: Make, test: Callable[..., None], algorithm: str) -> None:
        test(make, algorithm)

    @each_algorithm
    @pytest.mark.parametrize(
        "test",
        [contract.test_a_give_back_undoes_exactly_its_hit, contract.test_part_of_a_hit_may_be_given_back],
        ids=lambda test: test.__name__,
    )
    def test_holds_for_what_can_be_given_back(self, make: Make, test: Callable[..., None], algorithm: str) -> None:
        if not gives_back(make(VirtualClock()), algorithm):
            pytest.skip("nothing can be taken out of a moving window")
        test(make, algorithm)

    @pytest.mark.parametrize(
        "key", ["", "\0", "\0overflow", "ключ", "a" * 100_000, "\ud800", "a b\r\nget x", "{t}:x"]
    )
    def test_any_string_is_a_key_of_its_own(self, make: Make, key: str) -> None:
        contract.test_any_string_is_a_key_of_its_own(make, key)

    def test_awaiting_gives_the_same_answers(self, make: Make) -> None:
        contract.test_awaiting_gives_the_same_answers(make)


@each_algorithm
def test_a_peek_answers_as_the_hit_would_and_spends_nothing(make: Make, algorithm: str) -> None:
    store, one = make(VirtualClock()), limit(3, algorithm=algorithm)
    for _ in range(4):
        peeks = [ask(store, (one, "key", 2), spend=False)[0] for _ in range(3)]
        hit = ask(store, (one, "key", 2))[0]
        told = [(peek.allowed, peek.limit, peek.remaining, peek.receipt) for peek in peeks]
        assert told == [(hit.allowed, 3, hit.remaining, None)] * 3


@each_algorithm
def test_a_raised_or_lowered_limit_keeps_what_was_used(make: Make, algorithm: str) -> None:
    store = make(VirtualClock())
    ask(store, (limit(5, algorithm=algorithm), "key", 5))
    assert ask(store, (limit(300, algorithm=algorithm), "key", 1))[0].remaining == 294
    refused = ask(store, (limit(2, algorithm=algorithm), "key", 1))[0]
    assert (refused.allowed, refused.remaining) == (False, 0)


def test_each_algorithm_table_and_key_has_a_counter_of_its_own(make: Make) -> None:
    store = make(VirtualClock())
    for name, key in (("a/b", "c"), ("a", "b/c"), ("ab", "c"), ("a", "bc")):
        for algorithm in ALGORITHMS:
            for period in (60, 3600):
                one = limit(1, period, name=name, algorithm=algorithm)
                assert allowed(store, (one, key, 1)) == [True]
                assert allowed(store, (one, key, 1)) == [False]


@each_algorithm
def test_a_cost_above_the_limit_is_refused_for_ever_and_spends_nothing(make: Make, algorithm: str) -> None:
    store, one = make(VirtualClock()), limit(3, algorithm=algorithm)
    refused = ask(store, (one, "key", 4))[0]
    assert not refused.allowed
    assert refused.retry_after == float("inf")
    assert allowed(store, (one, "key", 3)) == [True]
    assert allowed(store, (one, "key", 2)) == [False]


@each_algorithm
def test_a_refused_client_is_told_a_wait_within_the_window(make: Make, algorithm: str) -> None:
    store, one = make(VirtualClock(time.time())), limit(2, 3600, algorithm=algorithm)
    first, _, refused = (ask(store, (one, "key", 1))[0] for _ in range(3))
    for wait in (first.reset_after, refused.reset_after, refused.retry_after):
        assert 0 < wait <= (2 if one.kind != "fixed_window" else 1) * 3600 + 1
    if algorithm == "fixed_window":
        assert refused.retry_after > 3500


def test_a_moving_window_gives_nothing_back_and_a_give_back_harms_nothing(in_memory: Make) -> None:
    store, one = in_memory(VirtualClock()), limit(2)
    receipt = ask(store, (one, "key", 2))[0].receipt
    assert receipt is not None
    store.ask(Batch(gives=[(one, "key", 2, receipt)]))
    assert allowed(store, (one, "key", 1)) == [False]


@pytest.mark.parametrize("algorithm", ["fixed_window", "sliding_counter"])
def test_what_is_given_back_twice_or_after_a_reset_never_makes_more_than_the_quota(
    make: Make, algorithm: str
) -> None:
    store, one = make(VirtualClock(time.time())), limit(3, 3600, algorithm=algorithm)
    receipt = ask(store, (one, "key", 2))[0].receipt
    for before in (Batch(gives=[(one, "key", 2, receipt)]), Batch(resets=[(one, "key")])):
        store.ask(before)
        store.ask(Batch(gives=[(one, "key", 2, receipt)]))
        assert [allowed(store, (one, "key", 1))[0] for _ in range(4)] == [True, True, True, False]


class TestTime:
    """On a virtual clock, where the storage takes the client's time."""

    @each_algorithm
    def test_a_refused_hit_is_admitted_after_its_wait_and_not_before(self, in_memory: Make, algorithm: str) -> None:
        for costs in ((3,), (1, 2), (2, 1), (1, 1, 1)):
            clock = VirtualClock()
            store, one = in_memory(clock), limit(3, algorithm=algorithm)
            for cost in costs:
                assert allowed(store, (one, "key", cost)) == [True]
                clock.advance(7)
            refused = ask(store, (one, "key", 1))[0]
            assert refused.reset_after == refused.retry_after
            clock.advance(refused.retry_after - 0.01)
            assert allowed(store, (one, "key", 1)) == [False]
            clock.advance(0.01)
            assert allowed(store, (one, "key", 1)) == [True]

    def test_remaining_grows_when_it_was_told_to(self, in_memory: Make) -> None:
        for algorithm in ALGORITHMS:
            clock = VirtualClock()
            store, one = in_memory(clock), limit(9, algorithm=algorithm)
            for cost in (2, 1, 3):
                told = ask(store, (one, "key", cost))[0]
                clock.advance(5)
            clock.advance(told.reset_after - 5 - 0.01)
            assert ask(store, (one, "key", 1), spend=False)[0].remaining == told.remaining - 1
            clock.advance(0.01)
            assert ask(store, (one, "key", 1), spend=False)[0].remaining > told.remaining - 1

    def test_what_is_given_back_after_its_window_ended_is_no_part_of_the_next(self, in_memory: Make) -> None:
        clock = VirtualClock()
        store, one = in_memory(clock), limit(3, algorithm="fixed_window")
        receipt = ask(store, (one, "key", 2))[0].receipt
        clock.advance(60.1)
        ask(store, (one, "key", 3))
        store.ask(Batch(gives=[(one, "key", 2, receipt)]))
        assert allowed(store, (one, "key", 1)) == [False]

    def test_a_counter_gives_back_in_the_window_that_was_charged(self, in_memory: Make) -> None:
        clock = VirtualClock()
        store, one = in_memory(clock), limit(4, algorithm="sliding_counter")
        receipt = ask(store, (one, "key", 4))[0].receipt
        clock.advance(75)
        assert ask(store, (one, "key", 1), spend=False)[0].remaining == 0, "three of the four still count"
        store.ask(Batch(gives=[(one, "key", 4, receipt)]))
        assert ask(store, (one, "key", 4))[0].allowed

    def test_a_cost_above_one_in_a_moving_window_waits_for_no_less_than_it_must(self, in_memory: Make) -> None:
        clock = VirtualClock()
        store, one = in_memory(clock), limit(3)
        for _ in range(3):
            ask(store, (one, "key", 1))
            clock.advance(7)
        refused = ask(store, (one, "key", 2))[0]
        assert refused.retry_after == pytest.approx(60, abs=0.01)
        clock.advance(refused.retry_after)
        assert allowed(store, (one, "key", 2)) == [True]

    def test_a_moving_window_in_redis_and_a_counter_in_memcached_end_by_the_clients_clock(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[LimitsStore] = []
        clock = VirtualClock(time.time())
        store, one = stores(server.url, monkeypatch, opened)(clock), limit(3, 3600)
        ask(store, (one, "key", 3))
        refused = ask(store, (one, "key", 1))[0]
        assert 0 < refused.retry_after <= 7200
        clock.advance(refused.retry_after - 1)
        assert allowed(store, (one, "key", 1)) == [False]
        clock.advance(1)
        assert allowed(store, (one, "key", 1)) == [True]
        store.close()

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from([0.0, 0.25, 1.0, 20.0, 59.0, 61.0, 200.0]), st.integers(1, 3)), max_size=40
        ),
        amount=st.integers(1, 6),
    )
    def test_a_moving_window_never_admits_more_than_the_limit_and_a_fixed_one_decides_as_its_oracle(
        self, in_memory: Make, steps: list[tuple[float, int]], amount: int
    ) -> None:
        clock = VirtualClock()
        store = in_memory(clock)
        sliding, fixed = limit(amount), limit(amount, algorithm="fixed_window")
        oracle = ORACLES["fixed_window"](amount, 60)
        log: list[tuple[float, int]] = []
        for pause, cost in steps:
            clock.advance(pause)
            now = clock() / 1e9
            inside = sum(spent for at, spent in log if at > now - 60)
            verdict = ask(store, (sliding, "key", cost))[0]
            if abs(min((abs(at + 60 - now) for at, _ in log), default=1)) > 0.01:  # not on the very edge
                assert verdict.allowed == (inside + cost <= amount)
            if verdict.allowed:
                log.append((now, cost))
                assert inside + cost <= amount
            assert ask(store, (fixed, "key", cost))[0].allowed == oracle.hit(clock(), cost)
        store.close()


class TestAllOrNothing:
    """As far as it can be: tested first, hit afterwards."""

    class Loser(MemoryStorage):
        """A storage in which another always takes the last of some counters between the look and the hit."""

        STORAGE_SCHEME = ["memory+loser"]  # noqa: RUF012
        losing: ClassVar[set[int]] = set()

        def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
            if limit in self.losing and amount > 0:
                return False
            return super().acquire_sliding_window_entry(key, limit, expiry, amount)

        def incr(self, key: str, expiry: float, amount: int = 1) -> int:
            if key.count(":fixed:") and 7 in self.losing:
                super().incr(key, expiry, 7)
            return super().incr(key, expiry, amount)

    Loser.__module__ = "limits.storage.memory"

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[LimitsStore]:
        store = LimitsStore("memory+loser://", timeout=PATIENT)
        yield store
        store.close()

    def test_what_was_spent_is_given_back_when_a_later_hit_is_lost(
        self, store: LimitsStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tight, wide = (
            limit(amount, 3600, name=f"rule{amount}", algorithm="sliding_counter") for amount in (5, 100)
        )
        monkeypatch.setattr(self.Loser, "losing", {100})
        for batch in ([(tight, "key", 1), (wide, "key", 1)], [(wide, "key", 1), (tight, "key", 1)]):
            verdicts = dict(zip([one.name for one, _, _ in batch], ask(store, *batch), strict=True))
            assert [verdicts[name].allowed for name in ("rule5", "rule100")] == [True, False]
            assert verdicts["rule5"].remaining == 5
            assert [verdict.receipt for verdict in verdicts.values()] == [None, None]
            assert verdicts["rule100"].retry_after > 0
        monkeypatch.setattr(self.Loser, "losing", set())
        assert ask(store, (tight, "key", 1), spend=False)[0].remaining == 4

    def test_the_limit_nearest_to_its_end_is_hit_first(
        self, store: LimitsStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Nothing can be given back to the moving window: but it was not spent yet.
        tight, wide = limit(5, 3600, name="tight", algorithm="sliding_counter"), limit(100, 3600, name="wide")
        monkeypatch.setattr(self.Loser, "losing", {5})
        for batch in ([(tight, "key", 1), (wide, "key", 1)], [(wide, "key", 1), (tight, "key", 1)]):
            ask(store, *batch)
        assert ask(store, (wide, "key", 1), spend=False)[0].remaining == 99

    def test_a_lost_hit_of_a_fixed_window_is_taken_back(
        self, store: LimitsStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = limit(9, 3600, algorithm="fixed_window")
        monkeypatch.setattr(self.Loser, "losing", {7})
        assert allowed(store, (one, "key", 3)) == [False]
        monkeypatch.setattr(self.Loser, "losing", set())
        assert ask(store, (one, "key", 1), spend=False)[0].remaining == 1

    def test_a_lost_shadow_refuses_nothing(self, store: LimitsStore, monkeypatch: pytest.MonkeyPatch) -> None:
        shadow, real = (limit(amount, 3600, name=f"s{amount}", algorithm="sliding_counter") for amount in (5, 100))
        shadow.shadow = True
        monkeypatch.setattr(self.Loser, "losing", {5})
        assert allowed(store, (shadow, "key", 1), (real, "key", 1)) == [False, True]
        assert ask(store, (real, "key", 1), spend=False)[0].remaining == 98

    def test_a_storage_that_breaks_off_in_the_middle_keeps_nothing_that_can_be_given_back(
        self, store: LimitsStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, broken = limit(5, 3600, algorithm="sliding_counter"), limit(100, 3600, name="broken")

        def fail(*_: object, **__: object) -> bool:
            raise OSError("redis://user:secret@192.0.2.1 is gone")

        monkeypatch.setattr(self.Loser, "acquire_entry", fail)
        replies = store.ask([(one, "key", 1), (broken, "key", 1)])
        assert [type(reply) for reply in replies] == [StoreError, StoreError]
        assert "secret" not in str(replies)
        assert "OSError" in str(replies[0])
        assert ask(store, (one, "key", 1), spend=False)[0].remaining == 4


@each_algorithm
def test_threads_admit_no_more_than_the_limit(server: Server, algorithm: str) -> None:
    store, one = (
        LimitsStore(server.url, timeout=PATIENT, prefix=f"threads-{algorithm}"),
        limit(50, 3600, algorithm=algorithm),
    )
    admitted: list[int] = []

    def work() -> None:
        admitted.append(sum(allowed(store, (one, "key", 1))[0] for _ in range(30)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) <= 50
    assert sum(admitted) >= 46, "at most one a thread is refused for a hit that was taken back"
    store.close()


def aio_driver(server: Server) -> None:
    pytest.importorskip("memcachio" if server.url.startswith("memcached") else "redis")


@each_algorithm
def test_tasks_and_event_loops_share_a_quota_with_blocking_callers(server: Server, algorithm: str) -> None:
    aio_driver(server)
    store, one = (
        LimitsStore(server.url, timeout=PATIENT, prefix=f"loops-{algorithm}"),
        limit(10, 3600, algorithm=algorithm),
    )

    async def main() -> int:
        replies = await asyncio.gather(*(store.aask([(one, "key", 1)]) for _ in range(4)))
        await store.aclose()
        return sum(reply.allowed for (reply,) in replies)

    assert allowed(store, (one, "key", 1)) == [True]
    assert [asyncio.run(main()) for _ in range(2)] == [4, 4]
    assert [allowed(store, (one, "key", 1))[0] for _ in range(2)] == [True, False]
    store.close()
    store.close()


class TestOutage:
    def told(self, replies: list[Any], server: Server) -> None:
        assert [type(reply) for reply in replies] == [StoreError, StoreError]
        for reply in replies:
            assert str(server.port) not in str(reply)
            assert "127.0.0.1" not in str(reply)

    def test_a_server_that_is_gone_is_an_error_for_each_hit(self, server: Server) -> None:
        aio_driver(server)
        scheme = server.url.partition(":")[0]
        store = LimitsStore(f"{scheme}://127.0.0.1:1", timeout=0.2)
        hits: Hits = [(limit(), "key", 1), (limit(name="other"), "key", 1)]
        self.told(store.ask(hits), server)

        async def main() -> None:
            self.told(await store.aask(hits), server)
            await store.aclose()

        asyncio.run(main())

    def test_a_mongodb_that_is_gone_is_an_error_for_each_hit(self) -> None:
        pytest.importorskip("pymongo")
        pytest.importorskip("motor")
        store = LimitsStore("mongodb://user:secret@127.0.0.1:1", timeout=0.1)

        async def main() -> list[Any]:
            replies = await store.aask([(limit(), "key", 1)])
            await store.aclose()
            return replies

        for replies in (store.ask([(limit(), "key", 1)]), store.ask([(limit(), "key", 1)]), asyncio.run(main())):
            assert [type(reply) for reply in replies] == [StoreError]
            assert "secret" not in str(replies)
            assert "127.0.0.1" not in str(replies)
        store.close()

    @pytest.mark.parametrize("loop_is_open", [True, False])
    def test_clients_of_mongodb_are_closed_with_the_store(self, loop_is_open: bool) -> None:
        errors = pytest.importorskip("pymongo.errors")
        pytest.importorskip("motor")
        store = LimitsStore("mongodb://127.0.0.1:1", timeout=0.05)
        hits: Hits = [(limit(), "key", 1)]
        storages: list[Any] = [store._blocking()]
        store.ask(hits)

        async def main() -> None:
            await store.aask(hits)
            storages.extend(store._aio.values())
            if loop_is_open:
                await store.aclose()

        asyncio.run(main())
        store.close()
        for client in (storages[0]._storage, storages[1].storage.delegate):
            with pytest.raises(errors.InvalidOperation):
                client.admin.command("ping")

    def test_a_server_that_does_not_answer_is_not_waited_for_and_is_asked_again_when_it_does(
        self, server: Server
    ) -> None:
        aio_driver(server)
        store = LimitsStore(server.url, timeout=0.1, prefix="paused")
        one = limit(1000, 3600, algorithm="fixed_window")
        hits: Hits = [(one, "key", 1), (one, "key", 1)]
        store.ask(hits)
        began = time.monotonic()
        with server.paused():
            self.told(store.ask(hits), server)
            assert time.monotonic() - began < 2
        patient = LimitsStore(server.url, timeout=PATIENT, prefix="paused")
        assert allowed(patient, (one, "key", 1)) == [True]
        for _ in range(100):  # the machine may be busy: not each try need be within the time
            if isinstance(store.ask([(one, "key", 1)])[0], Verdict):
                break
        else:
            pytest.fail("it never answers again")
        store.close()
        patient.close()

    @pytest.mark.parametrize("algorithm", ["fixed_window", "sliding_counter"])
    @pytest.mark.parametrize("how", ["cancelled", "late"])
    def test_what_nobody_waits_for_any_more_is_undone(self, server: Server, algorithm: str, how: str) -> None:
        aio_driver(server)
        one = limit(10, 3600, algorithm=algorithm)
        prefix = f"undone-{algorithm}-{how}"
        waiting = 0.05 if how == "late" else PATIENT
        # The client library itself is to be patient: what is late shall come.
        timeouts = (
            ("connect_timeout", "read_timeout", "blocking_timeout")
            if "memcached" in server.url
            else ("socket_timeout",)
        )

        async def main() -> list[Any]:
            store = LimitsStore(
                server.url, timeout=PATIENT, prefix=prefix, options=dict.fromkeys(timeouts, PATIENT)
            )
            await store.aask([(one, "other", 1)])  # connected
            store.timeout = waiting
            with server.paused():
                task = asyncio.ensure_future(store.aask([(one, "key", 3)]))
                if how == "cancelled":
                    await asyncio.sleep(0.01)
                    task.cancel()
                outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            await store.aclose()
            return [outcome]

        (outcome,) = asyncio.run(main())
        if how == "cancelled":
            assert isinstance(outcome, asyncio.CancelledError)
        else:
            assert isinstance(outcome[0], StoreError)
        store = LimitsStore(server.url, timeout=PATIENT, prefix=prefix)
        assert ask(store, (one, "key", 1), spend=False)[0].remaining == 9
        store.close()


class TestStartUp:
    def test_the_module_is_called_limits_and_the_library_still_is(self) -> None:
        assert importlib.import_module("limits") is limits is not module
        assert limits.__name__ == "limits"

    @pytest.mark.parametrize(
        "url",
        [
            "nothing://user:secret@host:1", "user:secret", "async+memory://secret", "memcached://secret",
            "memcached://", "memcached://secret:port", "redis+cluster://user:secret@host", "etcd://secret:1",
            "http://[secret", "limits+nothing://secret",
        ],
    )  # fmt: skip
    def test_a_url_that_is_none_of_limits_is_refused_without_being_shown(self, url: str) -> None:
        for wrong in (LimitsStore, weaker, lambda url: unsupported(url, [])):
            with pytest.raises(SettingsError, match=r"^store\.url: expected") as raised:
                wrong(url)
            assert "secret" not in str(raised.value)
            assert raised.value.__cause__ is None
            assert raised.value.__suppress_context__ or raised.value.__context__ is None

    def test_a_prefix_that_a_server_would_not_take_is_refused(self) -> None:
        with pytest.raises(SettingsError, match=r"^store\.prefix: expected"):
            LimitsStore("memory://", prefix="a b\r\n")

    def test_each_scheme_is_known_with_and_without_our_prefix(self) -> None:
        assert {"memcached", "mongodb", "redis", "limits+redis", "limits+memory"} <= schemes()
        assert not any("async" in scheme for scheme in schemes())
        store = LimitsStore("limits+memory://")
        assert allowed(store, (limit(1), "key", 1)) == [True]
        store.close()

    def test_its_repr_shows_no_url(self) -> None:
        assert repr(LimitsStore("redis://user:secret@host:1")) == "<LimitsStore redis>"

    def test_memory_is_local_and_servers_are_not(self) -> None:
        assert LimitsStore("memory://").local
        assert not LimitsStore("redis://host:1").local

    @pytest.mark.parametrize(
        ("url", "package", "aio"),
        [
            ("memcached://h:1", "pymemcache", "memcachio"),
            ("mongodb://h", "pymongo", "motor"),
            ("redis://h", "redis", "redis"),
        ],
    )
    def test_a_missing_driver_is_named(
        self, monkeypatch: pytest.MonkeyPatch, url: str, package: str, aio: str
    ) -> None:
        there: set[str] = set()
        monkeypatch.setattr(kinds, "is_there", there.__contains__)
        with pytest.raises(MissingDriver, match=rf"pip install {package}\b"):
            LimitsStore(url)
        if package != aio:
            there.add(package)
            store = LimitsStore(url)
            store.require(awaiting=False)
            with pytest.raises(MissingExtra, match=rf"for awaiting: pip install {aio}\b"):
                store.require(awaiting=True)
            with pytest.raises(ImportError):
                asyncio.run(store.aask([(limit(), "key", 1)]))

    def test_a_unix_socket_of_memcached_cannot_be_awaited(self) -> None:
        pytest.importorskip("pymemcache")
        store = LimitsStore("memcached:///run/secret.sock")
        with pytest.raises(SettingsError, match=r"store\.url: expected memcached://HOST:PORT") as raised:
            store.require(awaiting=True)
        assert "secret" not in str(raised.value)


class TestWhatItCannot:
    OTHERS = (bound(Concurrency(2, 60)), bound(Penalty(1, NS, NS, NS)), limit(algorithm="gcra"))

    def test_limits_that_cannot_be_counted_are_told_at_start_up(self) -> None:
        possible = [limit(algorithm=algorithm) for algorithm in ALGORITHMS]
        for url in ("memory://", "redis://h", "memcached://h:1", "mongodb://h"):
            assert unsupported(url, possible) == []
            told = unsupported(url, [*possible, *self.OTHERS])
            assert [line.rpartition(" ")[2] for line in told] == ["concurrency", "penalty", "gcra"]
            assert all(
                line.startswith("rule: expected sliding_window or sliding_counter or fixed_window") for line in told
            )

    def test_memcached_cannot_keep_a_counter_for_longer_than_thirty_days(self) -> None:
        day = 86_400
        cases = {
            ("sliding_window", 15 * day): 0, ("sliding_window", 30 * day): 1, ("sliding_counter", 16 * day): 1,
            ("fixed_window", 30 * day): 0, ("fixed_window", 60 * day): 1,
        }  # fmt: skip
        for (algorithm, period), lines in cases.items():
            one = limit(3, period, algorithm=algorithm)
            assert len(unsupported("memcached://h:1", [one])) == lines
            assert unsupported("redis://h", [one]) == []

    @pytest.mark.parametrize("one", OTHERS, ids=lambda one: one.kind)
    def test_a_hit_of_such_a_limit_is_an_error(self, in_memory: Make, one: RateLimit) -> None:
        store = in_memory(VirtualClock())
        replies = store.ask([(one, "key", 1), (limit(), "key", 1)])
        assert [type(reply) for reply in replies] == [StoreError, StoreError]
        assert one.kind in str(replies[0])
        assert ask(store, (limit(), "key", 1))[0].remaining == 2

    def test_keys_cannot_be_listed(self, in_memory: Make) -> None:
        store = in_memory(VirtualClock())
        with pytest.raises(StoreError, match="cannot list keys"):
            store.keys(limit())
        with pytest.raises(StoreError, match="cannot list keys"):
            asyncio.run(store.akeys(limit()))

    def test_what_is_weaker_is_said(self) -> None:
        for url in ("memory://", "redis://h", "memcached://h:1", "mongodb://h"):
            said = "\n".join(weaker(url))
            assert "one step" in said
            assert ("sliding_window is counted as sliding_counter" in said) == url.startswith("memcached")
            assert ("sliding_window: nothing is given back" in said) != url.startswith("memcached")
        assert LimitsStore("memory://").weaker() == weaker("memory://")

    def test_a_storage_of_the_users_own_is_used_as_far_as_it_goes(self) -> None:
        class Plain(Storage):
            STORAGE_SCHEME = ["plain-of-ours"]  # noqa: RUF012
            counts: ClassVar[dict[str, int]] = {}

            @property
            def base_exceptions(self) -> type[Exception]:
                return ValueError

            def incr(self, key: str, expiry: int, amount: int = 1) -> int:
                assert amount > 0
                self.counts[key] = self.counts.get(key, 0) + amount
                return self.counts[key]

            def get(self, key: str) -> int:
                return self.counts.get(key, 0)

            def get_expiry(self, key: str) -> float:
                return time.time() + 60

            def check(self) -> bool:
                return True

            def reset(self) -> int | None:
                return None

            def clear(self, key: str) -> None:
                self.counts.pop(key, None)

        store, one = LimitsStore("plain-of-ours://", timeout=PATIENT), limit(2, algorithm="fixed_window")
        verdicts = [ask(store, (one, "key", 1))[0] for _ in range(3)]
        assert [verdict.allowed for verdict in verdicts] == [True, True, False]
        store.ask(Batch(gives=[(one, "key", 1, verdicts[0].receipt)]))
        assert allowed(store, (one, "key", 1)) == [False]
        assert unsupported("plain-of-ours://", [limit()]) == [
            "rule: expected fixed_window in a plain-of-ours store, which cannot count sliding_window"
        ]
        assert any("nothing is given back" in line for line in weaker("plain-of-ours://"))
        assert isinstance(asyncio.run(store.aask([(one, "key", 1)]))[0], StoreError), "there is no async one"
        store.close()
