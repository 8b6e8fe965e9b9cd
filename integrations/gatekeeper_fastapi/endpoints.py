"""Limits on endpoints of Starlette's: functions, methods, classes, and applications to be mounted."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar, cast
from weakref import WeakSet

import anyio.from_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from gatekeeper.commands import run
from gatekeeper.decorators import CURRENT, Guard
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.ticket import Ticket
from gatekeeper_fastapi.places import key_of, label_of, leaf_of, template_of, with_parameters
from gatekeeper_fastapi.tickets import (
    OwnTicket,
    RateLimited,
    WebSocketLimited,
    charge,
    limited_handler,
    refused,
    tell_error,
    ticket_for,
)

T = TypeVar("T")

_LIMITED: Final[WeakSet[Any]] = WeakSet()
"""The functions that `limit` has made."""

_NO_REQUEST: Final = (
    "limit: there is no request to be seen: give the function a parameter for it, add GatekeeperMiddleware, or use "
    "Depends(RateLimit(…))"
)


def limit(
    rate: str | Sequence[str] | None = None,
    *,
    name: str | None = None,
    keeper: Gatekeeper | None = None,
    **settings: Any,
) -> Callable[[T], T]:
    """Limit an endpoint where it stands: a function, a method of an HTTPEndpoint, such a class, or an application.

    It stands below what makes a route of it, and nearest to the endpoint of what else decorates it. Each route that
    leads to it has a quota of its own, known by its template with all that it is mounted under; with a `name` they
    share one. `keeper` and `settings` as for RateLimit.

    A request too many raises RateLimited. A WebSocket that was accepted is closed instead.

    Raises SettingsError for settings that cannot be, and TypeError for what cannot be limited.
    """
    guard = Guard(rate, name, with_parameters(settings))

    def decorate(endpoint: T) -> T:
        found: Any = endpoint
        earlier = getattr(found, "__gatekeeper__", ())
        label = label_of(found) + (f"#{len(earlier) + 1}" if earlier and name is None else "")
        post = _Post(guard, keeper, label)
        if isinstance(found, type):
            limited = _class(found, post)
        elif isinstance(found, staticmethod | classmethod):
            raise TypeError(f"limit: expected a function; put @limit below @{type(found).__name__}")
        elif not callable(found):
            raise TypeError(f"limit: expected an endpoint, not {type(found).__name__}")
        elif hasattr(found, "include_router") and not isinstance(found, Starlette):
            # FastAPI includes a router's routes, and never calls the router itself.
            raise TypeError(
                "limit: expected an endpoint; of a router: APIRouter(dependencies=[Depends(RateLimit(…))])"
            )
        elif inspect.isroutine(inspect.unwrap(_whole(found))):
            limited = _function(found, post)
            _LIMITED.add(limited)
        else:
            limited = _Limited(found, post)
        limited.__gatekeeper__ = (*earlier, guard)
        return cast(T, limited)

    return decorate


def idle(endpoints: Iterable[Any]) -> Iterator[str]:
    """The names of the endpoints, of these, whose limit stands above their route: what is below it is called.

    It is a decorator's doing only where the limited function has the name in its module: who limits a function for
    one application may have it as it is in another.
    """
    called = list(endpoints)
    used = {id(one) for endpoint in called for one in _chain(endpoint)}
    ends = {id(endpoint) for endpoint in called}
    for function in list(_LIMITED):
        named = getattr(sys.modules.get(function.__module__), function.__name__, None)
        if named is function and id(function) not in used and any(id(one) in ends for one in _chain(function)):
            yield label_of(function)


def _chain(function: Any) -> Iterator[Any]:
    """A function, and those that it wraps."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _whole(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


class _Post:
    """Where a guard stands."""

    def __init__(self, guard: Guard, keeper: Gatekeeper | None, label: str) -> None:
        self.guard = guard
        self.keeper = keeper
        self.label = label

    def seen(self, scope: Any) -> tuple[Ticket, Rule, Gatekeeper] | None:
        """The request's ticket, and the rule of its route; None if nothing is to be charged."""
        ticket = ticket_for(scope, self.keeper)
        gate: Any = ticket.gate
        if gate.off:
            return None
        keeper: Gatekeeper = gate.keeper
        key = key_of(scope)
        rule = self.guard.rule(keeper, self.label, template_of(leaf_of(scope, key)[0], key))
        return ticket, rule, keeper

    async def admit(self, connection: HTTPConnection) -> OwnTicket | None:
        """Charge a request. Returns its ticket if it is ours to tell and to end. Raises what refuses it."""
        seen = self.seen(connection.scope)
        if seen is None:
            return None
        ticket, rule, keeper = seen
        at_once = not keeper.awaits and ticket.method != "OPTIONS"  # which may be a preflight, and free
        # Of a function called again, as for each message of a WebSocket, only the last call is kept.
        if not at_once or rule in ticket.rules or not keeper.gate.extend_at_once(ticket, rule, keeper.ask):
            await charge(self.guard, ticket, rule, keeper, connection)
        return _ours(ticket)

    def admit_in_thread(self, connection: HTTPConnection) -> OwnTicket | None:
        """As `admit`, in a thread of Starlette's, where functions run that are not asynchronous."""
        seen = self.seen(connection.scope)
        if seen is None:
            return None
        ticket, rule, keeper = seen
        if rule.body_fields or self.guard.awaited(keeper):
            anyio.from_thread.run(charge, self.guard, ticket, rule, keeper, connection)
        elif run(self.guard.charge(ticket, rule), keeper.ask):
            raise refused(ticket, rule, connection)
        return _ours(ticket)


def _ours(ticket: Ticket) -> OwnTicket | None:
    if not isinstance(ticket, OwnTicket):
        return None
    CURRENT.set(ticket)
    if ticket.is_watched:
        return None
    return ticket


def _connection(args: Sequence[Any], kwargs: Mapping[str, Any]) -> HTTPConnection:
    """The request that a function is called with, or that the middleware knows of. Raises RuntimeError."""
    for one in (*args, *kwargs.values()):
        if isinstance(one, HTTPConnection):
            return one
    ticket = CURRENT.get()
    if ticket is None or ticket.native is None:
        raise RuntimeError(_NO_REQUEST)
    connection = _made(ticket.native, _no_messages, _no_messages)
    if ticket.sent == 101 and isinstance(connection, WebSocket):
        connection.application_state = WebSocketState.CONNECTED
    return connection


async def _no_messages(*message: Message) -> Any:
    raise RuntimeError("limit: a key of the body's fields needs a parameter for the request")


def _made(scope: Any, receive: Receive, send: Send) -> HTTPConnection:
    return Request(scope, receive, send) if scope["type"] == "http" else WebSocket(scope, receive, send)


def _function(function: Any, post: _Post) -> Any:
    plain = inspect.unwrap(_whole(function))
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError("limit: expected no generator function: its body runs when it is iterated, not when called")
    if inspect.iscoroutinefunction(plain):

        @functools.wraps(function)
        async def limited_async(*args: Any, **kwargs: Any) -> Any:
            connection = _connection(args, kwargs)
            ticket = await post.admit(connection)
            if ticket is None:
                return await function(*args, **kwargs)
            if isinstance(connection, WebSocket):
                return await _session(ticket, function(*args, **kwargs))
            try:
                return _told(ticket, await function(*args, **kwargs))
            except BaseException as error:
                await _broken(ticket, error)
                raise

        return limited_async

    @functools.wraps(function)
    def limited_sync(*args: Any, **kwargs: Any) -> Any:
        ticket = post.admit_in_thread(_connection(args, kwargs))
        if ticket is None:
            return function(*args, **kwargs)
        try:
            return _told(ticket, function(*args, **kwargs))
        except BaseException as error:
            if ticket.is_open:
                anyio.from_thread.run(_broken, ticket, error)
            raise

    return limited_sync


def _told(ticket: OwnTicket, response: Any) -> Any:
    """A response that tells of a ticket that no middleware sees, and ends it."""
    if isinstance(response, Response):
        ticket.tell(response)
    if not ticket.is_open:
        ticket.native = None  # scope and ticket hold each other: the cycle would wait for the collector
        return response
    stack = ticket.native.get("fastapi_inner_astack")
    if stack is not None:  # FastAPI wants a response of its own kind
        ticket.is_watched = True
        ticket.status = getattr(response, "status_code", None)
        stack.push_async_exit(ticket.end)
        return response
    return _Ended(ticket, response)


async def _broken(ticket: OwnTicket, error: BaseException) -> None:
    if isinstance(error, HTTPException):
        tell_error(ticket, error)
    await ticket.end(type(error), error, None)


async def _session(ticket: OwnTicket, session: Any) -> Any:
    """A WebSocket, for as long as its function runs."""
    ticket.is_watched = True
    try:
        return await session
    finally:
        ticket.sent, ticket.ended = 101, True
        await ticket.keeper.afinish(ticket)
        ticket.native = None


async def watch(ticket: OwnTicket, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run an application to the end of its response, and end the ticket."""
    ticket.is_watched = ticket.is_seen = True
    ticket.outgoing = send
    try:
        await app(scope, receive, ticket.forward)
    except HTTPException as error:
        ticket.sent, ticket.ended = error.status_code, True  # which some handler will answer
        raise
    except ClientDisconnect:  # nobody is there to be answered
        raise
    except Exception:
        ticket.sent = 500
        raise
    finally:
        if ticket.is_open:
            await ticket.keeper.afinish(ticket)
        # Scope and ticket, and tickets that stand within one another, hold each other.
        ticket.native = ticket.outgoing = None


class _Ended:
    """A response whose end is awaited. Whoever looks at it sees the response."""

    def __init__(self, ticket: OwnTicket, response: Any) -> None:
        self._ticket = ticket
        self._response = response

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await watch(self._ticket, self._response, scope, receive, send)


class _Limited:
    """An application of its own, limited as a whole."""

    def __init__(self, app: ASGIApp, post: _Post) -> None:
        self.app = app
        self._post = post

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _serve(self._post, self.app, scope, receive, send)


async def _serve(post: _Post, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] not in ("http", "websocket"):
        await app(scope, receive, send)
        return
    connection = _made(scope, receive, send)
    try:
        ticket = await post.admit(connection)
    except (RateLimited, WebSocketLimited) as error:
        if "starlette.exception_handlers" in scope:
            raise
        response = await limited_handler(connection, error)
        if response is not None:
            await response(scope, receive, send)
        return
    if hasattr(connection, "_body"):
        receive = _again(cast(Request, connection), receive)
    if ticket is None:
        await app(scope, receive, send)
    else:
        await watch(ticket, app, scope, receive, send)


def _again(request: Request, receive: Receive) -> Receive:
    """What gives the body that was read for a key, and then what else comes."""
    body = [request._body]

    async def receive_again() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        return await receive()

    return receive_again


def _class(endpoint: Any, post: _Post) -> Any:
    """An HTTPEndpoint, or WebSocketEndpoint, all of whose requests are limited together."""
    original = getattr(endpoint, "dispatch", None)
    if original is None or not inspect.iscoroutinefunction(original):
        raise TypeError("limit: expected a class with `dispatch`, as HTTPEndpoint has; or decorate its methods")

    @functools.wraps(original)
    async def dispatch(self: Any) -> None:
        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            self.receive, self.send = receive, send
            await original(self)

        await _serve(post, inner, self.scope, self.receive, self.send)

    endpoint.dispatch = dispatch
    return endpoint
