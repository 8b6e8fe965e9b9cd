"""Whole requests with sessions: what they ask of Redis, and through real servers what clients get."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import hiredis
import httpx
import pytest

from gatekeeper import Gatekeeper
from gatekeeper.asgi import GatekeeperMiddleware, Message, Receive, Scope, Send
from gatekeeper.stores.redis.awaiting import Line
from tests.redis_servers import Server, running, until

SECRET = os.urandom(32).hex()
PLAIN = {"secure": False}
"""Of cookies that are sent over plain HTTP."""


PATIENCE: Final = 30.0
"""Seconds until a process that should have answered is given up."""


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


# Through real servers, with real clients.

SERVERS: dict[str, list[str]] = {
    "uvicorn": ["uvicorn", "--no-proxy-headers", "--fd", "FD", "tests.session_homes:asgi"],
    "gunicorn": ["gunicorn", "--workers", "2", "--threads", "4", "--bind", "fd://FD", "tests.session_homes:wsgi"],
}


@contextmanager
def served(server: str, folder: Path, redis: Server, **session: Any) -> Iterator[str]:
    """The application under a server, in a process of its own: its URL."""
    settings = {
        # Who is stopped on purpose is waited for as long; a busy machine is not to be taken for that.
        "store": {"url": redis.url, "timeout": "2s"},
        "keys": [SECRET],
        "session": {"kind": "store", "cookie": PLAIN, **session},
    }
    environ = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "WEB_CONCURRENCY")
    }
    log = folder / f"{server}.log"
    with socket.socket() as listener, log.open("w") as output:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        number = str(listener.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", *(word.replace("FD", number) for word in SERVERS[server])],
            cwd=Path(__file__).resolve().parent.parent,
            env={**environ, "SESSION_HOME": json.dumps(settings)},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/ready", timeout=PATIENCE).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(answers, PATIENCE)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)


@pytest.fixture(
    scope="module", params=[(server, kind) for server in SERVERS for kind in ("token", "store")], ids=" ".join
)
def home(request: pytest.FixtureRequest, redis: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server, kind = request.param
    with served(server, tmp_path_factory.mktemp("home"), redis, kind=kind) as url:
        yield url


@pytest.fixture
def client(home: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=home, timeout=PATIENCE) as client:
        yield client


def test_a_client_finds_again_what_was_written_and_others_do_not(home: str, client: httpx.Client) -> None:
    """Whichever worker answers; and each has its own."""
    written = client.get("/write?fruit=apple")
    assert written.json() == {"fruit": "apple"}
    assert written.headers["set-cookie"].startswith("session=")
    assert "httponly" in written.headers["set-cookie"].lower()
    assert all(client.get("/read").json() == {"fruit": "apple"} for _ in range(8))
    with httpx.Client(base_url=home, timeout=PATIENCE) as other:
        assert other.get("/read").json() == {}


def test_a_session_that_is_only_read_sets_no_cookie_and_varies_and_untouched_it_does_neither(
    client: httpx.Client,
) -> None:
    client.get("/write?fruit=apple")
    read, untouched = client.get("/read"), client.get("/untouched")
    assert "set-cookie" not in read.headers
    assert read.headers["vary"] == "Cookie"
    assert "set-cookie" not in untouched.headers
    assert "vary" not in untouched.headers


def test_what_changes_within_a_list_is_kept(client: httpx.Client) -> None:
    client.get("/append")
    client.get("/append")
    assert client.get("/read").json() == {"cart": ["apple", "apple"]}


def test_of_a_streaming_response_what_changes_before_the_head_is_kept_and_later_nothing(
    client: httpx.Client,
) -> None:
    assert client.get("/stream").text == "onetwo"
    assert client.get("/read").json() == {"early": True}


def test_a_head_request_writes_the_session_as_a_get_does_and_has_no_body(client: httpx.Client) -> None:
    answer = client.head("/write?fruit=apple")
    assert answer.status_code == 200
    assert answer.content == b""
    assert "set-cookie" in answer.headers
    assert client.get("/read").json() == {"fruit": "apple"}


def test_an_application_that_fails_is_answered_500_and_its_change_is_not_kept(client: httpx.Client) -> None:
    client.get("/write?fruit=apple")
    answer = client.get("/fails")
    assert answer.status_code == 500
    assert "set-cookie" not in answer.headers
    assert client.get("/read").json() == {"fruit": "apple"}


def test_a_session_that_is_ended_is_gone_and_its_cookie_expired(client: httpx.Client) -> None:
    client.get("/write?fruit=apple")
    answer = client.get("/end")
    assert "max-age=0" in answer.headers["set-cookie"].lower()
    assert "session" not in client.cookies
    assert client.get("/read").json() == {}


@pytest.mark.parametrize("cookie", ["x", "a.b.c", "\xff\xfe", '"', "2~a", "a" * 5000])
def test_a_cookie_of_anything_is_an_empty_session(home: str, cookie: str) -> None:
    fields = {b"cookie": f"session={cookie}".encode("latin-1")}
    answer = httpx.get(f"{home}/read", headers=fields, timeout=PATIENCE)
    assert (answer.status_code, answer.json()) == (200, {})


@pytest.mark.parametrize(("server", "load"), [("uvicorn", "lazy"), ("uvicorn", "early"), ("gunicorn", "lazy")])
@pytest.mark.parametrize("on_error", ["deny", "empty"])
def test_while_the_store_does_not_answer_a_session_is_503_or_empty_and_later_as_it_was(
    tmp_path: Path, server: str, load: str, on_error: str
) -> None:
    """Requests that do not use theirs go on; and nothing is written over what was there."""
    with (
        running() as redis,
        served(server, tmp_path, redis, load=load, on_error=on_error) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        client.get("/write?fruit=apple")
        redis.pause()
        try:
            untouched, read, written = client.get("/untouched"), client.get("/read"), client.get("/write?a=1")
        finally:
            redis.resume()
        assert untouched.status_code == 200
        if on_error == "deny":
            assert [read.status_code, written.status_code] == [503, 503]
            assert read.headers["retry-after"].isdigit()
            assert read.headers["cache-control"] == "no-store"
            assert str(redis.port) not in read.text
        else:
            assert (read.status_code, read.json()) == (200, {})
            assert (written.status_code, written.json()) == (200, {"a": "1"})
        assert "set-cookie" not in read.headers
        assert "set-cookie" not in written.headers
        # It is asked again when some time has passed, which this process cannot make pass there.
        expected = {"fruit": "apple"}
        until(lambda: (answer := client.get("/read")).status_code == 200 and answer.json() == expected, PATIENCE)


@pytest.mark.parametrize("load", ["lazy", "early"])
def test_what_is_loaded_early_needs_no_await_and_else_the_error_says_what_to_await(
    tmp_path: Path, redis: Server, load: str
) -> None:
    with (
        served("uvicorn", tmp_path, redis, load=load) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        assert client.get("/at-once").json() == {}, "no cookie: there is nothing to load"
        client.get("/write?fruit=apple")
        answer = client.get("/at-once")
        if load == "early":
            assert answer.json() == {"fruit": "apple"}
        else:
            assert answer.status_code == 500
            assert "await session.aload() first" in (tmp_path / "uvicorn.log").read_text()
