"""How requests end in Django: once, with the last byte, with an error, or with the client gone."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE  # first: Django wants its settings

# isort: split
import asyncio
import gc
import io
from collections.abc import AsyncIterator, Iterator
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import path

import gatekeeper_django
from gatekeeper.commands import Batch, Hits, Replies
from gatekeeper.testing import virtual_store
from gatekeeper_django import limit
from tests.scenarios import A, B
from tests.test_django import BOTH, aclient, client, hello, site

ONE = {"limits": [{"name": "one", "concurrency": 1}]}
"""One request of each client in progress."""


def open_now(address: str = A) -> bool:
    """Whether a request of the client is in progress, by the one rule."""
    keeper = gatekeeper_django.keeper()
    (lease,) = keeper.gate.rules[0].limits
    (verdict,) = keeper.store.ask(Batch([(lease, address, 1)], spend=False))
    return not verdict.allowed


@pytest.mark.parametrize("place", ["rule", "limit", "limit without the middleware"])
def test_a_request_is_in_progress_until_its_body_is_closed(place: str) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return StreamingHttpResponse(iter([b"a", b"b"]))

    limited = view if place == "rule" else limit(concurrency=1)(view)
    middleware = () if "without" in place else (MIDDLEWARE,)
    with site(path("", limited), policy=ONE if place == "rule" else {}, middleware=middleware):
        first = client().get("/")
        assert client().get("/").status_code == 429
        assert client(B).get("/").status_code == 200
        content = iter(first)
        assert next(content) == b"a"
        assert client().get("/").status_code == 429
        assert list(content) == [b"b"]
        assert client().get("/").status_code == 200


def environ() -> dict[str, Any]:
    found: dict[str, Any] = {"REMOTE_ADDR": A}
    setup_testing_defaults(found)
    return found


def test_a_plain_response_ends_when_the_server_closes_it() -> None:
    with site(path("", hello), policy=ONE):
        handler = WSGIHandler()
        response = handler(environ(), lambda *head: None)
        assert open_now()
        response.close()
        response.close()
        assert not open_now()


def test_a_response_that_another_middleware_drops_ends_with_it() -> None:
    with site(path("", hello), policy=ONE, middleware=("tests.test_django_ends.Replacing", MIDDLEWARE)):
        assert client().get("/").content == b"replaced"
        gc.collect()
        assert not open_now()


class Replacing:
    """A middleware that answers something else."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        self.get_response(request)
        return HttpResponse("replaced")


@BOTH
def test_a_view_that_fails_ends_its_request(middleware: tuple[str, ...]) -> None:
    def broken(request: HttpRequest) -> HttpResponse:
        raise ZeroDivisionError

    async def abroken(request: HttpRequest) -> HttpResponse:
        raise ZeroDivisionError

    lax = {"name": "lax", "give_back": "5xx"}
    with site(
        path("", limit("1/minute", **lax)(broken)),
        path("a", limit("1/minute", **lax)(abroken)),
        middleware=middleware,
    ):
        one = client(raise_request_exception=False)
        assert [one.get("/").status_code for _ in range(3)] == [500] * 3
        assert [one.get("/a").status_code for _ in range(3)] == [500] * 3


def test_an_error_that_django_lets_through_ends_its_request() -> None:
    def broken(request: HttpRequest) -> HttpResponse:
        raise ZeroDivisionError

    async def abroken(request: HttpRequest) -> HttpResponse:
        raise ZeroDivisionError

    async def walk() -> None:
        with pytest.raises(ZeroDivisionError):
            await aclient().get("/a")
        assert not open_now()

    with (
        site(path("", broken), path("a", abroken), policy=ONE),
        override_settings(DEBUG_PROPAGATE_EXCEPTIONS=True),
    ):
        with pytest.raises(ZeroDivisionError):
            client().get("/")
        assert not open_now()
        asyncio.run(walk())


def test_only_failed_logins_are_charged() -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(status=200 if request.GET["password"] == "right" else 401)

    with site(path("", limit("2/minute", give_back="2xx")(view))):
        seen = [client().get(f"/?password={word}").status_code for word in ("right", "no", "right", "no", "right")]
        assert seen == [200, 401, 200, 401, 429]


def test_what_a_response_says_that_it_has_cost_is_charged_and_not_told() -> None:
    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse("x", headers={"X-Cost": "5"})

    with site(path("", view), policy={"limits": [{"name": "c", "rate": "9/minute", "settle": "header:X-Cost"}]}):
        response = client().get("/")
        assert (response["RateLimit"], "X-Cost" in response.headers) == ('"c";r=8;t=61', False)
        assert client().get("/")["RateLimit"] == '"c";r=3;t=61'


def test_the_bytes_of_a_file_are_counted_and_it_is_sent_all_the_same() -> None:
    def view(request: HttpRequest) -> FileResponse:
        return FileResponse(io.BytesIO(b"x" * 9000), filename="x.bin")

    with site(path("", view), policy={"limits": [{"name": "b", "rate": "20000/minute", "settle": "bytes"}]}):
        response = client().get("/")
        assert (response["Content-Length"], len(response.getvalue())) == ("9000", 9000)
        assert client().get("/")["RateLimit"] == '"b";r=10999;t=61'


def test_a_file_that_nobody_counts_is_the_servers_to_send() -> None:
    def view(request: HttpRequest) -> FileResponse:
        return FileResponse(open(__file__, "rb"))  # the response closes it

    with site(path("", limit("9/minute")(view))):
        body = WSGIHandler()({**environ(), "wsgi.file_wrapper": FileWrapper}, lambda *head: None)
        assert isinstance(body, FileWrapper)
        body.close()


class Remote:
    """A store that has to be awaited, and says who asked it how."""

    local = False

    def __init__(self, clock: Any) -> None:
        self.store = virtual_store(clock)
        self.asked: list[str] = []

    def ask(self, batch: Hits) -> Replies:
        self.asked.append("blocking")
        return self.store.ask(batch)

    async def aask(self, batch: Hits) -> Replies:
        self.asked.append("awaiting")
        await asyncio.sleep(0)
        return self.store.ask(batch)

    def keys(self, limit: Any) -> list[str]:
        return self.store.keys(limit)

    async def akeys(self, limit: Any) -> list[str]:
        return self.store.keys(limit)

    def close(self) -> None: ...

    async def aclose(self) -> None: ...


async def until(what: Any) -> None:
    """A bounded wait for what ends in a task of its own."""
    for _ in range(1000):
        if what():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it does not come to be")


@pytest.mark.parametrize("store", ["memory", "remote"])
@pytest.mark.parametrize("place", ["rule", "limit", "limit without the middleware"])
def test_an_asynchronous_stream_is_in_progress_until_its_end(store: str, place: str) -> None:
    release = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"a"
        await release.wait()
        yield b"b"

    async def view(request: HttpRequest) -> HttpResponse:
        return StreamingHttpResponse(content())

    limited = view if place == "rule" else limit(concurrency=1, name="one")(view)
    middleware = () if "without" in place else (MIDDLEWARE,)

    async def walk() -> None:
        first = await aclient().get("/")
        assert first.status_code == 200
        assert (await aclient().get("/")).status_code == 429
        release.set()
        assert b"".join([part async for part in first]) == b"ab"
        last = await aclient().get("/")
        for _ in range(1000):  # a remote store is told in a task of its own
            if last.status_code == 200:
                break
            await asyncio.sleep(0.001)
            last = await aclient().get("/")
        assert last.status_code == 200
        assert [part async for part in last] == [b"a", b"b"]

    with site(path("", limited), policy=ONE if place == "rule" else {}, middleware=middleware) as clock:
        remote = Remote(clock)
        if store == "remote":
            gatekeeper_django.keeper().use(remote)
        asyncio.run(walk())
    assert "blocking" not in remote.asked


@pytest.mark.parametrize("when", ["in the view", "while the body is sent"])
def test_a_client_that_leaves_an_asynchronous_request_ends_it(when: str) -> None:
    reached = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"a"
        reached.set()
        await asyncio.Future()

    async def view(request: HttpRequest) -> HttpResponse:
        if when == "in the view":
            reached.set()
            await asyncio.Future()
        return StreamingHttpResponse(content())

    policy = {
        "limits": [{"name": "one", "concurrency": 1}, {"name": "r", "rate": "1/minute", "give_back": "disconnect"}]
    }

    async def walk() -> None:
        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await reached.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": (A, 1), "query_string": b""}
        task = asyncio.ensure_future(ASGIHandler()(scope, receive, send))
        await reached.wait()
        await task
        await until(lambda: not open_now())
        (_, limited) = gatekeeper_django.keeper().gate.rules
        (verdict,) = gatekeeper_django.keeper().store.ask(Batch([(limited.limits[0], A, 1)], spend=False))
        assert verdict.allowed, "a client that left is not charged, as the rule says"

    with site(path("", view), policy=policy):
        asyncio.run(walk())


def test_a_client_that_leaves_a_synchronous_stream_ends_it() -> None:
    def content() -> Iterator[bytes]:
        yield b"a"
        yield b"b"

    def view(request: HttpRequest) -> HttpResponse:
        return StreamingHttpResponse(content())

    policy = {
        "limits": [{"name": "one", "concurrency": 1}, {"name": "r", "rate": "1/minute", "give_back": "disconnect"}]
    }
    with site(path("", view), policy=policy):
        response = client().get("/")
        assert next(iter(response)) == b"a"
        response.close()
        assert not open_now()
        assert client().get("/").status_code == 200


def test_a_request_holds_its_ticket_and_the_ticket_holds_no_request_afterwards() -> None:
    with site(path("", limit("9/minute")(hello)), policy={"limits": [{"name": "a", "rate": "9/minute"}]}):
        for response in (client().get("/"), asyncio.run(aclient().get("/"))):
            request = getattr(response, "wsgi_request", None) or response.asgi_request
            assert request.gatekeeper.native is None
            assert len(request.gatekeeper.charges) == 2


def test_a_remote_store_is_awaited_where_requests_are_and_asked_blocking_where_they_are_not() -> None:
    policy = {"limits": [{"name": "a", "rate": "9/minute", "give_back": "404"}]}
    with site(
        path("", limit("9/minute")(hello)), path("a", limit("9/minute")(hello_async)), policy=policy
    ) as clock:
        remote = Remote(clock)
        gatekeeper_django.keeper().use(remote)
        assert asyncio.run(ask("/a")) == 200
        assert set(remote.asked) == {"awaiting"}
        remote.asked.clear()
        assert client().get("/").status_code == 200
        assert set(remote.asked) == {"blocking"}


async def hello_async(request: HttpRequest) -> HttpResponse:
    return HttpResponse("hello")


async def ask(url: str) -> int:
    response = await aclient().get(url)
    await asyncio.sleep(0)
    return int(response.status_code)


def test_a_remote_store_is_asked_once_for_a_refusal_too() -> None:
    with site(path("", limit("1/minute")(hello)), path("a", limit("1/minute")(hello_async))) as clock:
        remote = Remote(clock)
        gatekeeper_django.keeper().use(remote)
        assert [client().get("/").status_code for _ in range(3)] == [200, 429, 429]
        assert remote.asked == ["blocking"] * 3
        remote.asked.clear()
        assert [asyncio.run(ask("/a")) for _ in range(3)] == [200, 429, 429]
        assert remote.asked == ["awaiting"] * 3
