"""Django for tests: its settings, once for the process, and the homes of the scenario table under WSGI and ASGI."""

from __future__ import annotations

import asyncio
import atexit
import io
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, unquote_to_bytes
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import django
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command
from django.http import HttpRequest, StreamingHttpResponse
from django.test import AsyncClient, override_settings
from django.urls import re_path

import gatekeeper_django
from gatekeeper.commands import Store
from tests.scenarios import Answer, Ask, Response

MIDDLEWARE: Final = "gatekeeper_django.GatekeeperMiddleware"
SESSIONS: Final = (
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
)

if not settings.configured:
    _DATA = tempfile.mkdtemp(prefix="gatekeeper-django-")
    atexit.register(shutil.rmtree, _DATA, ignore_errors=True)
    settings.configure(
        ALLOWED_HOSTS=["*"],
        CACHES={"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}},
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(Path(_DATA) / "db")}},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=[
            "django.contrib.admin",
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.messages",
            "django.contrib.sessions",
            "gatekeeper_django",
            "rest_framework",
        ],
        LOGGING={"version": 1, "disable_existing_loggers": False},
        MIDDLEWARE=[MIDDLEWARE],
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        ROOT_URLCONF="tests.django_urls",
        SECRET_KEY="of tests alone",
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request",
                        "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                    ]
                },
            }
        ],
        USE_TZ=True,
    )
    django.setup()


@cache
def database() -> None:
    """The tables that users and sessions need, made once."""
    call_command("migrate", verbosity=0)


class AsyncClientAt(AsyncClient):  # type: ignore[misc]  # Django has no hints of its own
    """Django's client for asynchronous requests, at an address."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def _base_scope(self, **request: Any) -> Any:
        return {**super()._base_scope(**request), "client": (self.address, 1234)}


class Urls:
    """A URLconf made by a test: `override_settings(ROOT_URLCONF=Urls([...]))`."""

    def __init__(self, patterns: list[Any], handler429: Any = None) -> None:
        self.urlpatterns = patterns
        if handler429 is not None:
            self.handler429 = handler429


def _view(request: HttpRequest) -> StreamingHttpResponse:
    content = [] if request.method == "HEAD" else [b"o", b"k"]
    status, length = int(request.headers.get("X-Answer", "200")), int(request.headers.get("X-Length", "0"))
    if len(request.read(length)) != length:
        status = 418
    response = StreamingHttpResponse(content, status=status)
    if "X-Say-Cost" in request.headers:
        response["X-Cost"] = request.headers["X-Say-Cost"]
    response.set_cookie("a", "1", path=None)
    response.set_cookie("b", "2", path=None)
    return response


async def _view_async(request: HttpRequest) -> StreamingHttpResponse:
    async def content() -> AsyncIterator[bytes]:
        for part in [] if request.method == "HEAD" else [b"o", b"k"]:
            yield part

    response = _view(request)
    response.streaming_content = content()
    return response


@contextmanager
def django_wsgi(policy: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    """The scenario table's home in Django under WSGI."""
    urls = Urls([re_path("^", _view)])
    with override_settings(GATEKEEPER=policy, MIDDLEWARE=[MIDDLEWARE], ROOT_URLCONF=urls):
        gatekeeper_django.keeper().use(store)
        handler = validator(WSGIHandler())

        yield lambda ask: ask_wsgi(handler, ask)


@contextmanager
def django_asgi(policy: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    """The scenario table's home in Django under ASGI, with an asynchronous view."""
    urls = Urls([re_path("^", _view_async)])
    with override_settings(GATEKEEPER=policy, MIDDLEWARE=[MIDDLEWARE], ROOT_URLCONF=urls):
        gatekeeper_django.keeper().use(store)
        handler = ASGIHandler()

        yield lambda ask: asyncio.run(ask_asgi(handler, ask))


def _cgi_name(name: str) -> str:
    name = name.upper().replace("-", "_")
    return name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"


def ask_wsgi(handler: Any, ask: Ask) -> Response:
    """What a WSGI application answers."""
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

    body = handler(environ, start_response)
    content = b"".join(body)
    if hasattr(body, "close"):
        body.close()
    ((status, headers),) = heads
    # Django writes cookies with a space of its own before them.
    return Response(int(status[:3]), [(name, value.strip()) for name, value in headers], content)


async def ask_asgi(handler: Any, ask: Ask) -> Response:
    """What an ASGI application answers."""
    path, _, query = ask.raw.partition("?")
    scope = {
        "type": "http",
        "method": ask.method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in ask.headers],
        "client": None if ask.peer is None else (ask.peer, 1234),
    }
    sent: list[Any] = []
    pieces = [ask.body[at : at + 9000] for at in range(0, len(ask.body), 9000)] or [b""]

    async def receive() -> Any:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        return await asyncio.Future()  # the client stays

    async def send(message: Any) -> None:
        sent.append(message)

    await handler(scope, receive, send)
    start, *bodies = sent
    headers = [(name.decode(), value.decode()) for name, value in start["headers"]]
    return Response(start["status"], headers, b"".join(message["body"] for message in bodies if "body" in message))
