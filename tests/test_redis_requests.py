"""Whole requests with a real Redis behind the rules: what they cost it, and what becomes of them when it is gone."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import pytest

from gatekeeper import Gatekeeper, Limiter
from gatekeeper.asgi import GatekeeperMiddleware as Asgi
from gatekeeper.asgi import Message, Receive, Scope, Send
from gatekeeper.stores.redis import RedisStore
from gatekeeper.wsgi import GatekeeperMiddleware as Wsgi
from tests.redis_servers import PATIENT, Server, prefix, running

RULES = [
    {"name": "default", "rate": "1000/minute"},
    {"name": "page", "rate": ["100/minute", "900/hour"], "match": "/page", "key": ["ip", "route"]},
    {"name": "tenant", "rate": "500/minute", "key": "header:X-Tenant", "algorithm": "gcra"},
]
"""Three rules, four rates."""


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def scope(peer: str = "192.0.2.1") -> Scope:
    return {
        "type": "http", "method": "GET", "path": "/page", "query_string": b"", "client": (peer, 1),
        "headers": [(b"x-tenant", b"a")],
    }  # fmt: skip


async def answered(app: Any, peer: str = "192.0.2.1") -> tuple[int, dict[bytes, bytes]]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope(peer), receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def wsgi_answered(app: Any, peer: str = "192.0.2.1") -> tuple[int, dict[str, str]]:
    heads: list[tuple[int, dict[str, str]]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        heads.append((int(status[:3]), dict(headers)))
        return lambda data: None

    environ = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/page", "REMOTE_ADDR": peer,
        "HTTP_X_TENANT": "a", "wsgi.input": io.BytesIO(),
    }  # fmt: skip
    list(app(environ, start_response))
    return heads[0]


def plain(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


@pytest.fixture
def server() -> Any:
    with running() as server:
        yield server


def commands(server: Server) -> dict[str, int]:
    """What the server was asked so far, but for our own questions, by its own statistics."""
    lines = bytes(server.call("INFO", "commandstats")).decode().splitlines()
    counted = {}
    for line in lines:
        name, _, rest = line.removeprefix("cmdstat_").partition(":calls=")
        if rest and name not in ("info", "ping"):
            counted[name] = int(rest.partition(",")[0])
    return counted


@pytest.mark.parametrize("shell", ["asgi", "wsgi"])
def test_a_request_under_three_rules_with_four_rates_and_its_fields_is_one_round_trip(
    server: Server, shell: str
) -> None:
    keeper = Gatekeeper({"limits": RULES}, store=RedisStore(server.url, prefix=prefix(), timeout=PATIENT))

    async def asgi(times: int) -> list[tuple[int, dict[bytes, bytes]]]:
        app = Asgi(hello, keeper)
        return [await answered(app) for _ in range(times)]

    def ask(times: int) -> None:
        if shell == "asgi":
            for status, fields in asyncio.run(asgi(times)):
                assert status == 200
                assert fields[b"ratelimit-policy"].count(b";q=") == 4
                assert b"ratelimit" in fields
        else:
            app = Wsgi(plain, keeper)
            for _ in range(times):
                status, told = wsgi_answered(app)
                assert status == 200
                assert told["ratelimit-policy"].count(";q=") == 4

    ask(3)  # the script is loaded by the first
    before = commands(server)
    ask(20)
    after = commands(server)
    asked = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
    # What scripts call is counted as well: their own reads and writes, and the time.
    assert asked.pop("evalsha") == 20
    assert asked.pop("time") == 20
    assert asked.pop("get") == asked.pop("set") == 80
    assert not asked
    keeper.close()


def test_concurrent_requests_of_one_loop_turn_admit_exactly_the_limit(server: Server) -> None:
    store = RedisStore(server.url, prefix=prefix(), timeout=PATIENT)

    async def main() -> list[int]:
        app = Asgi(hello, Gatekeeper({"limits": [{"name": "a", "rate": "50/minute"}]}, store=store))
        statuses = [status for status, _ in await asyncio.gather(*(answered(app) for _ in range(200)))]
        await store.aclose()
        return statuses

    statuses = asyncio.run(main())
    assert (statuses.count(200), statuses.count(429)) == (50, 150)


@pytest.mark.parametrize("cancelled_after_turns", [0, 1, 2, 5, 50])
def test_a_request_that_is_cancelled_while_it_is_admitted_keeps_neither_charge_nor_slot(
    server: Server, cancelled_after_turns: int
) -> None:
    rules = [{"name": "busy", "concurrency": 1}, {"name": "few", "rate": "2/minute"}]
    store = RedisStore(server.url, prefix=prefix(), timeout=PATIENT)

    async def main() -> None:
        served: list[Scope] = []

        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            served.append(scope)
            await hello(scope, receive, send)

        app = Asgi(noted, Gatekeeper({"limits": rules}, store=store))
        task = asyncio.create_task(answered(app))
        for _ in range(cancelled_after_turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        was_admitted = bool(served)  # it was cancelled while it ended, or was faster: then it is rightly charged
        # What is undone is on its way before this is asked, on the same connection or by the same task.
        for _ in range(100):
            status, _ = await answered(app)
            if status == 200:
                break
            await asyncio.sleep(0.01)
        assert status == 200
        if was_admitted:
            await store.aclose()
            return
        status, _ = await answered(app)
        assert status == 200, "the cancelled request was not charged"
        await store.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("on_error", "expected"), [("allow", [200] * 3), ("local", [200, 429, 429]), ("deny", [503] * 3)]
)
def test_when_the_server_is_gone_each_rule_says_what_follows_and_no_address_is_told(
    server: Server, on_error: str, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://user:hunter2@127.0.0.1:{server.port}"
    server.kill()
    keeper = Gatekeeper(
        {"store": {"url": url, "on_error": on_error}, "limits": [{"name": "a", "rate": "1/minute"}]}
    )
    app = Wsgi(plain, keeper)
    heads = [wsgi_answered(app) for _ in range(3)]
    assert [status for status, _ in heads] == expected
    assert keeper.gate.failures == {f"a:{on_error}": 3}
    shown = f"{keeper!r} {keeper.settings!r} {keeper.store!r} {heads} {caplog.text}"
    assert "hunter2" not in shown
    assert str(server.port) not in shown
    keeper.close()


def test_a_limiter_counts_in_redis_by_its_url(server: Server) -> None:
    limiter = Limiter(server.url)
    assert [limiter.hit("2/minute", "user:7").allowed for _ in range(3)] == [True, True, False]
    other = Limiter(server.url)
    assert not other.hit("2/minute", "user:7")
    other.reset("2/minute", "user:7")
    assert limiter.hit("2/minute", "user:8", cost=2).allowed
    limiter.close()
    other.close()
