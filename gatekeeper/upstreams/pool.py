"""A pool: upstreams that answer the same requests. A policy orders them; health and capacity filter the order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING

from gatekeeper.upstreams.health import EJECTION, Ejection, Health

if TYPE_CHECKING:
    from gatekeeper.upstreams.policies import Policy


class Upstream:
    """A service that answers: at `host` and `port`, or at the Unix socket `path`.

    - `id`: what affinity, the ring and health go by; an address may change, the id stays.
    - `authority`: what a `Host` field calls it if the client named none.
    - `weight`: its share beside the others', a whole number.
    - `max_in_flight`: how many requests it takes at a time; None for no bound.
    - `drains`: whether it gets no new clients, and only those go on with it that are pinned to it.
    - `in_flight`: how many it has; changed by its pool alone.

    Raises ValueError if the id is empty, or a number not positive.
    """

    __slots__ = (
        "authority", "drains", "health", "host", "id", "in_flight", "max_in_flight", "path", "port", "weight",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        host: str = "localhost",
        port: int = 80,
        *,
        path: str | None = None,
        weight: int = 1,
        max_in_flight: int | None = None,
        drains: bool = False,
        ejection: Ejection = EJECTION,
    ) -> None:
        if not id:
            raise ValueError("expected an id that is not empty")
        if weight < 1:
            raise ValueError(f"{id}: expected a weight of 1 or more, and not {weight}")
        if max_in_flight is not None and max_in_flight < 1:
            raise ValueError(f"{id}: expected max_in_flight of 1 or more, and not {max_in_flight}")
        self.id = id
        self.host = host
        self.port = port
        self.path = path
        name = f"[{host}]" if ":" in host else host
        self.authority = (name if path is not None or port == 80 else f"{name}:{port}").encode("ascii")
        self.weight = weight
        self.max_in_flight = max_in_flight
        self.drains = drains
        self.in_flight = 0
        self.health = Health(ejection)

    @property
    def is_full(self) -> bool:
        return self.max_in_flight is not None and self.in_flight >= self.max_in_flight

    def __repr__(self) -> str:
        where = f"http+unix://{self.path}" if self.path is not None else f"http://{self.authority.decode()}"
        told = [self.id] if self.id == where else [self.id, where]
        if self.weight != 1:
            told.append(f"weight {self.weight}")
        bound = "" if self.max_in_flight is None else f" of {self.max_in_flight}"
        told.append(f"{self.in_flight}{bound} in flight")
        told += ["drains"] if self.drains else []
        return f"<Upstream {', '.join(told)}, {self.health.state.value}>"


class Pool:
    """Upstreams by the name of their pool, and how they are ordered.

    - `policy`: makes the policy when it is called with the upstreams that do not drain; a class of `POLICIES`, or
      another.
    - `fallback`: makes another one, for clients that cannot keep to the upstream that they are pinned to; by
      default they go by the policy, too.
    - `needs_key`: whether the policy goes by a key; if not, any text will do for one.

    A request goes this way::

        for upstream in pool.choose(key, now, draw):
            term = pool.take(upstream, now)
            try: …                                         # send it; if that cannot be, go on to the next
            pool.observe(upstream, success, now, term)     # once it is known; or never
            pool.release(upstream)                         # in any case

    Raises ValueError if there is no upstream, if all of them drain, or one id is there twice.
    """

    __slots__ = ("_by_id", "_fallback", "_policy", "_turns", "name", "needs_key", "upstreams")

    def __init__(
        self,
        name: str,
        upstreams: Iterable[Upstream],
        policy: Callable[[tuple[Upstream, ...]], Policy],
        fallback: Callable[[tuple[Upstream, ...]], Policy] | None = None,
    ) -> None:
        self.name = name
        self.upstreams = tuple(upstreams)
        if not self.upstreams:
            raise ValueError(f"pool {name}: expected at least one upstream")
        self._by_id: dict[str | None, Upstream] = {}
        for upstream in self.upstreams:
            if upstream.id in self._by_id:
                raise ValueError(f"pool {name}: expected each id once: {upstream.id!r} is there twice")
            self._by_id[upstream.id] = upstream
        takers = tuple(upstream for upstream in self.upstreams if not upstream.drains)
        if not takers:
            raise ValueError(f"pool {name}: expected at least one upstream that does not drain")
        self._policy = policy(takers)
        self._fallback = self._policy if fallback is None else fallback(takers)
        self.needs_key = self._policy.needs_key
        self._turns = count()

    def choose(self, key: str, now: int, draw: float) -> Iterator[Upstream]:
        """The upstreams to try, in the policy's order: those that are healthy, or due for a trial, and not full.

        The order is worked out as far as it is asked for. When none is healthy the ejected ones follow that are not
        full: to fail without trying would be worse (Envoy's panic mode).

        - `now`: nanoseconds on the clock that `take` and `observe` are told, too
        - `draw`: a random number, 0 ≤ draw < 1
        """
        yield from self._able(self._policy.order(key, next(self._turns), draw), now)

    def keep(self, id: str | None, key: str, now: int, *, strict: bool = False) -> Iterator[Upstream]:
        """As `choose`, for a client that is pinned to the upstream of an id: that one first, though it drains.

        Then those of the fallback, so that all who know the key turn to the same. With `strict` there is no other.
        """
        pinned = self._by_id.get(id)
        if not strict:
            yield from self._able(self._around(pinned, key), now)
        elif pinned is not None and now >= pinned.health.closed_until and not pinned.is_full:
            yield pinned

    def is_merely_full(self, id: str | None, now: int) -> bool:
        """Whether an upstream would get a request if it had fewer."""
        upstream = self._by_id.get(id)
        return upstream is not None and upstream.is_full and now >= upstream.health.closed_until

    def _around(self, pinned: Upstream | None, key: str) -> Iterator[Upstream]:
        if pinned is not None:
            yield pinned
        for upstream in self._fallback.order(key, 0, 0.0):
            if upstream is not pinned:
                yield upstream

    def _able(self, order: Iterator[Upstream], now: int) -> Iterator[Upstream]:
        """Those of an order that are healthy, or due for a trial, and not full; the ejected if none is healthy."""
        some_healthy = False
        ejected: list[Upstream] = []
        for upstream in order:
            closed_until = upstream.health.closed_until
            if not closed_until:
                some_healthy = True
            most = upstream.max_in_flight
            if most is not None and upstream.in_flight >= most:
                continue
            if now >= closed_until:
                yield upstream
            else:
                ejected.append(upstream)
        if not some_healthy:
            for upstream in ejected:
                if not upstream.is_full:
                    yield upstream

    def take(self, upstream: Upstream, now: int) -> int:
        """A request is sent to it: its trial, if its ejection is over. Returns the term, for `observe`."""
        upstream.in_flight += 1
        health = upstream.health
        return health.taken(now) if health.closed_until else health.term

    def release(self, upstream: Upstream) -> None:
        """A request that was sent to it has ended, whatever came of it."""
        assert upstream.in_flight > 0, "released more often than taken"
        upstream.in_flight -= 1

    def observe(self, upstream: Upstream, success: bool, now: int, term: int) -> bool:
        """What came of a request taken in `term`. Returns whether the upstream became healthy or ceased to be."""
        return upstream.health.observe(success, now, term)

    def __repr__(self) -> str:
        return f"<Pool {self.name}: {type(self._policy).__name__} of {list(self.upstreams)}>"
