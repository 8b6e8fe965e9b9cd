"""Routes of FastAPI's with their first limits in front of them.

To solve a dependency takes FastAPI longer than the whole decision takes us. A limit that a route depends on before
all else, and of which nobody wants the value, is therefore asked before FastAPI begins, by what stands in the place
of the route's application. The route's tree of dependencies stays as it was, for documents and for whoever looks
into it; it is only while a request is on its way from there that it begins behind those limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from itertools import takewhile
from typing import Any, Final, Protocol

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

    def decide(self, scope: Scope, place: Any) -> tuple[Ticket, Any, bool]: ...

    async def charge(self, ticket: Ticket, place: Any, connection: HTTPConnection) -> None: ...


class _Dependencies(list[Any]):
    """What a route depends on. A request that has passed its first limits sees the rest alone."""

    def __init__(self, whole: list[Any], passed: int) -> None:
        super().__init__(whole)
        self._passed = passed

    def __iter__(self) -> Iterator[Any]:
        return iter(self[self._passed :]) if _PASSED.get() is self else super().__iter__()


def whole(dependant: Any) -> list[Any]:
    """All that a route depends on, whatever the request in hand has passed."""
    return list(list.__iter__(getattr(dependant, "dependencies", [])))


class _Front:
    """A route's application behind its first limits."""

    def __init__(self, key: Any, first: list[Any], dependencies: _Dependencies, router: Any) -> None:
        self.app: ASGIApp = key.app
        self._dependant = key.dependant
        self._dependencies = dependencies
        self._first = first
        self._slice = slice(len(first))
        self._limits: list[Limit] = [one.call for one in first]
        self._router = router
        self._overrider = key.dependency_overrides_provider
        self._places: dict[Limit, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        overrider, dependencies, app = self._overrider, self._dependencies, self.app
        own: list[OwnTicket] = []
        stays = (
            scope.get("router") is not self._router
            or (overrider is not None and overrider.dependency_overrides)
            or self._dependant.dependencies is not dependencies
            or dependencies[self._slice] != self._first  # others were put before, or these taken away
        )
        if not stays:
            places = self._places
            try:
                for limit in self._limits:
                    ticket, place, is_charged = limit.decide(scope, places.get(limit))
                    places[limit] = place
                    if type(ticket) is OwnTicket and not ticket.is_seen:
                        ticket.is_seen = True
                        own.append(ticket)
                    if not is_charged:
                        await limit.charge(ticket, place, Request(scope, receive, send))
            except BaseException as error:
                app = _raising(error)
            if len(own) > 1:
                for ticket in own[:-1]:
                    app = partial(watch, ticket, app)
            if own and IN_USE:
                CURRENT.set(own[-1])
        passed = _PASSED.set(None if stays else dependencies)
        try:
            if own:
                await watch(own[-1], app, scope, receive, send)
            else:
                await app(scope, receive, send)
        finally:
            try:  # noqa: SIM105  # suppress() is three calls more for each request
                _PASSED.reset(passed)
            except ValueError:  # closed with its loop, and so not in its own context
                pass


def _raising(error: BaseException) -> ASGIApp:
    """What answers an error as a route does whose dependency has raised it."""
    from fastapi.routing import request_response

    async def handler(request: Request) -> Any:
        raise error

    return request_response(handler)


def put_in_front(key: Any, router: Any, may_go: Callable[[Any], bool]) -> bool:
    """Put the first limits of a route in front of it. Whether they are there.

    `key` is as `places.key_of` gives it. `may_go` tells of a dependency whether it is a limit that need not stay
    where it is.
    """
    dependant = getattr(key, "dependant", None)
    if dependant is None:  # Starlette's, which may be all there is
        return False
    from fastapi.routing import APIRoute, request_response

    if isinstance(key.app, _Front):
        return True
    # Of a route with a way of its own to be handled, or with something around it, nothing is known.
    route, code = getattr(key, "original_route", key), getattr(key.app, "__code__", None)
    is_fastapis = getattr(type(route), "get_route_handler", None) is APIRoute.get_route_handler
    if not is_fastapis or code is None or code not in request_response.__code__.co_consts:
        return False
    dependencies = whole(dependant)
    first = list(takewhile(may_go, dependencies))
    if not first:
        return False
    # A new list: the request that is on its way is in the midst of the old one.
    dependant.dependencies = seen = _Dependencies(dependencies, len(first))
    key.app = _Front(key, first, seen, router)
    return True
