# No `from __future__ import annotations`: FastAPI reads the annotations of `__call__` themselves.
"""Limits as dependencies of FastAPI's: `Depends(RateLimit("10/minute"))`."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response, StreamingResponse
from starlette.websockets import WebSocket

from gatekeeper.decorators import CURRENT, Guard
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.ticket import Ticket
from gatekeeper_fastapi.fronts import put_in_front, whole
from gatekeeper_fastapi.places import key_of, label_of, leaf_of, template_of, with_parameters
from gatekeeper_fastapi.tickets import (
    OwnTicket,
    charge,
    keeper_for,
    new_ticket,
    tell_error,
    ticket_for,
)

_MOST: Final = 1024


class RateLimit:
    """A limit that an application, a router or a route depends on: `Depends(RateLimit("10/minute"))`.

    - `rate`, and `settings` as those of a rule in a file (`key`, `cost`, `tiers`, `exempt`, `give_back`, …), but
      those that say for which requests it is
    - `name`: told to clients. Routes that depend on a limit with a name share its quota. Without one each route has
      a quota of its own, and is known by its template, with all that it is mounted or included under.
    - `keeper`: a Gatekeeper; by default that of the middleware, `app.state.gatekeeper`, or one of the process that
      counts in memory

    Its value is the request's Ticket, on which an endpoint can `settle` what it has really cost. A request too many
    raises RateLimited. What the middleware charges, it does not charge again.

    Raises SettingsError for settings that cannot be.
    """

    def __init__(
        self,
        rate: str | Sequence[str] | None = None,
        *,
        name: str | None = None,
        keeper: Gatekeeper | None = None,
        **settings: Any,
    ) -> None:
        self.guard = Guard(rate, name, with_parameters(settings), by_call=False)
        self.keeper = keeper
        # What was found out of a route, by the id of what its requests name it by.
        self._places: dict[int, _Place] = {}

    # Parameters of kinds that FastAPI hands over at no cost, and no generator: a dependency with `yield` takes
    # longer than the whole decision. The middleware's ticket sees to what is to be done when the response ends.
    async def __call__(self, connection: HTTPConnection, response: Response) -> Ticket:
        ticket, place, is_charged = self.decide(connection.scope, None)
        if not is_charged:
            await self.charge(ticket, place, connection)
        if type(ticket) is OwnTicket and not ticket.is_seen:
            fields = response.raw_headers
            if fields:
                ticket.tell(response)
            else:
                fields += ticket.gate.respond(ticket)
            if ticket.response is None:
                ticket.response = response
                CURRENT.set(ticket)  # for functions under @gk.limit, and for the endpoint, to be told
            if place.dependant is not None:
                _wrap(place.dependant)
                place.dependant = None
            if ticket.is_open and not ticket.is_watched:
                _end_with(ticket, connection)
        return ticket

    async def charge(self, ticket: Ticket, place: "_Place", connection: HTTPConnection) -> None:
        """Charge a request that could not be charged at once. Raises what refuses it."""
        await charge(self.guard, ticket, place.rule, place.keeper, connection)

    def decide(self, scope: Any, place: "_Place | None") -> "tuple[Ticket, _Place, bool]":
        """Charge a request, if that can be done at once; else it is to be charged, or refused, by `charge`.

        Returns its ticket, its place and whether nothing is left to be done. `place` is what an earlier request to
        the same route had.
        """
        ticket: Any = scope.get("gatekeeper")
        if ticket is None:
            ticket = scope["gatekeeper"] = new_ticket(scope, self.keeper or keeper_for(scope))
        elif self.keeper is not None or type(ticket) is OwnTicket or ticket.native is not scope:
            ticket = ticket_for(scope, self.keeper)
        gate = ticket.gate
        keeper = gate.keeper
        if place is None or place.keeper is not keeper:
            place = self._place(scope, keeper)
        rule = place.rule
        if gate.off or ticket.spared or (rule in ticket.rules and _has_passed(ticket, rule)):
            return ticket, place, True
        # As a preflight it may be free.
        if ticket.method == "OPTIONS" or keeper.awaits:
            return ticket, place, False
        return ticket, place, gate.extend_at_once(ticket, rule, keeper.ask)

    def _place(self, scope: Any, keeper: Gatekeeper) -> "_Place":
        """That of a request's route."""
        key = scope.get("route")
        fastapi = scope.get("fastapi")
        if fastapi:
            context = fastapi.get("effective_route_context")
            if context is not None and context.original_route is key:
                key = context
        place = self._places.get(id(key))
        if (
            place is None
            or place.key is not key
            or place.keeper is not keeper
            or place.router is not scope.get("router")
        ):
            place = self._find(scope, keeper)
        return place

    def _find(self, scope: Any, keeper: Gatekeeper) -> "_Place":
        """What is to be known of a request's route."""
        key = key_of(scope)
        leaf, is_certain = leaf_of(scope, key)
        dependant = getattr(key, "dependant", None)
        endpoint = getattr(key, "endpoint", None) or scope.get("endpoint") or key
        # FastAPI's static frontends have no function and no route of their own.
        label = ("frontend" if endpoint is None else label_of(endpoint)) + self.mark(dependant)
        place = _Place()
        place.key, place.router, place.keeper = key, scope.get("router"), keeper
        place.rule = self.guard.rule(keeper, label, template_of(leaf, key))
        place.dependant = None if scope["type"] == "websocket" else dependant
        if is_certain:
            if len(self._places) >= _MOST:
                self._places.clear()
            self._places[id(key)] = place
            if scope["type"] == "http":
                put_in_front(key, place.router, _may_go_first)
        return place

    def mark(self, dependant: Any) -> str:
        """What tells this limit from others without a name on the same route."""
        if self.guard.name is not None:
            return ""
        others = [one for one in limits_of(dependant) if one.guard.name is None]
        number = others.index(self) if self in others else len(others)
        return f"#{number + 1}" if number else ""

    def __repr__(self) -> str:
        settings = self.guard.settings
        rates = settings.rate or [f"{settings.concurrency} at a time"]
        return f"<RateLimit {' '.join([*([self.guard.name] if self.guard.name else []), *rates])}>"


def _has_passed(ticket: Ticket, rule: Rule) -> bool:
    """Whether a request was let in by a rule. It may have been refused, and the application have gone on."""
    return not any(
        hit[0].rule is rule and not verdict.allowed and not rule.shadow  # type: ignore[attr-defined]
        for hit, verdict in zip(ticket.hits, ticket.verdicts, strict=True)
    )


def limits_of(dependant: Any) -> list[RateLimit]:
    """The limits that a route depends on, each once, in the order in which they are asked."""
    return list(dict.fromkeys(_limits_of(dependant)))


def _limits_of(dependant: Any) -> Iterator[RateLimit]:
    for one in whole(dependant):
        yield from _limits_of(one)
        if isinstance(one.call, RateLimit):
            yield one.call


def _may_go_first(dependant: Any) -> bool:
    """Whether a dependency is a limit that can as well be asked before FastAPI begins.

    Not where its value is wanted, or where what it needs may be somebody's to find out on the way.
    """
    call = dependant.call
    is_ours = isinstance(call, RateLimit) and type(call).__call__ is RateLimit.__call__
    return is_ours and dependant.name is None and not call.guard.asks


class _Place:
    """A route for a limit: its rule there. `key` and `router` are kept, since an id is good only that long."""

    __slots__ = (
        "dependant",
        "keeper",
        "key",
        "router",
        "rule",
    )

    key: Any
    router: Any
    keeper: Gatekeeper
    rule: Rule
    dependant: Any
    """Whose call is still to be wrapped, where no middleware sees the response; else None."""


def _end_with(ticket: OwnTicket, connection: HTTPConnection) -> None:
    """End a ticket where dependencies with `yield` end: after the response was sent, or when it breaks off."""
    ticket.is_watched = True
    if isinstance(connection, WebSocket):
        ticket.status = 101
    connection.scope["fastapi_inner_astack"].push_async_exit(ticket.end)


def _wrap(dependant: Any) -> None:
    """Have what an endpoint returns or raises tell of the request's ticket.

    FastAPI takes fields from a dependency's `response` for what it makes a response of, and not for a Response that
    the endpoint returns. The function of a route is looked up anew for each request.
    """
    call: Callable[..., Any] = dependant.call
    plain = inspect.unwrap(call)
    is_stream = inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain)
    if is_stream or hasattr(call, "__gatekeeper_tells__"):  # of what a generator gives FastAPI makes the response
        return

    if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None)):  # noqa: B004

        @functools.wraps(call)
        async def told_async(*args: Any, **kwargs: Any) -> Any:
            ticket = CURRENT.get()
            if type(ticket) is not OwnTicket or ticket.native is None or ticket.is_seen:
                return await call(*args, **kwargs)
            try:
                result = await call(*args, **kwargs)
                if isinstance(result, Response):
                    _tell(ticket, result)
                return result
            except HTTPException as error:
                tell_error(ticket, error)
                raise
            finally:
                if not ticket.is_open:
                    ticket.native = None  # scope and ticket hold each other: the cycle would wait for the collector

        told: Callable[..., Any] = told_async
    else:

        @functools.wraps(call)
        def told_sync(*args: Any, **kwargs: Any) -> Any:
            ticket = CURRENT.get()
            if type(ticket) is not OwnTicket or ticket.native is None or ticket.is_seen:
                return call(*args, **kwargs)
            try:
                result = call(*args, **kwargs)
                if isinstance(result, Response):
                    _tell(ticket, result)
                return result
            except HTTPException as error:
                tell_error(ticket, error)
                raise
            finally:
                if not ticket.is_open:
                    ticket.native = None

        told = told_sync
    told.__gatekeeper_tells__ = True  # type: ignore[attr-defined]
    dependant.call = told


def _tell(ticket: OwnTicket, response: Response) -> None:
    ticket.tell(response)
    ticket.status = response.status_code
    if ticket.is_open:
        _count(ticket, response)


def _count(ticket: OwnTicket, response: Response) -> None:
    """Have the bytes of a body counted."""
    if not isinstance(response, StreamingResponse):
        ticket.moved = len(getattr(response, "body", b""))
        return

    async def counted(pieces: Any) -> AsyncIterator[Any]:
        async for piece in pieces:
            ticket.moved += len(piece)
            yield piece

    response.body_iterator = counted(response.body_iterator)
