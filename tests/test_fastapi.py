"""Limits in FastAPI: dependencies with and without the middleware, errors, documents, WebSockets."""

# No `from __future__ import annotations`: FastAPI reads those of endpoints, which name things of their function.

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Form, HTTPException, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from gatekeeper import Gatekeeper, Limited, SettingsError, Ticket
from gatekeeper.asgi import Message
from gatekeeper.commands import Hits, Replies
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock, assert_limited, disabled, virtual, virtual_store
from gatekeeper_fastapi import (
    PROBLEM_RESPONSES,
    RESPONSES,
    GatekeeperMiddleware,
    RateLimit,
    RateLimited,
    WebSocketLimited,
    document,
    limited_handler,
)
from gatekeeper_fastapi.tickets import default_keeper
from tests.fastapi_home import A, B, ask

Make = Callable[..., FastAPI]


@pytest.fixture(autouse=True)
def clock() -> Iterator[VirtualClock]:
    with virtual() as clock:
        yield clock


@pytest.fixture(params=["with the middleware", "alone"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an application whose dependencies find a middleware around them, or find none."""

    def make(settings: Any = None, **arguments: Any) -> FastAPI:
        app = FastAPI(**arguments)
        keeper = settings if isinstance(settings, Gatekeeper) else Gatekeeper(settings or {})
        if request.param == "alone":
            app.state.gatekeeper = keeper
        else:
            app.add_middleware(GatekeeperMiddleware, settings=keeper)
        return app

    return make


# What it limits


def test_each_client_has_a_quota_of_its_own_on_the_template(make: Make, clock: VirtualClock) -> None:
    app = make()

    @app.get("/item/{number}", dependencies=[Depends(RateLimit("2/minute"))])
    async def item(number: int) -> int:
        return number

    assert ask(app, "/item/1", "/item/2", "/item/3") == [200, 200, 429]
    assert ask(app, "/item/1", "/item/1", "/item/1", client=B) == [200, 200, 429]
    clock.advance(61)
    assert ask(app, "/item/4") == [200]


@pytest.mark.parametrize("level", ["app", "router", "include", "route", "parameter", "nested"])
def test_a_limit_holds_at_every_level(make: Make, level: str) -> None:
    limit = [Depends(RateLimit("2/minute"))]

    async def passing(ticket: Annotated[Ticket, Depends(RateLimit("2/minute"))]) -> None:
        pass

    def at(wanted: str) -> Any:
        return limit if level == wanted else []

    app = make(dependencies=at("app"))
    inner, outer = APIRouter(dependencies=at("router")), APIRouter(prefix="/outer")

    @inner.get("/a", dependencies=[*at("route"), *([Depends(passing)] if level == "nested" else [])])
    def page() -> str:
        return "page"

    if level == "parameter":

        @inner.get("/b")
        def other(ticket: Annotated[Ticket, Depends(RateLimit("2/minute"))]) -> str:
            return ticket.address
    else:
        inner.add_api_route("/b", page, dependencies=[*at("route")])
    outer.include_router(inner, prefix="/inner", dependencies=at("include"))
    app.include_router(outer)
    path = "/outer/inner/b" if level == "parameter" else "/outer/inner/a"
    assert ask(app, path, path, path) == [200, 200, 429]
    assert ask(app, path, client=B) == [200]


def test_each_route_has_a_quota_of_its_own_unless_the_limit_has_a_name(make: Make) -> None:
    def application(**more: Any) -> FastAPI:
        app = make(dependencies=[Depends(RateLimit("2/minute", **more))])
        for path in ("/a", "/b/{x}"):
            app.add_api_route(path, lambda: "page", methods=["GET"])
        return app

    assert ask(application(), "/a", "/b/1", "/a", "/b/2", "/a", "/b/3") == [200] * 4 + [429] * 2
    assert ask(application(name="site"), "/a", "/b/1", "/a", "/b/2") == [200] * 2 + [429] * 2
    assert ask(application(scope="site"), "/a", "/b/1", "/a", "/b/2") == [200] * 2 + [429] * 2


def test_limits_on_the_way_are_all_charged_each_once(make: Make) -> None:
    per_route = RateLimit("2/minute")
    app = make(dependencies=[Depends(RateLimit("3/minute")), Depends(per_route)])

    @app.get("/a", dependencies=[Depends(per_route), Depends(RateLimit("9/minute"))])
    async def a(ticket: Annotated[Ticket, Depends(per_route, use_cache=False)]) -> str:
        return "a"

    response = TestClient(app, client=A).get("/a")
    assert response.headers["ratelimit"] == '"a-2";r=1;t=61'
    assert response.headers["ratelimit-policy"] == '"a";q=3;w=60, "a-2";q=2;w=60, "a-3";q=9;w=60'
    assert response.headers.get_list("ratelimit") == ['"a-2";r=1;t=61']
    assert ask(app, "/a", "/a") == [200, 429]


def test_a_router_that_is_included_twice_has_two_quotas(make: Make) -> None:
    app, router = make(), APIRouter()
    router.add_api_route("/x/{y}", lambda y: y, dependencies=[Depends(RateLimit("1/minute"))])
    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/v2")
    assert ask(app, "/v1/x/1", "/v1/x/2", "/v2/x/1", "/v2/x/2") == [200, 429, 200, 429]


def test_mounted_applications_are_limited_by_their_whole_template(make: Make) -> None:
    below = FastAPI(dependencies=[Depends(RateLimit("1/minute"))])

    @below.get("/x/{y}")
    async def x(y: str) -> str:
        return y

    app = make()
    keeper = getattr(app.state, "gatekeeper", None)
    if keeper is not None:
        below.state.gatekeeper = keeper
    app.mount("/one", below)
    app.mount("/two/{tenant}", below)
    app.mount("/three", Starlette(routes=[Mount("/{tenant}/deep", app=below)]))
    assert ask(app, "/one/x/1", "/one/x/2") == [200, 429]
    assert ask(app, "/two/a/x/1", "/two/b/x/1", "/two/a/x/2") == [200, 429, 429]
    assert ask(app, "/three/a/deep/x/1", "/three/b/deep/x/1") == [200, 429]
    assert ask(below, "/x/1") == [200]  # by itself it is another place
    assert ask(app, "/one/x/1", "/two/a/x/1", client=B) == [200, 200]


def test_a_mount_that_cannot_be_looked_into_is_limited_whatever_its_parameters(make: Make) -> None:
    below = FastAPI()
    below.add_api_route("/x/{y}", lambda y: y, dependencies=[Depends(RateLimit("1/minute"))])

    async def hidden(scope: Any, receive: Any, send: Any) -> None:
        await below(scope, receive, send)

    app = make()
    app.mount("/{tenant}", hidden)
    assert ask(app, "/a/x/1", "/b/x/2", "/c/x/3") == [200, 429, 429]


def test_a_static_frontend_is_limited(make: Make, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("page")
    app = make(dependencies=[Depends(RateLimit("2/minute"))])
    app.frontend("/", directory=tmp_path)
    first = TestClient(app, client=A).get("/")
    assert (first.text, first.headers["ratelimit"]) == ("page", '"frontend";r=1;t=61')
    assert ask(app, "/", "/") == [200, 429]
    assert ask(app, "/", client=B) == [200]


def test_a_route_that_is_added_later_is_limited(make: Make) -> None:
    app, router = make(), APIRouter(dependencies=[Depends(RateLimit("1/minute"))])
    router.add_api_route("/a", lambda: "a")
    app.include_router(router, prefix="/p")
    assert ask(app, "/p/a", "/p/a") == [200, 429]
    router.add_api_route("/b", lambda: "b")
    assert ask(app, "/p/b", "/p/b", "/p/a") == [200, 429, 429]


def test_methods_of_a_function_share_and_other_functions_do_not(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("2/minute"))])

    @app.api_route("/a", methods=["GET", "HEAD", "PUT"])
    async def a() -> str:
        return "a"

    @app.post("/a")
    async def create() -> str:
        return "created"

    assert [*ask(app, "/a"), *ask(app, "/a", method="PUT"), *ask(app, "/a", method="HEAD")] == [200, 200, 429]
    assert ask(app, "/a", method="POST") == [200]


def test_what_the_middleware_charges_is_not_charged_again() -> None:
    keeper = Gatekeeper({"limits": [{"name": "all", "rate": "3/minute"}]})
    app = FastAPI(dependencies=[Depends(RateLimit("2/minute", name="own", keeper=keeper))])
    app.add_api_route("/a", lambda: "a")
    app.add_middleware(GatekeeperMiddleware, settings=keeper)
    first = TestClient(app, client=A).get("/a")
    assert first.headers["ratelimit"] == '"own";r=1;t=61'
    assert first.headers["ratelimit-policy"] == '"all";q=3;w=60, "own";q=2;w=60'
    assert ask(app, "/a", "/a", "/a") == [200, 429, 429]
    assert ask(app, "/b", "/b", "/b", "/b", client=B) == [404, 404, 404, 429]


@pytest.mark.parametrize("rates", [("3/minute", "3/minute"), ("9/minute", "3/minute"), ("3/minute", "9/minute")])
@pytest.mark.parametrize("between", [False, True])
def test_a_request_spends_the_quota_of_a_name_once_whoever_asks_for_it(
    make: Make, rates: tuple[str, str], between: bool
) -> None:
    async def nothing() -> None:
        pass

    first, second = (Depends(RateLimit(rate, name="x")) for rate in rates)
    app = make(dependencies=[first, *([Depends(nothing)] if between else []), second])
    app.add_api_route("/a", lambda: "a")
    assert ask(app, *["/a"] * 4) == [200, 200, 200, 429]
    assert ask(app, "/a", client=B) == [200]
    keeper = Gatekeeper({"limits": [{"name": "x", "rate": rates[0]}]})
    app = FastAPI(dependencies=[Depends(RateLimit(rates[1], name="x", keeper=keeper))])
    app.add_api_route("/a", lambda: "a")
    app.add_middleware(GatekeeperMiddleware, settings=keeper)
    policies = {f'"x";q={rate[0]};w=60' for rate in rates}
    assert set(TestClient(app, client=A).get("/a").headers["ratelimit-policy"].split(", ")) == policies
    assert ask(app, *["/a"] * 3) == [200, 200, 429]


def test_networks_that_are_never_limited_are_not_by_a_dependency_either(make: Make) -> None:
    app = make({"access": {"allow": B[0]}})

    @app.get("/", dependencies=[Depends(RateLimit("1/minute")), Depends(RateLimit(["2/minute", "5/hour"]))])
    async def page() -> str:
        return "page"

    assert ask(app, *["/"] * 4, client=B) == [200] * 4
    assert ask(app, *["/"] * 2) == [200, 429]


def test_preflights_are_free_unless_the_limit_says_that_they_are_not(make: Make) -> None:
    app = make()
    asks = {"Origin": "https://shop.example", "Access-Control-Request-Method": "PUT"}
    for path, more in (("/free", {}), ("/charged", {"preflights": True}), ("/two", {"name": "two"})):
        limits = [
            Depends(RateLimit("1/minute", **more)),
            *([Depends(RateLimit("1/minute"))] if path == "/two" else []),
        ]
        app.add_api_route(path, lambda: "page", methods=["OPTIONS"], dependencies=limits)

    for path, statuses in (("/free", [200] * 3), ("/charged", [200, 429, 429]), ("/two", [200] * 3)):
        assert ask(app, *[path] * 3, method="OPTIONS", headers=asks) == statuses
    assert ask(app, "/free", "/free", method="OPTIONS") == [200, 429]


def test_a_limit_of_another_gatekeeper_stands_beside_the_middleware(clock: VirtualClock) -> None:
    outer, inner = Gatekeeper({"limits": [{"name": "all", "rate": "9/minute"}]}), Gatekeeper({})
    app = FastAPI(dependencies=[Depends(RateLimit("1/minute", name="own", keeper=inner))])
    app.add_api_route("/a", lambda: "a")
    app.add_api_route("/raw", lambda: PlainTextResponse("a"))
    app.add_middleware(GatekeeperMiddleware, settings=outer)
    client = TestClient(app, client=A)
    for path in ("/a", "/raw"):
        assert client.get(path).headers.get_list("ratelimit")[0] == '"own";r=0;t=61'
        assert client.get(path).status_code == 429
        clock.advance(61)


# The response


@pytest.fixture
def answers(make: Make) -> FastAPI:
    """All ways in which FastAPI makes a response."""
    app = make(dependencies=[Depends(RateLimit("9/minute", name="any"))])
    shared = PlainTextResponse("shared")

    @app.get("/value")
    async def value() -> dict[str, int]:
        return {"a": 1}

    @app.get("/sync")
    def sync() -> dict[str, int]:
        return {"a": 1}

    @app.get("/raw")
    async def raw() -> Response:
        return PlainTextResponse("raw", headers={"x-own": "1"})

    @app.get("/raw-sync")
    def raw_sync() -> Response:
        return PlainTextResponse("raw", headers={"x-own": "1"})

    @app.get("/shared")
    async def again() -> Response:
        return shared

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"a"
            yield b"b"

        return StreamingResponse(pieces())

    @app.get("/lines")
    async def lines() -> AsyncIterator[int]:
        yield 1
        yield 2

    @app.get("/error")
    async def error() -> None:
        raise HTTPException(404, headers={"x-own": "1"})

    @app.get("/error-sync")
    def error_sync() -> None:
        raise HTTPException(404)

    @app.get("/status", status_code=201)
    async def status(response: Response) -> str:
        response.headers["x-own"] = "1"
        return "made"

    return app


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/value", 200), ("/sync", 200), ("/raw", 200), ("/raw-sync", 200), ("/shared", 200), ("/stream", 200),
        ("/lines", 200), ("/error", 404), ("/error-sync", 404), ("/status", 201),
    ],
)  # fmt: skip
def test_each_kind_of_response_tells_of_the_quota_once(answers: FastAPI, path: str, status: int) -> None:
    client = TestClient(answers, client=A)
    for left in (8, 7, 6):
        response = client.get(path)
        assert response.status_code == status
        assert response.headers.get_list("ratelimit") == [f'"any";r={left};t=61']
        assert response.headers.get_list("ratelimit-policy") == ['"any";q=9;w=60']
        if path in ("/raw", "/raw-sync", "/error", "/status"):
            assert response.headers["x-own"] == "1"


def test_fields_can_be_switched_off_and_the_older_ones_on(make: Make) -> None:
    app = make(
        {"response": {"fields": False, "x_ratelimit": "seconds"}}, dependencies=[Depends(RateLimit("2/minute"))]
    )
    app.add_api_route("/a", lambda: "a")
    fields = TestClient(app, client=A).get("/a").headers
    assert "ratelimit" not in fields
    assert (fields["x-ratelimit-limit"], fields["x-ratelimit-remaining"], fields["x-ratelimit-reset"]) == (
        "2",
        "1",
        "61",
    )


# The refusal


def refused(app: FastAPI, path: str = "/a", **headers: str) -> Any:
    client = TestClient(app, client=A, headers=headers)
    client.get(path)
    response = client.get(path)
    assert response.headers["retry-after"] == "61"
    assert response.headers.get_list("ratelimit") == ['"own";r=0;t=61']
    assert response.headers.get_list("ratelimit-policy") == ['"own";q=1;w=60']
    assert response.headers.get_list("cache-control") == ["no-store"]
    return response


@pytest.fixture
def tight(make: Make) -> FastAPI:
    app = make(dependencies=[Depends(RateLimit("1/minute", name="own"))])
    app.add_api_route("/a", lambda: "a", methods=["GET", "HEAD"])
    return app


def test_a_refusal_is_answered_by_fastapis_own_handler(tight: FastAPI) -> None:
    response = refused(tight)
    assert response.status_code == 429
    assert response.json() == {"detail": "Too Many Requests"}
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("kind", [429, HTTPException.__mro__[1], RateLimited, Limited])
def test_handlers_of_ones_own_answer_a_refusal(tight: FastAPI, kind: Any) -> None:
    @tight.exception_handler(kind)
    async def handler(request: Request, error: RateLimited) -> JSONResponse:
        assert error.verdict.limit == 1
        assert error.refusal.status == 429
        return JSONResponse({"wait": error.verdict.retry_after}, 429, headers=dict(error.headers or {}))

    assert refused(tight).json() == {"wait": pytest.approx(61, abs=1)}


@pytest.mark.parametrize("kind", [429, RateLimited, Limited])
def test_the_middleware_adds_the_fields_that_a_handler_has_left_out(kind: Any) -> None:
    app = FastAPI()
    app.add_api_route("/a", lambda: "a", dependencies=[Depends(RateLimit("1/minute", name="own"))])
    app.add_api_route("/own", lambda: JSONResponse("own", 429))
    app.add_middleware(GatekeeperMiddleware, settings={"response": {"x_ratelimit": "seconds"}})

    @app.exception_handler(kind)
    async def handler(request: Request, error: Any) -> JSONResponse:
        return JSONResponse(
            "mine", 429, headers=None if "plain" in str(request.url) else {"Cache-Control": "private"}
        )

    response = refused(app, path="/a?plain")
    assert response.json() == "mine"
    assert response.headers.get_list("x-ratelimit-limit") == ["1"]
    assert TestClient(app, client=A).get("/a").headers.get_list("cache-control") == ["private"]
    assert "retry-after" not in TestClient(app, client=A).get("/own").headers, "that is none of ours"


@pytest.mark.parametrize("kind", [RateLimited, Limited])
def test_limited_handler_answers_as_the_middleware_does(tight: FastAPI, kind: Any) -> None:
    tight.add_exception_handler(kind, limited_handler)
    response = refused(tight)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["violated-policies"] == ["own"]
    page = refused(tight, accept="text/html")
    assert page.headers["content-type"] == "text/plain; charset=utf-8"
    head = TestClient(tight, client=A).head("/a")
    assert (head.status_code, head.content) == (429, b"")
    assert head.headers["retry-after"] == "61"


def test_a_body_of_the_settings_is_given_by_limited_handler(make: Make) -> None:
    app = make(
        {"response": {"body": "Wait {retry_after} s.", "content_type": "text/x-own"}},
        dependencies=[Depends(RateLimit("1/minute", name="own"))],
    )
    app.add_api_route("/a", lambda: "a")
    app.add_exception_handler(RateLimited, limited_handler)
    response = refused(app)
    assert (response.text, response.headers["content-type"]) == ("Wait 61 s.", "text/x-own")


def test_limited_handler_answers_functions_under_a_limit_and_passes_on_other_errors(make: Make) -> None:
    keeper = Gatekeeper({})
    app = make(keeper)

    @keeper.limit("1/minute", name="own")
    async def work() -> str:
        return "done"

    @app.get("/a", dependencies=[Depends(RateLimit("9/minute", name="route"))])
    async def a() -> str:
        return await work()

    app.add_exception_handler(Limited, limited_handler)
    client = TestClient(app, client=A)
    assert client.get("/a").status_code == 200
    assert client.get("/a").status_code == 429
    assert client.get("/a").headers["retry-after"] == "61"
    assert ask(app, "/a", client=B) == [200]  # each client by itself, with and without the middleware
    with pytest.raises(KeyError):
        asyncio.run(limited_handler(Request({"type": "http"}), KeyError()))


def test_a_refusal_can_be_read_by_scripts_of_another_origin(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("1/minute", name="own"))])
    app.add_api_route("/a", lambda: "a")
    app.add_middleware(CORSMiddleware, allow_origins=["https://shop.example"])  # added last: it stands outside
    response = refused(app, origin="https://shop.example")
    assert response.headers["access-control-allow-origin"] == "https://shop.example"
    preflight = {"origin": "https://shop.example", "access-control-request-method": "GET"}
    assert ask(app, "/a", "/a", method="OPTIONS", headers=preflight) == [200, 200]


def test_the_middleware_inside_of_cors_refuses_readably_and_outside_it_does_not() -> None:
    for cors_last, readable in ((True, True), (False, False)):
        app = FastAPI()
        app.add_api_route("/a", lambda: "a")
        layers: list[Any] = [
            (GatekeeperMiddleware, {"settings": Gatekeeper({"limits": [{"name": "own", "rate": "1/minute"}]})}),
            (CORSMiddleware, {"allow_origins": ["*"]}),
        ]
        for layer, arguments in layers if cors_last else reversed(layers):
            app.add_middleware(layer, **arguments)
        response = refused(app, origin="https://shop.example")
        assert ("access-control-allow-origin" in response.headers) is readable


# Signatures and documents


def test_the_document_shows_no_parameter_of_the_limit(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("1/minute"))])

    @app.get("/a/{x}")
    async def a(x: int, q: str = "") -> int:
        return x

    (operation,) = app.openapi()["paths"]["/a/{x}"].values()
    assert [one["name"] for one in operation["parameters"]] == ["x", "q"]
    assert list(inspect.signature(a).parameters) == ["x", "q"]
    TestClient(app).get("/a/1")
    assert list(inspect.signature(app.router.routes[-1].endpoint).parameters) == ["x", "q"]  # type: ignore[attr-defined]
    (operation,) = FastAPI(routes=app.routes).openapi()["paths"]["/a/{x}"].values()
    assert [one["name"] for one in operation["parameters"]] == ["x", "q"]


def test_responses_document_the_refusal_with_its_fields() -> None:
    app = FastAPI(responses=RESPONSES)
    app.add_api_route("/a", lambda: "a")
    told = app.openapi()["paths"]["/a"]["get"]["responses"]["429"]
    assert set(told["headers"]) == {"Retry-After", "RateLimit", "RateLimit-Policy"}
    assert set(told["content"]) == {"application/json"}
    assert set(PROBLEM_RESPONSES[429]["content"]) == {"application/problem+json"}


def test_document_adds_the_refusal_to_the_routes_that_are_limited() -> None:
    app, router = FastAPI(), APIRouter(dependencies=[Depends(RateLimit("1/minute"))])
    app.add_api_route("/free", lambda: "a")
    own: dict[int | str, dict[str, Any]] = {429: {"description": "own"}}
    app.add_api_route("/own", lambda: "a", responses=own, dependencies=[Depends(RateLimit("1/second"))])
    for method in ("GET", "POST"):
        router.add_api_route("/a/{x:path}", lambda x: x, methods=[method])
    app.include_router(router, prefix="/p")
    assert document(app) is app
    paths = app.openapi()["paths"]
    assert app.openapi()["paths"] is paths
    assert "429" not in paths["/free"]["get"]["responses"]
    assert paths["/own"]["get"]["responses"]["429"] == {"description": "own"}
    for method in ("get", "post"):
        assert paths["/p/a/{x}"][method]["responses"]["429"] == RESPONSES[429]
    assert TestClient(app).get("/openapi.json").status_code == 200


def test_document_says_what_the_handler_answers() -> None:
    app = document(FastAPI(dependencies=[Depends(RateLimit("1/minute"))]))
    app.add_api_route("/a", lambda: "a")
    app.add_exception_handler(RateLimited, limited_handler)
    assert app.openapi()["paths"]["/a"]["get"]["responses"]["429"] == PROBLEM_RESPONSES[429]


# In tests


def test_dependency_overrides_take_a_limit_away_or_put_another_in_its_place(make: Make) -> None:
    limit = RateLimit("1/minute")
    app = make()
    app.add_api_route("/a", lambda: "a", dependencies=[Depends(limit)])
    app.dependency_overrides[limit] = lambda: None
    assert ask(app, *["/a"] * 3) == [200] * 3
    app.dependency_overrides[limit] = RateLimit("2/minute")
    assert ask(app, *["/a"] * 3) == [200, 200, 429]
    app.dependency_overrides.clear()
    assert ask(app, "/a", "/a") == [200, 429]


def test_all_limits_can_be_off(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("1/minute"))])

    @app.get("/a")
    async def a() -> str:
        return "a"

    with disabled():
        assert ask(app, *["/a"] * 3) == [200] * 3
    assert ask(app, "/a", "/a") == [200, 429]
    off = make({"enabled": False}, dependencies=[Depends(RateLimit("1/minute"))])
    off.add_api_route("/a", lambda: "a")
    assert ask(off, *["/a"] * 3) == [200] * 3


def test_the_test_kit_works(make: Make, clock: VirtualClock) -> None:
    app = make(dependencies=[Depends(RateLimit("3/minute"))])
    app.add_api_route("/a", lambda: "a")
    assert_limited(TestClient(app), "GET /a", after=3, clock=clock)


# Which Gatekeeper


def test_the_gatekeeper_is_the_given_one_or_the_middlewares_or_the_states_or_the_process_own() -> None:
    def seen(*, given: bool, around: bool, state: bool) -> Any:
        keepers = Gatekeeper({}), Gatekeeper({}), Gatekeeper({})
        found = []
        limit = RateLimit("1/minute", keeper=keepers[0] if given else None)
        app = FastAPI()

        @app.get("/a")
        async def a(ticket: Annotated[Ticket, Depends(limit)]) -> None:
            found.append(ticket.gate.keeper)  # type: ignore[attr-defined]

        if around:
            app.add_middleware(GatekeeperMiddleware, settings=keepers[1])
        if state:
            app.state.gatekeeper = keepers[2]
        assert ask(app, "/a", "/a") == [200, 429]
        return (*keepers, default_keeper()).index(found[0])

    assert seen(given=True, around=True, state=True) == 0
    assert seen(given=False, around=True, state=True) == 1
    assert seen(given=False, around=False, state=True) == 2
    assert seen(given=False, around=False, state=False) == 3


def test_a_state_that_holds_no_gatekeeper_is_an_error() -> None:
    app = FastAPI(dependencies=[Depends(RateLimit("1/minute"))])
    app.add_api_route("/a", lambda: "a")
    app.state.gatekeeper = "redis://"
    with pytest.raises(TypeError, match=r"^app\.state\.gatekeeper: expected a Gatekeeper, not str$"):
        TestClient(app).get("/a")


def test_limits_of_two_gatekeepers_are_each_told_of_their_own() -> None:
    first, second = Gatekeeper({}), Gatekeeper({})
    app = FastAPI()
    limits = [
        Depends(RateLimit("2/minute", name=name, keeper=keeper)) for name, keeper in (("a", first), ("b", second))
    ]
    app.add_api_route("/a", lambda: "a", dependencies=[*limits, Depends(RateLimit("9/minute", name="c"))])
    assert ask(app, "/a", "/a", "/a") == [200, 200, 429]
    assert default_keeper() not in (first, second)


def test_settings_that_cannot_be_are_refused_when_it_is_made() -> None:
    with pytest.raises(SettingsError, match="rate"):
        RateLimit("10/fortnight")
    with pytest.raises(SettingsError, match="match"):
        RateLimit("1/minute", match="/a")
    assert repr(RateLimit("1/minute", name="a")) == "<RateLimit a 1/minute>"


# Keys


def test_a_limit_counts_by_what_its_key_says(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("1/minute", key="header:X-Key"))])
    app.add_api_route("/a", lambda: "a")
    assert ask(app, "/a", "/a", headers={"x-key": "1"}) == [200, 429]
    assert ask(app, "/a", client=B, headers={"x-key": "1"}) == [429]
    assert ask(app, "/a", headers={"x-key": "2"}) == [200]


def test_a_key_may_be_a_parameter_of_the_path(make: Make) -> None:
    app = make()

    @app.get("/shop/{shop}/{item}", dependencies=[Depends(RateLimit("1/minute", key="param:shop"))])
    async def item(shop: int) -> int:
        return shop

    assert ask(app, "/shop/1/a", "/shop/1/b", "/shop/2/a") == [200, 429, 200]
    assert ask(app, "/shop/1/a", client=B) == [429]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_key_may_be_a_function(make: Make, is_async: bool) -> None:
    async def later(request: Ticket) -> str | None:
        await asyncio.sleep(0)
        return request.field("x-key")

    key = later if is_async else (lambda request: request.field("x-key"))
    app = make(dependencies=[Depends(RateLimit("1/minute", key=key))])
    app.add_api_route("/a", lambda: "a")
    assert ask(app, "/a", "/a", headers={"x-key": "1"}) == [200, 429]
    assert ask(app, "/a", headers={"x-key": "2"}) == [200]


def test_users_are_counted_wherever_they_come_from(make: Make) -> None:
    app = make(
        {"identity": {"user": lambda request: request.field("x-user")}},
        dependencies=[Depends(RateLimit("1/minute", key="user", exempt="user:root"))],
    )
    app.add_api_route("/a", lambda: "a")
    assert ask(app, "/a", headers={"x-user": "ada"}) == [200]
    assert ask(app, "/a", client=B, headers={"x-user": "ada"}) == [429]
    assert ask(app, "/a", "/a", headers={"x-user": "root"}) == [200, 200]


def test_a_limit_after_authentication_counts_by_whom_a_dependency_found(make: Make) -> None:
    async def signed_in(request: Request) -> None:
        request.state.user = request.headers["x-user"]

    limit = RateLimit("1/minute", key=lambda request: request.native["state"]["user"])
    app = make(dependencies=[Depends(signed_in), Depends(limit)])
    app.add_api_route("/a", lambda: "a")
    assert ask(app, "/a", headers={"x-user": "ada"}) == [200]
    assert ask(app, "/a", client=B, headers={"x-user": "ada"}) == [429]
    assert ask(app, "/a", headers={"x-user": "bob"}) == [200]


@pytest.fixture
def bodies(make: Make) -> FastAPI:
    app = make({"identity": {"max_body": 1024}})

    @app.post("/json", dependencies=[Depends(RateLimit("1/minute", key="json:user.name"))])
    async def as_json(body: dict[str, Any]) -> Any:
        return body["user"]["name"]

    @app.post("/form", dependencies=[Depends(RateLimit("1/minute", key="form:name"))])
    async def as_form(name: Annotated[list[str], Form()]) -> list[str]:
        return name

    @app.post("/read", dependencies=[Depends(RateLimit("1/minute", key="form:name"))])
    async def as_read(request: Request) -> str:
        return (await request.body()).decode()

    return app


def test_a_key_may_be_a_field_of_the_body_which_the_endpoint_still_gets(bodies: FastAPI) -> None:
    client = TestClient(bodies, client=A)
    first = client.post("/json", json={"user": {"name": "ada"}})
    assert (first.status_code, first.json()) == (200, "ada")
    assert ask(bodies, "/json", method="POST", client=B, json={"user": {"name": " ADA"}}) == [429]
    assert ask(bodies, "/json", method="POST", json={"user": {"name": "bob"}}) == [200]
    assert client.post("/form", data={"name": "ada"}).json() == ["ada"]
    assert ask(bodies, "/form", method="POST", client=B, data={"name": " ADA"}) == [429]
    assert ask(bodies, "/form", method="POST", client=B, data={"name": "ＡＤＡ"}) == [429]
    assert client.post("/form", data={"name": "bob"}, files={"f": b"x"}).json() == ["bob"]
    assert ask(bodies, "/form", method="POST", data={"name": "ｂｏｂ"}, files={"f": b"x"}) == [429]
    assert ask(bodies, "/form", method="POST", data={"name": ["a", "b"]}) == [400]
    assert client.post("/read", data={"name": "ada"}).json() == "name=ada"
    assert ask(bodies, "/read", method="POST", client=B, data={"name": "ada"}) == [429]
    assert ask(bodies, "/read", method="POST", data={"name": ["a", "b"]}) == [400]


def test_of_a_body_no_more_is_read_than_the_settings_allow(bodies: FastAPI) -> None:
    def pieces(count: int) -> Iterator[bytes]:
        yield b"name=ada&x="
        for _ in range(count):
            yield b"x" * 100

    form = {"content-type": "application/x-www-form-urlencoded"}
    assert ask(bodies, "/read", method="POST", data={"name": "x" * 2000}) == [413]
    assert ask(bodies, "/read", method="POST", headers=form, content=pieces(20)) == [413]
    response = TestClient(bodies, client=A).post("/read", headers=form, content=pieces(5))
    assert response.json() == "name=ada&x=" + "x" * 500
    assert ask(bodies, "/read", method="POST", headers=form, content=pieces(5)) == [429]


@pytest.mark.parametrize("length", ["5", "0" * 5000 + "5"])
def test_a_content_length_that_is_untrue_beside_transfer_encoding_bounds_nothing(
    bodies: FastAPI, length: str
) -> None:
    left = [b"x" * 100] * 1000
    heads: list[Any] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

    async def send(message: Message) -> None:
        heads.append(message.get("status"))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/read",
        "query_string": b"",
        "headers": [(b"content-length", length.encode()), (b"transfer-encoding", b"chunked")],
        "client": A,
    }
    asyncio.run(bodies(scope, receive, send))
    assert heads[0] == 413
    assert len(left) == 1000 - 11, "what is beyond the bound is left with the client"


# What ends with the response


class Counting(MemoryStore):
    """A store that counts what is given back, and may be one that has to be awaited."""

    def __init__(self, clock: VirtualClock, *, local: bool = True) -> None:
        super().__init__(clock=clock)
        self.local = local
        self.gives = 0
        self.asked = 0

    def ask(self, batch: Hits) -> Replies:
        self.asked += 1
        self.gives += len(getattr(batch, "gives", ()))
        return super().ask(batch)

    async def aask(self, batch: Hits) -> Replies:
        if not self.local:
            await asyncio.sleep(0)
        return self.ask(batch)


def left(response: Any) -> str | None:
    told: str | None = response.headers.get("ratelimit")
    return told and told.partition(";")[2].partition(";")[0]


@pytest.mark.parametrize("local", [True, False])
def test_outcomes_that_do_not_count_are_given_back_once(make: Make, clock: VirtualClock, local: bool) -> None:
    store = Counting(clock, local=local)
    app = make(Gatekeeper({}, store=store))

    @app.get("/{answer}", dependencies=[Depends(RateLimit("2/minute", give_back=["2xx", "404"]))])
    async def page(answer: str) -> Any:
        if answer == "fault":
            raise RuntimeError
        if answer == "missing":
            raise HTTPException(404)
        if answer == "raw":
            return PlainTextResponse("raw")
        if answer == "denied":
            return PlainTextResponse("denied", 401)
        return answer

    client = TestClient(app, client=A, raise_server_exceptions=False)
    for number, path in enumerate(["/value", "/raw", "/missing", "/value"], 1):
        assert left(client.get(path)) == "r=1"
        assert store.gives == number
    assert [client.get(path).status_code for path in ("/denied", "/fault", "/value")] == [401, 500, 429]
    assert store.gives == 4
    assert ask(app, "/value", client=B) == [200]


def test_the_real_cost_is_settled_when_the_response_ends(make: Make) -> None:
    app = make()
    tokens = RateLimit("100/minute", cost=10, settle="app", name="tokens")

    @app.post("/ask")
    async def answer(real: int, ticket: Annotated[Ticket, Depends(tokens)]) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"..."
            ticket.settle(real)
            yield b"."

        return StreamingResponse(pieces())

    client = TestClient(app, client=A)
    assert left(client.post("/ask?real=70")) == "r=90"
    assert left(client.post("/ask?real=3")) == "r=20"
    assert left(client.post("/ask?real=10")) == "r=17"
    assert left(client.post("/ask?real=50")) == "r=7"  # more than is left: all of it
    assert client.post("/ask?real=0").status_code == 429
    assert ask(app, "/ask?real=70", method="POST", client=B) == [200]


def test_bytes_are_counted(make: Make) -> None:
    app = make()

    @app.get("/stream", dependencies=[Depends(RateLimit("1000/minute", settle="bytes", name="bytes"))])
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 100

        return StreamingResponse(pieces())

    client = TestClient(app, client=A)
    assert left(client.get("/stream")) == "r=999"
    assert left(client.get("/stream")) == "r=699"


def test_requests_in_progress_are_counted_for_as_long_as_they_last(make: Make) -> None:
    app = make()
    inside, go = asyncio.Event(), asyncio.Event()

    @app.get("/a", dependencies=[Depends(RateLimit(concurrency=1))])
    async def a() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            inside.set()
            await go.wait()
            yield b"done"

        return StreamingResponse(pieces())

    async def trial() -> list[int]:
        first = asyncio.create_task(send(app, "/a"))
        await asyncio.wait_for(inside.wait(), 30)
        while_it_lasts = await send(app, "/a")
        other = asyncio.create_task(send(app, "/a", client=B))
        go.set()
        return [await first, while_it_lasts, await other, await send(app, "/a")]

    assert asyncio.run(trial()) == [200, 429, 200, 200]


@pytest.mark.parametrize("local", [True, False])
def test_a_request_that_is_broken_off_gives_up_its_place(make: Make, clock: VirtualClock, local: bool) -> None:
    app = make(Gatekeeper({}, store=Counting(clock, local=local)))
    inside = asyncio.Event()

    @app.get("/a", dependencies=[Depends(RateLimit(concurrency=1))])
    async def a(wait: bool = False) -> str:
        if wait:
            inside.set()
            await asyncio.Event().wait()
        return "a"

    async def trial() -> list[int]:
        first = asyncio.create_task(send(app, "/a", b"wait=1"))
        await asyncio.wait_for(inside.wait(), 30)
        during = await send(app, "/a")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return [during, await send(app, "/a")]

    assert asyncio.run(trial()) == [429, 200]


def failing(request: Request, error: Exception) -> Response:
    raise ValueError("a handler that fails")


def test_however_a_request_ends_it_gives_up_its_place(make: Make) -> None:
    """Errors that nobody handles or whose handler fails, invalid input and output, failing background tasks."""
    app = make(exception_handlers={LookupError: failing})
    done: list[str] = []

    @app.get("/error", dependencies=[Depends(RateLimit(concurrency=1))])
    def error() -> str:
        raise RuntimeError

    @app.get("/handler", dependencies=[Depends(RateLimit(concurrency=1))])
    async def handler() -> str:
        raise LookupError

    @app.get("/input", dependencies=[Depends(RateLimit(concurrency=1))])
    async def invalid(number: int) -> int:
        return number

    @app.get("/output", dependencies=[Depends(RateLimit(concurrency=1))])
    async def output() -> int:
        text: Any = "no number"
        return text  # type: ignore[no-any-return]

    def later(text: str) -> None:
        done.append(text)
        if text == "fail":
            raise RuntimeError

    @app.get("/tasks/{text}", dependencies=[Depends(RateLimit(concurrency=1))])
    async def tasks(text: str, background: BackgroundTasks) -> str:
        background.add_task(later, text)
        return text

    for path, status in (("/error", 500), ("/handler", 500), ("/input", 422), ("/output", 500), ("/tasks/a", 200)):
        assert ask(app, path, path, path) == [status] * 3, path
    assert ask(app, "/tasks/fail", "/tasks/fail", "/tasks/b") == [200] * 3
    assert done == ["a", "a", "a", "fail", "fail", "b"]


async def send(app: Any, path: str, query: bytes = b"", client: tuple[str, int] = A) -> int:
    """The status of a request that is sent as a server would."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "GET", "path": path,
        "query_string": query, "headers": [], "client": client, "server": ("h", 80), "scheme": "http",
    }  # fmt: skip
    statuses = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, keep)
    (status,) = statuses
    return int(status)


def test_a_store_that_has_to_be_awaited_is(make: Make, clock: VirtualClock) -> None:
    store = Counting(clock, local=False)
    app = make(Gatekeeper({}, store=store), dependencies=[Depends(RateLimit("1/minute"))])
    app.add_api_route("/a", lambda: "a")
    assert ask(app, "/a", "/a") == [200, 429]
    assert store.asked == 2


def test_a_store_that_is_put_in_its_place_later_is_asked(make: Make, clock: VirtualClock) -> None:
    keeper = Gatekeeper({})
    app = make(keeper, dependencies=[Depends(RateLimit("1/minute"))])
    app.add_api_route("/a", lambda: "a")
    assert ask(app, "/a", "/a") == [200, 429]
    keeper.use(virtual_store(clock))
    assert ask(app, "/a", "/a") == [200, 429]
    keeper.use(Counting(clock, local=False))
    assert ask(app, "/a", "/a") == [200, 429]


# WebSockets


@pytest.fixture
def sockets(make: Make) -> FastAPI:
    app = make(
        {"limits": [{"name": "talk", "rate": "2/minute", "per": "message"}]},
    )
    router = APIRouter(dependencies=[Depends(RateLimit("2/minute", name="shake"))])

    @router.websocket("/ws/{room}")
    async def talk(websocket: WebSocket, room: str) -> None:
        await websocket.accept()
        await websocket.send_text(room)
        await websocket.close()

    @app.websocket("/held", dependencies=[Depends(RateLimit(concurrency=1, name="held"))])
    async def held(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.close()

    app.include_router(router, prefix="/p")
    return app


def test_a_handshake_too_many_is_refused_with_status_and_fields(sockets: FastAPI) -> None:
    client = TestClient(sockets, client=A)
    for room in ("a", "b"):
        with client.websocket_connect(f"/p/ws/{room}") as socket:
            assert socket.receive_text() == room
    with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/p/ws/c"):
        pass
    denied: Any = caught.value
    assert denied.status_code == 429
    assert denied.headers["retry-after"] == "61"
    assert denied.headers.get_list("ratelimit") == ['"shake";r=0;t=61']
    with TestClient(sockets, client=B).websocket_connect("/p/ws/a") as socket:
        assert socket.receive_text() == "a"


@pytest.mark.parametrize("handler", [None, RateLimited, Limited])
def test_a_server_that_can_send_no_status_is_told_to_close(sockets: FastAPI, handler: Any) -> None:
    if handler is not None:
        sockets.add_exception_handler(handler, limited_handler)
    sent: list[Message] = []

    async def trial() -> None:
        for _ in range(3):
            scope = {"type": "websocket", "path": "/p/ws/a", "query_string": b"", "headers": [], "client": A}

            async def receive() -> Message:
                return {"type": "websocket.connect"}

            async def keep(message: Message) -> None:
                sent.append(message)

            await sockets(scope, receive, keep)

    asyncio.run(trial())
    assert [message["type"].partition(".")[2] for message in sent] == [*["accept", "send", "close"] * 2, "close"]
    assert sent[-1]["code"] == 1013


def test_a_websocket_is_in_progress_until_it_ends(sockets: FastAPI) -> None:
    client = TestClient(sockets, client=A)
    for _ in range(2):
        with client.websocket_connect("/held") as first:
            with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/held"):
                pass
            first.send_text("end")
            assert first.receive()["type"] == "websocket.close"


@pytest.mark.parametrize("how", ["before it is accepted", "after it is accepted", "by an error"])
def test_a_websocket_that_ends_early_gives_up_its_place(make: Make, how: str) -> None:
    app = make()

    @app.websocket("/held", dependencies=[Depends(RateLimit(concurrency=1))])
    async def held(websocket: WebSocket) -> None:
        if how != "before it is accepted":
            await websocket.accept()
        if how == "by an error":
            raise LookupError
        await websocket.close(4000)

    for _ in range(3):
        with pytest.raises(LookupError if how == "by an error" else WebSocketDisconnect) as caught:  # noqa: SIM117
            with TestClient(app, client=A).websocket_connect("/held") as socket:
                socket.receive_text()
        assert how == "by an error" or getattr(caught.value, "code", None) == 4000


def test_messages_are_limited_by_the_settings_where_the_middleware_is() -> None:
    app = FastAPI()

    @app.websocket("/echo", dependencies=[Depends(RateLimit("9/minute"))])
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    settings = {"limits": [{"name": "talk", "rate": "2/minute", "per": "message"}]}
    app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper(settings))
    with TestClient(app, client=A).websocket_connect("/echo") as socket:
        for _ in range(2):
            socket.send_text("a")
            assert socket.receive_text() == "a"
        socket.send_text("a")
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_text()
    assert caught.value.code == 1013


def test_the_errors_are_those_of_starlette_and_of_ours() -> None:
    assert issubclass(RateLimited, Limited)
    assert issubclass(WebSocketLimited, Limited)
    assert issubclass(RateLimited, HTTPException.__mro__[1])
