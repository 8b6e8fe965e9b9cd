"""The ASGI shell: what the specification asks of a middleware, beyond the scenario table."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from gatekeeper import Gatekeeper, Limited, SettingsError
from gatekeeper.asgi import GatekeeperMiddleware, Message, Receive, Scope, Send
from gatekeeper.commands import Batch, Hits, Limit, Replies
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock, virtual_store

ONE = {"limits": [{"name": "one", "rate": "1/minute"}]}
FAILED_ONLY = {"limits": [{"name": "one", "rate": "1/minute", "give_back": ["2xx", "disconnect"]}]}


def http(path: str = "/", **more: Any) -> Scope:
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": [],
        "client": ("192.0.2.1", 5),
        "extensions": {},
    }
    return {**scope, **more}


def websocket(extensions: dict[str, Any] | None = None) -> Scope:
    scope = {
        "type": "websocket",
        "path": "/",
        "headers": [],
        "client": ("192.0.2.1", 5),
        "extensions": extensions or {},
    }
    return scope


async def call(app: Any, scope: Scope, *received: Message) -> list[Message]:
    sent: list[Message] = []
    incoming = list(received)

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b"hello"})


HEADERS: list[tuple[bytes, bytes]] = []


def run(app: Any, scope: Scope, *received: Message) -> list[Message]:
    return asyncio.run(call(app, scope, *received))


def test_the_messages_of_the_application_are_not_changed_in_place() -> None:
    app = GatekeeperMiddleware(hello, {"limits": [{"name": "a", "rate": "9/minute"}]})
    for _ in range(2):
        start, _body = run(app, http())
        assert [name for name, _ in start["headers"]] == [b"ratelimit", b"ratelimit-policy"]
    assert HEADERS == []


def test_a_message_without_headers_gets_ours() -> None:
    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    start, _ = run(GatekeeperMiddleware(bare, ONE), http())
    assert [name for name, _ in start["headers"]] == [b"ratelimit", b"ratelimit-policy"]


def test_the_application_never_sees_a_refused_request() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await hello(scope, receive, send)

    middleware = GatekeeperMiddleware(app, ONE)
    statuses = [run(middleware, http())[0]["status"] for _ in range(3)]
    assert statuses == [200, 429, 429]
    assert len(seen) == 1


def test_unknown_scopes_pass_through_untouched() -> None:
    seen: list[tuple[Any, ...]] = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    scope = {"type": "mystery"}
    asyncio.run(GatekeeperMiddleware(app, ONE)(scope, receive, send))
    assert seen == [(scope, receive, send)]
    assert seen[0][0] is scope
    assert scope == {"type": "mystery"}


def test_lifespan_is_forwarded_unchanged_and_ends_the_store_the_middleware_made() -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, int]]:
        events.append("up")
        yield {"state": 1}
        events.append("down")

    app = Starlette(
        routes=[Route("/", lambda request: PlainTextResponse(str(request.state.state)))], lifespan=lifespan
    )
    middleware = GatekeeperMiddleware(app, ONE)
    with TestClient(middleware) as client:
        assert client.get("/").text == "1"
        assert client.get("/").status_code == 429
    assert events == ["up", "down"]
    assert isinstance(middleware.keeper.store, MemoryStore)
    assert len(middleware.keeper.store) == 0


def test_an_application_without_lifespan_may_say_so() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError("lifespan")

    with pytest.raises(NotImplementedError):
        run(GatekeeperMiddleware(app, ONE), {"type": "lifespan"}, {"type": "lifespan.startup"})


def test_a_shared_gatekeeper_outlives_the_application() -> None:
    keeper = Gatekeeper(ONE)
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    with TestClient(GatekeeperMiddleware(app, keeper)) as client:
        client.get("/")
    assert isinstance(keeper.store, MemoryStore)
    assert len(keeper.store) == 1


def test_the_same_policy_around_a_mounted_application_charges_once() -> None:
    keeper = Gatekeeper({"limits": [{"name": "two", "rate": "2/minute"}]})
    inner = GatekeeperMiddleware(hello, keeper)
    outer = GatekeeperMiddleware(inner, keeper)
    assert [run(outer, http())[0]["status"] for _ in range(3)] == [200, 200, 429]
    start, _ = run(outer, http(client=("192.0.2.2", 1)))
    assert len(start["headers"]) == 2


def test_two_policies_around_each_other_both_hold() -> None:
    app = GatekeeperMiddleware(
        GatekeeperMiddleware(hello, ONE), {"limits": [{"name": "outer", "rate": "2/minute"}]}
    )
    assert [run(app, http())[0]["status"] for _ in range(3)] == [200, 429, 429]


@pytest.mark.parametrize(
    ("sparing", "statuses"), [("outer", [200, 429]), ("inner", [200, 429]), ("both", [200, 200])]
)
def test_a_network_that_one_policy_spares_is_limited_by_the_other(sparing: str, statuses: list[int]) -> None:
    def policy(name: str) -> dict[str, Any]:
        access = {"allow": "192.0.2.0/24"} if sparing in (name, "both") else {}
        return {"limits": [{"name": name, "rate": "1/minute"}], "access": access}

    app = GatekeeperMiddleware(GatekeeperMiddleware(hello, policy("inner")), policy("outer"))
    assert [run(app, http())[0]["status"] for _ in range(2)] == statuses


@pytest.mark.parametrize("spared_by", ["ours", "theirs"])
def test_a_limited_function_under_another_policy_spares_whom_its_own_spares(spared_by: str) -> None:
    access = {"access": {"allow": "192.0.2.0/24"}}
    keeper = Gatekeeper(access if spared_by == "ours" else {})

    @keeper.limit("1/minute")
    async def limited() -> None:
        pass

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await limited()
        await hello(scope, receive, send)

    outer = GatekeeperMiddleware(app, access if spared_by == "theirs" else {})
    assert [run(outer, http())[0]["status"] for _ in range(2)] == [200, 200 if spared_by == "ours" else 429]


def test_the_ticket_is_in_the_scope_and_is_not_kept_alive_by_a_cycle() -> None:
    class Thing:
        pass

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        ticket = scope["gatekeeper"]
        assert ticket.address == "192.0.2.1"
        assert ticket.tightest.verdict.remaining == 0
        await hello(scope, receive, send)

    thing = Thing()
    kept = weakref.ref(thing)
    gc.disable()
    try:
        run(GatekeeperMiddleware(app, ONE), http(thing=thing))
        del thing
        assert kept() is None
    finally:
        gc.enable()


class TestWebSockets:
    @staticmethod
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000})

    CONNECT: Final[Message] = {"type": "websocket.connect"}

    def test_an_accepted_handshake_has_the_fields(self) -> None:
        accept, _ = run(GatekeeperMiddleware(self.echo, ONE), websocket(), self.CONNECT)
        assert [name for name, _ in accept["headers"]] == [b"ratelimit", b"ratelimit-policy"]

    def test_a_refused_one_is_answered_with_status_and_fields_where_the_server_can(self) -> None:
        middleware = GatekeeperMiddleware(self.echo, ONE)
        run(middleware, websocket(), self.CONNECT)
        start, body = run(middleware, websocket({"websocket.http.response": {}}), self.CONNECT)
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 429)
        assert {b"retry-after", b"ratelimit", b"ratelimit-policy"} <= dict(start["headers"]).keys()
        assert body["type"] == "websocket.http.response.body"

    def test_elsewhere_it_is_closed_before_it_is_accepted(self) -> None:
        middleware = GatekeeperMiddleware(self.echo, ONE)
        run(middleware, websocket(), self.CONNECT)
        assert run(middleware, websocket(), self.CONNECT) == [{"type": "websocket.close", "code": 1013}]

    def test_under_a_real_framework(self) -> None:
        async def endpoint(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text(await socket.receive_text())

        app = Starlette(routes=[WebSocketRoute("/", endpoint)])
        app.add_middleware(GatekeeperMiddleware, settings={"limits": [{"name": "one", "rate": "1/minute"}]})
        client = TestClient(app)
        with client.websocket_connect("/") as socket:
            socket.send_text("hello")
            assert socket.receive_text() == "hello"
        with pytest.raises((WebSocketDisconnect, Exception)) as refused, client.websocket_connect("/"):
            pass
        assert "429" in repr(getattr(refused.value, "status_code", refused.value))

    def test_a_client_that_is_refused_by_the_application_gets_its_charge_back(self) -> None:
        async def deny(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

        settings = {"limits": [{"name": "one", "rate": "1/minute", "give_back": "403"}]}
        middleware = GatekeeperMiddleware(deny, settings)
        for _ in range(3):
            assert run(middleware, websocket(), self.CONNECT)[0]["code"] == 1008
        assert middleware.keeper.gate.failures == {}


class TestOutcomes:
    """`finish` runs once, with what became of the request; here only failed requests count."""

    def remaining(self, app: Any, scope: Scope | None = None, *received: Message) -> int:
        """What is left of one after a request."""
        keeper = Gatekeeper(FAILED_ONLY, store=virtual_store(VirtualClock()))

        async def main() -> None:
            try:
                await call(GatekeeperMiddleware(app, keeper), scope or http(), *received)
            except ValueError:
                pass

        asyncio.run(main())
        return keeper.store.ask(Batch([(keeper.gate.rules[0].limits[0], "192.0.2.1", 1)], spend=False))[0].allowed

    def test_a_success_is_given_back(self) -> None:
        assert self.remaining(hello)

    def test_an_error_status_counts(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body"})

        assert not self.remaining(app)

    def test_an_exception_counts_as_a_500(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise ValueError

        assert not self.remaining(app)

    def test_an_exception_after_the_head_counts_as_a_500(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ValueError

        assert not self.remaining(app)

    def test_a_body_sent_by_path_is_a_whole_answer(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.pathsend", "path": __file__})

        assert not self.remaining(app)

    def test_a_client_that_leaves_is_a_disconnect(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert (await receive())["type"] == "http.disconnect"

        assert self.remaining(app, http(), {"type": "http.disconnect"})

    def test_a_cancelled_request_is_a_disconnect(self) -> None:
        keeper = Gatekeeper(FAILED_ONLY)
        started = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            started.set()
            await asyncio.Event().wait()

        async def main() -> None:
            middleware = GatekeeperMiddleware(app, keeper)
            task = asyncio.create_task(call(middleware, http()))
            await started.wait()
            assert keeper.store.ask(peek(keeper))[0].allowed is False
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert keeper.store.ask(peek(keeper))[0].allowed is True

        asyncio.run(main())


def peek(keeper: Gatekeeper) -> Batch:
    return Batch([(keeper.gate.rules[0].limits[0], "192.0.2.1", 1)], spend=False)


class Remote:
    """A real store behind an await, as one on another machine would be."""

    local = False

    def __init__(self) -> None:
        self._store = MemoryStore()
        self.asked: list[Hits] = []
        self.slow: asyncio.Event | None = None

    def ask(self, batch: Hits) -> Replies:
        return self._store.ask(batch)

    async def aask(self, batch: Hits) -> Replies:
        self.asked.append(batch)
        await asyncio.sleep(0)
        if self.slow is not None:
            await self.slow.wait()
        return self._store.ask(batch)

    def keys(self, limit: Limit) -> list[str]:
        return self._store.keys(limit)

    async def akeys(self, limit: Limit) -> list[str]:
        return self._store.keys(limit)

    def close(self) -> None:
        self._store.close()

    async def aclose(self) -> None:
        self._store.close()


class TestAwaitingStores:
    def test_decides_the_same_with_one_question_a_request(self) -> None:
        store = Remote()
        middleware = GatekeeperMiddleware(hello, Gatekeeper(ONE, store=store))
        assert [run(middleware, http())[0]["status"] for _ in range(3)] == [200, 429, 429]
        assert len(store.asked) == 3

    def test_a_give_back_arrives_though_the_request_was_cancelled(self) -> None:
        store = Remote()
        keeper = Gatekeeper(FAILED_ONLY, store=store)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            store.slow = asyncio.Event()
            await asyncio.Event().wait()

        async def main() -> None:
            middleware = GatekeeperMiddleware(app, keeper)
            task = asyncio.create_task(call(middleware, http()))
            while store.slow is None:
                await asyncio.sleep(0)
            task.cancel()
            while len(store.asked) < 2:
                await asyncio.sleep(0)
            task.cancel()  # and again, while it finishes
            with pytest.raises(asyncio.CancelledError):
                await task
            store.slow.set()
            while middleware.keeper._finishing:
                await asyncio.sleep(0)
            assert store.ask(peek(keeper))[0].allowed

        asyncio.run(main())

    def test_a_user_function_may_be_asynchronous(self) -> None:
        async def user(request: Any) -> str | None:
            await asyncio.sleep(0)
            return request.field("x-user")  # type: ignore[no-any-return]

        settings = {"identity": {"user": user}, "limits": [{"name": "u", "rate": "1/minute", "key": "user"}]}
        middleware = GatekeeperMiddleware(hello, settings)
        statuses = [run(middleware, http(headers=[(b"x-user", name)]))[0]["status"] for name in (b"a", b"b", b"a")]
        assert statuses == [200, 200, 429]


def test_streaming_is_not_buffered() -> None:
    seen: list[int] = []
    sent: list[Message] = []

    async def numbers() -> AsyncIterator[bytes]:
        for number in range(3):
            seen.append(len(sent))
            yield b"%d" % number

    app = Starlette(routes=[Route("/", lambda request: StreamingResponse(numbers()))])
    app.add_middleware(GatekeeperMiddleware, settings=ONE)

    async def main() -> None:
        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        await app(http(query_string=b"", scheme="http", server=("x", 80), http_version="1.1"), receive, send)

    asyncio.run(main())
    assert seen == [1, 2, 3], "each chunk is sent before the next is asked for"


@pytest.mark.parametrize("settings", [{"limits": [{"name": "x"}]}, "no-such-file.toml", 7])
def test_wrong_settings_are_one_exception_when_the_middleware_is_made(settings: Any) -> None:
    with pytest.raises(SettingsError):
        GatekeeperMiddleware(hello, settings)


def make_limited(decorate: Callable[[Any], Any]) -> Starlette:
    @decorate
    async def work() -> str:
        return "done"

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await work())

    return Starlette(routes=[Route("/", endpoint)])


@pytest.mark.parametrize("outside", [True, False])
def test_a_refusal_deep_in_the_application_is_a_429_of_a_request_that_stays_charged(outside: bool) -> None:
    keeper = Gatekeeper({"limits": [{"name": "all", "rate": "5/minute"}]}, store=virtual_store(VirtualClock()))
    app = make_limited(keeper.limit("2/minute", name="work"))
    if outside:
        # Starlette's outermost layer has answered 500 before the error reaches us, and raises it again.
        client = TestClient(GatekeeperMiddleware(app, keeper))
    else:
        app.add_middleware(GatekeeperMiddleware, settings=keeper)
        client = TestClient(app)
    responses = [client.get("/") for _ in range(9)]
    assert [response.status_code for response in responses] == [200, 200] + [429] * 7
    assert responses[0].headers["ratelimit-policy"] == '"all";q=5;w=60, "work";q=2;w=60'
    refused = responses[2]
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["violated-policies"] == ["work"]
    assert refused.headers["ratelimit"] == '"work";r=0;t=61'
    # The application ran for five of them; were they given back, it would run for any number.
    assert responses[-1].json()["violated-policies"] == ["all"]


class TestFunctions:
    """What an application may do with limited functions, and must not get by it."""

    @staticmethod
    def statuses(app: Any, keeper: Gatekeeper, count: int) -> list[int]:
        middleware = GatekeeperMiddleware(app, keeper)
        return [run(middleware, http())[0]["status"] for _ in range(count)]

    def test_calls_that_have_run_stay_charged_when_a_later_one_is_refused(self) -> None:
        keeper = Gatekeeper({"limits": [{"name": "all", "rate": "100/minute"}]})
        ran: list[int] = []

        @keeper.limit("5/minute")
        def send_message() -> None:
            ran.append(1)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for _ in range(6):
                send_message()
            await hello(scope, receive, send)

        assert self.statuses(app, keeper, 20) == [429] * 20
        assert len(ran) == 5

    def test_an_application_that_catches_the_refusal_is_limited_all_the_same(self) -> None:
        keeper = Gatekeeper({"limits": [{"name": "all", "rate": "3/minute"}]})

        @keeper.limit("1/minute")
        def extra() -> None: ...

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                extra()
            except Limited:
                pass
            await hello(scope, receive, send)

        assert self.statuses(app, keeper, 6) == [200, 200, 200, 429, 429, 429]

    def test_a_fault_after_a_caught_refusal_stays_a_fault(self) -> None:
        keeper = Gatekeeper({})

        @keeper.limit("1/minute")
        def extra() -> None: ...

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                extra()
            except Limited:
                pass
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body"})

        assert self.statuses(app, keeper, 3) == [500, 500, 500]

    def test_a_task_that_outlives_its_request_changes_nothing_of_it(self) -> None:
        keeper = Gatekeeper({"limits": [{"name": "all", "rate": "3/minute"}]})
        outcomes: list[str] = []

        @keeper.limit("1/minute", key="header:x-key")
        async def later() -> None: ...

        async def main() -> list[int]:
            tasks = []

            async def work() -> None:
                await asyncio.sleep(0)
                try:
                    await later()
                except Limited:
                    outcomes.append("limited")

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                tasks.append(asyncio.create_task(work()))
                await hello(scope, receive, send)

            middleware = GatekeeperMiddleware(app, keeper)
            statuses = []
            for _ in range(6):
                statuses.append((await call(middleware, http()))[0]["status"])
                await asyncio.gather(*tasks)
            return statuses

        assert asyncio.run(main()) == [200, 200, 200, 429, 429, 429]
        assert outcomes == ["limited"] * 2

    def test_concurrent_calls_behind_an_awaiting_store_are_each_decided(self) -> None:
        keeper = Gatekeeper({"limits": [{"name": "all", "rate": "100/minute"}]}, store=Remote())
        ran: list[int] = []

        @keeper.limit("1/hour")
        async def once() -> None:
            ran.append(1)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.gather(*[once() for _ in range(6)], return_exceptions=True)
            await hello(scope, receive, send)

        assert self.statuses(app, keeper, 3) == [200] * 3
        assert len(ran) == 1

    @pytest.mark.parametrize("inner", [{}, {"limits": [{"name": "inner", "rate": "100/minute"}]}])
    def test_a_function_of_another_policy_limits_each_client_and_is_a_429(self, inner: dict[str, Any]) -> None:
        keeper, other = Gatekeeper(inner), Gatekeeper({})
        app = GatekeeperMiddleware(make_limited(other.limit("2/minute")), keeper)
        for client in ("192.0.2.1", "192.0.2.2"):
            test = TestClient(app, client=(client, 1))
            assert [test.get("/").status_code for _ in range(3)] == [200, 200, 429]

    def test_a_policy_that_stands_twice_with_another_between_charges_once(self) -> None:
        keeper, other = Gatekeeper({"limits": [{"name": "a", "rate": "2/minute"}]}), Gatekeeper({})
        app = GatekeeperMiddleware(GatekeeperMiddleware(GatekeeperMiddleware(hello, keeper), other), keeper)
        assert [run(app, http())[0]["status"] for _ in range(3)] == [200, 200, 429]


def test_a_denial_by_the_application_of_a_websocket_is_an_answer_like_any() -> None:
    async def deny(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"no"})

    settings = {"limits": [{"name": "one", "rate": "2/minute", "give_back": "disconnect"}]}
    middleware = GatekeeperMiddleware(deny, settings)
    scope = websocket({"websocket.http.response": {}})
    heads = [run(middleware, dict(scope), {"type": "websocket.connect"})[0] for _ in range(3)]
    assert [head["status"] for head in heads] == [401, 401, 429]
    assert [name for name, _ in heads[0]["headers"]] == [b"ratelimit", b"ratelimit-policy"]
