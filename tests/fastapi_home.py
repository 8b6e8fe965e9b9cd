"""FastAPI and Starlette as homes of the scenario table: the middleware in an application with routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from gatekeeper import Gatekeeper
from gatekeeper.commands import Store
from gatekeeper_fastapi import GatekeeperMiddleware
from tests.scenarios import Answer
from tests.servers import ask_asgi

A, B = ("192.0.2.1", 1), ("198.51.100.2", 2)
"""Two clients, as their server knows them."""

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]


async def page(request: Request) -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        if request.method != "HEAD":
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
    yield lambda ask: asyncio.run(ask_asgi(app, ask))


@contextmanager
def starlette(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    app = Starlette(routes=[Route("/{path:path}", page, methods=METHODS)])
    app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper(settings, store=store))
    yield lambda ask: asyncio.run(ask_asgi(app, ask))


def ask(app: Any, *paths: str, client: tuple[str, int] = A, method: str = "GET", **more: Any) -> list[int]:
    """The statuses of requests, one after another."""
    asking = TestClient(app, client=client, raise_server_exceptions=False)
    return [asking.request(method, path, **more).status_code for path in paths]
