"""The ticket of a request where no middleware has made one, and what becomes of it."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import cache, partial
from typing import Any, Final, cast
from weakref import ref

from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Message, Send
from starlette.websockets import WebSocket, WebSocketState

from gatekeeper.commands import Body, arun, run
from gatekeeper.decorators import Guard, limited
from gatekeeper.errors import Limited
from gatekeeper.gate import Gate
from gatekeeper.http.bodies import is_longer
from gatekeeper.http.fields import Fields
from gatekeeper.http.message import ScopeRequest
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.ticket import Refusal, Ticket

_OF_A_BODY: Final = (b"content-type", b"content-length")


class OwnTicket(ScopeRequest, Ticket):
    """A ticket that no middleware sees: whoever makes it tells the client, and ends it."""

    response: Response | None = None
    """What FastAPI takes fields from for responses that it makes itself."""

    keeper: Gatekeeper
    is_watched = False  # whether its end is awaited
    is_seen = False  # whether what is sent for it passes us, so that nobody else need tell the client
    status: int | None = None  # of the response, where it is known before it is sent
    outgoing: Send | None = None  # where what is sent goes on to

    def forward(self, message: Message) -> Awaitable[None]:
        """What is sent, on its way out, where it passes us."""
        # Not a coroutine: it returns the server's, so that a message costs no second one.
        kind = message["type"]
        if kind == "http.response.body":
            if self.is_open:
                self.ended = not message.get("more_body", False)
                self.moved += len(message.get("body", b""))
        elif kind == "http.response.start":
            self.sent = message["status"]
            fields = self.gate.respond(self)
            if fields:
                headers = list(message.get("headers", ()))
                if fields[0][0] in dict(headers):  # a refusal's, or those of a Response that was sent before
                    tell(headers, fields)
                else:
                    headers += fields
                message = {**message, "headers": headers}
        elif kind == "websocket.accept":
            self.sent, self.ended = 101, True
        elif kind == "http.response.pathsend":  # a body that the server reads by itself
            self.ended = True
        return self.outgoing(message)  # type: ignore[misc]  # it is there as long as anything is sent

    def tell(self, response: Response) -> None:
        """Put the fields of this ticket on a response, in the place of earlier ones."""
        tell(response.raw_headers, self.gate.respond(self))

    async def end(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """An exit of FastAPI's stack for the request: the response was sent, or something broke it off."""
        if error is None:
            self.ended = True
            self.sent = self.sent or self.status or (self.response is not None and self.response.status_code) or 200
        elif isinstance(error, HTTPException):
            self.ended, self.sent = True, error.status_code
        elif isinstance(error, Exception) and not isinstance(error, ClientDisconnect):
            # A handler of the application's own may make anything of it; FastAPI's makes 422 of what is invalid.
            self.sent = 422 if type(error).__name__ == "RequestValidationError" else 500
            self.ended = self.sent == 422
        await self.keeper.afinish(self)
        self.native = None
        return False


def tell(headers: list[tuple[bytes, bytes]], fields: Fields) -> None:
    """Put fields on a response, in the place of earlier ones: it may be one that is sent again and again."""
    if headers and fields:
        names = {name for name, _ in fields}
        headers[:] = [field for field in headers if field[0] not in names]
    headers += fields


def tell_error(ticket: OwnTicket, error: HTTPException) -> None:
    """Put the fields of a ticket on the response that will be made of an error."""
    if not isinstance(error, Limited):
        fields = {name.decode(): value.decode() for name, value in ticket.gate.respond(ticket)}
        error.headers = {**(error.headers or {}), **fields}


@cache
def default_keeper() -> Gatekeeper:
    """The Gatekeeper of this process where nobody has made one: it counts in memory, by the client's address."""
    return Gatekeeper({})


def keeper_for(scope: Any) -> Gatekeeper:
    """`app.state.gatekeeper`, or else the process's own. Raises TypeError if it is something else."""
    state = getattr(scope.get("app"), "state", None)
    if state is not None:
        # For each request: that an attribute is not there would else take longer to find out than all the rest.
        held = getattr(state, "_state", None)
        keeper = held.get("gatekeeper") if isinstance(held, dict) else getattr(state, "gatekeeper", None)
        if keeper is not None:
            if not isinstance(keeper, Gatekeeper):
                raise TypeError(f"app.state.gatekeeper: expected a Gatekeeper, not {type(keeper).__name__}")
            return keeper
    return default_keeper()


def ticket_for(scope: Any, keeper: Gatekeeper | None) -> Ticket:
    """The request's ticket of a Gatekeeper; of the middleware's if none is given. Made if there is none."""
    around: Ticket | None = scope.get("gatekeeper")
    if keeper is None:
        ticket = around
        while ticket is not None and isinstance(ticket, OwnTicket):
            ticket = ticket.outer
        if ticket is not None and _is_for(ticket, scope):
            return ticket
        keeper = keeper_for(scope) if ticket is None else cast(Gate, ticket.gate).keeper
    if around is not None:
        ticket = around.under(keeper.gate)
        if ticket is not None and _is_for(ticket, scope):
            return ticket
    made = scope["gatekeeper"] = new_ticket(scope, keeper)
    made.outer = around
    return made


def _is_for(ticket: Ticket, scope: Any) -> bool:
    """Whether a ticket is of the request of a scope.

    Middleware hands copies of a scope on. But a copy for another path is another request: one that an endpoint
    makes of its own application.
    """
    native = ticket.native
    return native is scope or (
        native is not None and ticket.path == scope["path"] and ticket.method == scope.get("method", "GET").upper()
    )


def new_ticket(scope: Any, keeper: Gatekeeper) -> OwnTicket:
    made = OwnTicket(scope)
    made.keeper = keeper
    # On the instance, for what only its class has takes longer to read.
    made.rules, made.spared, made.response = (), False, None
    keeper.gate.identify(made)
    return made


async def charge(guard: Guard, ticket: Ticket, rule: Rule, keeper: Gatekeeper, connection: HTTPConnection) -> None:
    """Charge a request. Raises what refuses it."""
    if keeper.awaits or rule.asks:
        steps = guard.charge(ticket, rule)
        status = await arun(steps, keeper.aask, partial(body_of, connection))
    else:
        status = run(guard.charge(ticket, rule), keeper.ask)
    if status:
        raise refused(ticket, rule, connection)


class RateLimited(Limited, HTTPException):
    """A request was refused: an HTTPException of Starlette's, so that handlers of those know what to do.

    - `status_code`: 429; or 503 where a store does not answer and the rule denies, 413 or 400 for a body that could
      not be read for its key
    - `headers`: Retry-After and the RateLimit fields (those that no middleware will add)
    - `verdict`: the limit, and how long to wait
    - `refusal`: the whole answer as Gatekeeper gives it, of which `limited_handler` makes the response
    """

    def __init__(self, ticket: Ticket, rule: Rule) -> None:
        self.verdict = limited(ticket, rule).verdict
        self.refusal = refusal_of(ticket)
        fields = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self.refusal.fields
            if name.lower() not in _OF_A_BODY
        ]
        HTTPException.__init__(self, self.refusal.status, headers=dict(fields))
        _send_along(self, ticket)


class WebSocketLimited(Limited, WebSocketException):
    """A WebSocket was refused, or has to end, and no status can be sent: it is closed with `code`."""

    def __init__(self, ticket: Ticket, rule: Rule) -> None:
        self.verdict = limited(ticket, rule).verdict
        WebSocketException.__init__(self, ticket.gate.close_code, "Too many requests.")
        _send_along(self, ticket)


def refused(ticket: Ticket, rule: Rule, connection: HTTPConnection) -> Limited:
    """The exception that refuses a request or a handshake, or ends a WebSocket."""
    if isinstance(connection, WebSocket) and _is_bare(connection):
        return WebSocketLimited(ticket, rule)
    return RateLimited(ticket, rule)


def _is_bare(connection: WebSocket) -> bool:
    """Whether no response can be sent on a WebSocket: it was accepted, or its server knows no way."""
    extensions = connection.scope.get("extensions") or {}
    return (
        connection.application_state is not WebSocketState.CONNECTING or "websocket.http.response" not in extensions
    )


def _send_along(error: Limited, ticket: Ticket) -> None:
    """Let the policies around know the error, to tell it from a fault, as long as it is on its way to them."""
    around: Ticket | None = ticket
    while around is not None:
        around.limited = ref(error)
        around = around.outer


def refusal_of(ticket: Ticket, error: Limited | None = None) -> Refusal:
    """The answer to a refused request, without the fields that the middleware will add."""
    refusal: Refusal = ticket.gate.refusal(ticket, None if error is None else error.verdict)
    if isinstance(ticket, OwnTicket):
        return refusal
    added = ticket.gate.respond(ticket)
    return refusal._replace(fields=[field for field in refusal.fields if field not in added])


async def limited_handler(connection: Any, error: Exception) -> Any:
    """An exception handler that answers refusals as the middleware does: a problem document, or plain text.

    `app.add_exception_handler(RateLimited, limited_handler)`; or for `Limited`, which is also what functions under
    `@gk.limit` raise.
    """
    if not isinstance(error, Limited):
        raise error
    scope = connection.scope
    if isinstance(error, RateLimited):
        refusal = error.refusal
    else:
        ticket = ticket_for(scope, None)
        if isinstance(connection, WebSocket) and (isinstance(error, WebSocketLimited) or _is_bare(connection)):
            await connection.close(ticket.gate.close_code)
            return None
        refusal = refusal_of(ticket, error)
    is_head = scope.get("method") == "HEAD"
    response = Response(b"" if is_head else refusal.body, refusal.status)
    response.raw_headers = list(refusal.fields)
    return response


async def body_of(request: HTTPConnection, most: int) -> Body:
    """The body of a request, which Starlette keeps for the endpoint; None if it is longer than `most` bytes.

    Of a form that FastAPI has parsed nothing else is left.
    """
    if not isinstance(request, Request):
        return b""  # a WebSocket
    if getattr(request, "_form", None) is not None:
        form = await request.form()  # the same again
        return {name: [value for value in form.getlist(name) if isinstance(value, str)] for name in form}
    if is_longer(request.headers.get("content-length", ""), most):
        return None
    # A server may leave it a length that Transfer-Encoding has made untrue (RFC 9112, 6.3): what comes is counted.
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            return None
    request._body = bytes(body)  # as `body()` does, which has no bound
    return request._body
