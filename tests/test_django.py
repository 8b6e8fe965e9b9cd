"""Gatekeeper in Django: the middleware, `limit` where it stands, what is answered."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator, no-untyped-call"

from __future__ import annotations

from tests.django_home import (  # first: Django wants its settings
    MIDDLEWARE,
    AsyncClientAt,
    Urls,
)

# isort: split
import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import SimpleTemplateResponse
from django.test import Client, RequestFactory, override_settings
from django.urls import include, path, re_path, reverse
from django.utils.decorators import method_decorator
from django.utils.translation import gettext_lazy
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from django.views.generic import TemplateView

import gatekeeper_django
from gatekeeper import Gatekeeper, SettingsError
from gatekeeper.testing import VirtualClock, aassert_limited, assert_limited, disabled, virtual
from gatekeeper_django import GatekeeperMiddleware, Limited, limit
from tests.scenarios import A, Ask, B
from tests.servers import ask_asgi, ask_wsgi

pytestmark = pytest.mark.usefixtures("gatekeeper_fresh")  # what is left is told to the second

JSON = "application/problem+json"


@contextmanager
def site(
    *patterns: Any,
    policy: Any = None,
    middleware: tuple[str, ...] = (MIDDLEWARE,),
    handler429: Any = None,
    **settings: Any,
) -> Iterator[VirtualClock]:
    """A Django of a test's own, on a virtual clock."""
    urls = Urls(list(patterns), handler429)
    with (
        override_settings(GATEKEEPER=policy or {}, ROOT_URLCONF=urls, MIDDLEWARE=list(middleware), **settings),
        virtual() as clock,
    ):
        yield clock


def client(address: str = A, **options: Any) -> Any:
    return Client(REMOTE_ADDR=address, **options)


def aclient(address: str = A) -> Any:
    return AsyncClientAt(address)


def statuses(url: str, times: int, address: str = A, method: str = "get") -> list[int]:
    one = client(address)
    return [getattr(one, method)(url).status_code for _ in range(times)]


async def astatuses(url: str, times: int, address: str = A) -> list[int]:
    one = aclient(address)
    return [(await one.get(url)).status_code for _ in range(times)]


def hello(request: HttpRequest, **parameters: Any) -> HttpResponse:
    return HttpResponse("hello")


async def ahello(request: HttpRequest, **parameters: Any) -> HttpResponse:
    return HttpResponse("hello")


def rule(rate: str = "2/minute", **more: Any) -> dict[str, Any]:
    return {"limits": [{"name": "default", "rate": rate, **more}]}


BOTH = pytest.mark.parametrize("middleware", [(MIDDLEWARE,), ()], ids=["with the middleware", "without it"])


# Where it stands


@BOTH
def test_a_limited_view_limits_each_client_and_tells_its_quota(middleware: tuple[str, ...]) -> None:
    with site(path("report", limit("2/minute")(hello)), middleware=middleware) as clock:
        first = client().get("/report")
        assert first.status_code == 200
        assert first["RateLimit"] == '"hello";r=1;t=61'
        assert first["RateLimit-Policy"] == '"hello";q=2;w=60'
        assert statuses("/report", 2) == [200, 429]
        refused = client().get("/report", headers={"accept": "application/json"})
        assert refused.status_code == 429
        assert refused["Retry-After"] == "61"
        assert refused["Cache-Control"] == "no-store"
        assert refused["Content-Type"] == JSON
        assert refused.json()["violated-policies"] == ["hello"]
        assert statuses("/report", 3, B) == [200, 200, 429]
        clock.advance(61)
        assert statuses("/report", 3) == [200, 200, 429]


@BOTH
def test_an_asynchronous_view_is_limited_too(middleware: tuple[str, ...]) -> None:
    async def walk() -> None:
        assert await astatuses("/report", 3) == [200, 200, 429]
        assert await astatuses("/report", 3, B) == [200, 200, 429]
        refused = await aclient().get("/report")
        assert (refused["Retry-After"], refused["RateLimit"]) == ("61", '"ahello";r=0;t=61')
        clock.advance(61)
        await aassert_limited(aclient(), "/report", after=2, clock=clock)

    with site(path("report", limit("2/minute")(ahello)), middleware=middleware) as clock:
        asyncio.run(walk())


@BOTH
def test_views_of_one_kind_are_limited_in_a_handler_of_the_other(middleware: tuple[str, ...]) -> None:
    with site(
        path("sync", limit("1/minute")(hello)), path("async", limit("1/minute")(ahello)), middleware=middleware
    ):
        assert statuses("/async", 2) == [200, 429]
        assert asyncio.run(astatuses("/sync", 2)) == [200, 429]


def test_a_refused_request_does_not_reach_the_view() -> None:
    reached = []

    def view(request: HttpRequest) -> HttpResponse:
        reached.append(request)
        return HttpResponse()

    with site(path("", limit("1/minute")(view))):
        assert statuses("/", 3) == [200, 429, 429]
    assert len(reached) == 1


def test_the_parameters_of_a_path_make_no_quota_of_their_own() -> None:
    with site(path("item/<int:pk>", limit("2/minute")(hello))):
        assert [client().get(f"/item/{pk}").status_code for pk in (1, 2, 3)] == [200, 200, 429]
        assert client(B).get("/item/1").status_code == 200


def test_a_view_on_two_routes_has_two_quotas_unless_it_is_named() -> None:
    own, shared = limit("1/minute")(hello), limit("1/minute", name="shared")(hello)
    with site(path("a", own), path("b", own), path("c", shared), path("d", shared)):
        assert statuses("/a", 2) + statuses("/b", 2) == [200, 429, 200, 429]
        assert statuses("/c", 2) + statuses("/d", 1) == [200, 429, 429]
        assert statuses("/d", 1, B) == [200]


def test_two_views_that_are_limited_alike_have_two_quotas() -> None:
    strict = limit("1/minute")

    @strict
    def one(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    @strict
    def other(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    with site(path("one", one), path("other", other)):
        assert statuses("/one", 2) + statuses("/other", 2) == [200, 429, 200, 429]


def test_the_prefix_of_an_include_belongs_to_the_route() -> None:
    items = [path("<int:pk>", limit("1/minute")(hello), name="item")]
    with site(
        path("shop/", include((items, "items"), namespace="shop")),
        path("stock/", include((items, "items"), namespace="stock")),
        re_path(r"^old/(?P<kind>[a-z]+)/", include(items)),
    ):
        assert [client().get(reverse("shop:item", args=[pk])).status_code for pk in (1, 2)] == [200, 429]
        assert [client().get(reverse("stock:item", args=[pk])).status_code for pk in (1, 2)] == [200, 429]
        assert [client().get(f"/old/{kind}/1").status_code for kind in "ab"] == [200, 429]


def test_the_language_of_a_route_makes_no_quota_of_its_own() -> None:
    from django.conf.urls.i18n import i18n_patterns

    with site(
        *i18n_patterns(path("login", limit("2/minute")(hello))),
        path(gettext_lazy("Monday"), limit("2/minute")(hello)),  # a text that Django itself translates
        middleware=("django.middleware.locale.LocaleMiddleware", MIDDLEWARE),
        LANGUAGES=[("en", "English"), ("de", "German"), ("fr", "French")],
    ):
        assert [client().get(f"/{code}/login").status_code for code in ("en", "de", "fr")] == [200, 200, 429]
        days = [("/Monday", "en"), ("/Montag", "de"), ("/lundi", "fr")]
        assert [client().get(day, headers={"accept-language": code}).status_code for day, code in days] == [
            200,
            200,
            429,
        ]


def test_a_request_spends_the_quota_of_a_name_once_whoever_asks_for_it() -> None:
    once = limit("3/minute", name="default")
    with site(path("", once(hello)), path("a", once(ahello)), policy=rule("3/minute", name="default")):
        assert statuses("/", 4) == [200, 200, 200, 429]
        assert statuses("/a", 4, B) == [200, 200, 200, 429]


def test_a_limit_may_count_by_a_parameter_of_the_path() -> None:
    limited = limit("2/minute", key=["ip", "param:pk"])
    with site(
        path("<shop>/<int:pk>", limited(lambda request, shop, pk: hello(request))),
        path("a/<shop>/<int:pk>", limited(parameters)),
    ):
        for before in ("", "/a"):
            urls = (f"{before}/x/1", f"{before}/y/1", f"{before}/z/1", f"{before}/x/2")
            assert [statuses(url, 1)[0] for url in urls] == [200, 200, 429, 200]
            assert statuses(urls[0], 1, B) == [200]


async def parameters(request: HttpRequest, shop: str, pk: int) -> HttpResponse:
    return HttpResponse("async")


def test_a_limit_for_some_methods_leaves_the_others_free() -> None:
    with site(
        path("login", limit("1/minute", methods="POST")(hello)),
        path("page", limit("1/minute", methods=["GET"])(hello)),
    ):
        assert statuses("/login", 3) == [200] * 3
        assert "RateLimit" not in client().get("/login").headers
        assert statuses("/login", 2, method="post") == [200, 429]
        assert statuses("/page", 1, method="head") + statuses("/page", 1) == [200, 429]
        assert statuses("/page", 2, method="post") == [200, 200]


def test_class_based_views_are_limited_as_a_class_by_their_dispatch_and_by_their_methods() -> None:
    @limit("1/minute")
    class Whole(View):
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

        post = get

    @method_decorator(limit("1/minute"), name="dispatch")
    class Dispatched(View):
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    class Methods(View):
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

        @limit("1/minute")
        def post(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

        @method_decorator(limit("1/minute"))
        def put(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    class Other(Methods):
        pass

    with site(
        path("whole", Whole.as_view()),
        path("dispatched", Dispatched.as_view()),
        path("methods", Methods.as_view()),
        path("other", Other.as_view()),
        path("called", limit("1/minute")(TemplateView.as_view(template_name="none"))),
    ):
        assert statuses("/whole", 1) + statuses("/whole", 1, method="post") == [200, 429]
        assert statuses("/whole", 1, B) == [200]
        assert statuses("/dispatched", 2) == [200, 429]
        assert statuses("/methods", 3) == [200] * 3
        assert statuses("/methods", 2, method="post") == [200, 429]
        assert statuses("/methods", 2, method="put") == [200, 429]
        assert statuses("/methods", 1, B, method="put") == [200]
        assert statuses("/other", 2, method="post") == [200, 429]


def test_asynchronous_class_based_views_are_limited_whichever_way() -> None:
    @limit("1/minute")
    class Whole(View):
        async def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    @method_decorator(limit("1/minute"), name="dispatch")
    class Dispatched(View):
        async def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    class Method(View):
        @limit("1/minute")
        async def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    patterns = [
        path("whole", Whole.as_view()),
        path("dispatched", Dispatched.as_view()),
        path("method", Method.as_view()),
    ]
    for middleware in ((MIDDLEWARE,), ()):
        with site(*patterns, middleware=middleware):
            for url in ("/whole", "/dispatched", "/method"):
                assert statuses(url, 2) == [200, 429], url
                assert asyncio.run(astatuses(url, 2, B)) == [200, 429], url


def test_a_class_with_method_decorator_and_its_subclass_on_one_view_are_told_apart() -> None:
    @method_decorator(limit("1/minute"), name="dispatch")
    class One(View):
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    class Two(One):
        pass

    factory = RequestFactory()
    with site():
        # Called without a route, as a test does, only the class tells them apart.
        seen = [view.as_view()(factory.get("/")).status_code for view in (One, One, Two, Two)]
    assert seen == [200, 429, 200, 429]


def test_all_that_is_included_can_be_limited_at_once() -> None:
    items = [path("<int:pk>", hello, name="item"), path("sub/", include([path("deep", ahello)]))]
    with site(
        path("each/", limit("1/minute")(include((items, "items"), namespace="each"))),
        path("all/", limit("2/minute", name="all")(include((items, "items"), namespace="all"))),
        path("list/", include(limit("1/minute")(items))),
        path("free/", include(items)),
    ):
        assert statuses(reverse("each:item", args=[1]), 2) == [200, 429]
        assert statuses("/each/sub/deep", 2) == [200, 429]
        assert statuses("/all/1", 1) + statuses("/all/sub/deep", 2) == [200, 200, 429]
        assert statuses("/list/1", 2) == [200, 429]
        assert statuses("/free/1", 3) == [200] * 3


def test_the_admin_is_limited_by_a_rule_by_its_urls_and_by_its_login() -> None:
    from django.contrib import admin

    middleware = (
        MIDDLEWARE,
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    )
    session = "django.contrib.sessions.backends.signed_cookies"
    plain = path("admin/", admin.site.urls)
    with site(plain, policy=rule("2/minute", match="POST /admin/*"), middleware=middleware, SESSION_ENGINE=session):
        assert statuses("/admin/login/", 3) == [200] * 3
        assert statuses("/admin/login/", 3, method="post") == [200, 200, 429]
    limited = path("admin/", limit("1/minute", name="admin", methods="POST")(admin.site.urls))
    with site(limited, middleware=middleware, SESSION_ENGINE=session):
        assert reverse("admin:login") == "/admin/login/"
        assert statuses("/admin/login/", 3) == [200] * 3
        assert statuses("/admin/login/", 2, method="post") == [200, 429]
        assert statuses("/admin/login/", 1, B, method="post") == [200]


@pytest.mark.parametrize(
    ("what", "says"),
    [(7, "expected a view, and not int"), (("a", "b"), "expected what include"), (dict, "no dispatch")],
)
def test_what_is_no_view_is_not_decorated(what: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        limit("1/minute")(what)


def test_a_function_that_is_called_without_a_request_is_no_view() -> None:
    with site(), pytest.raises(TypeError, match="expected a view"):
        limit("1/minute")(hello)("no request")


def test_wrong_settings_of_a_limit_are_told_when_it_is_made() -> None:
    with pytest.raises(SettingsError, match=r"rate: .*"):
        limit("10/fortnight")
    with pytest.raises(SettingsError, match="match: goes with rules of the settings alone"):
        limit("10/minute", match="/x")
    with pytest.raises(SettingsError, match="methods: expected a method"):
        limit("10/minute", methods="GET POST")
    with pytest.raises(SettingsError, match=r"methods: expected a method; did you mean POST\?"):
        limit("10/minute", methods=["GET", "POTS"])


def test_a_view_keeps_its_name_and_what_other_decorators_have_said_of_it() -> None:
    view = limit("1/minute")(csrf_exempt(hello))
    assert view.__name__ == "hello"
    assert view.csrf_exempt
    assert asyncio.iscoroutinefunction(limit("1/minute")(ahello))


@BOTH
def test_networks_that_are_let_through_are_not_limited_by_views_either(middleware: tuple[str, ...]) -> None:
    policy = {**rule("1/minute"), "access": {"allow": A}}
    patterns = [path("", limit("1/minute")(hello)), path("a", limit("1/minute")(ahello))]
    with site(*patterns, policy=policy, middleware=middleware):
        assert statuses("/", 3) + asyncio.run(astatuses("/a", 3)) == [200] * 6
        assert statuses("/", 2, B) == [200, 429]


def test_networks_that_are_denied_reach_no_view() -> None:
    with site(path("", hello), policy={**rule(key="user"), "access": {"deny": A}}):
        assert (statuses("/", 2), statuses("/", 1, B)) == ([403, 403], [200])


# Never twice


def test_rules_of_the_settings_and_of_the_view_are_each_charged_once() -> None:
    with site(path("", limit("5/minute", name="view")(hello)), policy=rule("9/minute")):
        response = client().get("/")
        charges = {
            charge.limit.name: charge.verdict.remaining for charge in response.wsgi_request.gatekeeper.charges
        }
    assert charges == {"default": 8, "view": 4}
    assert response["RateLimit"] == '"view";r=4;t=61'
    assert response["RateLimit-Policy"] == '"default";q=9;w=60, "view";q=5;w=60'


@pytest.mark.parametrize("kind", ["function", "dispatch", "class", "method", "urls"])
def test_limits_of_one_period_that_stand_at_one_view_are_each_charged_once(kind: str) -> None:
    few, more = limit("2/minute"), limit("3/minute")

    class Page(View):
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    if kind == "dispatch":
        Page = method_decorator(more, name="dispatch")(method_decorator(few, name="dispatch")(Page))
    elif kind == "class":
        Page = more(few(Page))
    elif kind == "method":
        Page.get = method_decorator(more)(method_decorator(few)(Page.get))  # type: ignore[method-assign]
    view = more(few(more(hello))) if kind == "function" else Page.as_view()
    if kind == "urls":
        view = more(few(view))
    with site(path("", view)):
        assert [client(A).get("/").status_code for _ in range(3)] == [200, 200, 429]
        assert client(B).get("/")["RateLimit"].endswith('";r=1;t=61')


def test_a_view_that_is_decorated_twice_by_one_limit_is_charged_once() -> None:
    strict = limit("2/minute")
    for middleware in ((MIDDLEWARE,), ()):
        with site(path("", strict(strict(hello))), path("a", strict(strict(ahello))), middleware=middleware):
            assert statuses("/", 3) == [200, 200, 429]
            assert asyncio.run(astatuses("/a", 3)) == [200, 200, 429]


def test_two_limits_on_a_view_both_hold_with_and_without_the_middleware() -> None:
    both = limit("3/minute", name="outer")(limit("2/minute", name="inner")(hello))
    for middleware in ((MIDDLEWARE,), ()):
        with site(path("", both), middleware=middleware):
            response = client().get("/")
            assert response["RateLimit-Policy"] == '"outer";q=3;w=60, "inner";q=2;w=60'
            assert statuses("/", 3) == [200, 429, 429]


def test_the_middleware_that_stands_twice_charges_once() -> None:
    with site(path("", hello), path("a", ahello), policy=rule(), middleware=(MIDDLEWARE, MIDDLEWARE)):
        assert statuses("/", 3) == [200, 200, 429]
        assert asyncio.run(astatuses("/a", 3, B)) == [200, 200, 429]


def test_the_same_policy_around_django_charges_once() -> None:
    from django.core.handlers.asgi import ASGIHandler
    from django.core.handlers.wsgi import WSGIHandler

    from gatekeeper.asgi import GatekeeperMiddleware as Asgi
    from gatekeeper.wsgi import GatekeeperMiddleware as Wsgi

    with site(path("", limit("9/minute")(hello)), policy=rule()):
        wsgi = Wsgi(WSGIHandler(), gatekeeper_django.keeper())
        assert [ask_wsgi(wsgi, Ask()).status for _ in range(3)] == [200, 200, 429]
        asgi = Asgi(ASGIHandler(), gatekeeper_django.keeper())
        assert [asyncio.run(ask_asgi(asgi, Ask(peer=B))).status for _ in range(3)] == [200, 200, 429]


def test_requests_that_come_together_are_let_in_as_often_as_the_limit_says() -> None:
    with site(path("", limit("20/minute")(hello)), policy=rule("30/minute")), ThreadPoolExecutor(8) as pool:
        seen = Counter(pool.map(lambda number: client().get("/").status_code, range(64)))
    assert seen == {200: 20, 429: 44}


# Native in both


def test_an_asynchronous_request_takes_no_thread_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from asgiref.sync import SyncToAsync

    hops: list[str] = []
    called = SyncToAsync.__call__

    async def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        hops.append(getattr(self.func, "__qualname__", repr(self.func)))
        return await called(self, *args, **kwargs)

    monkeypatch.setattr(SyncToAsync, "__call__", counted)
    threads = []

    async def view(request: HttpRequest) -> HttpResponse:
        threads.append(threading.current_thread())
        return HttpResponse()

    async def walk() -> list[str]:
        hops.clear()
        assert (await aclient().get("/")).status_code == 200
        assert threads.pop() is threading.current_thread()
        return [*hops]

    with site(path("", view), middleware=()):
        djangos = asyncio.run(walk())
    with site(path("", limit("5/minute")(view)), policy=rule("9/minute", key=["ip", "user"])):
        assert asyncio.run(walk()) == djangos


def test_the_middleware_says_that_it_is_both() -> None:
    assert GatekeeperMiddleware.sync_capable
    assert GatekeeperMiddleware.async_capable
    with site(policy=rule()):
        middleware = GatekeeperMiddleware(hello)
        assert not asyncio.iscoroutinefunction(middleware)
        assert middleware.keeper is gatekeeper_django.keeper()


# The settings


def test_overridden_settings_are_in_force_at_once_and_the_first_ones_afterwards() -> None:
    with site(path("", limit("4/minute", name="view")(hello)), policy=rule("3/minute")):
        one = client()
        assert one.get("/")["RateLimit-Policy"] == '"default";q=3;w=60, "view";q=4;w=60'
        with override_settings(GATEKEEPER=rule("1/minute")):
            assert [one.get("/").status_code for _ in range(2)] == [200, 429]
        with override_settings(GATEKEEPER={"enabled": False}):
            assert [one.get("/").status_code for _ in range(9)] == [200] * 9
        assert one.get("/")["RateLimit-Policy"] == '"default";q=3;w=60, "view";q=4;w=60'


def test_the_settings_may_be_the_path_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "gatekeeper.toml"
    file.write_text('[[limits]]\nname = "default"\nrate = "1/minute"\nkey = "user"\n', encoding="utf-8")
    for named in (file, str(file)):
        with site(path("", hello), policy=named):
            assert statuses("/", 2) == [200, 429]


def test_wrong_settings_stop_the_start_and_all_that_is_wrong_is_told() -> None:
    wrong = {"limits": [{"name": "a", "rat": "1/minute"}], "identty": {}}
    with override_settings(GATEKEEPER=wrong), pytest.raises(ImproperlyConfigured) as told:
        GatekeeperMiddleware(hello)
    lines = str(told.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("GATEKEEPER: ") for line in lines)
    assert 'did you mean "identity"?' in str(told.value)


def test_without_settings_nothing_is_limited_but_what_is_decorated() -> None:
    with site(path("", hello), path("limited", limit("1/minute")(hello))):
        assert statuses("/", 5) == [200] * 5
        assert statuses("/limited", 2) == [200, 429]


def test_the_off_switch_of_tests_is_for_rules_and_views_alike() -> None:
    with site(path("", limit("1/minute")(hello)), path("a", limit("1/minute")(ahello)), policy=rule("1/minute")):
        with disabled():
            assert statuses("/", 5) == [200] * 5
            assert asyncio.run(astatuses("/a", 5)) == [200] * 5
            assert "RateLimit" not in client().get("/").headers
        assert statuses("/", 2) == [200, 429]


def test_the_kit_for_tests_works_with_djangos_clients() -> None:
    with site(path("login", hello), policy=rule("3/minute", match="POST /login")) as clock:
        assert_limited(client(), "POST /login", after=3, clock=clock)
        assert_limited(client(B), "POST /login", after=3)


async def nobody(request: Any) -> str | None:
    return None


def test_an_asynchronous_function_of_the_settings_is_refused_where_requests_are_not() -> None:
    policy = {**rule(key="user"), "identity": {"user": nobody}}
    with override_settings(GATEKEEPER=policy):
        with pytest.raises(ImproperlyConfigured, match=r"identity\.user: expected a function that is not asynch"):
            GatekeeperMiddleware(hello)
        GatekeeperMiddleware(ahello)
    with site(path("a", limit("1/minute", key="user")(ahello)), policy=policy):
        assert asyncio.run(astatuses("/a", 2)) == [200, 429]


def test_a_limit_that_must_be_awaited_is_refused_on_a_view_that_cannot() -> None:
    with (
        site(path("", limit("1/minute", key=nobody)(hello)), middleware=()),
        pytest.raises(ImproperlyConfigured, match="hello is not asynchronous, and a function"),
    ):
        client().get("/")


# What is answered


def test_the_urlconf_may_have_a_page_of_its_own_for_refusals() -> None:
    def slow_down(request: HttpRequest, exception: Limited) -> HttpResponse:
        wait = round(exception.verdict.retry_after)
        return HttpResponse(f"{request.path}: {wait} s", status=429, headers={"X-Mine": "1"})

    async def aslow_down(request: HttpRequest, exception: Limited) -> HttpResponse:
        return slow_down(request, exception)

    patterns = [path("", limit("1/minute")(hello)), path("a", limit("1/minute")(ahello)), path("rule", hello)]
    for handler in (slow_down, aslow_down):
        with site(*patterns, policy=rule("1/minute", match="/rule"), handler429=handler):
            for url in ("/", "/a", "/rule"):
                for address, ask in ((A, lambda url: client().get(url)), (B, lambda url: asyncio.run(got(url)))):
                    assert ask(url).status_code == 200
                    response = ask(url)
                    assert response.status_code == 429, (url, address)
                    assert response.content.decode() == f"{url}: 61 s"
                    assert response["Content-Type"] == "text/html; charset=utf-8"
                    assert (response["X-Mine"], response["Retry-After"]) == ("1", "61")
                    assert response["RateLimit"].endswith(";r=0;t=61")


async def got(url: str) -> Any:
    return await aclient(B).get(url)


def test_a_handler_of_the_settings_is_given_djangos_request() -> None:
    def handler(ticket: Any, refusal: Any) -> Any:
        return refusal._replace(body=ticket.native.headers["X-Team"].encode())

    policy = {"response": {"handler": handler}}
    with site(path("", limit("1/minute")(hello)), policy=policy):
        client().get("/")
        assert client().get("/", headers={"X-Team": "red"}).content == b"red"


def test_a_refused_head_has_the_length_and_no_body() -> None:
    with site(path("", hello), policy=rule("1/minute")):
        client().get("/")
        response = client().head("/")
    assert (response.status_code, response.content) == (429, b"")
    assert int(response["Content-Length"]) > 50


def test_a_function_that_a_view_calls_too_often_is_answered_429() -> None:
    gk = Gatekeeper({})

    @gk.limit("1/minute", name="mail")
    def send() -> None:
        pass

    @gk.limit("1/minute", name="mail")
    async def asend() -> None:
        pass

    def view(request: HttpRequest) -> HttpResponse:
        send()
        return HttpResponse()

    async def aview(request: HttpRequest) -> HttpResponse:
        await asend()
        return HttpResponse()

    with site(path("", view), path("a", aview)):
        assert statuses("/", 2) == [200, 429]
        assert statuses("/", 2, B) == [200, 429]
        assert client().get("/")["Retry-After"] == "61"
        assert asyncio.run(astatuses("/a", 2, "192.0.2.9")) == [200, 429]


def test_a_function_that_a_middleware_calls_too_often_is_answered_429() -> None:
    one = client(raise_request_exception=False)
    with site(path("", hello), middleware=(MIDDLEWARE, "tests.test_django.Sending")):
        assert [one.get("/").status_code for _ in range(2)] == [200, 429]
        assert one.get("/")["Retry-After"] == "61"


class Sending:
    """A middleware of the application's that calls a limited function."""

    gk = Gatekeeper({})

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        self.send = self.gk.limit("1/minute")(lambda: None)

    def __call__(self, request: HttpRequest) -> Any:
        self.send()
        return self.get_response(request)


def test_a_view_may_ask_for_itself_whether_it_is_within_a_limit() -> None:
    searches = limit("1/minute", name="searches")

    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("fresh" if searches.hit(request) else "cached")

    async def aview(request: HttpRequest) -> HttpResponse:
        return HttpResponse("fresh" if await searches.ahit(request) else "cached")

    for middleware in ((MIDDLEWARE,), ()):
        with site(path("", view), path("a", aview), middleware=middleware):
            assert [client().get("/").content for _ in range(2)] == [b"fresh", b"cached"]
            assert client().get("/a").content == b"cached", "they share the name, and so the quota"
            assert [client(B).get(url).content for url in ("/a", "/")] == [b"fresh", b"cached"]
            with disabled():
                assert client().get("/").content == b"fresh"
    with site(), pytest.raises(TypeError, match="expected a name"):
        limit("1/minute").hit(RequestFactory().get("/"))


def test_what_is_only_shadowed_is_told_to_the_view_and_refuses_nothing() -> None:
    def view(request: HttpRequest) -> HttpResponse:
        ticket = request.gatekeeper
        return HttpResponse(str([charge.verdict.allowed for charge in ticket.charges]))

    with site(path("", limit("1/minute", shadow=True)(view))):
        assert [client().get("/").content for _ in range(2)] == [b"[True]", b"[False]"]


@BOTH
def test_a_response_that_is_rendered_later_has_its_fields(middleware: tuple[str, ...]) -> None:
    def view(request: HttpRequest) -> SimpleTemplateResponse:
        return SimpleTemplateResponse(engines["django"].from_string("later"))

    limited = limit("9/minute", settle="bytes", cost=1)(view)
    with site(path("", limited), middleware=middleware):
        response = client().get("/")
        assert (response.content, response["RateLimit"]) == (b"later", '"view";r=8;t=61')
        assert client().get("/")["RateLimit"] == '"view";r=3;t=61', "the bytes of the first are spent by now"


def test_a_limit_by_a_field_of_the_form_leaves_the_form_to_the_view() -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.POST["email"])

    async def aview(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.POST["email"])

    by_email = limit("1/minute", key="form:email")
    with site(path("", by_email(view)), path("a", by_email(aview))):
        seen = [client().post("/", {"email": email}) for email in ("z@x", "Z@x ", "y@x")]
        assert [response.status_code for response in seen] == [200, 429, 200]
        kind = "application/x-www-form-urlencoded"
        seen = [client().post("/", f"email={email}", content_type=kind) for email in ("a%40x", "A%40x+", "b%40x")]
        assert [response.status_code for response in seen] == [200, 429, 200]
        assert seen[0].content == b"a@x"

        async def walk() -> list[int]:
            return [
                (await aclient(B).post("/a", f"email={email}", content_type=kind)).status_code
                for email in ("c%40x", "C%40x", "d%40x")
            ]

        assert asyncio.run(walk()) == [200, 429, 200]
        assert client().post("/", "email=" + "x" * 70_000, content_type=kind).status_code == 413
        assert client().post("/", "email=e", content_type=kind, CONTENT_LENGTH="9" * 5000).status_code == 413


@BOTH
def test_a_form_that_csrf_protection_has_parsed_before_the_view_is_counted_all_the_same(
    middleware: tuple[str, ...],
) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.POST["email"])

    async def aview(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.POST["email"])

    by_email = limit("1/minute", key="form:email")
    token = "t" * 32
    csrf = (*middleware, "django.middleware.csrf.CsrfViewMiddleware")

    def form(*emails: str) -> dict[str, Any]:
        return {"email": emails, "csrfmiddlewaretoken": token}

    with site(path("", by_email(view)), path("a", by_email(aview)), middleware=csrf):
        browser = Client(enforce_csrf_checks=True, REMOTE_ADDR=A)
        browser.cookies["csrftoken"] = token
        seen = [browser.post("/", form(email)) for email in ("z@x", "Z@x ", "y@x")]
        assert [response.status_code for response in seen] == [200, 429, 200]
        assert browser.post("/", form("w@x", "v@x")).status_code == 400, "which the view believes is unknown"

        async def walk() -> list[int]:
            abrowser = AsyncClientAt(B)
            abrowser.handler.enforce_csrf_checks = True
            abrowser.cookies["csrftoken"] = token
            return [(await abrowser.post("/a", form(email))).status_code for email in ("c@x", "C@x", "d@x")]

        assert asyncio.run(walk()) == [200, 429, 200]


def test_a_client_that_leaves_within_a_body_that_is_read_for_its_key_is_no_fault_of_the_site() -> None:
    class Broken:
        def read(self, size: int = -1) -> bytes:
            raise ConnectionResetError

        readline = read

    policy = {"limits": [{"name": "named", "rate": "1/minute", "key": "json:name"}]}
    with site(path("", hello), policy=policy), logged("django.request") as records:
        request = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "15", "wsgi.input": Broken()}
        assert client().request(**request).status_code == 413
    assert records == []


def looks(get_response: Any) -> Any:
    """A middleware that looks for a form in every request."""
    return lambda request: get_response(request) if request.POST is not None else None


def test_a_limit_by_json_is_not_told_of_no_body_by_who_has_looked_for_a_form() -> None:
    with site(path("", limit("1/minute", key="json:name")(hello)), middleware=(MIDDLEWARE, f"{__name__}.looks")):
        seen = [client().put("/", f'{{"name": "{name}"}}', content_type="application/json") for name in "aab"]
    assert [response.status_code for response in seen] == [200, 429, 200]


def test_a_path_with_the_prefix_of_the_script_and_the_one_without_are_the_same_to_rules_and_routes() -> None:
    policy = {"limits": [{"name": "login", "rate": "1/minute", "match": "POST /app/login"}]}
    login = csrf_exempt(hello)
    with site(path("login", login), policy=policy, FORCE_SCRIPT_NAME="/app"):
        handler = ASGIHandler()
        asks = [Ask("POST", url, peer=peer) for peer in (A, B) for url in ("/app/login", "/login")]
        assert [asyncio.run(ask_asgi(handler, ask)).status for ask in asks] == [200, 429, 200, 429]
        asks = [Ask("POST", "/login", peer="192.0.2.8")] * 2
        assert [ask_wsgi(WSGIHandler(), ask).status for ask in asks] == [200, 429]


# What is told


@contextmanager
def logged(name: str) -> Iterator[list[logging.LogRecord]]:
    """The records of a logger."""
    records: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keeping()
    logging.getLogger(name).addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger(name).removeHandler(handler)


def test_a_refusal_is_one_line_in_the_security_log_and_none_in_that_of_requests() -> None:
    with site(path("x\n", limit("1/minute")(hello))), logged("django") as records:
        client().get("/x%0A?token=secret")
        assert records == []
        client().get("/x%0A?token=secret")
    (record,) = records
    assert record.name == "django.security.gatekeeper"
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"Too Many Requests (hello, {A}): /x\\n"
    assert record.status_code == 429  # type: ignore[attr-defined]


@contextmanager
def heard(signal: Any) -> Iterator[list[dict[str, Any]]]:
    """What a signal is sent with."""
    events: list[dict[str, Any]] = []

    def hear(sender: Any, signal: Any, **arguments: Any) -> None:
        assert sender is Gatekeeper
        events.append(arguments)

    signal.connect(hear)
    try:
        yield events
    finally:
        signal.disconnect(hear)


def test_each_refusal_is_signalled_with_the_rules_that_refused() -> None:
    patterns = [path("", hello), path("v", limit("1/minute", name="view")(hello)), path("a", ahello)]
    with site(*patterns, policy=rule("2/minute")), heard(gatekeeper_django.limited) as events:
        assert statuses("/v", 2) == [200, 429]
        assert [(event["rules"], event["request"].path) for event in events] == [(["view"], "/v")]
        assert events[0]["verdict"].retry_after == pytest.approx(60.9375)
        assert statuses("/", 1) == [429]
        assert events[1]["rules"] == ["default"]
        assert events[1]["ticket"].address == A
        assert asyncio.run(astatuses("/a", 3, B)) == [200, 200, 429]
        assert events[2]["rules"] == ["default"]


def test_a_ban_is_signalled_once_and_the_refusals_that_follow_are_no_bans() -> None:
    penalty = {"strikes": 2, "ban": "10m"}
    patterns = [path("", hello), path("a", ahello), path("v", limit("1/minute", name="v", penalty=penalty)(hello))]
    policy = {"limits": [{"name": "default", "rate": "1/minute", "match": "/", "penalty": penalty},
                         {"name": "async", "rate": "1/minute", "match": "/a", "penalty": penalty}]}  # fmt: skip
    with site(*patterns, policy=policy), heard(gatekeeper_django.banned) as bans:
        assert statuses("/", 5) == [200] + [429] * 4
        assert [(event["rule"], event["key"]) for event in bans] == [("default", A)]
        assert asyncio.run(astatuses("/a", 5, B)) == [200] + [429] * 4
        assert [(event["rule"], event["key"]) for event in bans[1:]] == [("async", B)]
        assert statuses("/v", 5) == [200] + [429] * 4
        assert [(event["rule"], event["key"]) for event in bans[2:]] == [("v", A)]


def test_an_error_of_a_receiver_changes_no_answer() -> None:
    def broken(**arguments: Any) -> None:
        raise RuntimeError

    gatekeeper_django.limited.connect(broken)
    try:
        with site(path("", limit("1/minute")(hello)), path("a", limit("1/minute")(ahello))):
            assert statuses("/", 2) == [200, 429]
            assert asyncio.run(astatuses("/a", 2)) == [200, 429]
    finally:
        gatekeeper_django.limited.disconnect(broken)


# Beside other middleware


def test_behind_cors_a_refusal_can_be_read_by_scripts_and_preflights_are_free() -> None:
    cors = "corsheaders.middleware.CorsMiddleware"
    origin = {"origin": "https://app.example"}
    preflight = {**origin, "access-control-request-method": "PUT"}
    settings = {
        "CORS_ALLOWED_ORIGINS": ["https://app.example"],
        "CORS_EXPOSE_HEADERS": ["RateLimit", "Retry-After"],
    }
    with site(path("", hello), policy=rule("1/minute"), middleware=(cors, MIDDLEWARE), **settings):
        assert [client().options("/", headers=preflight).status_code for _ in range(3)] == [200] * 3
        assert client().get("/", headers=origin).status_code == 200
        refused = client().get("/", headers=origin)
        assert refused.status_code == 429
        assert refused["Access-Control-Allow-Origin"] == "https://app.example"
    with site(path("", hello), policy=rule("1/minute"), middleware=(MIDDLEWARE, cors), **settings):
        assert [client().options("/", headers=preflight).status_code for _ in range(3)] == [200] * 3
        assert client().get("/", headers=origin).status_code == 200
        refused = client().get("/", headers=origin)
        assert (refused.status_code, "Access-Control-Allow-Origin" in refused.headers) == (429, False)


def test_a_limited_view_that_answers_preflights_itself_does_so_freely() -> None:
    preflight = {"origin": "https://app.example", "access-control-request-method": "PUT"}
    strict = limit("1/minute", preflights=True, name="strict")
    with site(
        path("", limit("1/minute")(hello)), path("a", limit("1/minute")(ahello)), path("strict", strict(hello))
    ):
        for url in ("/", "/a"):
            assert [client().options(url, headers=preflight).status_code for _ in range(3)] == [200] * 3
            assert [client().options(url).status_code for _ in range(2)] == [200, 429]
        assert [client().options("/strict", headers=preflight).status_code for _ in range(2)] == [200, 429]


def test_before_the_cache_no_client_is_told_the_quota_of_another() -> None:
    cache = ("django.middleware.cache.UpdateCacheMiddleware", "django.middleware.cache.FetchFromCacheMiddleware")
    with site(path("cached", hello), policy=rule("5/minute"), middleware=(MIDDLEWARE, *cache)):
        assert client().get("/cached")["RateLimit"] == '"default";r=4;t=61'
        assert client(B).get("/cached")["RateLimit"] == '"default";r=4;t=61'
        assert client(B).get("/cached")["RateLimit"] == '"default";r=3;t=61'


def test_a_streamed_body_reaches_limited_functions_within_the_request() -> None:
    gk = Gatekeeper({})

    @gk.limit("1/minute", name="part")
    def part() -> bytes:
        return b"x"

    def view(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(part() for _ in range(1))

    with site(path("", view)):
        assert client().get("/").getvalue() == b"x"
        assert client(B).get("/").getvalue() == b"x", "another client has a quota of its own"
        with pytest.raises(Limited):
            client().get("/").getvalue()
