"""A Flask application with the extension, as a home for the scenario table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flask import Flask, Response, request
from werkzeug.routing import BaseConverter

from gatekeeper.commands import Store
from gatekeeper_flask import Gatekeeper
from tests.scenarios import Answer
from tests.servers import ask_wsgi


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
    yield lambda ask: ask_wsgi(app, ask)


@contextmanager
def flask_deferring(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    """An exempt route might begin with anything, so that each request is decided once its route is known."""
    app = application()
    app.add_url_rule("/<any('never'):x>/exempt", view_func=Gatekeeper(app, settings, store=store).exempt(exempt))
    yield lambda ask: ask_wsgi(app, ask)
