"""The scenario table through every home: the same policy, the same decisions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote, unquote_to_bytes
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from gatekeeper import Gatekeeper, Limiter
from gatekeeper.asgi import GatekeeperMiddleware as AsgiMiddleware
from gatekeeper.asgi import Message, Receive, Scope, Send
from gatekeeper.commands import Store
from gatekeeper.testing import VirtualClock, virtual_store
from gatekeeper.wsgi import GatekeeperMiddleware as WsgiMiddleware
from tests.scenarios import SCENARIOS, Answer, Ask, Home, Response, Scenario

COOKIES = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]


def asgi(settings: Mapping[str, Any], store: Store) -> Answer:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        status = int(dict(scope["headers"]).get(b"x-answer", b"200"))
        headers = [(name.lower().encode(), value.encode()) for name, value in COOKIES]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await send({"type": "http.response.body", "body": b"k"})

    middleware = AsgiMiddleware(app, Gatekeeper(settings, store=store))

    def answer(ask: Ask) -> Response:
        path, _, query = ask.raw.partition("?")
        scope = {
            "type": "http",
            "method": ask.method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in ask.headers],
            "client": None if ask.peer is None else (ask.peer, 1234),
        }
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        asyncio.run(middleware(scope, receive, send))
        start, *bodies = sent
        assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * len(
            bodies
        )
        headers = [(name.decode(), value.decode()) for name, value in start["headers"]]
        return Response(start["status"], headers, b"".join(message["body"] for message in bodies))

    return answer


def wsgi(settings: Mapping[str, Any], store: Store) -> Answer:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(f"{environ.get('HTTP_X_ANSWER', '200')} Answer", [("Content-Type", "text/plain"), *COOKIES])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"o", b"k"]

    # validate on both sides: what we ask of the application, and what we answer to the server
    middleware = validator(WsgiMiddleware(validator(app), Gatekeeper(settings, store=store)))

    def answer(ask: Ask) -> Response:
        path, _, query = ask.raw.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": ask.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query,
            **{"HTTP_" + name.upper().replace("-", "_"): value for name, value in ask.headers},
        }
        if ask.peer is not None:
            environ["REMOTE_ADDR"] = ask.peer
        setup_testing_defaults(environ)
        heads: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            heads.append((status, headers))
            return lambda data: None

        body = middleware(environ, start_response)
        content = b"".join(body)
        body.close()  # type: ignore[attr-defined]
        ((status, headers),) = heads
        return Response(int(status[:3]), headers, content)

    return answer


HOMES: dict[str, Home] = {"asgi": asgi, "wsgi": wsgi}


@pytest.mark.parametrize("home", HOMES.values(), ids=HOMES.keys())
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.says)
# wsgiref.validate does not know the method `post`, which servers pass on
@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_scenario(home: Home, scenario: Scenario) -> None:
    clock = VirtualClock()
    answer = home(scenario.settings, virtual_store(clock))
    for place, (ask, then) in enumerate(scenario.steps):
        clock.advance(ask.after)
        response = answer(ask)
        step = f"step {place}: {ask.method} {ask.raw} from {ask.peer}"
        assert response.status == then.status, step
        for name, value in then.fields.items():
            assert response.get(name) == value, step
        assert then.contains.encode() in response.body, step
        if response.status == 429:
            assert not response.all("set-cookie")
            length = response.get("content-length")
            assert length is not None
            assert len(response.body) == (0 if ask.method == "HEAD" else int(length))
            if response.body and response.get("content-type") == "application/problem+json":
                assert json.loads(response.body)["status"] == 429
        else:
            assert response.all("set-cookie") == ["a=1", "b=2"]
            assert response.body == (b"" if ask.method == "HEAD" and home is wsgi else b"ok")


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
