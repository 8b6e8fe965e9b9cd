"""Sessions in Starlette and FastAPI: a middleware with the arguments of Starlette's own, and a dependency."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gatekeeper import Gatekeeper, SettingsError, StoreError
from gatekeeper.commands import anobody, arun
from gatekeeper.http.message import ScopeRequest
from gatekeeper.keys import Key, Ring
from gatekeeper.sessions.cookies import Cookie
from gatekeeper.sessions.flow import Sessions, TokenSessions
from gatekeeper.sessions.state import Session as State
from gatekeeper.settings import Settings
from gatekeeper.user_sessions import session_tokens

LONGEST_LIFE: Final = 365 * 86_400
"""The seconds that a session lives at most, however much it is used, where `max_age` does not say more."""

_HEADS: Final = frozenset(["http.response.start", "websocket.accept", "websocket.http.response.start"])
_LOG: Final = logging.getLogger("gatekeeper")


class SessionMiddleware:
    """`request.session`, with the arguments of Starlette's own SessionMiddleware.

    - `secret_key`: a text of 32 bytes or more; the session is a signed token in the cookie, as it is there
    - `settings`: a mapping, the path of a TOML file, or Settings, whose `[session]` says all of that instead: also
      for sessions in a store, which is closed when the application shuts down
    - `keeper`: a Gatekeeper in their place, that others share
    - `max_age`: seconds that a session lives which is not used; None: as long as the browser is open
    - `session_cookie`, `path`, `same_site`, `https_only`, `domain`, `partitioned`: of the cookie

    Inside a GatekeeperMiddleware whose settings have a `[session]` it is that session, and no argument is needed.
    It is loaded before the application is called, if a cookie came. Beyond Starlette's: what changes within a list
    or a dictionary is kept, too; `session.rotate()` gives it a new id; a WebSocket may change it.

    Raises KeyRingError for a secret that is too short, or none; SettingsError for settings that are wrong, and for
    a cookie that browsers drop.
    """

    def __init__(
        self,
        app: ASGIApp,
        secret_key: Any = None,
        session_cookie: str = "session",
        max_age: int | None = 14 * 24 * 60 * 60,
        path: str = "/",
        same_site: Literal["lax", "strict", "none"] = "lax",
        https_only: bool = False,
        domain: str | None = None,
        partitioned: bool = False,
        *,
        settings: Settings | Mapping[str, Any] | str | Path | None = None,
        keeper: Gatekeeper | None = None,
    ) -> None:
        self.app = app
        self._flow: Sessions | None = None
        self._owned: Gatekeeper | None = None  # who makes the keeper closes it
        if sum(given is not None for given in (secret_key, settings, keeper)) > 1:
            raise SettingsError(["expected one of secret_key, settings and keeper"])
        if settings is not None:
            keeper = self._owned = Gatekeeper(settings)
        if keeper is not None:
            if keeper.sessions is None:
                raise SettingsError(["session: expected a [session] in the settings"])
            self._flow = keeper.sessions.flow
        elif secret_key is not None:
            secret = str(secret_key).encode()
            # As Gatekeeper's settings do: the id is the same in each process.
            ring = Ring([Key(hashlib.sha256(b"gatekeeper-kid" + secret).hexdigest()[:8], "HS256", secret)])
            life = LONGEST_LIFE if max_age is None else max(max_age, LONGEST_LIFE)
            cookie = Cookie(
                session_cookie, path, domain, https_only, True, same_site, partitioned, max_age is not None
            )
            if cookie.misfit is not None:
                raise SettingsError(
                    [f"session_cookie: {cookie.misfit}; else browsers drop the cookie (https_only makes it secure)"]
                )
            self._flow = TokenSessions(
                session_tokens(ring, longest=life),
                cookie=cookie,
                idle=life if max_age is None else max_age,
                absolute=life,
                store=None,
                clock=time.time,
                draw=os.urandom,
                warn=_LOG.warning,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._lifespan(scope, receive, send)
            return
        outer = scope.get("session")
        if isinstance(outer, State):
            if outer.came:
                await outer.aload()
            await self.app(scope, receive, send)
            return
        if self._flow is None:
            raise SettingsError(
                ["secret_key: expected one, or a GatekeeperMiddleware with a [session] around this"]
            )
        await _Request(self._flow, scope, send).answer(self.app, receive)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def observe(message: Message) -> None:
            if self._owned and message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self._owned.aclose()
            await send(message)

        await self.app(scope, receive, observe)


class _Request:
    """A request whose session is this middleware's own."""

    def __init__(self, flow: Sessions, scope: Scope, send: Send) -> None:
        self._flow = flow
        self._scope = scope
        self._send = send
        self._is_begun = False
        self._session = scope["session"] = flow.open(ScopeRequest(scope), blocking=False)

    async def answer(self, app: ASGIApp, receive: Receive) -> None:
        session = self._session
        try:
            if session.came:
                await session.aload()
            await app(self._scope, receive, self.forward)
        except StoreError:
            if self._is_begun or session.failure is None or self._scope["type"] != "http":
                raise
            refusal = PlainTextResponse(
                "Service Unavailable", 503, {"retry-after": "1", "cache-control": "no-store"}
            )
            await refusal(self._scope, receive, self._send)
        finally:
            if self._scope["type"] == "websocket":
                await arun(self._flow.keep(session), anobody)

    async def forward(self, message: Message) -> None:
        if message["type"] in _HEADS:
            fields = await arun(self._flow.save(self._session), anobody)
            self._is_begun = True
            if fields:
                message = {**message, "headers": [*message.get("headers", ()), *fields]}
        await self._send(message)


async def current_session(connection: HTTPConnection) -> State:
    """The session of a request or a WebSocket, loaded: what the dependency `Session` gives.

    Raises SettingsError where no middleware has opened one.
    """
    session = connection.scope.get("session")
    if not isinstance(session, State):
        raise SettingsError(["session: expected a GatekeeperMiddleware with a [session], or a SessionMiddleware"])
    return await session.aload()


try:
    from fastapi import Depends
except ImportError:  # Starlette alone has no dependencies
    Session = State
else:
    Session = Annotated[State, Depends(current_session)]  # type: ignore[assignment, misc]
