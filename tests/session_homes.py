"""A bare ASGI and a bare WSGI application that do the same with their sessions, for servers to import.

Their settings are the JSON in the variable SESSION_HOME.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl

from gatekeeper.asgi import GatekeeperMiddleware as Asgi
from gatekeeper.asgi import Receive, Scope, Send
from gatekeeper.sessions.state import Session
from gatekeeper.wsgi import GatekeeperMiddleware as Wsgi

SETTINGS: dict[str, Any] = json.loads(os.environ.get("SESSION_HOME", "{}"))


def done(path: str, query: str, session: Session) -> bytes:
    """What a path does with the session; the body."""
    if path in ("/untouched", "/ready"):
        return b"{}"
    if path == "/write":
        session.update(parse_qsl(query))
    elif path == "/append":
        session.setdefault("cart", []).append("apple")
    elif path == "/end":
        session.end()
    elif path == "/fails":
        session["failed"] = True
        raise RuntimeError("the application fails")
    return json.dumps(dict(session)).encode()


async def asgi_app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    path, session = scope["path"], scope["session"]
    if path not in ("/untouched", "/ready", "/at-once"):
        await session.aload()
    if path == "/stream":
        session["early"] = True
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        session["late"] = True
        await send({"type": "http.response.body", "body": b"two"})
        return
    body = done(path, scope["query_string"].decode(), session)
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def wsgi_app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    path, session = environ["PATH_INFO"], environ["gatekeeper.session"]
    if path == "/stream":

        def pieces() -> Iterable[bytes]:
            session["early"] = True
            start_response("200 OK", [])
            yield b"one"
            session["late"] = True
            yield b"two"

        return pieces()
    body = done(path, environ.get("QUERY_STRING", ""), session)
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


if SETTINGS:
    asgi = Asgi(asgi_app, SETTINGS)
    wsgi = Wsgi(wsgi_app, SETTINGS)
