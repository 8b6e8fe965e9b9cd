"""What a limit adds to a Starlette request: our middleware and slowapi's, each over the same bare application.

slowapi has two middlewares; this is `SlowAPIASGIMiddleware`, the cheaper one, for the other is built on
Starlette's BaseHTTPMiddleware. The applications are called directly, without a server, with a scope built for each
call as servers build it, and the same receive and send. What is added is the CPU time with the middleware less the
bare application's in the same round.

Both limit by the client's address, in memory, one rate for all, and both tell the client its quota in fields of
the response. Before anything is timed, that is verified, and that both really refuse under a small limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from statistics import median
from typing import Any, Final, TypeAlias

from benchmarks.measure import Progress, Result, Row, Skipped, Unfit, Work, added, interleave, median_ratio, peer
from gatekeeper.asgi import App, GatekeeperMiddleware

Message: TypeAlias = MutableMapping[str, Any]

RATE: Final = "1000000/minute"
FIELDS: Final = [
    (b"host", b"shop.example.com"),
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"),
    (b"accept", b"application/json, text/plain;q=0.9, */*;q=0.8"),
    (b"accept-language", b"en-GB,en;q=0.7,de;q=0.3"),
    (b"accept-encoding", b"gzip, deflate, br, zstd"),
    (b"referer", b"https://shop.example.com/basket"),
    (b"cookie", b"session=6f1f0c2e9b8d4a7e8c55; theme=dark; consent=1"),
    (b"connection", b"keep-alive"),
    (b"cache-control", b"no-cache"),
    (b"sec-fetch-mode", b"cors"),
    (b"sec-fetch-site", b"same-origin"),
    (b"x-request-id", b"0190f5c2-7b7e-7c3a-9a53-0c2f6d1b4e90"),
]


def run(quick: bool, progress: Progress) -> Result:
    against = peer("slowapi")
    peer("starlette")
    rounds, requests = (5, 500) if quick else (15, 4000)
    with asyncio.Runner() as runner:
        for build, field in ((ours, b"ratelimit"), (slowapi, b"x-ratelimit-remaining")):
            runner.run(verify(build.__name__, build(RATE), build("2/minute"), field))
        apps: dict[str, App] = {"bare": bare(), "ours": ours(RATE), "peer": slowapi(RATE)}

        def work(app: App) -> Work:
            return lambda: runner.run(serve(app, requests))

        works = {name: work(app) for name, app in apps.items()}
        seconds = interleave(lambda number: works, rounds, progress=progress)
    mine, theirs = (added(seconds[name], seconds["bare"]) for name in ("ours", "peer"))
    row = Row(
        what=f"asgi: added to a Starlette request, against {against}",
        unit="µs",
        ours=median(mine) / requests * 1e6,
        peer=median(theirs) / requests * 1e6,
        ratio=median_ratio(theirs, mine),
        at_least=10.0,
    )
    return Result([row], [f"asgi: the bare request takes {median(seconds['bare']) / requests * 1e6:.1f} µs"])


def bare() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def hello(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    return Starlette(routes=[Route("/hello", hello)])


def ours(rate: str) -> App:
    app = bare()
    app.add_middleware(GatekeeperMiddleware, settings={"limits": [{"name": "default", "rate": rate}]})
    return app  # type: ignore[no-any-return]


def slowapi(rate: str) -> App:
    try:
        from slowapi import Limiter, _rate_limit_exceeded_handler
        from slowapi.errors import RateLimitExceeded
        from slowapi.middleware import SlowAPIASGIMiddleware
        from slowapi.util import get_remote_address
    except ImportError as error:
        raise Skipped(f"slowapi cannot be imported: {error}") from None

    app = bare()
    app.state.limiter = Limiter(key_func=get_remote_address, default_limits=[rate], headers_enabled=True)
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
    app.add_middleware(SlowAPIASGIMiddleware)
    return app  # type: ignore[no-any-return]


def scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "server": ("10.0.0.5", 8000),
        "client": ("203.0.113.7", 50412),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": "/hello",
        "raw_path": b"/hello",
        "query_string": b"page=2",
        "headers": list(FIELDS),
        "state": {},
    }


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def discard(message: Message) -> None:
    pass


async def serve(app: App, requests: int) -> None:
    for _ in range(requests):
        await app(scope(), receive, discard)


async def answer(app: App) -> tuple[int, dict[bytes, bytes]]:
    """Status and fields of one response."""
    heads: list[Message] = []

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            heads.append(message)

    await app(scope(), receive, keep)
    (head,) = heads
    return head["status"], {name.lower(): value for name, value in head["headers"]}


async def verify(name: str, wide: App, narrow: App, field: bytes) -> None:
    """The response tells the quota, and 2/minute lets two requests pass and not a third. Raises Unfit."""
    status, fields = await answer(wide)
    if status != 200 or field not in fields:
        raise Unfit(f"{name} answered {status} with {sorted(fields)}: {field!r} was expected")
    statuses = [(await answer(narrow))[0] for _ in range(3)]
    if statuses != [200, 200, 429]:
        raise Unfit(f"{name} answered {statuses} to three requests under 2/minute")
