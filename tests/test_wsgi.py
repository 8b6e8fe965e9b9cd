"""The WSGI shell: what PEP 3333 asks of a middleware, beyond the scenario table."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest
from flask import Flask
from starlette.applications import Starlette

from gatekeeper import Gatekeeper, SettingsError, asgi, decorators, wsgi
from gatekeeper.commands import Batch
from gatekeeper.testing import VirtualClock, virtual_store
from gatekeeper.wsgi import GatekeeperMiddleware

ONE = {"limits": [{"name": "one", "rate": "1/minute"}]}
MANY = {"limits": [{"name": "many", "rate": "1000/minute"}]}
FAILED_ONLY = {"limits": [{"name": "one", "rate": "1/minute", "give_back": ["2xx", "disconnect"]}]}

Start = Callable[..., Any]


def environ(path: str = "/", **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"PATH_INFO": path, "REMOTE_ADDR": "192.0.2.1", **more}
    setup_testing_defaults(values)
    return values


class Server:
    """Calls an application as a server does, and keeps what it did."""

    def __init__(self) -> None:
        self.heads: list[tuple[str, list[tuple[str, str]]]] = []
        self.written: list[bytes] = []

    def start_response(
        self, status: str, headers: list[tuple[str, str]], *exc_info: Any
    ) -> Callable[[bytes], None]:
        if self.heads:
            assert exc_info, "start_response is called again only with exc_info"
        self.heads.append((status, headers))
        return self.written.append

    def run(self, app: Any, values: dict[str, Any] | None = None) -> tuple[int, bytes]:
        body = app(values or environ(), self.start_response)
        try:
            content = b"".join(body)
        finally:
            if hasattr(body, "close"):
                body.close()
        return int(self.heads[-1][0][:3]), b"".join(self.written) + content


def ask(app: Any, values: dict[str, Any] | None = None) -> int:
    return Server().run(app, values)[0]


def hello(environ: dict[str, Any], start_response: Start) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


async def coroutine(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application."""


def plain(scope: Any, receive: Any, send: Any) -> Any:
    return coroutine(scope, receive, send)


@pytest.mark.parametrize("app", [coroutine, plain, Starlette(), asgi.GatekeeperMiddleware(coroutine, ONE)])
def test_an_asgi_application_is_told_where_its_middleware_is(app: Any) -> None:
    with pytest.raises(TypeError, match=r"from gatekeeper\.asgi import GatekeeperMiddleware"):
        GatekeeperMiddleware(app, ONE)
    asgi.GatekeeperMiddleware(app, ONE)


def test_a_wsgi_application_is_told_where_its_middleware_is() -> None:
    for app in (hello, Flask(__name__), Flask(__name__).wsgi_app, GatekeeperMiddleware(hello, ONE)):
        with pytest.raises(TypeError, match=r"from gatekeeper\.wsgi import GatekeeperMiddleware"):
            asgi.GatekeeperMiddleware(app, ONE)  # type: ignore[arg-type]
        GatekeeperMiddleware(app, ONE)


@pytest.mark.parametrize("arguments", [({},), ({}, coroutine, coroutine)])
def test_an_asgi_server_is_told_that_it_calls_a_wsgi_application(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"called by a WSGI server; .*gatekeeper\.asgi"):
        GatekeeperMiddleware(hello, ONE)(*arguments)


def test_the_application_never_sees_a_refused_request() -> None:
    seen = []

    def app(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        seen.append(environ)
        return hello(environ, start_response)

    middleware = GatekeeperMiddleware(app, ONE)
    assert [ask(middleware) for _ in range(3)] == [200, 429, 429]
    assert len(seen) == 1


def test_without_limited_functions_the_body_of_the_application_goes_by_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bodies: list[Any] = []

    def app(environ: dict[str, Any], start_response: Start) -> FileWrapper:
        start_response("200 OK", [])
        bodies.append(FileWrapper(open(__file__, "rb")))  # noqa: SIM115 - closed by the server
        return bodies[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(decorators, "IN_USE", [])
    monkeypatch.setattr(wsgi, "IN_USE", [])
    body = GatekeeperMiddleware(app, ONE)(environ(), Server().start_response)
    assert body is bodies[0]
    body.close()


def test_a_watched_body_is_streamed_and_closed_once() -> None:
    events: list[str] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            for number in range(3):
                events.append(f"made {number}")
                yield b"%d" % number

        def close(self) -> None:
            events.append("closed")

    def app(environ: dict[str, Any], start_response: Start) -> Body:
        start_response("500 No", [])
        return Body()

    body: Any = GatekeeperMiddleware(app, FAILED_ONLY)(environ(), Server().start_response)
    for chunk in body:
        events.append(f"sent {chunk.decode()}")
    body.close()
    assert events == ["made 0", "sent 0", "made 1", "sent 1", "made 2", "sent 2", "closed"]


def test_write_reaches_the_server() -> None:
    def app(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        start_response("200 OK", [])(b"written ")
        return [b"and returned"]

    assert Server().run(GatekeeperMiddleware(app, ONE)) == (200, b"written and returned")


def test_a_head_that_is_replaced_by_an_error_still_has_the_fields_once() -> None:
    def app(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        start_response("200 OK", [])
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oops", [], sys.exc_info())
        return [b"oops"]

    server = Server()
    server.run(GatekeeperMiddleware(app, MANY))
    assert [[name for name, _ in headers] for _, headers in server.heads] == [["ratelimit", "ratelimit-policy"]] * 2


def test_the_headers_of_the_application_are_not_changed_in_place() -> None:
    headers: list[tuple[str, str]] = []

    def app(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        start_response("200 OK", headers)
        return []

    middleware = GatekeeperMiddleware(app, MANY)
    ask(middleware)
    assert ask(middleware) == 200
    assert headers == []


def test_the_same_policy_around_a_mounted_application_charges_once() -> None:
    keeper = Gatekeeper({"limits": [{"name": "two", "rate": "2/minute"}]})
    app = GatekeeperMiddleware(GatekeeperMiddleware(hello, keeper), keeper)
    assert [ask(app) for _ in range(3)] == [200, 200, 429]


def test_a_rule_sees_the_mount_prefix_and_utf8_as_asgi_does() -> None:
    settings = {"limits": [{"name": "one", "rate": "1/minute", "match": "/app/caf\u00e9"}]}
    middleware = GatekeeperMiddleware(hello, settings)
    mounted: dict[str, Any] = {"SCRIPT_NAME": "/app", "PATH_INFO": "/café".encode().decode("latin-1")}
    assert [ask(middleware, environ(**mounted)) for _ in range(2)] == [200, 429]


def test_no_cycle_keeps_a_request_alive() -> None:
    class Thing:
        pass

    thing = Thing()
    kept = weakref.ref(thing)
    gc.disable()
    try:
        ask(GatekeeperMiddleware(hello, ONE), environ(**{"x.thing": thing}))  # type: ignore[arg-type]
        del thing
        assert kept() is None
    finally:
        gc.enable()


def test_an_asynchronous_user_function_is_refused_when_the_middleware_is_made() -> None:
    async def user(request: Any) -> str:
        return "ada"

    with pytest.raises(SettingsError, match=r"identity\.user: expected a function that is not asynchronous"):
        GatekeeperMiddleware(hello, {"identity": {"user": user}})


class TestOutcomes:
    """`finish` runs once, with what became of the request; here only failed requests count."""

    def left(self, app: Any, read: int | None = None) -> bool:
        keeper = Gatekeeper(FAILED_ONLY, store=virtual_store(VirtualClock()))
        try:
            body: Any = GatekeeperMiddleware(app, keeper)(environ(), Server().start_response)
            iterator = iter(body)
            try:
                for _ in range(read) if read is not None else iter(int, 1):
                    next(iterator)
            except StopIteration:
                pass
            finally:
                body.close()
        except ValueError:
            pass
        peek = Batch([(keeper.gate.rules[0].limits[0], "192.0.2.1", 1)], spend=False)
        return keeper.store.ask(peek)[0].allowed

    def test_a_success_is_given_back(self) -> None:
        assert self.left(hello)

    def test_an_error_status_counts(self) -> None:
        def app(environ: dict[str, Any], start_response: Start) -> list[bytes]:
            start_response("404 Not Found", [])
            return []

        assert not self.left(app)

    def test_an_exception_counts_as_a_500_when_called_and_when_iterated(self) -> None:
        def raises(environ: dict[str, Any], start_response: Start) -> list[bytes]:
            raise ValueError

        def raises_late(environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
            start_response("200 OK", [])
            yield b"x"
            raise ValueError

        assert not self.left(raises)
        assert not self.left(raises_late)

    def test_a_body_that_is_closed_before_its_end_is_a_disconnect(self) -> None:
        def app(environ: dict[str, Any], start_response: Start) -> list[bytes]:
            start_response("404 Not Found", [])
            return [b"a", b"b"]

        assert self.left(app, read=1)
        assert not self.left(app)


def limited(keeper: Gatekeeper, style: str) -> Any:
    """An application in which a decorated function is called where its style says."""

    @keeper.limit("2/minute", name="work")
    def work() -> bytes:
        return b"done"

    if style == "flask":
        flask = Flask("app")
        flask.add_url_rule("/", view_func=lambda: work())
        return flask

    def called(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        content = work()
        start_response("200 OK", [])
        return [content]

    def iterated(environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
        content = work()
        start_response("200 OK", [])
        yield content

    return {"called": called, "iterated": iterated}[style]


@pytest.mark.parametrize("style", ["called", "iterated", "flask"])
def test_a_refusal_deep_in_the_application_is_a_429_of_a_request_that_stays_charged(style: str) -> None:
    keeper = Gatekeeper({"limits": [{"name": "all", "rate": "5/minute"}]}, store=virtual_store(VirtualClock()))
    middleware = GatekeeperMiddleware(limited(keeper, style), keeper)
    servers = [Server() for _ in range(9)]
    answers = [server.run(middleware) for server in servers]
    assert [status for status, _ in answers] == [200, 200] + [429] * 7
    assert answers[0][1] == b"done"
    assert b'"violated-policies": ["work"]' in answers[2][1]
    assert dict(servers[2].heads[-1][1])["ratelimit"] == '"work";r=0;t=61'
    # The application ran for five of them; were they given back, it would run for any number.
    assert b'"violated-policies": ["all"]' in answers[-1][1]


def test_a_head_after_the_refusal_took_its_place_is_dropped() -> None:
    keeper = Gatekeeper({})

    @keeper.limit("1/minute")
    def work() -> None: ...

    def app(environ: dict[str, Any], start_response: Start) -> list[bytes]:
        try:
            work()
            start_response("200 OK", [])
        except Exception:
            start_response("500 Oops", [])
            start_response("200 OK", [("content-length", "2")], sys.exc_info())
        return [b"ok"]

    middleware = GatekeeperMiddleware(app, keeper)
    ask(middleware)
    server = Server()
    status, body = server.run(middleware)
    assert status == 429
    assert len(server.heads) == 1
    assert b"quota-exceeded" in body


def test_a_refusal_after_the_head_was_sent_is_the_servers_to_end() -> None:
    keeper = Gatekeeper({})

    @keeper.limit("1/minute")
    def work() -> bytes:
        return b"x"

    def app(environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield work()

    middleware = GatekeeperMiddleware(app, keeper)
    assert ask(middleware) == 200
    with pytest.raises(Exception, match="rate limit exceeded"):
        ask(middleware)
