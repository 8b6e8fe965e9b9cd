"""Django for tests: its settings, once for the process, and the homes of the scenario table under WSGI and ASGI."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

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
from tests.scenarios import Answer
from tests.servers import ask_asgi, ask_wsgi

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
        handler = WSGIHandler()

        yield lambda ask: ask_wsgi(handler, ask)


@contextmanager
def django_asgi(policy: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    """The scenario table's home in Django under ASGI, with an asynchronous view."""
    urls = Urls([re_path("^", _view_async)])
    with override_settings(GATEKEEPER=policy, MIDDLEWARE=[MIDDLEWARE], ROOT_URLCONF=urls):
        gatekeeper_django.keeper().use(store)
        handler = ASGIHandler()

        yield lambda ask: asyncio.run(ask_asgi(handler, ask))
