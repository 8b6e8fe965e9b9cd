"""Whole requests with sessions: what they ask of Redis, and through real servers what clients get."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import hiredis
import pytest

from gatekeeper import Gatekeeper
from gatekeeper.asgi import GatekeeperMiddleware, Message, Receive, Scope, Send
from gatekeeper.stores.redis.awaiting import Line
from tests.redis_servers import Server, running

SECRET = os.urandom(32).hex()
PLAIN = {"secure": False}
"""Of cookies that are sent over plain HTTP."""


@pytest.fixture(scope="module")
def redis() -> Iterator[Server]:
    with running() as server:
        yield server


# What a request asks of Redis.

RULES: list[dict[str, Any]] = [
    {"name": "all", "rate": "1000/minute"},
    {"name": "page", "rate": "900/minute", "key": ["ip", "route"], "match": "/*"},
    {"name": "tenant", "rate": "500/minute", "key": "header:X-Tenant"},
]
BY_USER: list[dict[str, Any]] = [*RULES[:2], {"name": "user", "rate": "500/minute", "key": "user"}]


class Wire:
    """What is written to Redis: each write with the names of its commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes: list[list[str]] = []
        flush = Line._flush

        def noted(line: Line) -> None:
            if line._outbox:
                reader = hiredis.Reader()  # a command is an array, as some answers are
                reader.feed(b"".join(line._outbox))
                names = []
                while (words := reader.gets()) is not False:
                    names.append(words[0].decode().lower())
                self.writes.append(sorted(names))
            flush(line)

        monkeypatch.setattr(Line, "_flush", noted)

    def taken(self) -> list[list[str]]:
        """Those since it was last asked."""
        taken, self.writes = self.writes, []
        return taken


class Home:
    """An application and its client, whose requests tell what was written before the application and after."""

    def __init__(self, keeper: Gatekeeper, wire: Wire) -> None:
        self._app = GatekeeperMiddleware(self._answer, keeper)
        self._wire = wire
        self._cookie = b""
        self._before: list[list[str]] = []
        self._change: dict[str, str] = {}
        self._looks = False

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._before = self._wire.taken()
        if self._looks:
            dict(scope["session"])
        if self._change:
            scope["session"].update(self._change)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    async def ask(
        self, *, looks: bool = False, cookie: bool = True, **change: str
    ) -> tuple[list[list[str]], list[list[str]]]:
        """What was written before the application was called, and since."""
        self._looks, self._change = looks, change
        self._wire.taken()
        fields = [(b"x-tenant", b"a"), *([(b"cookie", self._cookie)] if cookie and self._cookie else [])]
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "GET", "path": "/page", "query_string": b"", "client": ("192.0.2.1", 1),
            "headers": fields,
        }  # fmt: skip
        await self._app(scope, receive, send)
        assert sent[0]["status"] == 200
        for name, value in sent[0]["headers"]:
            if name == b"set-cookie":
                self._cookie = value.partition(b";")[0]
        return self._before, self._wire.taken()


LOAD, LIMITS, SAVE = "get", "evalsha", "evalsha"


@pytest.mark.parametrize(
    ("load", "rules", "before"),
    [
        ("early", RULES, [[LIMITS, LOAD]]),
        ("early", BY_USER, [[LOAD], [LIMITS]]),
        ("lazy", RULES, [[LIMITS]]),
        ("lazy", BY_USER, [[LOAD], [LIMITS]]),
    ],
    ids=["early", "early, by user", "lazy", "lazy, by user"],
)
def test_a_session_and_three_rules_are_one_round_trip_and_two_if_a_rule_needs_the_user(
    redis: Server, monkeypatch: pytest.MonkeyPatch, load: str, rules: list[dict[str, Any]], before: list[list[str]]
) -> None:
    """So before the application; after it there is one if the session changed, and else none."""
    wire = Wire(monkeypatch)
    settings = {
        "store": {"url": redis.url, "timeout": "10s"},
        "keys": [SECRET],
        "identity": {"user": "session:sub"},
        "session": {"kind": "store", "load": load, "cookie": PLAIN},
        "limits": rules,
    }

    async def main() -> None:
        keeper = Gatekeeper(settings)
        home = Home(keeper, wire)
        await home.ask()  # opens the connection
        await home.ask(sub="7")  # the scripts are loaded by those who ask first
        calls = redis.calls("evalsha")

        assert await home.ask(cookie=False) == ([[LIMITS]], []), "without a cookie there is nothing to load"
        assert await home.ask() == (before, []), "it is not used"
        eager = load == "early" or rules is BY_USER
        if eager:
            assert await home.ask(looks=True) == (before, []), "it is read"
            assert await home.ask(fruit="apple") == (before, [[SAVE]]), "it changes"
            assert await home.ask(fruit="apple") == (before, []), "it is written as it was"
            assert await home.ask(looks=True, fruit="pear") == (before, [[SAVE]]), "it changes once more"

        assert redis.calls("evalsha") - calls == (8 if eager else 2)
        await keeper.aclose()

    asyncio.run(main())
