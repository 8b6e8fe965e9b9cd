"""What a server does, for one request of the scenario table: of a WSGI application and of an ASGI one."""

from __future__ import annotations

import asyncio
import io
from typing import Any
from urllib.parse import unquote, unquote_to_bytes
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from tests.scenarios import Ask, Response


def ask_wsgi(app: Any, ask: Ask) -> Response:
    """What a WSGI application answers, checked for PEP 3333."""
    path, _, query = ask.raw.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": ask.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "wsgi.input": io.BytesIO(ask.body),
        **{_cgi_name(name): value for name, value in ask.headers},
    }
    if ask.peer is not None:
        environ["REMOTE_ADDR"] = ask.peer
    setup_testing_defaults(environ)
    heads: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        heads.append((status, headers))
        return lambda data: None

    body: Any = validator(app)(environ, start_response)
    content = b"".join(body)
    body.close()
    ((status, headers),) = heads
    # Django writes cookies with a space of its own before them.
    return Response(int(status[:3]), [(name, value.strip()) for name, value in headers], content)


def _cgi_name(name: str) -> str:
    name = name.upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"


async def ask_asgi(app: Any, ask: Ask) -> Response:
    """What an ASGI application answers, by the specification's version 2.4."""
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
    sent: list[Any] = []
    pieces = [ask.body[at : at + 9000] for at in range(0, len(ask.body), 9000)] or [b""]

    async def receive() -> Any:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        return await asyncio.Future()  # the client stays

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *bodies = sent
    assert start["type"] == "http.response.start"
    assert {message["type"] for message in bodies} == {"http.response.body"}
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
    return Response(start["status"], headers, b"".join(message.get("body", b"") for message in bodies))
