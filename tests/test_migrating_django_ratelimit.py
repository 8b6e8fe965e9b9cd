"""The table of docs/migrating/from-django-ratelimit.md: both sides of each row, with the same outcomes."""

# the frameworks have no hints of their own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE  # first: Django wants its settings

# isort: split
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser
from django.core.cache import cache
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django_ratelimit.core import get_usage, is_ratelimited
from django_ratelimit.decorators import ratelimit

import gatekeeper_django
from gatekeeper import StoreError
from gatekeeper.commands import Batch, Hits, Replies
from gatekeeper_django import limit
from tests.scenarios import A, B
from tests.test_django import client, site

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrating" / "from-django-ratelimit.md"


def hello(request: HttpRequest, **parameters: Any) -> HttpResponse:
    return HttpResponse("hello")


@dataclass(frozen=True)
class Ask:
    address: str = A
    url: str = "/"
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    form: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table: the view before and after, and requests with whether they pass. `old` names its left side."""

    old: str
    before: Callable[..., Any]
    after: Callable[..., Any]
    asks: Sequence[tuple[Ask, bool]]
    settings_before: dict[str, Any] = field(default_factory=dict)
    settings_after: dict[str, Any] = field(default_factory=dict)


class Users:
    """Says who the user is, as AuthenticationMiddleware does, by a header."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        pk = request.headers.get("X-User")
        staff = pk == "9"
        request.user = AnonymousUser() if pk is None else get_user_model()(pk=int(pk), is_staff=staff)
        return self.get_response(request)


def asked(view: Callable[..., Any], asks: Sequence[tuple[Ask, bool]], **settings: Any) -> list[bool]:
    """Whether each request passes."""
    cache.clear()
    patterns = [path("", view), path("other", view)]
    outcomes = []
    with site(*patterns, middleware=(MIDDLEWARE, f"{__name__}.Users"), **settings):
        for ask, _ in asks:
            response = client(ask.address).generic(
                ask.method, ask.url, ask.form, "application/x-www-form-urlencoded", headers=ask.headers
            )
            assert response.status_code in (200, 403, 429), response.status_code
            outcomes.append(response.status_code == 200)
    return outcomes


def each(*asks: Ask) -> list[tuple[Ask, bool]]:
    """Twice each of these, under a limit of one: the first passes, the second does not."""
    return [(ask, passes) for ask in asks for passes in (True, False)]


def of(pk: int, address: str = A) -> Ask:
    return Ask(address, headers={"X-User": str(pk)})


def team(name: str, address: str = A) -> Ask:
    return Ask(address, headers={"X-Team": name})


@method_decorator(ratelimit(key="ip", rate="1/m"), name="dispatch")
class Before(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()


@method_decorator(limit("1/minute"), name="dispatch")
class After(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()


@limit("1/minute")
class Whole(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()


def limited_before(request: HttpRequest) -> HttpResponse:
    return HttpResponse(status=429 if request.limited else 200)


mail = limit("1/minute", name="mail")


def limited_after(request: HttpRequest) -> HttpResponse:
    return HttpResponse(status=200 if mail.hit(request) else 429)


def is_limited_before(request: HttpRequest) -> HttpResponse:
    refused = is_ratelimited(request, group="mail", key="ip", rate="1/m", increment=True)
    return HttpResponse(status=429 if refused else 200)


def proxied(peer: str, claimed: str) -> Ask:
    return Ask(peer, headers={"X-Real-IP": claimed})


ROWS = [
    Row('`@ratelimit(key="ip", rate="5/m")`', ratelimit(key="ip", rate="2/m")(hello), limit("2/minute")(hello),
        [(Ask(A), True), (Ask(A), True), (Ask(A), False), (Ask(B), True), (Ask(B), True), (Ask(B), False)]),
    Row('`rate="100/10s"`', ratelimit(key="ip", rate="1/10s")(hello), limit("1 per 10 seconds")(hello), each(Ask(A), Ask(B))),
    Row('two decorators, `"5/m"` and `"20/h"`',
        ratelimit(key="ip", rate="1/m")(ratelimit(key="ip", rate="5/h")(hello)), limit(["1/minute", "5/hour"])(hello), each(Ask(A), Ask(B))),
    Row('`key="user_or_ip"`', ratelimit(key="user_or_ip", rate="1/m")(hello), limit("1/minute", key="user")(hello),
        [(of(1), True), (of(1, B), False), (of(2), True), (Ask(A), True), (Ask(A), False), (Ask(B), True)]),
    Row('`key="user"`', ratelimit(key="user", rate="1/m")(hello), limit("1/minute", key="user")(hello), [(of(1), True), (of(1, B), False), (of(2), True)]),
    Row('`key="header:x-team"`', ratelimit(key="header:x-team", rate="1/m")(hello), limit("1/minute", key="header:X-Team")(hello),
        [(team("red"), True), (team("red", B), False), (team("blue"), True)]),
    Row('`key="get:q"`', ratelimit(key="get:q", rate="1/m")(hello), limit("1/minute", key="query:q")(hello), each(Ask(url="/?q=a"), Ask(B, url="/?q=b"))),
    Row('`key="post:username"`', ratelimit(key="post:username", rate="1/m")(hello), limit("1/minute", key="form:username")(hello),
        [(Ask(A, method="POST", form="username=ada"), True), (Ask(B, method="POST", form="username=ada"), False), (Ask(A, method="POST", form="username=bob"), True)]),
    Row("`key=lambda group, request: …`", ratelimit(key=lambda group, request: request.path, rate="1/m")(hello),
        limit("1/minute", key=lambda ticket: ticket.native.path, name="mine")(hello), each(Ask(A), Ask(B, url="/other"))),
    Row("two values joined in a callable key", ratelimit(key=lambda group, request: request.META["REMOTE_ADDR"] + request.headers["X-Team"], rate="1/m")(hello),
        limit("1/minute", key=["ip", "header:X-Team"])(hello), each(team("red", A), team("red", B), team("blue", A))),
    Row('`method="POST"`, `method=ratelimit.UNSAFE`', ratelimit(key="ip", rate="1/m", method="POST")(hello), limit("1/minute", methods="POST")(hello),
        [(Ask(A), True), (Ask(A), True), *each(Ask(A, method="POST"), Ask(B, method="POST")), (Ask(A), True)]),
    Row('`method="POST"`, `method=ratelimit.UNSAFE`', ratelimit(key="ip", rate="1/m", method=ratelimit.UNSAFE)(hello),
        limit("1/minute", methods=["DELETE", "PATCH", "POST", "PUT"])(hello), [(Ask(A), True), (Ask(A), True), (Ask(A, method="PUT"), True), (Ask(A, method="DELETE"), False)]),
    Row('`group="mail"`', ratelimit(key="ip", rate="1/m", group="mail")(hello), limit("1/minute", name="mail")(hello),
        [(Ask(A), True), (Ask(A, url="/other"), False), (Ask(B, url="/other"), True), (Ask(B), False)]),
    Row('`rate=lambda group, request: None if … else "5/m"`', ratelimit(key="user_or_ip", rate=lambda group, request: None if request.user.is_staff else "1/m")(hello),
        limit("1/minute", key="user", tier="claim:is_staff", tiers={"true": "unlimited"})(hello), [(of(9), True), (of(9), True), (of(9), True), *each(of(1))]),
    Row('`rate=lambda group, request: None if … else "5/m"`', ratelimit(key="user_or_ip", rate=lambda group, request: None if request.user.is_staff else "1/m")(hello),
        limit("1/minute", key="user", exempt=lambda ticket: ticket.native.user.is_staff)(hello), [(of(9), True), (of(9), True), *each(of(1))]),
    Row("`block=False`, then `request.limited`", ratelimit(key="ip", rate="1/m", block=False)(limited_before), limited_after, each(Ask(A), Ask(B))),
    Row("`is_ratelimited(request, group=…, key=…, rate=…, increment=True)`", is_limited_before, limited_after, each(Ask(A), Ask(B))),
    Row('`method_decorator(ratelimit(…), name="dispatch")`', Before.as_view(), After.as_view(), each(Ask(A), Ask(B))),
    Row('`method_decorator(ratelimit(…), name="dispatch")`', Before.as_view(), Whole.as_view(), each(Ask(A), Ask(B))),
    Row("`RATELIMIT_ENABLE = False`", ratelimit(key="ip", rate="1/m")(hello), limit("1/minute")(hello), [(Ask(A), True)] * 3,
        {"RATELIMIT_ENABLE": False}, {"policy": {"enabled": False}}),
    Row('`RATELIMIT_IP_META_KEY = "HTTP_X_REAL_IP"`', ratelimit(key="ip", rate="1/m")(hello), limit("1/minute")(hello),
        [(proxied("10.0.0.1", A), True), (proxied("10.0.0.2", A), False), (proxied("10.0.0.1", B), True)],
        {"RATELIMIT_IP_META_KEY": "HTTP_X_REAL_IP"}, {"policy": {"identity": {"header": "X-Real-IP", "trusted_proxies": ["10.0.0.0/8"]}}}),
    Row("`RATELIMIT_IPV6_MASK = 48`", ratelimit(key="ip", rate="1/m")(hello), limit("1/minute")(hello),
        [(Ask("2001:db8:1:1::1"), True), (Ask("2001:db8:1:2::1"), False), (Ask("2001:db8:2::1"), True)],
        {"RATELIMIT_IPV6_MASK": 48}, {"policy": {"identity": {"ipv6_prefix": 48}}}),
    Row("`RATELIMIT_IPV4_MASK = 24`", ratelimit(key="ip", rate="1/m")(hello), limit("1/minute", key="ip/24")(hello),
        [(Ask("192.0.2.1"), True), (Ask("192.0.2.9"), False), (Ask("192.0.3.1"), True)], {"RATELIMIT_IPV4_MASK": 24}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window of django-ratelimit ends within a test."""
    monkeypatch.setattr("django_ratelimit.core.time", SimpleNamespace(time=lambda: 1_800_000_000))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.old)
def test_both_sides_of_a_row_let_the_same_requests_pass(row: Row) -> None:
    expected = [passes for _, passes in row.asks]
    assert asked(row.before, row.asks, **row.settings_before) == expected
    assert asked(row.after, row.asks, **row.settings_after) == expected


def test_what_is_left_can_be_read_on_both_sides() -> None:
    seen: list[tuple[int, int]] = []

    def before(request: HttpRequest) -> HttpResponse:
        usage = get_usage(request, group="g", key="ip", rate="3/m", increment=True)
        seen.append((usage["limit"], usage["limit"] - usage["count"]))
        return HttpResponse()

    def after(request: HttpRequest) -> HttpResponse:
        verdict = request.gatekeeper.tightest.verdict
        seen.append((verdict.limit, verdict.remaining))
        return HttpResponse()

    asks = [(Ask(A), True), (Ask(A), True), (Ask(B), True)]
    asked(before, asks)
    asked(limit("3/minute")(after), asks)
    assert seen == [(3, 2), (3, 1), (3, 2)] * 2


def page(request: HttpRequest, exception: Exception) -> HttpResponse:
    return HttpResponse(f"{request.path} {type(exception).__name__}", status=429)


def test_a_page_of_ones_own_is_called_with_the_request_and_the_exception_on_both_sides() -> None:
    cache.clear()
    with site(
        path("", ratelimit(key="ip", rate="1/m")(hello)),
        middleware=("django_ratelimit.middleware.RatelimitMiddleware",),
        RATELIMIT_VIEW=f"{__name__}.page",
    ):
        assert [client().get("/").content for _ in range(2)] == [b"hello", b"/ Ratelimited"]
    with site(path("", limit("1/minute")(hello)), handler429=page):
        assert [client().get("/").content for _ in range(2)] == [b"hello", b"/ Limited"]


class Down:
    """A store that does not answer."""

    local = True

    def ask(self, batch: Hits) -> Replies:
        assert not (isinstance(batch, Batch) and batch.local)
        return [StoreError("down") for _ in batch]

    async def aask(self, batch: Hits) -> Replies:
        return self.ask(batch)

    def keys(self, limit: Any) -> list[str]:
        return []

    async def akeys(self, limit: Any) -> list[str]:
        return []

    def close(self) -> None: ...

    async def aclose(self) -> None: ...


class DownCache:
    """A cache that does not answer, as django-ratelimit expects it."""

    def add(self, *arguments: Any) -> bool:
        return False

    def incr(self, *arguments: Any) -> None:
        return None


@pytest.mark.parametrize("fail_open", [True, False])
def test_while_the_store_is_down_both_sides_are_open_or_shut(
    fail_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_ratelimit.core.caches", {"default": DownCache()})
    with site(path("", ratelimit(key="ip", rate="1/m")(hello)), RATELIMIT_FAIL_OPEN=fail_open, middleware=()):
        before = [client().get("/").status_code == 200 for _ in range(3)]
    policy = {"store": {"on_error": "allow" if fail_open else "deny"}}
    with site(path("", limit("1/minute")(hello)), policy=policy):
        gatekeeper_django.keeper().use(Down())
        after = [client().get("/").status_code == 200 for _ in range(3)]
    assert before == after == [fail_open] * 3


def test_the_counters_are_where_the_settings_say_on_both_sides() -> None:
    elsewhere = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "LOCATION": "elsewhere"}
    caches = {"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}, "counters": elsewhere}
    with (
        override_settings(CACHES=caches, RATELIMIT_USE_CACHE="counters"),
        site(path("", ratelimit(key="ip", rate="1/m")(hello))),
    ):
        assert [client().get("/").status_code for _ in range(2)] == [200, 403]
    with site(path("", limit("1/minute")(hello)), policy={"store": {"url": "memory://", "max_keys": 7}}):
        assert gatekeeper_django.keeper().store.max_keys == 7  # type: ignore[attr-defined]
        assert [client().get("/").status_code for _ in range(2)] == [200, 429]


def test_every_row_of_the_page_is_run() -> None:
    text = PAGE.read_text(encoding="utf-8")
    olds = re.findall(r"^\| (.+?) \| .+ \|$", text, re.MULTILINE)[1:]
    elsewhere = {
        '`get_usage(request, …)["count"]`',
        "`except Ratelimited`, `handler403`, `RATELIMIT_VIEW`",
        '`RATELIMIT_USE_CACHE = "redis"`',
        "`RATELIMIT_FAIL_OPEN = True`",
        "`RATELIMIT_FAIL_OPEN = False`",
    }
    assert set(olds) == {row.old for row in ROWS} | elsewhere
