"""Django's sessions in real requests: cookies, logins, messages, the admin, races, and a store that is down."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE, Urls, database  # first: Django wants its settings

# isort: split
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import alogin, alogout, get_user_model, login, logout
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import AsyncClient, Client
from django.urls import path

import gatekeeper_django
from tests.test_django_sessions import KINDS, STORED, Clock, policy

STACK = [
    MIDDLEWARE,
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]


def put(request: HttpRequest) -> HttpResponse:
    request.session.update(request.GET.dict())
    return HttpResponse()


def show(request: HttpRequest) -> HttpResponse:
    return JsonResponse(dict(request.session.items()))


def silent(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


def nested(request: HttpRequest) -> HttpResponse:
    request.session.setdefault("cart", [])
    request.session["cart"].append(request.GET["item"])
    return HttpResponse()


def append(request: HttpRequest) -> HttpResponse:
    request.session["cart"].append(request.GET["item"])
    return HttpResponse()


def enter(request: HttpRequest) -> HttpResponse:
    login(request, get_user_model().objects.get(username=request.GET["name"]))
    return HttpResponse(request.session.session_key)


def leave(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse()


def me(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.user.get_username())


async def aput(request: HttpRequest) -> HttpResponse:
    await request.session.aupdate(request.GET.dict())
    return HttpResponse()


async def ashow(request: HttpRequest) -> HttpResponse:
    return JsonResponse(dict(await request.session.aitems()))


async def aenter(request: HttpRequest) -> HttpResponse:
    await alogin(request, await get_user_model().objects.aget(username=request.GET["name"]))
    return HttpResponse(request.session.session_key)


async def aleave(request: HttpRequest) -> HttpResponse:
    await alogout(request)
    return HttpResponse()


async def ame(request: HttpRequest) -> HttpResponse:
    return HttpResponse((await request.auser()).get_username())


URLS = [
    path("put", put),
    path("show", show),
    path("silent", silent),
    path("nested", nested),
    path("append", append),
    path("enter", enter),
    path("leave", leave),
    path("me", me),
]
ASYNC_URLS = [path("put", aput), path("show", ashow), path("enter", aenter), path("leave", aleave), path("me", ame)]


class Site:
    """A Django of a test's own, and a browser for it; asynchronous on demand."""

    def __init__(self, kind: str, runner: asyncio.Runner | None, clock: Clock) -> None:
        self.kind = kind
        self.is_stored = kind in STORED
        self.clock = clock
        self._runner = runner
        self.browser = self.new_browser()

    def new_browser(self) -> Any:
        return Client() if self._runner is None else AsyncClient()

    def get(self, url: str, browser: Any = None) -> Any:
        found = (browser or self.browser).get(url)
        return found if self._runner is None else self._runner.run(found)

    @property
    def cookie(self) -> str:
        return str(self.browser.cookies["sessionid"].value)


@pytest.fixture(scope="module")
def users() -> None:
    database()
    for name in ("ada", "bob"):
        get_user_model().objects.get_or_create(
            username=name, defaults={"is_staff": True, "is_superuser": True, "password": "!"}
        )


@pytest.fixture(params=[f"{kind}, {way}" for kind in KINDS for way in ("blocking", "awaiting")])
def site(request: pytest.FixtureRequest, tmp_path: Path, users: None) -> Iterator[Site]:
    kind, way = request.param.split(", ")
    urls = Urls(URLS if way == "blocking" else ASYNC_URLS)
    with policy(kind, tmp_path, MIDDLEWARE=STACK, ROOT_URLCONF=urls) as clock:
        if way == "blocking":
            yield Site(kind, None, clock)
        else:
            with asyncio.Runner() as runner:
                yield Site(kind, runner, clock)
                runner.run(gatekeeper_django.keeper().aclose())
    from django.db import connections

    connections.close_all()


class TestEachKind:
    def test_what_one_request_puts_in_the_next_one_finds(self, site: Site) -> None:
        """The cookie is Django's, by its settings."""
        answer = site.get("/put?cart=apple")
        cookie = answer.cookies["sessionid"]
        assert (cookie["max-age"], cookie["httponly"], cookie["samesite"]) == (1_209_600, True, "Lax")
        assert answer["Vary"] == "Cookie"
        answer = site.get("/show")
        assert answer.json() == {"cart": "apple"}
        assert "sessionid" not in answer.cookies
        assert answer["Vary"] == "Cookie"

    def test_a_login_changes_the_key_and_a_logout_ends_it(self, site: Site) -> None:
        """What was in the anonymous session stays; the keys from before are dead."""
        site.get("/put?cart=apple")
        before = site.cookie
        told = site.get("/enter?name=ada").content.decode()
        during = site.cookie
        assert during != before
        if site.is_stored:
            assert told == during
        assert site.get("/me").content == b"ada"
        assert site.get("/show").json()["cart"] == "apple"
        site.browser.cookies["sessionid"] = before
        assert site.get("/me").content == b""
        site.browser.cookies["sessionid"] = during
        answer = site.get("/leave")
        assert answer.cookies["sessionid"]["max-age"] == 0
        if site.kind in STORED | {"revocable token"}:
            site.browser.cookies["sessionid"] = during
            assert site.get("/me").content == b""
            assert site.get("/show").json() == {}

    def test_another_user_gets_nothing_of_the_one_before(self, site: Site) -> None:
        """Django flushes the session of another user."""
        site.get("/put?cart=apple")
        site.get("/enter?name=ada")
        first = site.cookie
        site.get("/enter?name=bob")
        assert site.get("/me").content == b"bob"
        assert "cart" not in site.get("/show").json()
        assert site.cookie != first

    @pytest.mark.parametrize("planted", ["abcdefghijklmnop", "x" * 64 + ".sig", "", '"quoted"'])
    def test_a_planted_cookie_is_not_taken_on(self, site: Site, planted: str) -> None:
        """It is expired, or replaced by a key of ours."""
        site.browser.cookies["sessionid"] = planted
        answer = site.get("/show")
        assert answer.json() == {}
        if planted:
            assert answer.cookies["sessionid"]["max-age"] == 0
        site.browser.cookies["sessionid"] = planted
        site.get("/put?cart=1")
        assert site.cookie != planted
        assert site.get("/show").json() == {"cart": "1"}
