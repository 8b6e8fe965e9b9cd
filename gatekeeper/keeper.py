"""Settings become objects: the Gatekeeper of an application."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar, cast
from weakref import WeakSet

from gatekeeper import decorators
from gatekeeper.affinity import Affinity, Pins
from gatekeeper.commands import Batch, Hits, Limit, Replies, Store, Verdict, arun, run
from gatekeeper.errors import SettingsError, StoreError
from gatekeeper.gate import Access, Destination, Gate
from gatekeeper.http.parts import bearer_token, part
from gatekeeper.http.routes import Pattern
from gatekeeper.identity import Identity
from gatekeeper.jwks import Jwks
from gatekeeper.keyfiles import Keys
from gatekeeper.keys import Ring
from gatekeeper.ratelimit.algorithms import NS, Penalty
from gatekeeper.ratelimit.fields import Manner
from gatekeeper.ratelimit.rates import Rate, parse_rates
from gatekeeper.ratelimit.rules import Exemption, RateLimit, Rule
from gatekeeper.sessions.flow import Sessions
from gatekeeper.sessions.foreign import Bearer, ForeignTokens
from gatekeeper.settings import (
    IdentitySettings,
    LimitSettings,
    PoolSettings,
    ResponseSettings,
    Settings,
    UnixAddress,
    UpstreamSettings,
    is_asynchronous,
    load_settings,
    parse_upstream,
)
from gatekeeper.storage import checked_store, open_sessions, open_store
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.ticket import Ticket
from gatekeeper.upkeep import Leases, NetworkFiles
from gatekeeper.upstreams.health import Ejection
from gatekeeper.upstreams.policies import POLICIES, RingOrder
from gatekeeper.upstreams.pool import Pool, Upstream
from gatekeeper.user_sessions import UserSessions, sessions_of, vouchers_of

_LOG: Final = logging.getLogger("gatekeeper")

KEEPERS: Final[WeakSet[Gatekeeper]] = WeakSet()
"""All that there are in this process, for tests to find those that an application made for itself."""

P = ParamSpec("P")
T = TypeVar("T")


class Ban(NamedTuple):
    """A key that a rule's penalty has banned."""

    rule: str
    key: str
    seconds: float
    """How long it is banned for from now."""


class Gatekeeper:
    """A policy at work: its settings, the gate they compile to, the store it asks.

    - `settings`: a mapping, the path of a TOML file, or Settings. Raises SettingsError with all that is wrong.
    - `store`: a Store of your own in place of the one that the settings name.
    - `workers`: among how many processes a rule is divided while it is counted in each by itself, for the store
      does not answer (default 1).
    """

    def __init__(
        self,
        settings: Settings | Mapping[str, Any] | str | Path,
        *,
        store: Store | None = None,
        workers: int = 1,
    ) -> None:
        self.settings = load_settings(settings)
        self._files = NetworkFiles(self.settings.access.reload / 1e9, _LOG.warning)
        self._is_failing = False
        self._finishing: set[asyncio.Task[None]] = set()
        self._leases = Leases(self._ask)
        self.keys = Keys(self.settings.keys, _LOG.warning) if self.settings.keys else None
        """The ring of the settings' keys; None without any."""
        self.gate = self._gate = _gate(self.settings, self._files, self._leases, workers, self._ring)
        self.gate.keeper = self
        self.sessions: UserSessions | None = None
        """The sessions of users; None without `[session]`."""
        self._guards: WeakSet[Rule] = WeakSet()  # of all that are asked of it beside the settings' own
        # Asked in the store's place while it does not answer.
        self._local = MemoryStore(max_keys=self.settings.store.max_keys)
        self.use(open_store(self.settings.store, _limits(self._gate)) if store is None else store)
        self.sessions = self._sessions()
        self._gate.sessions = None if self.sessions is None else self.sessions.flow
        self._vouch()
        self._gate.bearer = self._bearer()
        self._choose_way()
        self._punishing = [rule.penalty for rule in self.gate.rules if rule.penalty is not None]
        self._files.watch()
        self.enabled = self.settings.enabled
        KEEPERS.add(self)

    def use(self, store: Store) -> Store:
        """Ask another store from now on; the one before is returned, and left open. Raises SettingsError.

        For tests. What the first store counted is not brought along, and a gateway that serves does not see it.
        """
        before = getattr(self, "_store", store)
        self._store = checked_store(store)
        for rule in (*self._gate.rules, *self._guards):
            self._shorten(rule)
        # Memory always answers: nothing need stand between.
        self.ask: Callable[[Hits], Replies] = store.ask if type(store) is MemoryStore else self._ask
        self._choose_way()
        return before

    @property
    def store(self) -> Store:
        """The store that is asked."""
        return self._store

    def _shorten(self, rule: Rule) -> None:
        """Give a rule the shortest way to its store, if there is one."""
        is_one = rule.is_plain and not rule.asks and rule.cost == 1 and len(rule.limits) == 1
        rule.hit = self._store.hitter(rule.limits[0]) if is_one and type(self._store) is MemoryStore else None

    def _choose_way(self) -> None:
        """Whether a decision may have to be awaited."""
        flow = self._gate.sessions
        # The session's store, or the keys of an identity provider, may be on another machine.
        remote = (flow is not None and not flow.is_local and self._by_session) or self._gate.bearer is not None
        # An asynchronous function can only be awaited, whatever the store.
        self.awaits = not self.store.local or remote or any(is_asynchronous(one) for _, one in self.functions())

    def use_sessions(self, flow: Sessions) -> None:
        """Load and save sessions by `flow` from now on; for frameworks that have cookies of their own."""
        self.sessions = UserSessions(flow)
        self.gate.sessions = self._gate.sessions = flow

    def require(self, *, awaiting: bool) -> None:
        """Raises MissingExtra, now and not later, if the store lacks a package for being asked so."""
        require = getattr(self.store, "require", None)
        if require is not None:
            require(awaiting=awaiting)

    def limits(self) -> list[RateLimit]:
        """Every limit of the settings."""
        return list(_limits(self._gate))

    def functions(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The functions of the settings that requests are asked, each with its path."""
        if callable(self.settings.identity.user):
            yield "identity.user", self.settings.identity.user
        for place, limit in enumerate(self.settings.limits):
            for function in limit.functions:
                yield f"limits[{place}]", function

    @property
    def enabled(self) -> bool:
        """Whether anything is limited. Set to False, all requests and calls pass, and none is counted."""
        return not self.gate.off

    @enabled.setter
    def enabled(self, wanted: bool) -> None:
        if wanted:
            self.gate = self._gate
        elif not self.gate.off:
            self.gate = Gate((), _identity(self.settings.identity), manner=Manner(fields=False))
            self.gate.off, self.gate.keeper, self.gate.route = True, self, self._gate.route
            self.gate.sessions, self.gate.unpinned = self._gate.sessions, self._gate.unpinned
            self.gate.pin_cookies, self.gate.pin_fields = self._gate.pin_cookies, self._gate.pin_fields

    def finish(self, ticket: Ticket) -> None:
        """End a request or a call: once, when its outcome is known. The ticket's `sent` and `ended` tell it."""
        run(cast(Gate, ticket.gate).finish(ticket), self.ask)

    async def afinish(self, ticket: Ticket) -> None:
        """As `finish`, awaiting the store; it is carried out though the task that awaits it is cancelled."""
        if not self.awaits:
            self.finish(ticket)
        elif ticket.is_open:
            # In a task that was cancelled an await is lost, so this is a task of its own.
            task = asyncio.ensure_future(arun(cast(Gate, ticket.gate).finish(ticket), self.aask))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
            await asyncio.shield(task)

    @property
    def _by_session(self) -> bool:
        user = self.settings.identity.user
        return isinstance(user, str) and user.startswith("session:")

    def _ring(self, what: str) -> Ring:
        if self.keys is None:
            raise SettingsError([f'keys: expected some for {what}, such as keys = ["env:GATEKEEPER_KEY"]'])
        return self.keys.ring

    def _sessions(self) -> UserSessions | None:
        settings = self.settings
        if settings.session is None:
            if self._by_session:
                raise SettingsError(["session: expected a [session], of which identity.user names a member"])
            return None
        return sessions_of(
            settings.session,
            self._ring("[session]"),
            open_sessions(settings, self.store),
            user=str(settings.identity.user).removeprefix("session:") if self._by_session else "sub",
            warn=_LOG.warning,
        )

    def _bearer(self) -> Bearer | None:
        settings, user = self.settings.identity.bearer, self.settings.identity.user
        if settings is None:
            return None
        source = Jwks(
            settings.jwks_url,
            timeout=settings.timeout / 1e9,
            every=settings.refresh / 1e9,
            warn=_LOG.warning,
        )
        tokens = ForeignTokens(
            source, issuer=settings.issuer, audience=settings.audience, algorithms=settings.algorithms
        )
        return Bearer(tokens, str(user).removeprefix("bearer:"), time.time)

    def _vouch(self) -> None:
        gate, settings = self._gate, self.settings
        passes = any(pool.pass_identity for pool in settings.pools.values())
        if settings.identity.from_gateway or passes:
            ring = self._ring("identity.from_gateway" if settings.identity.from_gateway else "pass_identity")
            vouchers = vouchers_of(ring)
            gate.vouchers = vouchers if settings.identity.from_gateway else None
            gate.vouching = vouchers if passes else None

    def rule(self, limit: LimitSettings, space: str, route: str | None = None) -> Rule:
        """A rule that is not of the settings, for a guard; `route` is what its key's part "route" stands for.

        Raises SettingsError.
        """
        rule = rule_of(
            limit,
            self.settings,
            self._files,
            "limit",
            space=space,
            route=route,
            is_shared=limit.scope is not None,
        )
        self._files.watch()
        if rule.penalty is not None:
            self._punishing.append(rule.penalty)
        self._guards.add(rule)
        self._shorten(rule)
        return rule

    def bans(self) -> list[Ban]:
        """The keys that are banned at the moment. Raises StoreError."""
        found: list[Ban] = []
        for limit in self._punishing:
            for keys in _portions(self.store.keys(limit)):
                found += _banned(limit, keys, self.store.ask(_looks(limit, keys)))
        return found

    async def abans(self) -> list[Ban]:
        """As `bans`, awaiting the store."""
        found: list[Ban] = []
        for limit in self._punishing:
            for keys in _portions(await self.store.akeys(limit)):
                found += _banned(limit, keys, await self.store.aask(_looks(limit, keys)))
        return found

    def lift(self, rule: str, key: str) -> bool:
        """Lift the ban of a key, as `bans` lists it: its strikes are forgotten, and its quota is whole again.

        Whether it was banned. Raises KeyError for a rule without a penalty, StoreError.
        """
        looks, batch = self._lifting(rule, key)
        before = self.store.ask(looks)
        self.store.ask(batch)
        return _were_banned(before)

    async def alift(self, rule: str, key: str) -> bool:
        """As `lift`, awaiting the store."""
        looks, batch = self._lifting(rule, key)
        before = await self.store.aask(looks)
        await self.store.aask(batch)
        return _were_banned(before)

    def _lifting(self, rule: str, key: str) -> tuple[Batch, Batch]:
        limits = [limit for limit in self._punishing if limit.rule.name == rule]
        if not limits:
            names = ", ".join(limit.rule.name for limit in self._punishing)
            raise KeyError(f"expected the name of a rule with a penalty: {names or 'none has one'}")
        counted = [
            one for limit in limits for ones in (limit.rule.limits, *limit.rule.tiers.values()) for one in ones
        ]
        looks = Batch([(limit, key, 0) for limit in limits], spend=False)
        return looks, Batch(resets=[(limit, key) for limit in (*limits, *counted)])

    def _ask(self, batch: Hits) -> Replies:
        if isinstance(batch, Batch) and batch.local:
            return self._local.ask(batch)
        replies = self._store.ask(batch)
        if replies:
            self._heed(replies[-1])
        return replies

    async def aask(self, batch: Hits) -> Replies:
        if isinstance(batch, Batch) and batch.local:
            return self._local.ask(batch)
        replies = await self._store.aask(batch)
        if replies:
            self._heed(replies[-1])
        return replies

    def _heed(self, reply: Verdict | StoreError) -> None:
        """Tell when the store ceases to answer, and when it answers again: a line each, not one a request."""
        if isinstance(reply, StoreError):
            if not self._is_failing:
                self._is_failing = True
                _LOG.warning("the store fails, so that on_error decides: %s", reply)
        elif self._is_failing:
            self._is_failing = False
            _LOG.warning("the store answers again")

    def limit(
        self, rate: str | Sequence[str] | None = None, *, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Limit a function, synchronous or not: `@gk.limit("5/minute")`.

        Inside a request each client has its quota, by `key`; elsewhere all callers share one. `name` is told to
        clients and keeps counters apart; by default it is the function's own. `settings` are those of a rule in a
        file (`key`, `cost`, `tiers`, `shadow`, …), but those that say for which requests it is. A call too many
        raises Limited, which the middleware answers with 429.

        Raises SettingsError for settings that cannot be, and, when it decorates, TypeError for what cannot be
        limited: classes, generator functions and what is not callable.
        """
        return decorators.limit(self, rate, name, settings)

    def close(self) -> None:
        """Let go of what the store holds. The counters in memory are forgotten."""
        if self.sessions is not None and self.sessions.flow.store is not None:
            self.sessions.flow.store.close()
        self.store.close()

    async def aclose(self) -> None:
        if self.sessions is not None and self.sessions.flow.store is not None:
            await self.sessions.flow.store.aclose()
        await self.store.aclose()

    def __repr__(self) -> str:
        return f"<Gatekeeper {list(self.gate.rules)}>"


def _portions(keys: list[str]) -> Iterator[list[str]]:
    """So many at a time that a store is not held up."""
    return (keys[start : start + 256] for start in range(0, len(keys), 256))


def _looks(limit: Limit, keys: Iterable[str]) -> Batch:
    return Batch([(limit, key, 0) for key in keys], spend=False)


def _banned(limit: RateLimit, keys: Iterable[str], replies: Replies) -> Iterator[Ban]:
    for key, reply in zip(keys, replies, strict=True):
        if isinstance(reply, StoreError):
            raise reply
        if not reply.allowed:
            yield Ban(limit.rule.name, key, reply.retry_after)


def _were_banned(replies: Replies) -> bool:
    for reply in replies:
        if isinstance(reply, StoreError):
            raise reply
    return not all(reply.allowed for reply in replies)


def _limits(gate: Gate) -> Iterator[RateLimit]:
    """Every limit of a gate."""
    for rule in gate.rules:
        yield from rule.limits
        for limits in rule.tiers.values():
            yield from limits
        if rule.penalty is not None:
            yield rule.penalty


def _gate(
    settings: Settings, files: NetworkFiles, leases: Leases, workers: int, ring: Callable[[str], Ring]
) -> Gate:
    scopes = Counter(limit.scope for limit in settings.limits if limit.scope)
    rules = [
        rule_of(
            limit,
            settings,
            files,
            f"limits[{place}]",
            workers=workers,
            is_shared=scopes[limit.scope or ""] > 1,
            digest=_digest(limit),
        )
        for place, limit in enumerate(settings.limits)
    ]
    destinations = {name: _destination(name, pool, ring) for name, pool in settings.pools.items()}
    routes = [(Pattern(route.match), destinations[route.pool]) for route in settings.routes]
    access = settings.access
    return Gate(
        rules,
        _identity(settings.identity),
        manner=_manner(settings.response),
        routes=routes,
        access=Access(files.networks(access.allow, "access.allow"), files.networks(access.deny, "access.deny"))
        if access.allow or access.deny
        else None,
        leases=leases,
        most_body=settings.identity.max_body,
    )


def _manner(settings: ResponseSettings) -> Manner:
    return Manner(
        fields=settings.fields,
        x_ratelimit=settings.x_ratelimit,
        jitter=settings.retry_jitter / 1e9,
        body=settings.body,
        content_type=settings.content_type,
        handler=settings.handler,
        close_code=settings.close_code,
        clock=time.time,
        draw=random.random,
    )


def _destination(name: str, settings: PoolSettings, ring: Callable[[str], Ring]) -> Destination:
    upstreams = [_upstream(upstream, settings) for upstream in settings.upstreams]
    policy = POLICIES[settings.policy] if isinstance(settings.policy, str) else settings.policy
    by_ring = partial(RingOrder, vnodes=settings.vnodes)
    affinity = _affinity(name, settings, ring)
    fallback = None if policy is RingOrder or affinity is None else by_ring
    try:
        pool = Pool(name, upstreams, by_ring if policy is RingOrder else policy, fallback)
    except Exception as error:  # of a class of the user's own: the rest was checked
        raise SettingsError(
            [f"pools.{name}.policy: expected a policy; making it of the upstreams raised {type(error).__name__}"]
        ) from None
    has_key = pool.needs_key or affinity is not None
    return Destination(
        pool,
        part(settings.key) if has_key else None,
        settings.pass_identity or (has_key and (settings.key == "user" or settings.key.startswith("claim:"))),
        settings.connect_timeout / 1e9,
        settings.response_timeout / 1e9,
        settings.read_timeout / 1e9,
        settings.idle_timeout / 1e9,
        settings.pass_identity,
        affinity,
    )


def _affinity(name: str, pool: PoolSettings, ring: Callable[[str], Ring]) -> Affinity | None:
    settings = pool.affinity
    if settings is None:
        return None
    ids = [upstream.id for upstream in pool.upstreams]
    return Affinity(
        Pins(ring(f"pools.{name}.affinity"), name, ids, -(-settings.ttl // NS)),
        cookie=settings.cookie_of(name),
        field=None if settings.header is None else settings.header.lower(),
        strict=settings.strict,
        secure=settings.secure,
        samesite=settings.samesite,
        clock=time.time,
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
        drains=settings.drain,
        ejection=Ejection(health.failures, health.eject_for, health.eject_at_most),
    )


def rule_of(
    limit: LimitSettings,
    settings: Settings,
    files: NetworkFiles,
    where: str,
    *,
    workers: int = 1,
    is_shared: bool = False,
    space: str | None = None,
    route: str | None = None,
    digest: str = "",
) -> Rule:
    """The rule that settings describe. Raises SettingsError, for files that they name."""
    if limit.concurrency is None:
        rates, algorithm = parse_rates(";".join(limit.rate)), limit.counted_by
    else:
        rates, algorithm = (Rate(limit.concurrency, max(1, -(-limit.lease // NS))),), "concurrency"
    penalty = limit.penalty
    return Rule(
        limit.name,
        rates,
        algorithm=algorithm,
        burst=limit.burst,
        pattern=None if limit.match is None else Pattern(limit.match),
        keys=limit.key,
        route=route,
        cost=limit.cost,
        on_error=limit.on_error or settings.store.on_error,
        gives_back=limit.give_back,
        resets_on=limit.reset_on,
        settles=limit.settle,
        preflights=limit.preflights,
        workers=workers,
        space=space if limit.scope is None else f"+{limit.scope}",  # a rule's name begins with no sign
        is_shared=is_shared,
        tier=limit.tier,
        tiers={name: parse_rates(";".join(rates)) if rates else () for name, rates in limit.tiers.items()},
        exempt=_exemption(limit.exempt, files, f"{where}.exempt") if limit.exempt else None,
        penalty=None
        if penalty is None
        else Penalty(penalty.strikes, penalty.within, penalty.ban, max(penalty.ban, penalty.at_most)),
        shadow=limit.shadow,
        overrides=limit.overrides,
        messages=limit.per == "message",
        digest=digest,
    )


def _digest(limit: LimitSettings) -> str:
    """What tells a rule from any other, in each process that has read it: functions are told by their names."""

    def name(function: Any) -> str:
        return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"

    text = json.dumps(limit.model_dump(), default=name, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _exemption(entries: Sequence[Any], files: NetworkFiles, where: str) -> Exemption:
    texts = [one for one in entries if isinstance(one, str)]
    users = [text.removeprefix("user:") for text in texts if text.startswith("user:")]
    fields = [text.removeprefix("header:").partition("=") for text in texts if text.startswith("header:")]
    networks = [text for text in texts if not text.startswith(("user:", "header:"))]
    return Exemption(
        networks=files.networks(networks, where) if networks else None,
        users=users,
        fields={name: value for name, _, value in fields},
        functions=[one for one in entries if callable(one)],
    )


def _identity(settings: IdentitySettings) -> Identity:
    user = settings.user
    return Identity(
        trusted=[ipaddress.ip_network(text) for text in settings.trusted_proxies if text != "unix"],
        unix="unix" in settings.trusted_proxies,
        header=settings.header.lower(),
        ipv6_prefix=settings.ipv6_prefix,
        user_field=user.partition(":")[2].lower() if isinstance(user, str) and user.startswith("header:") else None,
        by_session=isinstance(user, str) and user.startswith("session:"),
        user=user if callable(user) else None,
        api_key=bearer_token if settings.api_key == "bearer" else cast(Any, part(settings.api_key)),
    )
