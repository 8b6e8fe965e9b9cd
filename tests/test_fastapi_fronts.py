"""Limits that FastAPI's routes depend on before all else: asked before FastAPI begins, from the second request on."""

# No `from __future__ import annotations`: FastAPI reads those of endpoints, which name things of their function.

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Mount
from starlette.testclient import TestClient

from gatekeeper import Gatekeeper, Ticket
from gatekeeper.asgi import GatekeeperMiddleware, Message
from gatekeeper.commands import Hits, Replies
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock, virtual
from gatekeeper_fastapi import RateLimit, check, document
from gatekeeper_fastapi.tickets import OwnTicket
from tests.fastapi_home import A, B, ask

Make = Callable[..., FastAPI]


@pytest.fixture(autouse=True)
def clock() -> Iterator[VirtualClock]:
    with virtual() as clock:
        yield clock


@pytest.fixture(params=["with the middleware", "alone"])
def make(request: pytest.FixtureRequest) -> Make:
    def make(**arguments: Any) -> FastAPI:
        app = FastAPI(**arguments)
        if request.param == "alone":
            app.state.gatekeeper = Gatekeeper({})
        else:
            app.add_middleware(GatekeeperMiddleware, settings=Gatekeeper({}))
        return app

    return make


async def send(app: Any, path: str, body: asyncio.Future[bytes], began: asyncio.Event) -> int:
    """The status of a request whose body comes when `body` is done; `began` is set once it is waited for."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST", "path": path,
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": A,
        "server": ("h", 80), "scheme": "http",
    }  # fmt: skip
    statuses: list[int] = []

    async def receive() -> Message:
        began.set()
        return {"type": "http.request", "body": await body, "more_body": False}

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, keep)
    (status,) = statuses
    return status


async def posted(app: Any, path: str, body: bytes) -> int:
    done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    done.set_result(body)
    return await send(app, path, done, asyncio.Event())


def test_invalid_requests_are_charged_and_a_refusal_costs_no_reading_of_the_body(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("3/minute"))])

    @app.post("/a")
    async def a(number: int, body: dict[str, int]) -> int:
        return number

    asks = [("/a?number=1", "{}"), ("/a?number=x", "{}"), ("/a?number=1", "[]"), ("/a?number=1", "no json")]
    client = TestClient(app, client=A, headers={"content-type": "application/json"})
    assert [client.post(path, content=body).status_code for path, body in asks] == [200, 422, 422, 429]


def test_a_request_whose_body_comes_late_is_limited_though_the_limit_moves_to_the_front_meanwhile(
    make: Make,
) -> None:
    app = make()

    @app.post("/a", dependencies=[Depends(RateLimit("2/minute"))])
    async def a(body: list[int]) -> int:
        return len(body)

    async def main() -> list[int]:
        body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        began = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(send(app, "/a", body, event)) for event in began]
        for event in began:
            await event.wait()
        statuses = [await posted(app, "/a", b"[]")]
        body.set_result(b"[1]")
        return [*statuses, *sorted(await asyncio.gather(*tasks)), await posted(app, "/a", b"[]")]

    assert asyncio.run(main()) == [200, 200, 429, 429, 429]


def test_what_stands_before_a_limit_runs_before_it_and_what_stands_after_it_only_if_it_lets_pass(
    make: Make,
) -> None:
    app, seen = make(), list[str]()

    def note(text: str) -> Any:
        async def noted() -> None:
            seen.append(text)

        return Depends(noted)

    def limit(rate: str = "9/minute") -> Any:
        return Depends(RateLimit(rate))

    @app.get("/behind", dependencies=[note("before"), limit("2/minute"), note("after")])
    @app.get("/between", dependencies=[limit(), note("before"), limit("2/minute"), note("after"), limit()])
    @app.get("/first", dependencies=[limit(), limit("2/minute"), note("after")])
    async def page() -> str:
        seen.append("page")
        return "page"

    for path, refused in (("/behind", ["before"]), ("/between", ["before"]), ("/first", [])):
        assert ask(app, path, path, path) == [200, 200, 429]
        before = ["before"] if refused else []
        assert seen == [*before, "after", "page"] * 2 + refused, path
        seen.clear()


def test_limits_in_front_and_within_are_charged_and_told_together(make: Make) -> None:
    app = make()

    async def nothing() -> None:
        pass

    limits = [Depends(RateLimit(rate)) for rate in ("9/minute", "8/minute", "7/minute")]

    @app.get("/a", dependencies=[limits[0], limits[1], Depends(nothing), limits[2]])
    async def a(ticket: Annotated[Ticket, Depends(RateLimit("6/minute", name="last"))]) -> Response:
        return PlainTextResponse(" ".join(str(charge.verdict.remaining) for charge in ticket.charges))

    for spent in (1, 2, 3):
        response = TestClient(app, client=A).get("/a")
        assert response.text == " ".join(str(whole - spent) for whole in (9, 8, 7, 6))
        assert response.headers.get_list("ratelimit") == [f'"last";r={6 - spent};t=61']
        assert response.headers["ratelimit-policy"].count(";q=") == 4


def test_a_limit_by_a_parameter_of_the_path_counts_each_value_by_itself(make: Make) -> None:
    app = make()
    key = ["ip", "param:item"]

    @app.get("/{shop}/{item}", dependencies=[Depends(RateLimit("2/minute", key=key))])
    async def page(shop: str, item: str) -> str:
        return item

    assert ask(app, "/a/1", "/b/1", "/c/1", "/a/2", "/a/2", "/a/2") == [200, 200, 429, 200, 200, 429]
    assert ask(app, "/a/1", client=B) == [200]


def test_a_limit_whose_value_is_wanted_stays_where_it_is(make: Make) -> None:
    app, limit = make(), RateLimit("2/minute")

    @app.get("/a", dependencies=[Depends(limit)])
    async def a(ticket: Annotated[Ticket, Depends(limit)]) -> list[int]:
        return [charge.verdict.remaining for charge in ticket.charges]

    client = TestClient(app, client=A)
    assert [client.get("/a").json() for _ in range(2)] == [[1], [0]]
    assert ask(app, "/a", client=A) == [429]


@pytest.mark.parametrize("included", [False, True])
def test_overrides_hold_from_the_next_request_on_and_no_longer_than_they_are_there(
    make: Make, included: bool
) -> None:
    app, limit = make(), RateLimit("2/minute")
    router = APIRouter(dependencies=[Depends(limit)])
    (router if included else app).add_api_route(
        "/a", lambda: "a", dependencies=[] if included else [Depends(limit)]
    )
    app.include_router(router)
    assert ask(app, *["/a"] * 3) == [200, 200, 429]
    app.dependency_overrides = {limit: lambda: None}
    assert ask(app, *["/a"] * 3) == [200] * 3
    app.dependency_overrides = {print: lambda: None}
    assert ask(app, "/a") == [429]
    assert ask(app, *["/a"] * 3, client=B) == [200, 200, 429]
    app.dependency_overrides = {}
    assert ask(app, "/a") == [429]
    assert ask(app, "/a", client=("203.0.113.3", 3)) == [200]


def test_a_dependency_that_is_added_to_the_route_later_is_solved(make: Make) -> None:
    app, seen = make(), list[str]()

    async def late() -> None:
        seen.append("late")

    app.add_api_route("/a", lambda: "a", dependencies=[Depends(RateLimit("9/minute"))])
    app.add_api_route("/b", lambda: "b", dependencies=[Depends(late)])
    a, b = (route for route in app.routes if isinstance(route, APIRoute))
    assert ask(app, "/a", "/a") == [200, 200]
    for place in (0, 1, 3):
        a.dependant.dependencies.insert(place, b.dependant.dependencies[0])
        a.dependant.dependencies[place].use_cache = False
    assert ask(app, "/a") == [200]
    assert seen == ["late"] * 3


def test_a_limit_in_front_that_refuses_frees_what_those_before_it_hold(make: Make, clock: VirtualClock) -> None:
    limits = [Depends(RateLimit(concurrency=1)), Depends(RateLimit("1/minute"))]
    app = make(dependencies=limits)
    app.add_api_route("/a", lambda: "a")
    for _ in range(3):
        assert ask(app, "/a", "/a", "/a") == [200, 429, 429]
        clock.advance(61)


def test_gatekeepers_of_their_own_in_front_are_each_ended_and_told(clock: VirtualClock) -> None:
    keepers = [Gatekeeper({}) for _ in range(3)]
    given: list[dict[str, Any]] = [
        {"concurrency": 1, "name": "busy"},
        {"rate": "2/minute", "name": "b"},
        {"rate": "1/minute", "name": "c", "give_back": ["2xx"]},
    ]
    limits = [Depends(RateLimit(keeper=keeper, **more)) for keeper, more in zip(keepers, given, strict=True)]
    app = FastAPI(dependencies=limits)
    app.add_api_route("/a", lambda: PlainTextResponse("a"))
    for _ in range(3):
        assert ask(app, "/a", "/a", "/a") == [200, 200, 429]
        clock.advance(61)
    with virtual(*keepers):
        for _ in range(3):
            response = TestClient(app, client=A).get("/a")
        assert response.status_code == 429
        assert '"b";r=0;t=61' in response.headers.get_list("ratelimit")


def test_a_route_with_a_way_of_its_own_to_handle_requests_sees_refusals(make: Make) -> None:
    seen: list[str] = []

    class Seeing(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handler(request: Request) -> Response:
                try:
                    return await handle(request)
                except Exception as error:
                    seen.append(type(error).__name__)
                    raise

            return handler

    app = make()
    app.router.route_class = Seeing
    app.add_api_route("/a", lambda: "a", dependencies=[Depends(RateLimit("1/minute"))])
    assert ask(app, "/a", "/a", "/a") == [200, 429, 429]
    assert seen == ["RateLimited"] * 2


def test_a_request_that_an_endpoint_makes_of_its_own_application_is_limited_too(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("2/minute"))])

    @app.post("/inner")
    async def inner() -> str:
        return "inner"

    @app.post("/outer")
    async def outer(again: bool = True) -> list[int]:
        async def other() -> int:
            return await posted(app, "/inner", b"")

        return [await posted(app, "/inner", b""), await asyncio.create_task(other()), await other()]

    client = TestClient(app, client=A)
    assert client.post("/outer").json() == [200, 200, 429]
    assert client.post("/outer").json() == [429] * 3
    assert client.post("/outer").status_code == 429


def test_documents_and_reports_see_limits_in_front(make: Make) -> None:
    app = document(make(dependencies=[Depends(RateLimit("9/minute", name="site"))]))
    app.add_api_route("/a", lambda: "a", dependencies=[Depends(RateLimit("5/minute", name="a"))])
    assert ask(app, "/a", "/a") == [200, 200]
    assert "429" in app.openapi()["paths"]["/a"]["get"]["responses"]
    assert [rules for route, rules in check(app).routes if route.path == "/a"] == [("site", "a")]


@pytest.mark.parametrize("raises", [KeyError, asyncio.CancelledError])
def test_whatever_an_endpoint_raises_ends_the_request(make: Make, raises: type[BaseException]) -> None:
    app, fails = make(), [False]

    @app.post("/a", dependencies=[Depends(RateLimit(concurrency=1))])
    async def a() -> str:
        if fails[0]:
            raise raises
        return "a"

    async def main() -> None:
        for fails[0] in (False, True, True, False):
            (answer,) = await asyncio.gather(asyncio.create_task(posted(app, "/a", b"")), return_exceptions=True)
            assert isinstance(answer, raises) if fails[0] else answer == 200

    asyncio.run(main())


# What wraps, copies and breaks off


@pytest.mark.parametrize("limited", [True, False], ids=["from a limited endpoint", "from a free one"])
def test_requests_that_an_endpoint_makes_with_its_scope_for_another_path_are_each_charged_and_told(
    make: Make, limited: bool
) -> None:
    app = make()

    @app.post("/b", dependencies=[Depends(RateLimit("2/minute", name="b"))])
    async def b() -> str:
        return "b"

    @app.post("/batch", dependencies=[Depends(RateLimit("99/minute", name="batch"))] if limited else [])
    async def batch(request: Request) -> list[str]:
        heads: list[Message] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                heads.append(message)

        for _ in range(4):
            await app({**request.scope, "path": "/b"}, request.receive, keep)
        return [f"{head['status']} {dict(head['headers'])[b'ratelimit'].decode()}" for head in heads]

    client = TestClient(app, client=A)
    for passed in (2, 0, 0):
        answer = client.post("/batch")
        told = [f'200 "b";r={1 - place};t=61' for place in range(passed)]
        assert answer.json() == told + ['429 "b";r=0;t=61'] * (4 - passed)
        assert ("ratelimit" in answer.headers) is limited
    assert ask(app, "/b", client=B, method="POST") == [200]


def test_what_stands_around_a_routes_application_stays_around_its_limits(make: Make) -> None:
    class Guarded(APIRoute):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            inner = self.app

            async def guard(scope: Any, receive: Any, send: Any) -> None:
                if b"x-key" not in dict(scope["headers"]):
                    await PlainTextResponse("who are you?", 401)(scope, receive, send)
                else:
                    await inner(scope, receive, send)

            self.app = guard

    app = make()
    app.router.route_class = Guarded
    app.add_api_route("/a", lambda: "a", dependencies=[Depends(RateLimit("2/minute", key="global"))])
    key = {"x-key": "1"}
    assert ask(app, "/a", headers=key) == [200]
    assert ask(app, *["/a"] * 3, client=B) == [401] * 3
    assert ask(app, "/a", "/a", headers=key) == [200, 429]


def test_refusals_in_a_mounted_router_pass_its_middleware_as_responses(make: Make) -> None:
    router, app = APIRouter(), make()
    router.add_api_route("/a", lambda: "a", dependencies=[Depends(RateLimit("1/minute"))])
    cors = Middleware(CORSMiddleware, allow_origins=["*"])
    app.router.routes.append(Mount("/s", app=router, middleware=[cors]))
    client = TestClient(app, client=A, headers={"origin": "https://shop.example"})
    answers = [client.get("/s/a") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 429, 429]
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {"*"}


def test_a_handler_of_ones_own_need_not_pass_the_fields_of_a_refusal_on(make: Make) -> None:
    app = make(dependencies=[Depends(RateLimit("1/minute", name="own"))])
    app.add_api_route("/a", lambda: "a")
    app.add_exception_handler(429, lambda request, error: PlainTextResponse("mine", 429))
    client = TestClient(app, client=A)
    refused = [client.get("/a") for _ in range(3)][-1]
    assert (refused.text, refused.headers["ratelimit"]) == ("mine", '"own";r=0;t=61')


def test_responses_of_first_requests_at_once_are_all_told_and_settled(make: Make) -> None:
    app, waiting = make(), list[None]()

    async def together() -> None:
        waiting.append(None)
        while len(waiting) % 3:
            await asyncio.sleep(0)

    limit = RateLimit("9/minute", name="a", give_back=["404"])

    @app.post("/a", dependencies=[Depends(limit), Depends(together)])
    async def a() -> Response:
        return PlainTextResponse("not here", 404)

    async def main() -> None:
        for _ in range(3):
            assert await asyncio.gather(*(posted(app, "/a", b"") for _ in range(3))) == [404] * 3

    asyncio.run(main())
    waiting += [None, None]
    assert TestClient(app, client=A).post("/a").headers["ratelimit"] == '"a";r=8;t=61', "all were given back"


def test_every_limit_in_front_is_ended_though_the_request_is_cancelled_while_one_is_asked() -> None:
    keepers, stores = [Gatekeeper({}) for _ in range(3)], [Slow() for _ in range(3)]
    for keeper, store in zip(keepers, stores, strict=True):
        keeper.use(store)
    limits = [RateLimit(concurrency=1, name=f"k{place}", keeper=keeper) for place, keeper in enumerate(keepers)]
    app = FastAPI(dependencies=[Depends(limit) for limit in limits])
    app.add_api_route("/a", lambda: "a", methods=["POST"])

    async def main() -> None:
        assert await posted(app, "/a", b"") == 200
        with anyio.CancelScope() as cancelling:
            stores[2].reached = cancelling.cancel
            await posted(app, "/a", b"")
        assert cancelling.cancelled_caught
        stores[2].reached = None
        assert await posted(app, "/a", b"") == 200

    asyncio.run(main())


class Slow(MemoryStore):
    """A store that has to be awaited, and takes its time when it tells that a hit has reached it."""

    local = False
    reached: Callable[[], None] | None = None

    async def aask(self, batch: Hits) -> Replies:
        if self.reached is not None and batch:
            self.reached()
        await asyncio.sleep(0)
        return self.ask(batch)


@pytest.mark.parametrize(
    ("outcome", "left"), [("disconnect", [998, 997]), ("2xx", [999, 999]), ("404", [998, 997])]
)
def test_a_file_that_the_server_sends_by_itself_is_a_whole_answer(
    make: Make, tmp_path: Path, outcome: str, left: list[int]
) -> None:
    (tmp_path / "file").write_text("file")
    app = make(dependencies=[Depends(RateLimit("1000/minute", give_back=[outcome]))])
    app.add_api_route("/a", lambda: FileResponse(tmp_path / "file"), methods=["POST"])
    fields: list[str] = []

    async def main() -> None:
        for _ in range(4):
            sent: list[str] = []
            scope = {
                "type": "http", "asgi": {"version": "3.0"}, "method": "POST", "path": "/a", "query_string": b"",
                "headers": [], "client": A, "server": ("h", 80), "scheme": "http",
                "extensions": {"http.response.pathsend": {}},
            }  # fmt: skip

            async def send(message: Message, sent: list[str] = sent) -> None:
                sent.append(message["type"])
                if message["type"] == "http.response.start":
                    fields.append(dict(message["headers"])[b"ratelimit"].decode())

            await app(scope, no_body, send)
            assert sent == ["http.response.start", "http.response.pathsend"]

    asyncio.run(main())
    assert [int(re.findall(r"r=(\d+)", field)[0]) for field in fields[1:3]] == left


async def no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.parametrize(("outcome", "left"), [("disconnect", 9), ("5xx", 6)])
def test_a_client_that_leaves_while_it_is_answered_is_no_failure(make: Make, outcome: str, left: int) -> None:
    app = make(dependencies=[Depends(RateLimit("10/minute", name="a", give_back=[outcome]))])

    async def pieces() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    app.add_api_route("/a", lambda: StreamingResponse(pieces()), methods=["POST"])

    async def main() -> None:
        for _ in range(3):
            scope = {
                "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST", "path": "/a",
                "query_string": b"", "headers": [], "client": A, "server": ("h", 80), "scheme": "http",
            }  # fmt: skip

            async def send(message: Message) -> None:
                if message["type"] == "http.response.body":
                    raise OSError

            with pytest.raises(ClientDisconnect):
                await app(scope, no_body, send)

    asyncio.run(main())
    response = TestClient(app, client=A).post("/a")
    assert response.headers["ratelimit"] == f'"a";r={left};t=61'


def test_a_limit_that_is_taken_away_from_the_route_limits_no_more(make: Make) -> None:
    app = make()
    app.add_api_route("/a", lambda: "a", dependencies=[Depends(RateLimit("1/minute"))])
    assert ask(app, "/a", "/a") == [200, 429]
    (route,) = (route for route in app.routes if isinstance(route, APIRoute))
    route.dependant.dependencies.clear()
    assert ask(app, "/a") == [200]


def test_requests_leave_nothing_for_the_garbage_collector() -> None:
    keepers = [Gatekeeper({}) for _ in range(2)]
    limits = [
        RateLimit(rate, keeper=keeper) for rate, keeper in zip(("99/minute", "9/minute"), keepers, strict=True)
    ]
    app = FastAPI(dependencies=[Depends(limit) for limit in limits])

    async def a() -> Response:
        return PlainTextResponse("a")

    app.add_api_route("/a", a, methods=["POST"])

    async def main() -> int:
        for _ in range(20):
            await posted(app, "/a", b"")
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                assert await posted(app, "/a", b"") == 429
            return sum(type(one) is OwnTicket and one.keeper in keepers for one in gc.get_objects())
        finally:
            gc.enable()

    assert asyncio.run(main()) <= len(limits), "those of the last request, which its context holds"
