"""A Flask application with the extension, as a home for the scenario table."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote_to_bytes
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

from flask import Flask, Response, request
from werkzeug.routing import BaseConverter

from gatekeeper.commands import Store
from gatekeeper_flask import Gatekeeper
from tests.scenarios import Answer, Ask
from tests.scenarios import Response as Answered


def cgi_name(field: str) -> str:
    name = field.upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"


class Anything(BaseConverter):
    regex = ".*?"
    part_isolating = False


def application() -> Flask:
    """It answers every request with "ok", two cookies and the status that X-Answer names."""
    app = Flask("home", static_folder=None)
    app.url_map.merge_slashes = False
    app.url_map.converters["anything"] = Anything

    @app.route(
        "/<anything:path>",
        methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
        provide_automatic_options=False,
        strict_slashes=False,
    )
    def ok(path: str) -> Response:
        status = int(request.headers.get("X-Answer", "200"))
        length = int(request.headers.get("X-Length", "0"))
        if len(request.stream.read(length)) != length:
            status = 418
        response = Response("ok", status)
        if "X-Say-Cost" in request.headers:
            response.headers["X-Cost"] = request.headers["X-Say-Cost"]
        response.set_cookie("a", "1", path=None)
        response.set_cookie("b", "2", path=None)
        return response

    return app


def exempt(x: str) -> str:
    return "exempt"


@contextmanager
def flask(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    app = application()
    Gatekeeper(app, settings, store=store)
    yield client(app)


@contextmanager
def flask_deferring(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    """An exempt route might begin with anything, so that each request is decided once its route is known."""
    app = application()
    app.add_url_rule("/<any('never'):x>/exempt", view_func=Gatekeeper(app, settings, store=store).exempt(exempt))
    yield client(app)


def client(app: Flask) -> Answer:
    """It answers through the whole application, as a server would ask it, and checks both for PEP 3333."""
    checked = validator(app)

    def answer(ask: Ask) -> Answered:
        path, _, query = ask.raw.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": ask.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query,
            "wsgi.input": io.BytesIO(ask.body),
            **{cgi_name(name): value for name, value in ask.headers},
        }
        if ask.peer is not None:
            environ["REMOTE_ADDR"] = ask.peer
        setup_testing_defaults(environ)
        heads: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            heads.append((status, headers))
            return lambda data: None

        body = checked(environ, start_response)
        content = b"".join(body)
        body.close()  # type: ignore[attr-defined]
        ((status, headers),) = heads
        return Answered(int(status[:3]), headers, content)

    return answer
