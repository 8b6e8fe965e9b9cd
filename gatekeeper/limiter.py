"""Limits without any framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gatekeeper.commands import Batch, Hits, Limit, Replies, Store, Verdict
from gatekeeper.errors import StoreError
from gatekeeper.http.fields import NAME
from gatekeeper.ratelimit.rates import Rate, parse_rates
from gatekeeper.ratelimit.rules import LONGEST_KEY, Rule, bounded
from gatekeeper.settings import load_settings
from gatekeeper.storage import checked_store, open_store
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.ticket import tightness

_REMEMBERED: Final = 4096
_ONE: Final = 1  # the usual cost: by identity, 1.0 and True are none


class Limiter:
    """Limits without any framework::

        limiter = Limiter("memory://")
        if not limiter.hit("100/minute", "user:7"):
            ...

    A `rate` is as in settings: "5/minute", "5/minute; 20/hour" (all or nothing), at most so many in any window
    of that length. `algorithm` is for all of them ("sliding_window", "gcra", "sliding_counter", "fixed_window").

    Counters are kept apart by rate and key. Give a `name` to keep them apart by name instead: then a changed
    amount keeps what was used.

    Raises SettingsError for a store or algorithm it does not know; its methods raise RateError for a rate,
    TypeError for a key that is not a string, ValueError for a cost below 1, StoreError where the store does not
    answer: there is no `on_error` here, what follows is the caller's to say.
    """

    def __init__(self, store: str | Store = "memory://", *, algorithm: str = "sliding_window") -> None:
        rule = {"name": "limiter", "rate": "1/second", "algorithm": algorithm}
        document: dict[str, object] = {"limits": [rule]}
        if isinstance(store, str):
            document["store"] = {"url": store}
        settings = load_settings(document)
        self._algorithm = settings.limits[0].counted_by
        (limit,) = Rule("limiter", [Rate(1, 1)], algorithm=self._algorithm).limits
        self._limits: dict[str | tuple[str, str], tuple[Limit, ...]] = {}
        # Of them those by rate alone, where it is one, and where the store gives a shorter way.
        self._hitters: dict[str, Callable[[str], Verdict]] = {}
        self.store = open_store(settings.store, [limit]) if isinstance(store, str) else checked_store(store)

    @property
    def store(self) -> Store:
        """The store that is asked."""
        return self._store

    @store.setter
    def store(self, store: Store) -> None:
        self._store = store
        self._limits.clear()
        self._hitters.clear()

    def hit(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """Spend `cost` units if all rates allow it. The verdict is the tightest rate's."""
        if cost is _ONE and name is None and key.__class__ is str:
            hit = self._hitters.get(rate)
            if hit is not None and len(key) <= LONGEST_KEY:
                return hit(key)
        hits = self._batch(rate, key, cost, name)
        replies = self._store.ask(hits)
        verdict = replies[0]
        return verdict if len(replies) == 1 and verdict.__class__ is Verdict else _tightest(replies)

    async def ahit(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """As `hit`, awaiting the store."""
        return _tightest(await self._store.aask(self._batch(rate, key, cost, name)))

    def peek(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """What `hit` would answer, spending nothing."""
        return _tightest(self._store.ask(Batch(self._batch(rate, key, cost, name), spend=False)))

    async def apeek(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """As `peek`, awaiting the store."""
        return _tightest(await self._store.aask(Batch(self._batch(rate, key, cost, name), spend=False)))

    def reset(self, rate: str, key: str, name: str | None = None) -> None:
        """Forget what the key has used."""
        self._store.ask(self._forget(rate, key, name))

    async def areset(self, rate: str, key: str, name: str | None = None) -> None:
        """As `reset`, awaiting the store."""
        await self._store.aask(self._forget(rate, key, name))

    def close(self) -> None:
        self.store.close()

    async def aclose(self) -> None:
        await self.store.aclose()

    def _batch(self, rate: str, key: str, cost: int, name: str | None) -> Hits:
        limits = self._limits.get(rate if name is None else (name, rate)) or self._learn(rate, name)
        if key.__class__ is not str or len(key) > LONGEST_KEY or cost is not _ONE:
            key = _checked(key, cost)
        if len(limits) == 1:
            return [(limits[0], key, cost)]
        return [(limit, key, cost) for limit in limits]

    def _forget(self, rate: str, key: str, name: str | None) -> Batch:
        return Batch(resets=[(limit, key) for limit, key, _ in self._batch(rate, key, 1, name)])

    def _learn(self, rate: str, name: str | None) -> tuple[Limit, ...]:
        if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
            raise ValueError("name: expected 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
        rates = parse_rates(rate)
        limits: tuple[Limit, ...]
        if name is None:
            # No rule's name begins with a star, so these spaces are nobody else's.
            limits = tuple(Rule(f"*{part.amount}", [part], algorithm=self._algorithm).limits[0] for part in rates)
        else:
            limits = Rule(name, rates, algorithm=self._algorithm).limits
        if len(self._limits) >= _REMEMBERED:
            self._limits.clear()
            self._hitters.clear()
        if name is None and len(limits) == 1 and isinstance(self._store, MemoryStore):
            self._hitters[rate] = self._store.hitter(limits[0])
        self._limits[rate if name is None else (name, rate)] = limits
        return limits


def _checked(key: str, cost: int) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key: expected a string, and not {type(key).__name__}")
    if not isinstance(cost, int) or isinstance(cost, bool):
        raise TypeError(f"cost: expected an integer, and not {type(cost).__name__}")
    if cost < 1:
        raise ValueError("cost: expected at least 1")
    return bounded(key)


def _tightest(replies: Replies) -> Verdict:
    verdicts = []
    for reply in replies:
        if isinstance(reply, StoreError):
            raise reply
        verdicts.append(reply)
    return min(verdicts, key=tightness)
