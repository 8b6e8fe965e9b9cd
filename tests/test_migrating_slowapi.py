"""docs/migrating/from-slowapi.md: each row of its table, on both sides, gives the same answers."""

# No `from __future__ import annotations`: FastAPI reads those of endpoints.
# mypy: disable-error-code="untyped-decorator"

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from gatekeeper import Gatekeeper
from gatekeeper.commands import Hits, Replies
from gatekeeper.errors import StoreError
from gatekeeper.testing import VirtualClock, virtual
from gatekeeper_fastapi import GatekeeperMiddleware, RateLimit, RateLimited, limit, limited_handler

slowapi = pytest.importorskip("slowapi")

from slowapi.errors import RateLimitExceeded  # noqa: E402
from slowapi.middleware import SlowAPIMiddleware  # noqa: E402
from slowapi.util import get_remote_address  # noqa: E402

PAGE: Final = Path(__file__).resolve().parent.parent / "docs/migrating/from-slowapi.md"


@pytest.fixture(autouse=True)
def clock() -> Iterator[VirtualClock]:
    with virtual() as clock:
        yield clock


def text(body: str = "ok") -> Response:
    return PlainTextResponse(body)


def old(**arguments: Any) -> tuple[FastAPI, Any]:
    app = FastAPI()
    limiter = slowapi.Limiter(**{"key_func": get_remote_address, **arguments})
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, slowapi._rate_limit_exceeded_handler)
    return app, limiter


def new(**settings: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper(settings))
    return app


@dataclass(frozen=True)
class Row:
    """A row of the table: what it is about, the two applications, the requests that both answer alike."""

    about: str
    before: Callable[[], Any]
    after: Callable[[], Any]
    asked: list[tuple[str, int]]
    """The paths, each with the status that must come. A path may be `METHOD /path client`."""

    headers: dict[str, str] = field(default_factory=dict)


def decorator_before() -> Any:
    app, limiter = old()

    @app.get("/a")
    @limiter.limit("2/minute")
    async def a(request: Request) -> Response:
        return text()

    return app


def decorator_after() -> Any:
    app = new()

    @app.get("/a", dependencies=[Depends(RateLimit("2/minute"))])
    async def a() -> Response:
        return text()

    return app


def sync_before() -> Any:
    app, limiter = old()

    @app.get("/a")
    @limiter.limit("2/minute")
    def a(request: Request) -> Response:
        return text()

    return app


def sync_after() -> Any:
    app = new()

    @app.get("/a")
    @limit("2/minute")
    def a() -> Response:
        return text()

    return app


def several_before() -> Any:
    app, limiter = old()

    @app.get("/a")
    @limiter.limit("2/minute;3/hour")
    async def a(request: Request) -> Response:
        return text()

    return app


def several_after() -> Any:
    app = new()
    app.get("/a", dependencies=[Depends(RateLimit("2/minute;3/hour"))])(text)
    return app


def defaults_before() -> Any:
    app, _ = old(default_limits=["2/minute"])
    app.add_middleware(SlowAPIMiddleware)

    @app.get("/a")
    async def a() -> Response:
        return text()

    @app.get("/b")
    async def b() -> Response:
        return text()

    return app


def defaults_after() -> Any:
    app = FastAPI(dependencies=[Depends(RateLimit("2/minute"))])
    app.get("/a")(lambda: text())
    app.get("/b")(lambda: text())
    return app


def application_before() -> Any:
    app, _ = old(application_limits=["2/minute"])
    app.add_middleware(SlowAPIMiddleware)

    @app.get("/a")
    async def a() -> Response:
        return text()

    @app.get("/b")
    async def b() -> Response:
        return text()

    return app


def application_after() -> Any:
    app = new(limits=[{"name": "site", "rate": "2/minute"}])
    app.get("/a")(lambda: text())
    app.get("/b")(lambda: text())
    return app


def shared_before() -> Any:
    app, limiter = old()
    shared = limiter.shared_limit("2/minute", scope="search")

    @app.get("/a")
    @shared
    async def a(request: Request) -> Response:
        return text()

    @app.get("/b")
    @shared
    async def b(request: Request) -> Response:
        return text()

    return app


def shared_after() -> Any:
    app = new()
    search = Depends(RateLimit("2/minute", name="search"))
    app.get("/a", dependencies=[search])(lambda: text())
    app.get("/b", dependencies=[search])(lambda: text())
    return app


def exempt_before() -> Any:
    app, limiter = old(default_limits=["1/minute"])
    app.add_middleware(SlowAPIMiddleware)

    @app.get("/a")
    async def a() -> Response:
        return text()

    @app.get("/health")
    @limiter.exempt
    async def health() -> Response:
        return text()

    return app


def exempt_after() -> Any:
    app, limited = FastAPI(), APIRouter(dependencies=[Depends(RateLimit("1/minute"))])
    limited.get("/a")(lambda: text())
    app.get("/health")(lambda: text())
    app.include_router(limited)
    return app


def exempt_when_before() -> Any:
    app, limiter = old()

    @app.get("/a")
    @limiter.limit("1/minute", exempt_when=lambda request: request.headers.get("x-staff") == "1")
    async def a(request: Request) -> Response:
        return text()

    return app


def exempt_when_after() -> Any:
    app = new()
    free = RateLimit("1/minute", exempt=lambda request: request.field("x-staff") == "1")
    app.get("/a", dependencies=[Depends(free)])(lambda: text())
    return app


def key_before() -> Any:
    app, limiter = old()

    @app.get("/a")
    @limiter.limit("1/minute", key_func=lambda request: request.headers["x-key"])
    async def a(request: Request) -> Response:
        return text()

    return app


def key_after() -> Any:
    app = new()
    app.get("/a", dependencies=[Depends(RateLimit("1/minute", key="header:X-Key"))])(lambda: text())
    return app


def cost_before() -> Any:
    app, limiter = old()

    @app.get("/a")
    @limiter.limit("5/minute", cost=lambda request: int(request.headers["x-cost"]))
    async def a(request: Request) -> Response:
        return text()

    return app


def cost_after() -> Any:
    app = new()
    costly = RateLimit("5/minute", cost=lambda request: int(request.field("x-cost")))
    app.get("/a", dependencies=[Depends(costly)])(lambda: text())
    return app


def per_method_before() -> Any:
    app, limiter = old()

    @app.api_route("/a", methods=["GET", "POST"])
    @limiter.limit("1/minute", per_method=True)
    async def a(request: Request) -> Response:
        return text()

    return app


def per_method_after() -> Any:
    app = new()
    each = [Depends(RateLimit("1/minute", key=["ip", "method"]))]
    app.api_route("/a", methods=["GET", "POST"], dependencies=each)(lambda: text())
    return app


def methods_before() -> Any:
    app, limiter = old()

    @app.api_route("/a", methods=["GET", "POST"])
    @limiter.limit("1/minute", methods=["post"])
    async def a(request: Request) -> Response:
        return text()

    return app


def methods_after() -> Any:
    app = new(limits=[{"name": "post", "rate": "1/minute", "match": "POST /a"}])
    app.api_route("/a", methods=["GET", "POST"])(lambda: text())
    return app


def dynamic_before() -> Any:
    app, limiter = old()

    def rate(key: str) -> str:
        return "3/minute" if key == "pro" else "1/minute"

    @app.get("/a")
    @limiter.limit(rate, key_func=lambda request: request.headers.get("x-plan", "free"))
    async def a(request: Request) -> Response:
        return text()

    return app


def dynamic_after() -> Any:
    app = new()
    plan = RateLimit("1/minute", key="header:X-Plan", tier="header:X-Plan", tiers={"pro": "3/minute"})
    app.get("/a", dependencies=[Depends(plan)])(lambda: text())
    return app


def enabled_before() -> Any:
    app, limiter = old(enabled=False)

    @app.get("/a")
    @limiter.limit("1/minute")
    async def a(request: Request) -> Response:
        return text()

    return app


def enabled_after() -> Any:
    app = new(enabled=False)
    app.get("/a", dependencies=[Depends(RateLimit("1/minute"))])(lambda: text())
    return app


def moving_before() -> Any:
    app, limiter = old(strategy="moving-window")

    @app.get("/a")
    @limiter.limit("2/minute")
    async def a(request: Request) -> Response:
        return text()

    return app


class Down:
    """A store that does not answer."""

    local = True

    def ask(self, batch: Hits) -> Replies:
        return [StoreError("down") for _ in batch]

    async def aask(self, batch: Hits) -> Replies:
        return self.ask(batch)

    def keys(self, limit: Any) -> list[str]:
        return []

    async def akeys(self, limit: Any) -> list[str]:
        return []

    def close(self) -> None: ...

    async def aclose(self) -> None: ...


class DownStorage:
    """For slowapi: what its storage does when a server is down."""

    def incr(self, *arguments: Any, **more: Any) -> int:
        raise ConnectionError


def down_before(**arguments: Any) -> Any:
    app, limiter = old(**arguments)
    limiter._storage.incr = DownStorage().incr

    @app.get("/a")
    @limiter.limit("1/minute")
    async def a(request: Request) -> Response:
        return text()

    return app


def down_after(policy: str) -> Any:
    app = FastAPI()
    app.state.gatekeeper = keeper = Gatekeeper({"store": {"on_error": policy}})
    keeper.use(Down())
    app.get("/a", dependencies=[Depends(RateLimit("1/minute"))])(lambda: text())
    return app


def starlette_before() -> Any:
    limiter = slowapi.Limiter(key_func=get_remote_address)

    @limiter.limit("1/minute")
    async def a(request: Request) -> Response:
        return text()

    app = Starlette(routes=[Route("/a", a)])
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, slowapi._rate_limit_exceeded_handler)
    return app


def starlette_after() -> Any:
    @limit("1/minute")
    async def a(request: Request) -> Response:
        return text()

    return Starlette(routes=[Route("/a", a)])


TWICE: Final = [("GET /a A", 200), ("GET /a A", 200), ("GET /a A", 429), ("GET /a B", 200)]
ONCE: Final = [("GET /a A", 200), ("GET /a A", 429), ("GET /a B", 200)]

ROWS: Final = [
    Row("a route", decorator_before, decorator_after, TWICE),
    Row("a function that is not asynchronous", sync_before, sync_after, TWICE),
    Row("several rates", several_before, several_after, TWICE),
    Row(
        "each route",
        defaults_before,
        defaults_after,
        [("GET /a A", 200), ("GET /a A", 200), ("GET /a A", 429), ("GET /b A", 200), ("GET /a B", 200)],
    ),
    Row(
        "the whole application",
        application_before,
        application_after,
        [("GET /a A", 200), ("GET /b A", 200), ("GET /a A", 429), ("GET /b A", 429), ("GET /b B", 200)],
    ),
    Row(
        "several routes together",
        shared_before,
        shared_after,
        [("GET /a A", 200), ("GET /b A", 200), ("GET /a A", 429), ("GET /b B", 200)],
    ),
    Row(
        "a route without limit",
        exempt_before,
        exempt_after,
        [("GET /a A", 200), ("GET /a A", 429), *[("GET /health A", 200)] * 3],
    ),
    Row(
        "some requests without limit",
        exempt_when_before,
        exempt_when_after,
        [("GET /a A", 200)] * 3,
        {"x-staff": "1"},
    ),
    Row("another key", key_before, key_after, [("GET /a A", 200), ("GET /a B", 429)], {"x-key": "k"}),
    Row("a cost", cost_before, cost_after, TWICE, {"x-cost": "2"}),
    Row(
        "each method by itself",
        per_method_before,
        per_method_after,
        [("GET /a A", 200), ("POST /a A", 200), ("GET /a A", 429), ("POST /a A", 429), ("POST /a B", 200)],
    ),
    Row("some methods", methods_before, methods_after, [("POST /a A", 200), ("POST /a A", 429), ("GET /a A", 200)]),
    Row(
        "rates that depend on the client",
        dynamic_before,
        dynamic_after,
        [("GET /a A", 200), ("GET /a A", 200), ("GET /a A", 200), ("GET /a A", 429)],
        {"x-plan": "pro"},
    ),
    Row("off", enabled_before, enabled_after, [("GET /a A", 200)] * 3),
    Row("a sliding window", moving_before, decorator_after, TWICE),
    Row(
        "a store that is down, counted in the process",
        lambda: down_before(in_memory_fallback_enabled=True),
        lambda: down_after("local"),
        ONCE,
    ),
    Row("an endpoint of Starlette's", starlette_before, starlette_after, ONCE),
]


def answer(app: Any, asked: str, headers: dict[str, str]) -> int:
    method, path, who = asked.split()
    client = TestClient(app, client=({"A": "192.0.2.1", "B": "198.51.100.2"}[who], 1))
    return client.request(method, path, headers=headers).status_code


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.about)
def test_both_sides_of_a_row_answer_alike(row: Row, side: str) -> None:
    app = getattr(row, side)()
    assert [(asked, answer(app, asked, row.headers)) for asked, _ in row.asked] == row.asked


def test_the_page_has_the_rows_that_are_tested() -> None:
    table = re.findall(r"^\| ([^|]+?) \|.*\|.*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {row.about for row in ROWS} <= set(table)


def test_the_answer_can_be_the_one_of_before() -> None:
    before, limiter = old(headers_enabled=True)

    @before.get("/a")
    @limiter.limit("1/minute")
    async def a(request: Request) -> Response:
        return text()

    after = new(response={"x_ratelimit": "epoch", "fields": False})
    after.get("/a", dependencies=[Depends(RateLimit("1/minute"))])(lambda: text())

    @after.exception_handler(RateLimited)
    async def handler(request: Request, error: RateLimited) -> JSONResponse:
        limit = error.verdict.limit
        return JSONResponse({"error": f"Rate limit exceeded: {limit} per 1 minute"}, 429, headers=error.headers)

    answers = []
    for app in (before, after):
        client = TestClient(app)
        client.get("/a")
        refusal = client.get("/a")
        assert refusal.headers["x-ratelimit-limit"] == "1"
        assert refusal.headers["x-ratelimit-remaining"] == "0"
        assert {"x-ratelimit-reset", "retry-after"} <= set(refusal.headers)
        answers.append((refusal.status_code, refusal.json()))
    assert answers[0] == answers[1]


# What is otherwise, and why one moves


def test_slowapi_counts_each_path_by_itself_and_we_count_the_route() -> None:
    before, limiter = old()

    @before.get("/item/{number}")
    @limiter.limit("1/minute")
    async def item(request: Request, number: int) -> Response:
        return text()

    after = new()
    after.get("/item/{number}", dependencies=[Depends(RateLimit("1/minute"))])(lambda number: text())
    paths = ["GET /item/1 A", "GET /item/2 A", "GET /item/3 A"]
    assert [answer(before, path, {}) for path in paths] == [200, 200, 200]
    assert [answer(after, path, {}) for path in paths] == [200, 429, 429]


def test_slowapi_does_not_see_what_is_mounted_and_we_do() -> None:
    below = FastAPI()

    @below.get("/a")
    async def a() -> Response:
        return text()

    before, _ = old(default_limits=["1/minute"])
    before.add_middleware(SlowAPIMiddleware)
    after = new(limits=[{"name": "all", "rate": "1/minute"}])
    for app in (before, after):
        app.mount("/m", below)
    assert [answer(before, "GET /m/a A", {}) for _ in range(3)] == [200] * 3
    assert [answer(after, "GET /m/a A", {}) for _ in range(3)] == [200, 429, 429]


def test_slowapi_that_swallows_errors_answers_500_and_we_let_pass() -> None:
    before = TestClient(down_before(swallow_errors=True), raise_server_exceptions=False)
    assert before.get("/a").status_code == 500
    after = down_after("allow")
    assert [answer(after, "GET /a A", {}) for _ in range(3)] == [200] * 3


def test_slowapi_wants_a_request_parameter_and_we_do_not() -> None:
    _, limiter = old()

    async def a(number: int) -> Response:
        return text()

    with pytest.raises(Exception, match='No "request" or "websocket" argument'):
        limiter.limit("1/minute")(a)
    app = new()
    app.get("/a/{number}")(limit("1/minute")(a))
    assert [answer(app, "GET /a/1 A", {}), answer(app, "GET /a/1 A", {})] == [200, 429]


def test_slowapi_knows_no_methods_of_classes_and_we_do() -> None:
    class Page(HTTPEndpoint):
        @limit("1/minute")
        async def get(self, request: Request) -> Response:
            return text()

    app = Starlette(routes=[Route("/a", Page)])
    app.add_exception_handler(RateLimited, limited_handler)
    assert [answer(app, "GET /a A", {}), answer(app, "GET /a A", {}), answer(app, "GET /a B", {})] == [
        200,
        429,
        200,
    ]
