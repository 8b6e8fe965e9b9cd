"""Limits on endpoints of Starlette's: functions, methods, classes, mounted applications; and what `check` says."""

from __future__ import annotations

import asyncio
import functools
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from gatekeeper import Gatekeeper
from gatekeeper.asgi import Message
from gatekeeper.testing import VirtualClock, disabled, virtual
from gatekeeper_fastapi import (
    GatekeeperMiddleware,
    RateLimit,
    RateLimited,
    check,
    limit,
    limited_handler,
    uncovered,
)
from tests.fastapi_home import A, B, ask

ROOT = Path(__file__).resolve().parent.parent
Make = Callable[..., Starlette]


@pytest.fixture(autouse=True)
def clock() -> Iterator[VirtualClock]:
    with virtual() as clock:
        yield clock


@pytest.fixture(params=["with the middleware", "alone"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an application whose limits find a middleware around them, or find none."""

    def make(*routes: BaseRoute, settings: Any = None) -> Starlette:
        app = Starlette(routes=routes)
        keeper = Gatekeeper(settings or {})
        if request.param == "alone":
            app.state.gatekeeper = keeper
        else:
            app.add_middleware(GatekeeperMiddleware, settings=keeper)
        return app

    return make


async def page(request: Request) -> Response:
    return PlainTextResponse("page")


def sync_page(request: Request) -> Response:
    return PlainTextResponse("page")


@pytest.mark.parametrize("endpoint", [page, sync_page, functools.partial(page)])
def test_a_function_is_limited_for_each_client_on_its_template(make: Make, endpoint: Any) -> None:
    app = make(Route("/item/{number}", limit("2/minute")(endpoint), name="item"))
    client = TestClient(app, client=A)
    first = client.get("/item/1")
    assert first.headers.get_list("ratelimit") == [first.headers["ratelimit"]]
    assert first.headers["ratelimit"].endswith('page";r=1;t=61')
    assert ask(app, "/item/2", "/item/3") == [200, 429]
    assert ask(app, "/item/1", "/item/1", "/item/1", client=B) == [200, 200, 429]


@pytest.mark.parametrize("endpoint", [page, sync_page])
def test_preflights_are_free_and_so_are_networks_that_are_never_limited(make: Make, endpoint: Any) -> None:
    route = Route("/a", limit("1/minute")(endpoint), methods=["GET", "OPTIONS"])
    app = make(route, settings={"access": {"allow": B[0]}})
    asks = {"Origin": "https://shop.example", "Access-Control-Request-Method": "PUT"}
    assert ask(app, *["/a"] * 3, method="OPTIONS", headers=asks) == [200] * 3
    assert ask(app, *["/a"] * 3, client=B) == [200] * 3
    assert ask(app, "/a", "/a") == [200, 429]


def test_a_function_under_two_routes_has_two_quotas_unless_it_has_a_name(make: Make) -> None:
    for name, statuses in ((None, [200, 200, 429, 429]), ("own", [200, 429, 429, 429])):
        limited = limit("1/minute", name=name)(page)
        app = make(Route("/a", limited), Mount("/m", routes=[Route("/b/{x}", limited)]))
        assert ask(app, "/a", "/m/b/1", "/a", "/m/b/2") == statuses


def test_the_same_mounts_at_two_places_are_two_places(make: Make) -> None:
    below = Router([Route("/x/{y}", limit("1/minute")(page))])
    app = make(Mount("/one", app=below), Mount("/two/{tenant}", app=below), Host("api.example", app=below))
    assert ask(app, "/one/x/1", "/one/x/2", "/two/a/x/1", "/two/b/x/1") == [200, 429, 200, 429]
    assert ask(app, "/x/1", "/x/2", headers={"host": "api.example"}) == [200, 429]


def test_a_plain_route_in_fastapi_is_limited_by_its_template() -> None:
    app, router = FastAPI(), APIRouter()
    limited = limit("1/minute")(page)
    app.add_route("/plain/{x}", limited)
    router.add_route("/plain/{x}", limited)
    app.include_router(router, prefix="/a")
    app.include_router(router, prefix="/b")
    assert ask(app, "/plain/1", "/plain/2", "/a/plain/1", "/a/plain/2", "/b/plain/1") == [200, 429, 200, 429, 200]


def test_a_function_of_fastapis_needs_no_request_where_the_middleware_is() -> None:
    app = FastAPI()

    @app.get("/item/{number}")
    @limit("1/minute")
    async def item(number: int, q: str = "") -> int:
        return number

    @app.get("/sync/{number}")
    @limit("1/minute")
    def sync_item(number: int) -> int:
        return number

    assert list(inspect.signature(item).parameters) == ["number", "q"]
    with pytest.raises(RuntimeError, match="there is no request to be seen"):
        TestClient(app).get("/item/1")
    app = FastAPI(routes=app.routes)
    app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper({}))
    for path in ("/item", "/sync"):
        assert ask(app, f"{path}/1", f"{path}/2") == [200, 429]
        assert ask(app, f"{path}/1", client=B) == [200]


def test_stacked_limits_are_all_charged(make: Make) -> None:
    app = make(Route("/a", limit("3/minute")(limit("2/minute")(page)), name="a"))
    response = TestClient(app, client=A).get("/a")
    assert response.headers["ratelimit-policy"] == '"page-2";q=3;w=60, "page";q=2;w=60'
    assert ask(app, "/a", "/a") == [200, 429]


def test_methods_of_an_endpoint_are_limited_each_by_itself(make: Make) -> None:
    class Items(HTTPEndpoint):
        @limit("2/minute")
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("items")

        @limit("1/minute")
        def post(self, request: Request) -> Response:
            return PlainTextResponse("made", 201)

    app = make(Route("/items", Items))
    assert ask(app, "/items", "/items", "/items") == [200, 200, 429]
    assert ask(app, "/items", "/items", method="POST") == [201, 429]
    assert ask(app, "/items", client=B) == [200]


def test_a_class_is_limited_as_a_whole(make: Make) -> None:
    @limit("2/minute", give_back="404")
    class Items(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            if "missing" in request.query_params:
                raise HTTPException(404)
            return PlainTextResponse("items")

        def post(self, request: Request) -> Response:
            return PlainTextResponse("made", 201)

    app = make(Route("/items", Items))
    client = TestClient(app, client=A)
    assert client.get("/items").headers.get_list("ratelimit") == ['"Items";r=1;t=61']
    assert ask(app, "/items?missing", "/items?missing", "/items?missing") == [404] * 3
    assert [*ask(app, "/items", method="POST"), *ask(app, "/items")] == [201, 429]
    assert ask(app, "/items", client=B) == [200]


def test_an_application_to_be_mounted_is_limited_as_a_whole(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    app = make(
        Mount("/static", app=limit("2/minute", name="files")(StaticFiles(directory=tmp_path))),
        Mount("/api/{version}", app=limit("2/minute")(Starlette(routes=[Route("/x", page), Route("/y", page)]))),
    )
    client = TestClient(app, client=A)
    first = client.get("/static/a.txt")
    assert (first.text, first.headers.get_list("ratelimit")) == ("a", ['"files";r=1;t=61'])
    assert ask(app, "/static/b.txt", "/static/a.txt") == [200, 429]
    assert ask(app, "/api/1/x", "/api/2/y", "/api/3/x") == [200, 200, 429]
    assert ask(app, "/static/a.txt", "/api/1/x", client=B) == [200, 200]


def test_an_application_without_any_other_around_is_limited(clock: VirtualClock) -> None:
    app = limit("1/minute")(Router([Route("/a", page)]))
    assert ask(app, "/a") == [200]
    response = TestClient(app, client=A).get("/a")
    assert (response.status_code, response.headers["content-type"]) == (429, "application/problem+json")
    assert ask(app, "/a", client=B) == [200]
    with TestClient(limit("1/minute")(Starlette(routes=[Route("/a", page)]))) as client:  # lifespan goes through
        assert client.get("/a").status_code == 200


def test_errors_tell_of_the_quota_as_well(make: Make) -> None:
    async def missing(request: Request) -> Response:
        raise HTTPException(404, headers={"x-own": "1"})

    app = make(Route("/a", limit("9/minute", name="own")(missing)))
    response = TestClient(app, client=A).get("/a")
    assert (response.status_code, response.headers["x-own"]) == (404, "1")
    assert response.headers.get_list("ratelimit") == ['"own";r=8;t=61']


def test_a_refusal_is_an_error_with_a_handler(make: Make) -> None:
    app = make(Route("/a", limit("1/minute", name="own")(page)))
    client = TestClient(app, client=A)
    client.get("/a")
    response = client.get("/a")
    assert (response.status_code, response.text) == (429, "Too Many Requests")
    assert response.headers["retry-after"] == "61"
    assert response.headers.get_list("ratelimit") == ['"own";r=0;t=61']
    app = make(Route("/a", limit("1/minute", name="own")(page)))
    app.add_exception_handler(RateLimited, limited_handler)
    client = TestClient(app, client=A)
    client.get("/a")
    assert client.get("/a").json()["violated-policies"] == ["own"]


@pytest.mark.parametrize("is_async", [True, False])
def test_what_ends_with_the_response_ends_once(make: Make, is_async: bool) -> None:
    failed = {"give_back": ["2xx"], "name": "failures"}

    def answer(request: Request) -> Response:
        status = int(request.query_params["status"])
        if status == 500:
            raise RuntimeError
        return PlainTextResponse("", status)

    async def aanswer(request: Request) -> Response:
        return answer(request)

    app = make(Route("/a", limit("2/minute", **failed)(aanswer if is_async else answer)))  # type: ignore[arg-type]
    assert ask(app, *["/a?status=200"] * 5, "/a?status=401", "/a?status=500", "/a?status=200") == [
        *[200] * 5,
        401,
        500,
        429,
    ]


def test_a_stream_is_in_progress_until_it_ends(make: Make) -> None:
    inside, go = asyncio.Event(), asyncio.Event()

    async def stream(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            inside.set()
            await go.wait()
            yield b"done"

        return StreamingResponse(pieces())

    app = make(Route("/a", limit(concurrency=1)(stream)))

    async def send() -> int:
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "GET", "path": "/a",
            "query_string": b"", "headers": [], "client": A,
        }  # fmt: skip
        statuses: list[int] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def keep(message: Message) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        await app(scope, receive, keep)
        return statuses[0]

    async def trial() -> list[int]:
        first = asyncio.create_task(send())
        await asyncio.wait_for(inside.wait(), 30)
        during = await send()
        go.set()
        return [await first, during, await send()]

    assert asyncio.run(trial()) == [200, 429, 200]


def test_a_key_may_be_a_field_of_the_body_or_a_parameter_of_the_path(make: Make) -> None:
    async def echo(request: Request) -> Response:
        return JSONResponse(await request.json())

    @limit("1/minute", key="json:name")
    class Echo(HTTPEndpoint):
        async def post(self, request: Request) -> Response:
            return JSONResponse(await request.json())

    app = make(
        Route("/function", limit("1/minute", key="json:name")(echo), methods=["POST"]),
        Route("/class", Echo),
        Route("/of/{shop}", limit("1/minute", key="param:shop")(sync_page)),
    )
    for path in ("/function", "/class"):
        response = TestClient(app, client=A).post(path, json={"name": "ada"})
        assert (response.status_code, response.json()) == (200, {"name": "ada"})
        assert ask(app, path, method="POST", client=B, json={"name": "Ada"}) == [429]
        assert ask(app, path, method="POST", json={"name": "bob"}) == [200]
    assert ask(app, "/of/a", "/of/a", "/of/b") == [200, 429, 200]


def test_a_sync_function_may_have_a_key_that_is_awaited(make: Make) -> None:
    async def key(request: Any) -> str | None:
        await asyncio.sleep(0)
        found: str | None = request.field("x-key")
        return found

    app = make(Route("/a", limit("1/minute", key=key)(sync_page)))
    assert ask(app, "/a", "/a", headers={"x-key": "1"}) == [200, 429]
    assert ask(app, "/a", headers={"x-key": "2"}) == [200]


def test_a_websocket_is_refused_at_its_handshake(make: Make) -> None:
    @limit("1/minute", name="function")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    @limit("1/minute", name="class")
    class Talk(WebSocketEndpoint):
        pass

    app = make(WebSocketRoute("/function", talk), WebSocketRoute("/class", Talk))
    for path in ("/function", "/class"):
        with TestClient(app, client=A).websocket_connect(path):
            pass
        with pytest.raises(WebSocketDenialResponse) as caught, TestClient(app, client=A).websocket_connect(path):
            pass
        denied: Any = caught.value
        assert denied.status_code == 429
        assert denied.headers.get_list("ratelimit") == [f'"{path[1:]}";r=0;t=61']
        with TestClient(app, client=B).websocket_connect(path):
            pass


def test_a_method_for_messages_ends_the_websocket_that_sends_too_many(make: Make) -> None:
    class Echo(WebSocketEndpoint):
        encoding = "text"

        @limit("2/minute")
        async def on_receive(self, websocket: WebSocket, data: str) -> None:
            await websocket.send_text(data)

    app = make(WebSocketRoute("/echo", Echo))
    with TestClient(app, client=A).websocket_connect("/echo") as socket:
        for _ in range(2):
            socket.send_text("a")
            assert socket.receive_text() == "a"
        socket.send_text("a")
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_text()
    assert caught.value.code == 1013


def test_a_concurrent_websocket_counts_until_it_ends(make: Make) -> None:
    @limit(concurrency=1)
    async def held(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.close()

    client = TestClient(make(WebSocketRoute("/held", held)), client=A)
    for _ in range(2):
        with client.websocket_connect("/held") as first:
            with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/held"):
                pass
            first.send_text("end")
            assert first.receive()["type"] == "websocket.close"


def test_what_cannot_be_limited_is_refused_when_it_is_decorated() -> None:
    async def stream(request: Request) -> AsyncIterator[bytes]:
        yield b""

    wrong: Any
    for wrong in (stream, staticmethod(page), classmethod(page), 7, dict, APIRouter()):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^limit: expected"):
            limit("1/minute")(wrong)


def test_limits_can_be_off(make: Make) -> None:
    app = make(Route("/a", limit("1/minute")(page)), Route("/b", limit("1/minute")(sync_page)))
    with disabled():
        assert ask(app, "/a", "/a", "/b", "/b") == [200] * 4
    assert ask(app, "/a", "/a", "/b", "/b") == [200, 429, 200, 429]


# What limits which routes


def shop(settings: Any = None) -> FastAPI:
    app = FastAPI(dependencies=[Depends(RateLimit("9/minute", name="site"))])
    router = APIRouter(dependencies=[Depends(RateLimit("9/minute"))])

    @router.get("/item/{number:int}")
    async def item(number: int) -> int:
        return number

    @router.websocket("/ws")
    async def talk(websocket: WebSocket) -> None: ...

    @limit("9/minute", name="class")
    class Items(HTTPEndpoint):
        @limit("9/minute")
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("")

    app.include_router(router, prefix="/v1")
    app.add_route("/plain", limit("9/minute", name="plain")(page))
    app.add_route("/open", page)
    below = Starlette(routes=[Route("/items", Items), Route("/login", page, methods=["POST"])])
    app.mount("/sub/{tenant}", below)
    app.mount("/limited", limit("9/minute", name="whole")(Starlette(routes=[Route("/x", page)])))
    app.mount("/static", StaticFiles(directory=ROOT))
    if settings is not None:
        app.add_middleware(GatekeeperMiddleware, settings=settings)
    return app


def test_check_lists_each_route_with_what_limits_it() -> None:
    report = check(shop({"limits": [{"name": "login", "rate": "5/minute", "match": "POST /sub/{tenant}/login"}]}))
    told = {(covered.route.path, covered.rules) for covered in report.routes if "/docs" not in covered.route.path}
    assert told == {
        ("/openapi.json", ()),
        ("/redoc", ()),
        ("/v1/item/{number:int}", ("site", "item")),
        ("/v1/ws", ("site", "talk")),
        ("/plain", ("plain",)),
        ("/open", ()),
        ("/sub/{tenant}/items", ("class", "get")),
        ("/sub/{tenant}/login", ("login",)),
        ("/limited/x", ("whole",)),
        ("/static/*", ()),
    }
    assert [route.path for route in report.uncovered] == ["/open", "/static/*"]
    assert report.warnings == ("GET /open: no limit is for it", "* /static/*: no limit is for it")
    text = str(report)
    assert "GET   /v1/item/{number:int}  site, item\n" in text
    assert text.endswith("\nwarning: * /static/*: no limit is for it")
    assert [route.path for route in uncovered(shop({"limits": [{"name": "all", "rate": "5/minute"}]}))] == []


def test_check_knows_the_middleware_around_and_within() -> None:
    rules = {"limits": [{"name": "all", "rate": "5/minute"}]}
    inner = {"limits": [{"name": "inner", "rate": "5/minute", "match": "/m/*"}]}
    app = Starlette(
        routes=[
            Route("/a", page),
            Mount("/m", routes=[Route("/b", page)], middleware=[Middleware(GatekeeperMiddleware, settings=inner)]),
        ]
    )
    told = [(covered.route.path, covered.rules) for covered in check(GatekeeperMiddleware(app, rules)).routes]
    assert told == [("/a", ("all",)), ("/m/b", ("inner", "all"))]
    assert check(app).uncovered == (check(app).routes[0].route,)
    assert check(Starlette()).routes == ()
    assert str(check(Starlette())).strip() == "no routes"


def test_check_warns_of_what_is_risky(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"identity": {"trusted_proxies": "0.0.0.0/0"}, "limits": [{"name": "all", "rate": "5/minute"}]}
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    lines = check(shop(settings)).warnings
    assert [line.partition(":")[0] for line in lines] == ["store.url", "identity.trusted_proxies"]
    assert len(check(shop(settings), workers=1).warnings) == 1
    remote = {"store": {"url": "redis://h"}, "limits": settings["limits"]}
    app = FastAPI()
    app.add_api_route("/login", lambda: "", dependencies=[Depends(RateLimit("1/minute"))])
    app.add_middleware(GatekeeperMiddleware, settings=remote)
    (line,) = check(app).warnings
    assert line.startswith("/login.on_error: ")


wrong_way_round = FastAPI(openapi_url=None, dependencies=[Depends(RateLimit("9/minute"))])


@limit("1/minute")
@wrong_way_round.get("/wrong")
async def wrong() -> str:
    return "wrong"


@wrong_way_round.get("/right")
@limit("1/minute")
async def right() -> str:
    return "right"


def test_check_warns_of_a_limit_above_its_route() -> None:
    assert check(wrong_way_round).warnings == (
        f"{__name__}.wrong: its limit stands above its route and limits nothing: put it below",
    )
    limit("1/minute")(page)
    app = Starlette(routes=[Route("/a", page)])
    assert [line.partition(":")[0] for line in check(app).warnings] == ["GET /a"], "but that nothing limits it"


def test_check_warns_of_rules_without_middleware_and_of_its_place() -> None:
    app = Starlette(routes=[Route("/a", limit("1/minute")(page))])
    app.state.gatekeeper = Gatekeeper({"limits": [{"name": "all", "rate": "5/minute"}]})
    assert [line.partition(":")[0] for line in check(app).warnings] == ["limits"]
    for first, count in ((True, 1), (False, 0)):
        app = Starlette(routes=[Route("/a", page)])
        layers: list[Any] = [
            (CORSMiddleware, {}),
            (GatekeeperMiddleware, {"settings": {"limits": [{"name": "all", "rate": "5/minute"}]}}),
        ]
        for layer, arguments in layers if first else reversed(layers):
            app.add_middleware(layer, **arguments)
        assert len(check(app).warnings) == count


def test_the_command_prints_the_report(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from fastapi import Depends, FastAPI\n"
        "from gatekeeper_fastapi import RateLimit\n"
        "app = FastAPI(openapi_url=None)\n"
        "app.get('/a', dependencies=[Depends(RateLimit('5/minute'))])(lambda: 'a')\n"
        "bare = FastAPI(openapi_url=None)\n"
        "bare.get('/a', name='a')(lambda: 'a')\n"
        "number = 7\n"
        "def make():\n"
        "    return app\n"
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        call = [sys.executable, "-m", "gatekeeper_fastapi", *arguments]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    assert run("shop:app") == (0, "GET  /a  lambda\n", "")
    warned = "GET  /a  no limit\nwarning: GET /a: no limit is for it\n"
    assert run("shop:bare") == (0, warned, "")
    assert run("shop:bare", "--strict") == (1, warned, "")
    assert run("shop:app", "--strict", "--workers", "2")[0] == 1
    assert run("shop:none")[0] == run("nowhere:app")[0] == run()[0] == 2
    expected = "expected an application of FastAPI's or Starlette's, not"
    assert run("shop:make", "--strict") == (
        2, "", f"shop:make: {expected} function; if it makes one, name what it has made\n",
    )  # fmt: skip
    assert run("shop:number") == (2, "", f"shop:number: {expected} int\n")


def test_starlette_is_enough(tmp_path: Path) -> None:
    """Where FastAPI is not installed, all that is not FastAPI's works."""
    (tmp_path / "fastapi.py").write_text("raise ImportError\n")
    (tmp_path / "page.py").write_text(
        "from starlette.applications import Starlette\n"
        "from starlette.responses import PlainTextResponse\n"
        "from starlette.routing import Route\n"
        "from starlette.testclient import TestClient\n"
        "from gatekeeper_fastapi import check, limit\n"
        "@limit('1/minute')\n"
        "async def page(request):\n"
        "    return PlainTextResponse('page')\n"
        "app = Starlette(routes=[Route('/', page)])\n"
        "print([TestClient(app).get('/').status_code for _ in range(2)], check(app).uncovered)\n"
    )
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[200, 429] ()\n", "")
