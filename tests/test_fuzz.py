"""No request, however malformed, makes a middleware raise; and both homes decide alike."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper import Gatekeeper
from gatekeeper.asgi import GatekeeperMiddleware as AsgiMiddleware
from gatekeeper.asgi import Message, Receive, Scope, Send
from gatekeeper.testing import VirtualClock, virtual_store
from gatekeeper.wsgi import GatekeeperMiddleware as WsgiMiddleware

SETTINGS: dict[str, Any] = {
    "identity": {"trusted_proxies": ["10.0.0.0/8", "::1", "unix"], "user": "header:X-User"},
    "limits": [
        {"name": "all", "rate": "3/minute"},
        {"name": "user", "rate": ["3/minute", "9/hour"], "key": ["user", "method", "host"], "give_back": "4xx"},
        {"name": "key", "rate": "3/minute", "key": "header:X-Key", "burst": 2},
        {"name": "host", "rate": "3/minute", "match": "*.example.com/*", "algorithm": "sliding_counter"},
        {"name": "path", "rate": "3/minute", "match": "/{a}/{b:path}", "algorithm": "fixed_window", "key": "route"},
        {"name": "admin", "rate": "3/minute", "match": "GET|POST /admin/*"},
    ],
}
FORWARDED = {**SETTINGS, "identity": {**SETTINGS["identity"], "header": "Forwarded"}}

junk = st.one_of(
    st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=30),
    st.sampled_from(['for="[::1]:80"', "for=_hidden", 'for="', "for=;for=", "10.0.0.1, 10.0.0.2", "[::1", "::ffff:1.2.3.4", "1.2.3.4:99999", "," * 50, '"' * 9, "%", "fe80::1%eth0", "[", ":80", "a" * 300]),
)  # fmt: skip
names = st.sampled_from(["x-forwarded-for", "forwarded", "host", "x-user", "x-key", "accept", "origin", "access-control-request-method"])  # fmt: skip
peers = st.sampled_from([None, "", "10.0.0.1", "192.0.2.1", "::1", "::ffff:10.0.0.1", "2001:db8::1", "fe80::1%lo", "testclient", "not an address", "\ud800", "9" * 1000])  # fmt: skip
paths = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["", ".", "..", "admin", "a", "\n", "%2e", "\\", "ü", "a" * 5000]), max_size=6).map(
        lambda parts: "/" + "/".join(parts)
    ),
)
requests = st.tuples(
    st.sampled_from(["GET", "get", "POST", "OPTIONS", "HEAD", "", "ſ", "G E T"]),
    paths,
    peers,
    st.lists(st.tuples(names, junk), max_size=6, unique_by=lambda pair: pair[0]),
)

OK = {"type": "http.response.start", "status": 200, "headers": []}


async def asgi_app(scope: Scope, receive: Receive, send: Send) -> None:
    await send(OK)
    await send({"type": "http.response.body"})


def wsgi_app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return []


def through_asgi(app: AsgiMiddleware, request: Any) -> tuple[int, dict[str, str]]:
    method, path, peer, headers = request
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    fields = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": fields,
        "client": (peer, 1) if peer else None,
    }
    coroutine = app(scope, receive, send)
    try:
        coroutine.send(None)
    except StopIteration:
        pass
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def through_wsgi(app: WsgiMiddleware, request: Any) -> tuple[int, dict[str, str]]:
    method, path, peer, headers = request
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path.encode("utf-8", "surrogatepass").decode("latin-1"),
        "REMOTE_ADDR": peer,
        **{"HTTP_" + name.upper().replace("-", "_"): value for name, value in headers},
    }
    heads: list[Any] = []

    def start_response(*head: Any) -> Any:
        heads.append(head)

    body: Any = app(environ, start_response)
    for _ in body:
        pass
    if hasattr(body, "close"):
        body.close()
    return int(heads[0][0][:3]), dict(heads[0][1])


@settings(max_examples=400, deadline=None)
@given(sequence=st.lists(requests, min_size=1, max_size=12), policy=st.sampled_from([SETTINGS, FORWARDED]))
def test_both_homes_answer_every_request_and_alike(sequence: list[Any], policy: dict[str, Any]) -> None:
    clock = VirtualClock()
    asgi = AsgiMiddleware(asgi_app, Gatekeeper(policy, store=virtual_store(clock)))
    wsgi = WsgiMiddleware(wsgi_app, Gatekeeper(policy, store=virtual_store(clock)))
    for request in sequence:
        # What no UTF-8 spells, no WSGI server can hand over.
        sayable = request[1].encode("utf-8", "ignore").decode("utf-8")
        request = (request[0], sayable, *request[2:])
        one, two = through_asgi(asgi, request), through_wsgi(wsgi, request)
        assert one == two
        assert one[0] in (200, 429)
        assert all(value.isprintable() and value.isascii() for value in one[1].values())


@settings(max_examples=200, deadline=None)
@given(
    scope=st.fixed_dictionaries(
        {
            "type": st.sampled_from(["http", "websocket"]),
            "path": paths,
            "headers": st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=40)), max_size=8),
        },
        optional={
            "method": st.text(max_size=5),
            "client": st.one_of(st.none(), st.tuples(peers, st.integers())),
            "extensions": st.one_of(st.none(), st.just({"websocket.http.response": {}})),
        },
    )
)
def test_no_scope_makes_the_asgi_shell_raise(scope: dict[str, Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"} if scope["type"] == "websocket" else dict(OK))

    async def main() -> None:
        middleware = AsgiMiddleware(app, Gatekeeper(SETTINGS, store=virtual_store(VirtualClock())))
        for _ in range(5):
            sent: list[Message] = []

            async def receive() -> Message:
                return {"type": "websocket.connect"}

            async def send(message: Message, sent: list[Message] = sent) -> None:
                sent.append(message)

            await middleware(dict(scope), receive, send)
            assert sent

    asyncio.run(main())
