"""Settings become objects: a Gatekeeper for applications, a Limiter for anything else."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar
from weakref import WeakSet

from gatekeeper import decorators
from gatekeeper.commands import Batch, Hits, Limit, Replies, Store, Verdict
from gatekeeper.errors import SettingsError, StoreError
from gatekeeper.gate import Destination, Gate, tightness
from gatekeeper.http.fields import NAME
from gatekeeper.http.parts import part
from gatekeeper.http.routes import Pattern
from gatekeeper.identity import Identity
from gatekeeper.ratelimit.rates import parse_rates
from gatekeeper.ratelimit.rules import LONGEST_KEY, Rule, bounded
from gatekeeper.settings import (
    IdentitySettings,
    LimitSettings,
    PoolSettings,
    Settings,
    UnixAddress,
    UpstreamSettings,
    is_asynchronous,
    load_settings,
    parse_upstream,
)
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.upstreams.health import Ejection
from gatekeeper.upstreams.policies import POLICIES, RingOrder
from gatekeeper.upstreams.pool import Pool, Upstream

STORES: Final[dict[str, Callable[..., Store]]] = {"memory": MemoryStore}
"""Stores by the scheme of their URL."""

KEEPERS: Final[WeakSet[Gatekeeper]] = WeakSet()
"""All that there are in this process, for tests to find those that an application made for itself."""

_REMEMBERED: Final = 4096
_ONE: Final = 1  # the usual cost: by identity, 1.0 and True are none

P = ParamSpec("P")
T = TypeVar("T")


class Gatekeeper:
    """A policy at work: its settings, the gate they compile to, the store it asks.

    - `settings`: a mapping, the path of a TOML file, or Settings. Raises SettingsError with all that is wrong.
    - `store`: a Store of your own in place of the one that the settings name.
    """

    def __init__(self, settings: Settings | Mapping[str, Any] | str | Path, *, store: Store | None = None) -> None:
        self.settings = load_settings(settings)
        self.gate = self._gate = _gate(self.settings)
        # Asked in the store's place while it does not answer.
        self._local = MemoryStore(max_keys=self.settings.store.max_keys)
        self.use(MemoryStore(max_keys=self.settings.store.max_keys) if store is None else store)
        KEEPERS.add(self)

    def use(self, store: Store) -> Store:
        """Ask another store from now on; the one before is returned, and left open. Raises SettingsError.

        For tests. What the first store counted is not brought along, and a gateway that serves does not see it.
        """
        before = getattr(self, "store", store)
        self.store = _checked_store(store)
        # Memory always answers: nothing need stand between.
        self.ask: Callable[[Hits], Replies] = store.ask if isinstance(store, MemoryStore) else self._ask
        # An asynchronous function can only be awaited, whatever the store.
        self.awaits = not store.local or is_asynchronous(self.settings.identity.user)
        return before

    @property
    def enabled(self) -> bool:
        """Whether anything is limited. Set to False, all requests and calls pass, and none is counted."""
        return not self.gate.off

    @enabled.setter
    def enabled(self, wanted: bool) -> None:
        if wanted:
            self.gate = self._gate
        elif not self.gate.off:
            self.gate = Gate((), _identity(self.settings.identity), fields=False)
            self.gate.off = True

    def _ask(self, batch: Hits) -> Replies:
        return (self._local if isinstance(batch, Batch) and batch.local else self.store).ask(batch)

    async def aask(self, batch: Hits) -> Replies:
        return await (self._local if isinstance(batch, Batch) and batch.local else self.store).aask(batch)

    def limit(
        self, rate: str, *, key: str | Sequence[str] = "ip", cost: int = 1, name: str | None = None
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Limit a function, synchronous or not: `@gk.limit("5/minute")`.

        Inside a request each client has its quota, by `key`; elsewhere all callers share one. `name` is told to
        clients and keeps counters apart; by default it is the function's own. A call too many raises Limited,
        which the middleware answers with 429.

        Raises SettingsError for a rate, key or cost that cannot be, and, when it decorates, TypeError for what
        cannot be limited: classes, generator functions and what is not callable.
        """
        return decorators.limit(self, rate, key, cost, name)

    def close(self) -> None:
        """Let go of what the store holds. The counters in memory are forgotten."""
        self.store.close()

    async def aclose(self) -> None:
        await self.store.aclose()

    def __repr__(self) -> str:
        return f"<Gatekeeper {list(self.gate.rules)}>"


def _gate(settings: Settings) -> Gate:
    rules = [_rule(limit, settings) for limit in settings.limits]
    destinations = {name: _destination(name, pool) for name, pool in settings.pools.items()}
    routes = [(Pattern(route.match), destinations[route.pool]) for route in settings.routes]
    return Gate(rules, _identity(settings.identity), fields=settings.response.fields, routes=routes)


def _destination(name: str, settings: PoolSettings) -> Destination:
    upstreams = [_upstream(upstream, settings) for upstream in settings.upstreams]
    policy = POLICIES[settings.policy] if isinstance(settings.policy, str) else settings.policy
    if policy is RingOrder:
        policy = partial(RingOrder, vnodes=settings.vnodes)
    try:
        pool = Pool(name, upstreams, policy)
    except Exception as error:  # of a class of the user's own: the rest was checked
        raise SettingsError(
            [f"pools.{name}.policy: expected a policy; making it of the upstreams raised {type(error).__name__}"]
        ) from None
    return Destination(
        pool,
        part(settings.key) if pool.needs_key else None,
        pool.needs_key and settings.key == "user",
        settings.connect_timeout / 1e9,
        settings.response_timeout / 1e9,
        settings.read_timeout / 1e9,
        settings.idle_timeout / 1e9,
    )


def _upstream(settings: UpstreamSettings, pool: PoolSettings) -> Upstream:
    address = parse_upstream(settings.url)
    health = pool.health
    host, port, path = ("localhost", 80, address.path) if isinstance(address, UnixAddress) else (*address, None)
    return Upstream(
        settings.id,
        host,
        port,
        path=path,
        weight=settings.weight,
        max_in_flight=settings.max_in_flight,
        ejection=Ejection(health.failures, health.eject_for, health.eject_at_most),
    )


def _rule(limit: LimitSettings, settings: Settings) -> Rule:
    return Rule(
        limit.name,
        parse_rates(";".join(limit.rate)),
        algorithm=limit.counted_by,
        burst=limit.burst,
        pattern=None if limit.match is None else Pattern(limit.match),
        keys=limit.key,
        cost=limit.cost,
        on_error=limit.on_error or settings.store.on_error,
        gives_back=limit.give_back,
        preflights=limit.preflights,
    )


def _identity(settings: IdentitySettings) -> Identity:
    user = settings.user
    return Identity(
        trusted=[ipaddress.ip_network(text) for text in settings.trusted_proxies if text != "unix"],
        unix="unix" in settings.trusted_proxies,
        header=settings.header.lower(),
        ipv6_prefix=settings.ipv6_prefix,
        user_field=user.partition(":")[2].lower() if isinstance(user, str) else None,
        user=user if callable(user) else None,
    )


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
    TypeError for a key that is not a string, ValueError for a cost below 1.
    """

    def __init__(self, store: str | Store = "memory://", *, algorithm: str = "sliding_window") -> None:
        (checked,) = load_settings(
            {"limits": [{"name": "limiter", "rate": "1/second", "algorithm": algorithm}]}
        ).limits
        self._algorithm = checked.counted_by
        if isinstance(store, str):
            make = STORES.get(store.partition("://")[0]) if store.endswith("://") else None
            if make is None:
                raise SettingsError([f"store: expected {' or '.join(f'{name}://' for name in STORES)}, or a store"])
            store = make()
        self.store: Store = _checked_store(store)
        self._limits: dict[str | tuple[str, str], tuple[Limit, ...]] = {}
        self._plain: dict[str, Limit] = {}  # of them those by rate alone, where it is one

    def hit(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """Spend `cost` units if all rates allow it. The verdict is the tightest rate's."""
        limit = self._plain.get(rate) if name is None and cost is _ONE else None
        if limit is not None and key.__class__ is str and len(key) <= LONGEST_KEY:
            hits: Hits = [(limit, key, 1)]
        else:
            hits = self._batch(rate, key, cost, name)
        replies = self.store.ask(hits)
        verdict = replies[0]
        return verdict if len(replies) == 1 and verdict.__class__ is Verdict else _tightest(replies)

    async def ahit(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """As `hit`, awaiting the store."""
        return _tightest(await self.store.aask(self._batch(rate, key, cost, name)))

    def peek(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """What `hit` would answer, spending nothing."""
        return _tightest(self.store.ask(Batch(self._batch(rate, key, cost, name), spend=False)))

    async def apeek(self, rate: str, key: str, cost: int = 1, name: str | None = None) -> Verdict:
        """As `peek`, awaiting the store."""
        return _tightest(await self.store.aask(Batch(self._batch(rate, key, cost, name), spend=False)))

    def reset(self, rate: str, key: str, name: str | None = None) -> None:
        """Forget what the key has used."""
        self.store.ask(self._forget(rate, key, name))

    async def areset(self, rate: str, key: str, name: str | None = None) -> None:
        """As `reset`, awaiting the store."""
        await self.store.aask(self._forget(rate, key, name))

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
            self._plain.clear()
        if name is None and len(limits) == 1:
            self._plain[rate] = limits[0]
        self._limits[rate if name is None else (name, rate)] = limits
        return limits


def _checked_store(store: Store) -> Store:
    if not all(hasattr(store, name) for name in ("ask", "aask", "local", "close", "aclose")):
        raise SettingsError([f"store: expected a store (gatekeeper.commands.Store), not {type(store).__name__}"])
    return store


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
