"""The scenario table through every home: the same policy, the same decisions."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from typing import Any, Final, Self, TypeVar, cast
from wsgiref.validate import validator

import pytest
import uvloop

from gatekeeper import Gatekeeper, Limiter
from gatekeeper.asgi import GatekeeperMiddleware as AsgiMiddleware
from gatekeeper.asgi import Receive, Scope, Send
from gatekeeper.commands import Store
from gatekeeper.gateway.worker import front_of
from gatekeeper.proxy.listener import Listener
from gatekeeper.testing import VirtualClock, virtual_store
from gatekeeper.wsgi import GatekeeperMiddleware as WsgiMiddleware
from tests.django_home import django_asgi, django_wsgi
from tests.fastapi_home import fastapi, starlette
from tests.flask_home import flask, flask_deferring
from tests.scenarios import SCENARIOS, Answer, Ask, Home, Response, Scenario, Then
from tests.servers import ask_asgi, ask_wsgi

COOKIES = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]

T = TypeVar("T")


@contextmanager
def asgi(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        fields = dict(scope["headers"])
        status, length, more = int(fields.get(b"x-answer", b"200")), 0, True
        while more:
            message = await receive()
            length, more = length + len(message["body"]), message["more_body"]
        if length != int(fields.get(b"x-length", length)):
            status = 418
        headers = [(name.lower().encode(), value.encode()) for name, value in COOKIES]
        if b"x-say-cost" in fields:
            headers.append((b"X-Cost", fields[b"x-say-cost"]))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await send({"type": "http.response.body", "body": b"k"})

    middleware = AsgiMiddleware(app, Gatekeeper(settings, store=store))

    yield lambda ask: asyncio.run(ask_asgi(middleware, ask))


@contextmanager
def wsgi(settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        status, cost = environ.get("HTTP_X_ANSWER", "200"), environ.get("HTTP_X_SAY_COST")
        length = int(environ.get("HTTP_X_LENGTH", 0))
        if len(environ["wsgi.input"].read(length)) != length:
            status = "418"
        headers = [("Content-Type", "text/plain"), *COOKIES, *([] if cost is None else [("X-Cost", cost)])]
        start_response(f"{status} Answer", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"o", b"k"]

    # What we ask of the application is checked, as what we answer to the server is.
    middleware = WsgiMiddleware(validator(app), Gatekeeper(settings, store=store))

    yield lambda ask: ask_wsgi(middleware, ask)


class Service(asyncio.Protocol):
    """What stands behind the gateway. It answers as the applications above, in chunks."""

    transport: asyncio.Transport

    def __init__(self, targets: list[bytes]) -> None:
        self.targets = targets
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            told = re.search(rb"\r\ncontent-length: ([0-9]+)", head, re.IGNORECASE)
            length = int(told[1]) if told else 0
            if len(self.buffer) < end + 4 + length:
                break
            self.buffer = self.buffer[end + 4 + length :]
            method, target, _ = head.partition(b"\r\n")[0].split(b" ")
            self.targets.append(target)
            wanted = re.search(rb"\r\nx-answer: ([0-9]+)", head, re.IGNORECASE)
            lines = [b"HTTP/1.1 %b Answer" % (wanted[1] if wanted else b"200")]
            lines += [b"%b: %b" % (name.encode(), value.encode()) for name, value in COOKIES]
            cost = re.search(rb"\r\nx-say-cost: (\w+)", head, re.IGNORECASE)
            lines += [b"X-Cost: " + cost[1]] if cost else []
            lines += [b"Transfer-Encoding: chunked", b"", b""]
            body = b"" if method == b"HEAD" else b"1\r\no\r\n1\r\nk\r\n0\r\n\r\n"
            self.transport.write(b"\r\n".join(lines) + body)


class Told(Listener):
    """Peers as the scenarios have them, by the port of loopback that each stands for."""

    peers: dict[int, str | None]

    def peer_of(self, transport: asyncio.BaseTransport) -> str | None:
        return self.peers[transport.get_extra_info("peername")[1]]


class Engine:
    """The gateway and a service behind it, on real sockets. The event loop, in a thread, is one for all scenarios."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._targets: list[bytes] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._service = self._run(self._loop.create_server(lambda: Service(self._targets), "127.0.0.1", 0))
        self._url = f"http://127.0.0.1:{self._service.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._service.close()
        await self._service.wait_closed()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(15)

    @contextmanager
    def gateway(self, settings: Mapping[str, Any], store: Store) -> Iterator[Answer]:
        behind = {"pools": {"one": {"upstreams": self._url}}, "routes": [{"match": "/*", "pool": "one"}]}
        keeper = Gatekeeper({**settings, **behind}, store=store)
        peers: dict[int, str | None] = {}
        clients: dict[str | None, socket.socket] = {}
        passed: list[Ask] = []
        self._targets.clear()

        async def start() -> tuple[asyncio.Server, Told]:
            listener = Told(front_of(keeper, self._loop, "gatekeeper-1"))
            listener.peers = peers
            return await self._loop.create_server(listener, "127.0.0.1", 0), listener

        async def stop() -> None:
            server.close()
            await listener.drain(5)
            await server.wait_closed()
            await listener.front.aclose()
            await keeper.aclose()

        async def settled() -> None:
            """The callback in which the last answer was written has come to its end."""

        def client(peer: str | None) -> socket.socket:
            """A connection that is kept until it is closed: one a peer."""
            if peer not in clients:
                clients[peer] = stack.enter_context(socket.socket())
                clients[peer].settimeout(15)
                clients[peer].bind(("127.0.0.1", 0))
                peers[clients[peer].getsockname()[1]] = peer
                clients[peer].connect(server.sockets[0].getsockname())
            return clients[peer]

        def answer(ask: Ask) -> Response:
            fields = [*ask.headers]
            if not any(name.lower() == "host" for name, _ in fields):
                fields.insert(0, ("Host", "gateway.example"))
            lines = [f"{ask.method} {ask.raw} HTTP/1.1", *(f"{name}: {value}" for name, value in fields), "", ""]
            sock = client(ask.peer)
            sock.sendall("\r\n".join(lines).encode() + ask.body)
            with HTTPResponse(sock, method=ask.method) as came:
                came.begin()
                response = Response(came.status, came.getheaders(), came.read())
                if came.will_close:
                    sock.shutdown(socket.SHUT_WR)  # a refused upload is lingered for
                    assert sock.recv(1) == b""
                    clients.pop(ask.peer).close()
            self._run(settled())
            if response.all("set-cookie"):
                passed.append(ask)
            assert len(self._targets) == len(passed), "what was refused reached the service"
            return response

        server, listener = self._run(start())
        with ExitStack() as stack:
            stack.callback(lambda: self._run(stop()))
            yield answer


NO_SEGMENT: Final = "the path goes on without its dot segments, and what goes on is not what the rule is for"
OTHERWISE: Final[Mapping[tuple[str, str], Mapping[str, tuple[int, str]]]] = {
    ("gateway", "/x/{a}/y is not walked round by a spelling"): {
        "/x/../y%0A": (200, NO_SEGMENT),
        "/x/./y/": (200, NO_SEGMENT),
        "/x/./y%0A": (200, NO_SEGMENT),
    },
    ("gateway", "/files/{rest:path} is not walked round by a spelling"): {
        "/files/../x": (200, NO_SEGMENT),
        "/files/%2e%2e": (200, NO_SEGMENT),
    },
}
"""Where a home knowingly answers otherwise: by home and scenario the targets, with the status and the reason.

An application may be handed a path with dot segments and read them in its own way, so the middleware limits it as
both. The gateway removes them, and its upstreams see what its rules saw.
"""


HOMES: Final = (
    "asgi", "wsgi", "gateway", "django_asgi", "django_wsgi", "fastapi", "flask", "flask_deferring", "starlette",
)  # fmt: skip


@pytest.fixture(scope="module")
def homes() -> Iterator[Mapping[str, Home]]:
    with Engine() as engine:
        yield {
            "asgi": asgi,
            "wsgi": wsgi,
            "gateway": engine.gateway,
            "django_asgi": django_asgi,
            "django_wsgi": django_wsgi,
            "fastapi": fastapi,
            "flask": flask,
            "flask_deferring": flask_deferring,
            "starlette": starlette,
        }


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.says)
# wsgiref.validate does not know the method `post`, which servers pass on
@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_scenario(homes: Mapping[str, Home], home: str, scenario: Scenario) -> None:
    clock = VirtualClock()
    with homes[home](scenario.settings, virtual_store(clock)) as answer:
        walk(answer, clock, scenario, home)


def walk(answer: Answer, clock: VirtualClock, scenario: Scenario, home: str) -> None:
    otherwise = OTHERWISE.get((home, scenario.says), {})
    assert otherwise.keys() <= {ask.raw for ask, _ in scenario.steps}
    for place, (ask, then) in enumerate(scenario.steps):
        clock.advance(ask.after)
        if ask.raw in otherwise:
            status, _ = otherwise[ask.raw]
            assert status != then.status, "it answers as the others do"
            then = Then(status)
        response = answer(ask)
        step = f"step {place}: {ask.method} {ask.raw} from {ask.peer}"
        assert response.status == then.status, step
        for name, value in then.fields.items():
            assert response.get(name) == value, step
        assert then.contains.encode() in response.body, step
        if response.status == 429 or then.refused:
            assert not response.all("set-cookie")
            length = response.get("content-length")
            assert length is not None
            assert len(response.body) == (0 if ask.method == "HEAD" else int(length))
            if response.body and response.get("content-type") == "application/problem+json":
                assert json.loads(response.body)["status"] == response.status
        else:
            assert response.all("set-cookie") == ["a=1", "b=2"]
            assert response.body == (b"" if ask.method == "HEAD" and home != "asgi" else b"ok")


def test_the_homes_that_answer_otherwise_and_the_scenarios_exist(homes: Mapping[str, Home]) -> None:
    known = {scenario.says for scenario in SCENARIOS}
    assert [key for key in OTHERWISE if key[0] not in homes or key[1] not in known] == []


SPELLED = [
    (match, target)
    for scenario in SCENARIOS
    if "is not walked round" in scenario.says
    for match in [scenario.settings["limits"][0]["match"]]
    for target in [ask.raw for ask, _ in scenario.steps]
    if target not in OTHERWISE.get(("gateway", scenario.says), {})
]


@pytest.mark.parametrize(("match", "target"), SPELLED)
def test_each_spelling_spends_of_the_rule_behind_the_gateway(
    homes: Mapping[str, Home], match: str, target: str
) -> None:
    """Whichever comes first: an encoded slash where the rule protects a path is spent, and refused at once."""
    (plain,) = [ask.raw for says in SCENARIOS for ask, _ in says.steps[:1] if says.says.startswith(f"{match} is ")]
    settings = {"limits": [{"name": "default", "rate": "1/minute", "match": match}]}
    with homes["gateway"](settings, virtual_store(VirtualClock())) as answer:
        assert answer(Ask(raw=target)).status == (400 if "%2F" in target else 200)
        assert answer(Ask(raw=plain)).status == 429
        assert answer(Ask(raw=plain, peer="198.51.100.2")).status == 200


@pytest.mark.parametrize(
    "hosts", [["a.example", "b.example"], ["a.example", "a.example"], ["a.example/x"], ["a b"], ["\xff"], [""]]
)
def test_a_host_that_is_not_one_and_valid_is_refused_by_the_gateway_and_spends_nothing(
    homes: Mapping[str, Home], hosts: list[str]
) -> None:
    """An application's server lets what it will in; behind the gateway nobody need guess which host was meant."""
    with homes["gateway"]({"limits": [{"name": "a", "rate": "1/minute"}]}, virtual_store(VirtualClock())) as answer:
        refused = answer(Ask(headers=[("Host", host) for host in hosts]))
        assert (refused.status, refused.get("connection"), refused.get("ratelimit")) == (400, "close", None)
        assert answer(Ask()).status == 200
        assert answer(Ask()).status == 429


@pytest.mark.parametrize(
    "scenario",
    [
        scenario
        for scenario in SCENARIOS
        if list(scenario.settings) == ["limits"]
        and set(*[rule.keys() for rule in scenario.settings["limits"]][:1]) <= {"name", "rate", "algorithm"}
        and len(scenario.settings["limits"]) == 1
        and all(ask.peer in ("192.0.2.1", "198.51.100.2") and not ask.headers for ask, _ in scenario.steps)
    ],
    ids=lambda scenario: scenario.says,
)
def test_the_limiter_decides_the_same_without_any_framework(scenario: Scenario) -> None:
    clock = VirtualClock()
    limiter = Limiter(virtual_store(clock))
    (rule,) = scenario.settings["limits"]
    rate = rule["rate"] if isinstance(rule["rate"], str) else ";".join(rule["rate"])
    for ask, then in scenario.steps:
        clock.advance(ask.after)
        peek = limiter.peek(rate, str(ask.peer))
        verdict = limiter.hit(rate, str(ask.peer))
        assert verdict.allowed == peek.allowed == (then.status == 200)
        if "retry-after" in then.fields and then.fields["retry-after"] is not None:
            assert -(-verdict.retry_ns // 10**9) == int(then.fields["retry-after"])
