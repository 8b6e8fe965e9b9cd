"""Routes of FastAPI's with their first limits in front of them.

To solve a dependency takes FastAPI longer than the whole decision takes us. A limit that a route depends on before
all else, and of which nobody wants the value, is therefore asked before FastAPI begins, by what stands in the place
of the route's application. The route's tree of dependencies stays as it was, for documents and for whoever looks
into it; it is only while a request is on its way from there that it begins behind those limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final, Protocol

from fastapi.routing import APIRoute
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gatekeeper.decorators import CURRENT, IN_USE
from gatekeeper.ticket import Ticket
from gatekeeper_fastapi.endpoints import watch
from gatekeeper_fastapi.tickets import OwnTicket

_PASSED: Final[ContextVar[_Dependencies | None]] = ContextVar("gatekeeper_fastapi_passed", default=None)
"""The dependencies of the route whose limits the request in hand has passed."""


class Limit(Protocol):
    """A RateLimit, as far as it matters here."""

    def decide(self, scope: Scope) -> tuple[Ticket, Any, bool]: ...

    async def charge(self, ticket: Ticket, place: Any, connection: HTTPConnection) -> None: ...


class _Dependencies(list[Any]):
    """What a route depends on. A request that has passed its first limits sees the rest alone."""

    def __init__(self, whole: list[Any], passed: int) -> None:
        super().__init__(whole)
        self._rest = whole[passed:]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rest) if _PASSED.get() is self else super().__iter__()


def whole(dependant: Any) -> list[Any]:
    """All that a route depends on, whatever the request in hand has passed."""
    return list(list.__iter__(getattr(dependant, "dependencies", [])))


class _Front:
    """A route's application behind its first limits."""

    def __init__(
        self, app: ASGIApp, limits: list[Limit], dependencies: _Dependencies, router: Any, overrider: Any
    ) -> None:
        self.app = app
        self._limits = limits
        self._dependencies = dependencies
        self._router = router
        self._overrider = overrider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        overrider = self._overrider
        if scope["router"] is not self._router or (overrider is not None and overrider.dependency_overrides):
            await self.app(scope, receive, send)
            return
        for limit in self._limits:
            ticket, place, is_charged = limit.decide(scope)
            if not is_charged:
                await limit.charge(ticket, place, Request(scope, receive, send))
        ours = ticket if isinstance(ticket, OwnTicket) and not ticket.is_seen else None
        passed, current = (
            _PASSED.set(self._dependencies),
            CURRENT.set(ours) if IN_USE and ours is not None else None,
        )
        try:
            if ours is not None:
                await watch(ours, self.app, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            _PASSED.reset(passed)
            if current is not None:
                CURRENT.reset(current)


def put_in_front(key: Any, router: Any, limit_of: Callable[[Any], Limit | None]) -> bool:
    """Put the first limits of a route in front of it. Whether they are there.

    `key` is as `places.key_of` gives it. `limit_of` gives the limit that a dependency is; None for others, and for
    those that must stay where they are.
    """
    dependant, route = getattr(key, "dependant", None), getattr(key, "original_route", key)
    # Of a route with a way of its own to be handled nothing is known.
    if dependant is None or getattr(type(route), "get_route_handler", None) is not APIRoute.get_route_handler:
        return False
    if isinstance(key.app, _Front):
        return True
    limits: list[Limit] = []
    for one in whole(dependant):
        limit = limit_of(one)
        if limit is None:
            break
        limits.append(limit)
    if limits:
        # A new list: the request that is on its way is in the midst of the old one.
        dependant.dependencies = dependencies = _Dependencies(whole(dependant), len(limits))
        key.app = _Front(key.app, limits, dependencies, router, key.dependency_overrides_provider)
    return bool(limits)
