"""The gate as ASGI middleware: `GatekeeperMiddleware(app, settings)`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gatekeeper.commands import anobody, arun, run
from gatekeeper.decorators import CURRENT, IN_USE
from gatekeeper.errors import Limited, StoreError
from gatekeeper.http.fields import Fields
from gatekeeper.http.message import ScopeRequest
from gatekeeper.keeper import Gatekeeper
from gatekeeper.ratelimit.rules import Rule
from gatekeeper.settings import Settings, parameters
from gatekeeper.ticket import Refusal, Ticket

if TYPE_CHECKING:
    from gatekeeper.sessions.flow import Sessions
    from gatekeeper.sessions.state import Session

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_OF_REFUSALS = frozenset([b"retry-after", b"cache-control"])
# What Starlette, and uvicorn, raise where the client has left before all was sent: no fault of the application's.
_OF_CLIENTS = frozenset(["ClientDisconnect", "ClientDisconnected"])
_OTHER_HEADS = frozenset(["websocket.accept", "websocket.http.response.start"])


class GatekeeperMiddleware:
    """Limits requests and WebSocket handshakes before the application sees them.

    - `settings`: a mapping, the path of a TOML file, Settings, or a Gatekeeper that others share.

    The request's Ticket is in `scope["gatekeeper"]`. Raises SettingsError when the settings are wrong, TypeError
    for a WSGI application.
    """

    def __init__(self, app: App, settings: Gatekeeper | Settings | Mapping[str, Any] | str | Path) -> None:
        if "start_response" in parameters(app):
            raise TypeError(
                "app: expected an ASGI application; for WSGI: from gatekeeper.wsgi import GatekeeperMiddleware"
            )
        self.app = app
        # Who makes the keeper closes it.
        self._owns = not isinstance(settings, Gatekeeper)
        self.keeper = settings if isinstance(settings, Gatekeeper) else Gatekeeper(settings)
        self.keeper.require(awaiting=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await (self._lifespan if kind == "lifespan" else self.app)(scope, receive, send)
            return
        keeper = self.keeper
        gate = keeper.gate
        ticket = _Ticket(scope)
        ticket.outgoing = send
        if "gatekeeper" in scope:
            ticket.outer = scope["gatekeeper"]
            if ticket.outer.under(gate) is not None:
                await self.app(scope, receive, send)  # the same policy stands around us already
                return
        loading = self._begin(gate.sessions, ticket) if gate.sessions is not None else None
        if keeper.awaits or gate.reads_body:
            ticket.incoming = receive
            ticket.refused = await arun(gate.admit(ticket), keeper.aask, ticket.read)
            if ticket.replay:
                receive = ticket.receive
        else:
            ticket.refused = gate.admit_at_once(ticket, keeper.ask)
        if ticket.refused:
            if loading is not None:
                loading.cancel()
            if kind == "websocket":
                await receive()  # websocket.connect
            await _refuse(scope, send, gate.refusal(ticket), gate.close_code)
            return
        scope["gatekeeper"] = ticket
        if ticket.session is not None:
            scope["session"] = ticket.session
        if kind == "websocket" and (rules := gate.message_rules(ticket)):
            ticket.incoming = receive
            receive = _Messages(keeper, ticket, rules).receive
        token = CURRENT.set(ticket) if IN_USE else None
        try:
            if loading is not None:
                await loading
            await self.app(scope, receive, ticket.forward)
        except Limited as limited:
            if not ticket.replaced:
                await ticket.refuse(limited)
        except StoreError:
            if ticket.sent or ticket.session is None or ticket.session.failure is None:
                ticket.sent = 500
                raise
            ticket.refused = 503
            await ticket.replace(gate.refusal(ticket))
        except Exception as error:
            if type(error).__name__ not in _OF_CLIENTS:
                ticket.sent = 500
            raise
        finally:
            if token is not None:
                try:  # noqa: SIM105  # suppress() is three calls more for each request
                    CURRENT.reset(token)
                except ValueError:  # closed with its loop, and so not in its own context
                    pass
            if ticket.session is not None and ticket.sent == 101 and gate.sessions is not None:
                await arun(gate.sessions.keep(ticket.session), anobody)
            if ticket.is_open:
                await keeper.afinish(ticket)
            ticket.native = None  # scope and ticket held each other: the cycle would wait for the collector

    def _begin(self, sessions: Sessions, ticket: _Ticket) -> asyncio.Task[None] | None:
        """Open the session of a request. It is asked for together with the limits, if it is to be loaded early."""
        session = ticket.session = sessions.open(ticket, blocking=False)
        if not (session.came and sessions.early):
            return None
        return asyncio.ensure_future(_load(sessions, session))

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def observe(message: Message) -> None:
            if self._owns and message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self.keeper.aclose()
            await send(message)

        await self.app(scope, receive, observe)


class _Ticket(ScopeRequest, Ticket):
    """A ticket that what the application sends goes through, on its way out."""

    closed = False  # a WebSocket's close was sent
    replay: list[Message] = []  # noqa: RUF012  # never changed in place before `read` has made one of its own
    # what was read of the request before the application asked for it
    incoming: Receive
    """The server's `receive`."""

    outgoing: Send
    """The server's `send`."""

    def forward(self, message: Message) -> Awaitable[None]:
        # Not a coroutine: it returns the server's, so that a message costs no second one.
        kind = message["type"]
        if self.replaced:
            return _nothing()
        if kind == "http.response.body":
            if self.is_open:
                self.ended = not message.get("more_body", False)
                self.moved += len(message.get("body", b""))
        elif kind == "http.response.start" or kind in _OTHER_HEADS:
            if kind == "websocket.accept":
                self.sent, self.ended = 101, True
            else:
                self.sent = message["status"]
                if self.limited is not None and (limited := self.limited()) is not None:
                    if self.sent >= 500:
                        # The application took a decorator's refusal for a fault of its own; we know better.
                        return self.replace(self.gate.refusal(self, limited.verdict))
                    if self.sent == 429:
                        message = _with_missing(
                            message, self.gate.refusal(self, limited.verdict)
                        )  # in its own words
            if self.gate.reports:
                message = self._heed(message)
            fields = self.gate.respond(self)
            session = self.session
            if session is not None and session.is_loaded and not session.is_written:
                return self._saved(message, fields)
            if fields:
                message = _with(message, fields)
        elif kind == "websocket.close":
            self.sent, self.ended, self.closed = self.sent or 403, True, True
        elif kind != "http.response.trailers":  # the other ways of sending a body
            self.ended = not message.get("more_body", False)
        return self.outgoing(message)

    async def _saved(self, message: Message, fields: Fields) -> None:
        """Send the head of a response once the session is written."""
        assert self.session is not None
        refused = self.sent >= 500 and self.session.failure is not None  # the application took it for its own fault
        if not refused:
            try:
                fields = fields + await arun(self.gate.save(self), anobody)
            except StoreError:
                refused = True
        if refused:
            self.refused = 503
            await self.replace(self.gate.refusal(self))
        else:
            await self.outgoing(_with(message, fields) if fields else message)

    async def read(self, most: int) -> bytes | None:
        """The body, None if it is longer; the application is given it all the same."""
        body = bytearray()
        if self.native["type"] != "http":
            return b""
        more = True
        while more:
            message = await self.incoming()
            body += message.get("body", b"")
            if len(body) > most:
                return None
            more = message.get("more_body", False)
        # As one message: of a body that comes byte by byte the messages would take two hundred times its size.
        whole, left = bytes(body), message["type"] == "http.disconnect"
        self.replay = [{"type": "http.request", "body": whole, "more_body": left}]
        if left:
            self.replay.append(message)
        return whole

    async def receive(self) -> Message:
        """What was read already, then what comes."""
        if self.replay:
            return self.replay.pop(0)
        return await self.incoming()

    def _heed(self, message: Message) -> Message:
        """A response without the fields that tell us what it has cost."""
        kept = []
        for name, value in message.get("headers", ()):
            told = name.lower().decode("latin-1")
            if told in self.gate.reports:
                self.gate.report(self, told, value.decode("latin-1"))
            else:
                kept.append((name, value))
        return {**message, "headers": kept}

    async def refuse(self, limited: Limited) -> None:
        """A decorator's refusal reached us: it is the answer, if none was begun."""
        if not self.sent:
            await self.replace(self.gate.refusal(self, limited.verdict))
        elif self.sent == 101 and not self.closed:
            await self.outgoing({"type": "websocket.close", "code": self.gate.close_code})
        else:
            raise limited

    async def replace(self, refusal: Refusal) -> None:
        self.sent = refusal.status
        self.replaced = self.ended = True
        await _refuse(self.native, self.outgoing, refusal, self.gate.close_code)


class _Messages:
    """The messages that a client sends within a WebSocket, each charged before the application sees it."""

    def __init__(self, keeper: Gatekeeper, ticket: _Ticket, rules: tuple[Rule, ...]) -> None:
        self._keeper = keeper
        self._ticket = ticket
        self._rules = rules

    async def receive(self) -> Message:
        ticket, keeper = self._ticket, self._keeper
        message = await ticket.receive()
        if message["type"] != "websocket.receive" or ticket.replaced:
            return message
        steps = ticket.gate.message(ticket, self._rules)
        if keeper.awaits:
            allowed = await arun(steps, keeper.aask)
        else:
            allowed = run(steps, keeper.ask)
        if allowed:
            return message
        # To the application it is as if the client had left; what it still sends goes nowhere.
        ticket.closed = ticket.replaced = True
        code = ticket.gate.close_code
        await ticket.outgoing({"type": "websocket.close", "code": code})
        return {"type": "websocket.disconnect", "code": code}


def _with(message: Message, fields: Fields) -> Message:
    """The head of a response with more fields. A copy: the application may send the same message again."""
    return {**message, "headers": [*message["headers"], *fields] if "headers" in message else fields}


def _with_missing(message: Message, refusal: Refusal) -> Message:
    """The head of an answer to a refused request, with the fields that each refusal has."""
    there = {name.lower() for name, _ in message.get("headers", ())}
    missing = [field for field in refusal.fields if field[0] in _OF_REFUSALS and field[0] not in there]
    return _with(message, missing)


async def _load(sessions: Sessions, session: Session) -> None:
    if not session.is_coming:  # a rule that needs its user has asked for it
        await arun(sessions.load(session), anobody)


async def _nothing() -> None:
    pass


async def _refuse(scope: Scope, send: Send, refusal: Refusal, close_code: int) -> None:
    prefix = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": close_code})  # the server answers a bare 403
            return
        prefix = "websocket.http.response"
    await send({"type": f"{prefix}.start", "status": refusal.status, "headers": refusal.fields})
    body = b"" if scope.get("method") == "HEAD" else refusal.body
    await send({"type": f"{prefix}.body", "body": body})
