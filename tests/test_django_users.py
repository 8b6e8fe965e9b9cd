"""Limits by the user that Django has authenticated."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE, SESSIONS, AsyncClientAt, database  # first: Django wants its settings

# isort: split
import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth import get_user_model, login
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.urls import path

import gatekeeper_django
from gatekeeper.commands import Batch, Hits, Replies
from gatekeeper_django import limit, user_of
from tests.scenarios import A, B
from tests.test_django import client, hello, site

BEFORE = (MIDDLEWARE, *SESSIONS)
BEHIND = (*SESSIONS, MIDDLEWARE)
PLACES = pytest.mark.parametrize("middleware", [BEFORE, BEHIND], ids=["before sessions", "behind sessions"])


@pytest.fixture(scope="module")
def ada() -> Any:
    database()
    return get_user_model().objects.get_or_create(username="ada")[0]


@pytest.fixture(scope="module")
def bob() -> Any:
    database()
    return get_user_model().objects.get_or_create(username="bob", is_staff=True)[0]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Connections that threads of the tests have opened are theirs."""
    yield
    from django.db import connections

    connections.close_all()


def of(user: Any, address: str = A) -> Any:
    one = client(address)
    if user is not None:
        one.force_login(user)
    return one


def aof(user: Any, address: str = A) -> Any:
    one = AsyncClientAt(address)
    if user is not None:
        one.force_login(user)
    return one


async def ahello(request: HttpRequest) -> HttpResponse:
    return HttpResponse("hello")


def by_user(rate: str = "2/minute", **more: Any) -> dict[str, Any]:
    return {"limits": [{"name": "user", "rate": rate, "key": "user", **more}]}


@PLACES
def test_a_rule_by_the_user_counts_each_wherever_he_comes_from(
    middleware: tuple[str, ...], ada: Any, bob: Any
) -> None:
    with site(path("", hello), policy=by_user(), middleware=middleware):
        seen = [of(ada, address).get("/").status_code for address in (A, B, "192.0.2.3")]
        assert seen == [200, 200, 429]
        assert of(bob).get("/")["RateLimit"] == '"user";r=1;t=61'
        assert [of(None).get("/").status_code for _ in range(3)] == [200, 200, 429], "the anonymous by address"
        assert of(None, B).get("/").status_code == 200


@PLACES
def test_a_rule_by_the_user_counts_asynchronous_requests_too(
    middleware: tuple[str, ...], ada: Any, bob: Any
) -> None:
    clients = [aof(ada, A), aof(ada, B), aof(ada, A), aof(bob), aof(None), aof(None), aof(None)]

    async def walk() -> list[int]:
        return [(await one.get("/")).status_code for one in clients]

    with site(path("", ahello), policy=by_user(), middleware=middleware):
        assert asyncio.run(walk()) == [200, 200, 429, 200, 200, 200, 429]


@PLACES
def test_what_a_user_is_refused_spends_nothing_of_the_rule_by_address(
    middleware: tuple[str, ...], ada: Any
) -> None:
    policy = {"limits": [{"name": "ip", "rate": "3/minute"}, *by_user("1/minute")["limits"]]}
    with site(path("", hello), policy=policy, middleware=middleware):
        one = of(ada)
        assert [one.get("/").status_code for _ in range(9)] == [200] + [429] * 8
        assert [of(None).get("/").status_code for _ in range(3)] == [200, 429, 429]
        last = of(None).get("/")
        assert last["RateLimit"] == '"user";r=0;t=61', "of the three of the address one is left"


@pytest.mark.parametrize("overrides", [{}, {"overrides": "none"}], ids=["side by side", "one in place of another"])
def test_who_is_over_the_limit_of_his_address_is_refused_before_anybody_asks_who_he_is(
    overrides: dict[str, str], ada: Any, django_queries: list[str]
) -> None:
    none = {"name": "none", "rate": "1/minute"}
    policy = {
        "limits": [none] * bool(overrides)
        + [{"name": "ip", "rate": "2/minute", **overrides}, *by_user("9/minute")["limits"]]
    }
    with site(path("", hello), policy=policy, middleware=BEFORE):
        one = of(ada)
        assert [one.get("/").status_code for _ in range(2)] == [200, 200]
        django_queries.clear()
        assert one.get("/").status_code == 429
        assert django_queries == []


@pytest.fixture
def django_queries() -> Iterator[list[str]]:
    """The SQL that was asked."""
    from django.db import connection

    asked: list[str] = []

    def note(execute: Any, sql: str, *arguments: Any) -> Any:
        asked.append(sql)
        return execute(sql, *arguments)

    with connection.execute_wrapper(note):
        yield asked


def test_nobody_is_asked_for_where_no_rule_that_applies_counts_by_him(ada: Any, django_queries: list[str]) -> None:
    with site(path("", hello), policy=by_user(match="/other"), middleware=BEFORE):
        one = of(ada)
        django_queries.clear()
        assert one.get("/").status_code == 200
        assert django_queries == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_pages_that_are_not_there_are_counted_by_the_user_as_well(kind: str, ada: Any) -> None:
    with site(path("there", hello), policy=by_user(), middleware=BEFORE):
        if kind == "sync":
            one = of(ada)
            assert [one.get("/nowhere").status_code for _ in range(3)] == [404, 404, 429]
            assert one.get("/there").status_code == 429
        else:
            one = aof(ada)

            async def walk() -> list[int]:
                return [(await one.get(url)).status_code for url in ("/nowhere", "/nowhere", "/nowhere", "/there")]

            assert asyncio.run(walk()) == [404, 404, 429, 429]


@PLACES
def test_a_view_limited_by_the_user_is_so_without_any_rule(middleware: tuple[str, ...], ada: Any, bob: Any) -> None:
    with site(path("", limit("1/minute", key="user")(hello)), middleware=middleware):
        assert [of(user, address).get("/").status_code for user, address in ((ada, A), (ada, B), (bob, A))] == [
            200,
            429,
            200,
        ]
    with site(path("", limit("1/minute", key="user")(hello)), middleware=SESSIONS):
        assert [of(ada).get("/").status_code, of(ada, B).get("/").status_code] == [200, 429]
    with site(path("", limit("1/minute", key="user")(ahello)), middleware=middleware):

        async def walk() -> list[int]:
            return [(await one.get("/")).status_code for one in clients]

        clients = [aof(ada), aof(ada, B), aof(bob)]
        assert asyncio.run(walk()) == [200, 429, 200]


def test_an_asynchronous_request_to_a_view_in_a_thread_finds_its_user(ada: Any, bob: Any) -> None:
    clients = [aof(ada), aof(ada, B), aof(bob)]

    async def walk() -> list[int]:
        return [(await one.get("/")).status_code for one in clients]

    policy = by_user("9/minute")
    with site(path("", limit("1/minute", key="user", name="v")(hello)), policy=policy, middleware=BEFORE):
        assert asyncio.run(walk()) == [200, 429, 200]


def test_who_logs_in_within_a_request_is_known_to_what_is_counted_after_it(ada: Any) -> None:
    by_name = limit("1/minute", key="user", name="after")

    def view(request: HttpRequest) -> HttpResponse:
        login(request, ada, backend="django.contrib.auth.backends.ModelBackend")
        return HttpResponse(str(by_name.hit(request).allowed))

    with site(path("", view), policy=by_user("9/minute"), middleware=BEFORE):
        assert [of(None, address).get("/").content for address in (A, B)] == [b"True", b"False"]


def test_claims_say_what_the_user_is(ada: Any, bob: Any) -> None:
    policy = by_user("1/minute", tier="claim:is_staff", tiers={"true": "3/minute"})
    with site(path("", hello), policy=policy, middleware=BEFORE):
        assert [of(ada).get("/").status_code for _ in range(2)] == [200, 429]
        assert [of(bob).get("/").status_code for _ in range(4)] == [200, 200, 200, 429]
    with site(path("", hello), policy=by_user("1/minute", exempt=f"user:{bob.pk}"), middleware=BEFORE):
        assert [of(bob).get("/").status_code for _ in range(3)] == [200] * 3


def test_the_settings_may_name_another_user_than_djangos(ada: Any) -> None:
    policy = {**by_user("1/minute"), "identity": {"user": lambda ticket: ticket.native.headers.get("X-Team")}}
    with site(path("", hello), policy=policy, middleware=BEFORE):
        assert [of(ada).get("/", headers={"X-Team": team}).status_code for team in "aab"] == [200, 429, 200]


def test_user_of_can_be_named_and_knows_nobody_where_nobody_authenticates() -> None:
    request = RequestFactory().get("/")
    with site(policy={"identity": {"user": "gatekeeper_django:user_of"}}):
        assert gatekeeper_django.keeper().settings.identity.user is user_of
        ticket = gatekeeper_django.requests.DjangoTicket(request)
        assert user_of(ticket) is None
        request.user = None
        assert user_of(ticket) is None


def test_a_store_that_does_not_answer_refuses_nobody_early(ada: Any) -> None:
    class Deaf:
        local = True

        def ask(self, batch: Hits) -> Replies:
            from gatekeeper import StoreError

            assert not (isinstance(batch, Batch) and batch.local)
            return [StoreError("deaf") for _ in batch]

        async def aask(self, batch: Hits) -> Replies:
            return self.ask(batch)

        def keys(self, limit: Any) -> list[str]:
            return []

        async def akeys(self, limit: Any) -> list[str]:
            return []

        def close(self) -> None: ...

        async def aclose(self) -> None: ...

    policy = {"limits": [{"name": "ip", "rate": "5/minute"}, *by_user("1/minute")["limits"]]}
    with site(path("", hello), policy=policy, middleware=BEFORE):
        gatekeeper_django.keeper().use(Deaf())
        assert [of(ada).get("/").status_code for _ in range(2)] == [200, 429], "counted in the process"


class SyncOnly:
    """A middleware of the old kind, which Django runs in a thread."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)


@pytest.mark.parametrize("middleware", [(MIDDLEWARE, *SESSIONS, "."), (".", MIDDLEWARE, *SESSIONS)])
def test_middleware_of_the_old_kind_may_stand_on_either_side(
    middleware: tuple[str, ...], ada: Any, bob: Any
) -> None:
    names = tuple(f"{__name__}.SyncOnly" if name == "." else name for name in middleware)
    clients = [aof(ada), aof(ada, B), aof(bob), aof(None), aof(None)]

    async def walk(url: str) -> list[int]:
        return [(await one.get(url)).status_code for one in clients]

    patterns = [
        path("a", limit("1/minute", key="user", name="v")(ahello)),
        path("s", limit("1/minute", key="user", name="v")(hello)),
    ]
    for url in ("/a", "/s", "/nowhere"):
        with site(*patterns, policy=by_user("1/minute"), middleware=names):
            passed = 404 if url == "/nowhere" else 200
            assert asyncio.run(walk(url)) == [passed, 429, passed, passed, 429], url
