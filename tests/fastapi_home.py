"""FastAPI and Starlette as homes of the scenario table: the middleware in an application with routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from gatekeeper import Gatekeeper
from gatekeeper.asgi import App, Message
from gatekeeper.commands import Store
from gatekeeper_fastapi import GatekeeperMiddleware
from tests.scenarios import Answer, Ask, Response

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]


async def page(request: Request) -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        yield b"o"
        yield b"k"

    status, sent = int(request.headers.get("x-answer", "200")), await request.body()
    if len(sent) != int(request.headers.get("x-length", len(sent))):
        status = 418
    response = StreamingResponse(body(), status)
    response.headers.append("set-cookie", "a=1")
    response.headers.append("set-cookie", "b=2")
    if "x-say-cost" in request.headers:
        response.headers["X-Cost"] = request.headers["x-say-cost"]
    return response


@contextmanager
def fastapi(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    app = FastAPI(openapi_url=None)
    app.add_api_route("/{path:path}", page, methods=METHODS)
    app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper(settings, store=store))
    yield lambda ask: asyncio.run(answer(app, ask))


@contextmanager
def starlette(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    app = Starlette(routes=[Route("/{path:path}", page, methods=METHODS)])
    app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper(settings, store=store))
    yield lambda ask: asyncio.run(answer(app, ask))


async def answer(app: App, ask: Ask) -> Response:
    """Ask an application, as a server would that speaks ASGI 3 with the spec 2.4."""
    path, _, query = ask.raw.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http",
        "method": ask.method,
        "root_path": "",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in ask.headers],
        "client": None if ask.peer is None else (ask.peer, 1234),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[Message] = []

    pieces = [ask.body[at : at + 9000] for at in range(0, len(ask.body), 9000)] or [b""]

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *bodies = sent
    assert start["type"] == "http.response.start"
    assert {message["type"] for message in bodies} == {"http.response.body"}
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
    body = (
        b"" if ask.method == "HEAD" else b"".join(message.get("body", b"") for message in bodies)
    )  # as servers do
    return Response(start["status"], headers, body)
