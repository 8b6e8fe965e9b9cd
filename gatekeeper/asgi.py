"""The gate as ASGI middleware: `GatekeeperMiddleware(app, settings)`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

from gatekeeper.commands import arun, run
from gatekeeper.decorators import CURRENT
from gatekeeper.errors import Limited
from gatekeeper.gate import Refusal, Ticket
from gatekeeper.http.message import ScopeRequest
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import Settings

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY_VIOLATION = 1008
"""The close code of a WebSocket that a limit ends (RFC 6455, 7.4.1)."""


class GatekeeperMiddleware:
    """Limits requests and WebSocket handshakes before the application sees them.

    - `settings`: a mapping, the path of a TOML file, Settings, or a Gatekeeper that others share.

    The request's Ticket is in `scope["gatekeeper"]`. Raises SettingsError when the settings are wrong.
    """

    def __init__(self, app: App, settings: Gatekeeper | Settings | Mapping[str, Any] | str | Path) -> None:
        self.app = app
        # Who makes the keeper closes it.
        self._owns = not isinstance(settings, Gatekeeper)
        self.keeper = settings if isinstance(settings, Gatekeeper) else Gatekeeper(settings)
        self._finishing: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await (self._lifespan if kind == "lifespan" else self.app)(scope, receive, send)
            return
        keeper = self.keeper
        gate = keeper.gate
        if "gatekeeper" in scope and scope["gatekeeper"].gate is gate:
            await self.app(scope, receive, send)  # the same policy stands around us already
            return
        request = ScopeRequest(scope)
        steps = gate.admit(request)
        ticket = await arun(steps, keeper.aask) if keeper.awaits else run(steps, keeper.ask)
        if ticket.status:
            if kind == "websocket":
                await receive()  # websocket.connect
            await _refuse(scope, send, gate.refusal(ticket))
            return
        scope["gatekeeper"] = ticket
        exchange = _Exchange(ticket, scope, send)
        token = CURRENT.set(ticket) if keeper.decorates else None
        try:
            await self.app(scope, receive, exchange.send)
        except Limited as limited:
            if not exchange.replaced:
                await exchange.limited(limited)
        except Exception:
            exchange.status = exchange.status or 500
            raise
        finally:
            if token is not None:
                CURRENT.reset(token)
            if ticket.is_open:
                await self._finish(ticket, exchange.outcome())
            request.native = None  # scope and ticket held each other: the cycle would wait for the collector

    async def _finish(self, ticket: Ticket, status: int | None) -> None:
        keeper = self.keeper
        steps = keeper.gate.finish(ticket, status)
        if not keeper.awaits:
            run(steps, keeper.ask)
            return
        # In a task that was cancelled an await is lost, so this is a task of its own.
        task = asyncio.ensure_future(arun(steps, keeper.aask))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        await asyncio.shield(task)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def observe(message: Message) -> None:
            if self._owns and message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self.keeper.aclose()
            await send(message)

        await self.app(scope, receive, observe)


class _Exchange:
    """What the application sends, on its way out; and what became of it."""

    __slots__ = ("_scope", "_send", "_ticket", "ended", "replaced", "status")

    def __init__(self, ticket: Ticket, scope: Scope, send: Send) -> None:
        self._ticket = ticket
        self._scope = scope
        self._send = send
        self.status = 0  # until the head of a response was sent
        self.ended = False
        self.replaced = False

    def send(self, message: Message) -> Awaitable[None]:
        # Not a coroutine: it returns the server's, so that a message costs no second one.
        kind = message["type"]
        if self.replaced:
            return _nothing()
        if kind == "http.response.body":
            self.ended = not message.get("more_body", False)
        elif kind == "http.response.start" or kind == "websocket.accept":
            ticket = self._ticket
            self.status = message.get("status", 101)
            if ticket.status and self.status >= 500:
                # The application took a decorator's refusal for a fault of its own; we know better.
                return self._replace(ticket.gate.refusal(ticket))
            fields = ticket.gate.respond(ticket)
            if fields:
                # Copied: the message may be one that the application sends again and again.
                message = dict(message, headers=[*message.get("headers", ()), *fields])
        elif kind == "websocket.close":
            self.ended = True
            self.status = self.status or 403
        return self._send(message)

    def outcome(self) -> int | None:
        """The status, or None if the client left before the end."""
        if self.status >= 500 or self._scope["type"] == "websocket":
            return self.status or None
        return self.status if self.ended else None

    async def limited(self, limited: Limited) -> None:
        """A decorator's refusal reached us: it is the answer, if none was begun."""
        if not self.status:
            await self._replace(self._ticket.gate.refusal(self._ticket, limited.verdict))
        elif self._scope["type"] == "websocket" and not self.ended:
            await self._send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            raise limited

    async def _replace(self, refusal: Refusal) -> None:
        self.status = refusal.status
        self.replaced = self.ended = True
        await _refuse(self._scope, self._send, refusal)


async def _nothing() -> None:
    pass


async def _refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    prefix = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})  # the server answers a bare 403
            return
        prefix = "websocket.http.response"
    await send({"type": f"{prefix}.start", "status": refusal.status, "headers": refusal.fields})
    body = b"" if scope.get("method") == "HEAD" else refusal.body
    await send({"type": f"{prefix}.body", "body": body})
