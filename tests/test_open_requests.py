"""What is held while a request is open, and what is read before it is decided, in each shell."""

from __future__ import annotations

import asyncio
import gc
import io
from pathlib import Path
from typing import Any

import pytest

from gatekeeper import Gatekeeper, SettingsError
from gatekeeper.asgi import GatekeeperMiddleware as Asgi
from gatekeeper.asgi import Message, Receive, Scope, Send
from gatekeeper.wsgi import GatekeeperMiddleware as Wsgi
from tests.gateway import Client, answering, request, says, silent, staged

BUSY = {"limits": [{"name": "busy", "concurrency": 1}]}
NAMED = {"limits": [{"name": "named", "rate": "1/minute", "key": "json:name"}], "identity": {"max_body": "1KiB"}}


# ASGI


def scope(kind: str = "http", **more: Any) -> Scope:
    return {"type": kind, "method": "POST", "path": "/", "headers": [], "client": ("192.0.2.1", 1), **more}


async def status_of(app: Any, receive: Receive | None = None) -> int:
    sent: list[Message] = []

    async def keep(message: Message) -> None:
        sent.append(message)

    await app(scope(), receive or nothing, keep)
    status: int = sent[0]["status"]
    return status


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize("ending", ["ends", "fails", "is cancelled", "is left"])
def test_asgi_a_slot_is_free_again_however_its_request_ends(ending: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        begun.set()
        await go_on.wait()
        if ending == "fails":
            raise ZeroDivisionError
        if ending == "ends":
            await send({"type": "http.response.body", "body": b"ok"})

    async def main() -> None:
        middleware = Asgi(slow, BUSY)
        task = asyncio.create_task(status_of(middleware))
        await begun.wait()
        middleware.app = ok
        assert await status_of(middleware) == 429
        if ending == "is cancelled":
            task.cancel()
        go_on.set()
        await asyncio.gather(task, return_exceptions=True)
        assert await status_of(middleware) == 200
        assert len(middleware.keeper._leases) == 0

    asyncio.run(main())


@pytest.mark.parametrize("more", [True, False], ids=["and the client leaves within it", "whole"])
def test_asgi_the_application_receives_the_body_once_and_as_one_message_though_it_was_read_before(
    more: bool,
) -> None:
    body = b'{"name": "bob"}'
    # Of a body in so many pieces the messages are far larger than what they bring.
    incoming: list[Message] = [{"type": "http.request", "body": bytes([byte]), "more_body": True} for byte in body]
    incoming[-1]["more_body"] = more
    incoming.append({"type": "http.disconnect"})
    seen: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])
        await ok(scope, receive, send)

    async def receive() -> Message:
        return incoming.pop(0)

    assert asyncio.run(status_of(Asgi(app, NAMED), receive)) == 200
    assert seen == [{"type": "http.request", "body": body, "more_body": more}, {"type": "http.disconnect"}]


def test_asgi_no_more_of_a_long_body_is_read_than_the_bound_and_a_client_that_leaves_is_no_error() -> None:
    asked = 0

    async def endless() -> Message:
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": b"x" * 500, "more_body": True}

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def main() -> None:
        middleware = Asgi(ok, NAMED)
        assert await status_of(middleware, endless) == 413
        assert asked == 3
        assert await status_of(middleware, gone) == 200
        assert await status_of(middleware, gone) == 429, "counted by its address"

    asyncio.run(main())


def test_asgi_the_body_of_a_client_that_is_over_another_limit_is_not_waited_for() -> None:
    limits = [{"name": "address", "rate": "1/minute"}, {"name": "named", "rate": "9/minute", "key": "json:name"}]

    async def whole() -> Message:
        return {"type": "http.request", "body": b'{"name": "bob"}'}

    async def never() -> Message:
        raise AssertionError("the body was asked for")

    async def main() -> None:
        middleware = Asgi(ok, {"limits": limits})
        assert await status_of(middleware, whole) == 200
        assert await status_of(middleware, never) == 429
        named = middleware.keeper.gate.rules[1].limits[0]
        assert middleware.keeper.ask([(named, "=bob", 1)])[0].remaining == 7  # type: ignore[union-attr]

    asyncio.run(main())


def test_asgi_messages_within_a_websocket_are_limited_and_the_connection_is_closed_with_1013() -> None:
    limits = [
        {
            "name": "talk",
            "rate": "2/minute",
            "per": "message",
            "match": "/chat/{room}",
            "key": ["ip", "param:room"],
        },
        {"name": "open", "rate": "9/minute"},
    ]

    for response, code in (({}, 1013), ({"close_code": 1008}, 1008)):
        middleware = Asgi(ok, {"limits": limits, "response": response})

        async def main(middleware: Asgi = middleware) -> list[tuple[list[Message], list[Message]]]:
            results = []
            for path in ("/chat/a", "/chat/a", "/chat/b", "/news"):
                seen: list[Message] = []
                sent: list[Message] = []
                incoming: list[Message] = [{"type": "websocket.connect"}]
                incoming += [{"type": "websocket.receive", "text": str(n)} for n in range(3)]
                incoming += [{"type": "websocket.disconnect", "code": 1001}]
                middleware.app = listening(seen)
                await middleware(scope("websocket", path=path), giving(incoming), keeping(sent))
                results.append((seen, sent))
            return results

        first, again, other, free = asyncio.run(main())
        assert [message["type"] for message in first[0]] == [
            "websocket.connect", "websocket.receive", "websocket.receive", "websocket.disconnect",
        ]  # fmt: skip
        assert first[0][-1]["code"] == code
        assert [message["type"] for message in first[1]] == ["websocket.accept", "websocket.close"]
        assert first[1][-1]["code"] == code
        assert dict(first[1][0]["headers"])[b"ratelimit-policy"] == b'"open";q=9;w=60', "the handshake's own"
        assert len(again[0]) == 2, "another connection of the same client has no quota of its own"
        assert len(other[0]) == 4
        assert len(free[0]) == 5


def listening(seen: list[Message]) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            seen.append(await receive())
            if seen[-1]["type"] == "websocket.connect":
                await send({"type": "websocket.accept"})
            if seen[-1]["type"] == "websocket.disconnect":
                if seen[-1]["code"] != 1001:
                    await send({"type": "websocket.send", "text": "goes nowhere"})
                return

    return app


def giving(incoming: list[Message]) -> Receive:
    async def receive() -> Message:
        return incoming.pop(0)

    return receive


def keeping(sent: list[Message]) -> Send:
    async def send(message: Message) -> None:
        sent.append(message)

    return send


# WSGI


def environ(body: bytes = b"", **more: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "POST", "SCRIPT_NAME": "", "PATH_INFO": "/", "REMOTE_ADDR": "192.0.2.1",
        "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body), **more,
    }  # fmt: skip


def begun(app: Any, values: dict[str, Any] | None = None) -> tuple[int, Any]:
    statuses: list[int] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        statuses.append(int(status[:3]))
        return lambda data: None

    body = app(values or environ(), start_response)
    return statuses[0], body


def plain(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"o", b"k"]


@pytest.mark.parametrize("ending", ["ends", "is left", "fails", "is forgotten"])
def test_wsgi_a_slot_is_free_again_however_its_request_ends(ending: str) -> None:
    def failing(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [])
        yield b"o"
        raise ZeroDivisionError

    middleware = Wsgi(failing if ending == "fails" else plain, BUSY)
    # A generator has answered nothing before it is first asked.
    body = middleware(environ(), lambda status, headers, exc_info=None: lambda data: None)
    next(iter(body))
    assert begun(middleware)[0] == 429
    if ending == "ends":
        list(body)
    if ending == "fails":
        with pytest.raises(ZeroDivisionError):
            list(body)
    if ending == "is forgotten":
        del body  # by a server that never closes it
        gc.collect()
    else:
        body.close()  # type: ignore[attr-defined]
    middleware.app = plain
    status, body = begun(middleware)
    assert status == 200
    body.close()


@pytest.mark.parametrize("way", ["read", "readline", "lines", "pieces"])
def test_wsgi_the_application_reads_the_whole_body_and_no_more_though_it_was_read_before(way: str) -> None:
    body = b'{"name": "bob",\n "x": 1}\n'
    seen: list[bytes] = []

    class Socket(io.BytesIO):
        """A server's input, on which the next request stands behind this one."""

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 <= size <= len(body) - self.tell(), "it would wait for ever"
            return super().read(size)

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        source = environ["wsgi.input"]
        if way == "read":
            seen.append(source.read(len(body)))
        elif way == "readline":
            seen.extend([source.readline(), source.readline(), source.readline()])
        elif way == "lines":
            seen.extend(source)
        else:
            seen.extend(iter(lambda: source.read(5), b""))
        return plain(environ, start_response)

    values = environ(body, **{"wsgi.input": Socket(body + b"GET / HTTP/1.1\r\n")})
    assert begun(Wsgi(app, NAMED), values)[0] == 200
    assert b"".join(seen) == body


def test_wsgi_a_body_of_unknown_length_is_read_where_the_server_says_it_ends() -> None:
    body = b'{"name": "bob"}'
    values: dict[str, Any] = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": "", "wsgi.input_terminated": True}
    middleware = Wsgi(plain, NAMED)
    assert begun(middleware, environ(**values))[0] == 200
    values = {**values, "wsgi.input": io.BytesIO(body), "REMOTE_ADDR": "192.0.2.2"}
    assert begun(middleware, environ(**values))[0] == 429
    values = {**values, "wsgi.input": io.BytesIO(b"x" * 2000)}
    assert begun(middleware, environ(**values))[0] == 413


@pytest.mark.parametrize("length", ["9" * 19, "9" * 5000])
def test_wsgi_a_body_of_a_length_that_none_has_is_read_as_far_as_it_comes_and_is_no_error(length: str) -> None:
    middleware = Wsgi(plain, NAMED)
    statuses = [begun(middleware, environ(b'{"name": "bob"}', CONTENT_LENGTH=length))[0] for _ in range(2)]
    assert statuses == [200, 429]
    assert begun(middleware, environ(b"x" * 2000, CONTENT_LENGTH=length))[0] == 413


def test_wsgi_what_is_written_counts_among_the_bytes() -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])(b"12345")
        return [b"678"]

    middleware = Wsgi(app, {"limits": [{"name": "bytes", "rate": "10/minute", "settle": "bytes"}]})
    _, body = begun(middleware)
    list(body)
    body.close()
    key = middleware.keeper.gate.rules[0].limits[0]
    assert middleware.keeper.ask([(key, "192.0.2.1", 1)])[0].remaining == 1  # type: ignore[union-attr]


def test_wsgi_refuses_asynchronous_functions_with_their_paths() -> None:
    async def function(request: Any) -> str:
        return "a"

    rules = [
        {"name": "a", "rate": "1/minute", "key": function},
        {"name": "b", "rate": "1/minute", "cost": function},
    ]
    with pytest.raises(SettingsError) as error:
        Wsgi(plain, {"limits": rules})
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["limits[0]", "limits[1]"]


def test_asgi_awaits_asynchronous_functions_of_every_kind() -> None:
    async def key(request: Any) -> str:
        await asyncio.sleep(0)
        return "k"

    async def cost(request: Any) -> int:
        return 2

    async def spared(request: Any) -> bool:
        return request.method == "GET"  # type: ignore[no-any-return]

    rule = {"name": "a", "rate": "3/minute", "key": key, "cost": cost, "exempt": spared}

    async def main() -> list[int]:
        middleware = Asgi(ok, Gatekeeper({"limits": [rule]}))
        return [await status_of(middleware) for _ in range(2)]

    assert asyncio.run(main()) == [200, 429]


# The gateway


def one_service(**more: Any) -> Any:
    return lambda urls: {
        "pools": {"one": {"upstreams": [urls["up"]]}}, "routes": [{"match": "/*", "pool": "one"}], **more,
    }  # fmt: skip


def test_gateway_a_slot_is_free_again_when_the_client_leaves(tmp_path: Path) -> None:
    with staged(tmp_path, one_service(**BUSY)) as stage:
        stage.up.script = silent
        with Client(stage.gateway.port) as client:
            client.send(request("GET /slow"))
            stage.up.until(lambda: stage.up.completed)
            assert stage.ask(request("GET /")).status == 429
        stage.up.until(lambda: not stage.up.open)
        stage.up.script = answering(says(b"ok"))
        assert [stage.ask(request("GET /")).status for _ in range(3)] == [200, 200, 200]


STUBBORN = """
import asyncio

async def key(request):
    if request.path == "/slow":
        print("asked", flush=True)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("goes on", flush=True)
    return "all"
"""


def test_gateway_a_slot_is_free_again_though_a_function_goes_on_when_its_client_has_left(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN, encoding="utf-8")
    busy = {"limits": [{"name": "busy", "concurrency": 1, "key": "stubborn:key"}]}
    with staged(tmp_path, one_service(**busy)) as stage:
        stage.up.script = answering(says(b"ok"))
        with Client(stage.gateway.port) as client:
            client.send(request("GET /slow"))
            stage.gateway.until_line(lambda line: line == "asked\n")
        stage.gateway.until_line(lambda line: line == "goes on\n")
        assert stage.ask(request("GET /")).status == 200


def test_gateway_waits_for_the_body_that_it_counts_by_and_asks_for_it(tmp_path: Path) -> None:
    with staged(tmp_path, one_service(**NAMED)) as stage:
        stage.up.script = answering(says(b"ok"))
        body = b'{"name": "bob"}'
        for place, expected in enumerate((200, 429)):
            with Client(stage.gateway.port) as client:
                fields = f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n".encode()
                client.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")
                interim = client.through(b"\r\n\r\n")
                assert interim.startswith(b"HTTP/1.1 100 "), place
                client.send(body[:5])
                client.send(body[5:])
                assert client.answer("POST").status == expected
        (arrived,) = stage.up.completed
        assert arrived.body == body
        assert arrived.get("expect") is None


def test_gateway_a_body_in_chunks_is_read_as_what_it_holds(tmp_path: Path) -> None:
    with staged(tmp_path, one_service(**NAMED)) as stage:
        stage.up.script = answering(says(b"ok"))
        head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks = [b'8\r\n{"name":\r\n', b'7\r\n "bob"}\r\n', b"0\r\n\r\n"]
        with Client(stage.gateway.port) as client:
            client.send(head)
            for piece in chunks:
                client.send(piece)
            assert client.answer("POST").status == 200
            client.send(head + b"".join(chunks))
            assert client.answer("POST").status == 429
        assert stage.up.one().body == b'{"name": "bob"}'
        with Client(stage.gateway.port) as client:
            client.send(head + b"".join(b"400\r\n" + b"x" * 1024 + b"\r\n" for _ in range(3)))
            assert client.answer("POST").status == 413
