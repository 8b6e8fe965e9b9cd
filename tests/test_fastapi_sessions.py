"""Sessions in Starlette and FastAPI: `request.session`, the middleware of Starlette's arguments, the dependency."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from gatekeeper import Gatekeeper, SettingsError, StoreError
from gatekeeper.keys import KeyRingError
from gatekeeper.stores.sessions.memory import MemorySessions
from gatekeeper_fastapi import GatekeeperMiddleware, Session, SessionMiddleware
from gatekeeper_fastapi.sessions import current_session

SECRET = os.urandom(32).hex()
PLAIN = {"cookie": {"secure": False}}
SETTINGS: dict[str, dict[str, Any]] = {
    kind: {"keys": [SECRET], "session": {"kind": kind, **PLAIN}} for kind in ("token", "store")
}


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/read")
    async def read(request: Request) -> dict[str, Any]:
        return dict(request.session)

    @app.post("/write")
    async def write(request: Request) -> dict[str, Any]:
        request.session.update(await request.json())
        return dict(request.session)

    @app.post("/nested")
    async def nested(session: Session) -> dict[str, Any]:
        session.setdefault("cart", []).append(len(session.get("cart", [])))
        return dict(session)

    @app.post("/login")
    async def login(session: Session) -> dict[str, Any]:
        session["sub"] = "7"
        session.rotate()
        return {}

    @app.post("/logout")
    async def logout(session: Session) -> dict[str, Any]:
        session.end()
        return {}

    @app.get("/stream")
    async def stream(session: Session) -> StreamingResponse:
        session["streamed"] = True

        async def pieces() -> Any:
            yield b"a"
            session["late"] = True
            yield b"b"

        return StreamingResponse(pieces())

    @app.get("/untouched")
    async def untouched() -> dict[str, Any]:
        return {}

    @app.get("/fails")
    async def fails(session: Session) -> dict[str, Any]:
        session["failed"] = True
        raise RuntimeError

    @app.websocket("/socket")
    async def socket(websocket: WebSocket, session: Session) -> None:
        await websocket.accept()
        while True:
            text = await websocket.receive_text()
            if text == "end":
                break
            session[text] = True
            await websocket.send_json(dict(session))
        await websocket.close()

    return app


Ways = dict[str, Callable[[FastAPI], None]]

WAYS: Ways = {
    "gatekeeper, token": lambda app: app.add_middleware(GatekeeperMiddleware, settings=SETTINGS["token"]),
    "gatekeeper, store": lambda app: app.add_middleware(GatekeeperMiddleware, settings=SETTINGS["store"]),
    "starlette's arguments": lambda app: app.add_middleware(SessionMiddleware, secret_key=SECRET),
    "settings": lambda app: app.add_middleware(SessionMiddleware, settings=SETTINGS["token"]),
    "keeper": lambda app: app.add_middleware(SessionMiddleware, keeper=Gatekeeper(SETTINGS["store"])),
}


@pytest.fixture(params=WAYS)
def client(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    app = application()
    WAYS[request.param](app)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_what_one_request_writes_the_next_one_reads(client: TestClient) -> None:
    assert client.get("/read").json() == {}
    assert client.post("/write", json={"a": [1]}).json() == {"a": [1]}
    assert client.get("/read").json() == {"a": [1]}


def test_a_session_that_nobody_touches_leaves_no_trace(client: TestClient) -> None:
    client.post("/write", json={"a": 1})
    response = client.get("/untouched")
    assert "set-cookie" not in response.headers
    assert "vary" not in response.headers


def test_a_session_that_is_read_varies_by_cookie_and_sets_none(client: TestClient) -> None:
    client.post("/write", json={"a": 1})
    response = client.get("/read")
    assert response.headers["vary"] == "Cookie"
    assert "set-cookie" not in response.headers


def test_what_changes_within_a_list_is_kept(client: TestClient) -> None:
    client.post("/nested")
    client.post("/nested")
    assert client.get("/read").json() == {"cart": [0, 1]}


def test_a_login_rotates_and_a_logout_ends_it(client: TestClient) -> None:
    client.post("/write", json={"a": 1})
    (before,) = client.cookies.values()
    client.post("/login")
    (after,) = client.cookies.values()
    assert before != after
    assert client.get("/read").json() == {"a": 1, "sub": "7"}
    client.post("/logout")
    assert len(client.cookies) == 0
    assert client.get("/read").json() == {}


def test_what_a_streaming_response_changes_before_its_head_is_kept(client: TestClient) -> None:
    assert client.get("/stream").text == "ab"
    assert client.get("/read").json() == {"streamed": True}


def test_a_cookie_of_anything_is_an_empty_session_and_no_error(client: TestClient) -> None:
    for value in ("x", "a.b", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", "x" * 9000, "2~x", '"', "%00"):
        for name in ("session", "__Host-session"):
            response = client.get("/read", headers={"cookie": f"{name}={value}"})
            assert (response.status_code, response.json()) == (200, {})


def test_an_application_that_fails_is_answered_as_without_us(client: TestClient) -> None:
    assert client.get("/fails").status_code == 500


def test_a_websocket_reads_the_session_and_a_stored_one_keeps_what_it_changes(client: TestClient) -> None:
    client.post("/write", json={"a": 1})
    with client.websocket_connect("/socket") as socket:
        socket.send_text("b")
        assert socket.receive_json() == {"a": 1, "b": True}
        socket.send_text("end")
    found = client.get("/read").json()
    is_stored = len(client.cookies["session"]) < 100
    assert found == ({"a": 1, "b": True} if is_stored else {"a": 1})


def test_the_attributes_of_the_cookie_are_those_of_starlettes_arguments() -> None:
    async def write(request: StarletteRequest) -> JSONResponse:
        request.session["a"] = 1
        return JSONResponse({})

    app = Starlette(
        routes=[Route("/app/write", write)],
        middleware=[
            Middleware(
                SessionMiddleware,
                secret_key=SECRET,
                session_cookie="mine",
                max_age=60,
                path="/app",
                same_site="strict",
                https_only=True,
                domain="example.org",
                partitioned=True,
            )
        ],
    )
    with TestClient(app, base_url="https://example.org") as client:
        pair, *attributes = client.get("/app/write").headers["set-cookie"].split("; ")
        assert pair.startswith("mine=")
        assert set(attributes) == {
            "Path=/app", "Domain=example.org", "Max-Age=60", "Secure", "HttpOnly", "SameSite=Strict", "Partitioned",
        }  # fmt: skip


def test_without_a_max_age_the_cookie_ends_with_the_browser() -> None:
    app = application()
    app.add_middleware(SessionMiddleware, secret_key=SECRET, max_age=None)
    with TestClient(app) as client:
        assert "Max-Age" not in client.post("/write", json={"a": 1}).headers["set-cookie"]


@pytest.mark.parametrize("secret", ["short", "changeme" * 8, "x" * 40])
def test_a_weak_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(KeyRingError) as error:
        SessionMiddleware(application(), secret_key=secret)
    assert secret not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"session_cookie": "__Host-mine"},
        {"session_cookie": "__Host-mine", "https_only": True, "path": "/app"},
        {"same_site": "none"},
        {"partitioned": True},
    ],
)
def test_a_cookie_that_browsers_drop_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="browsers drop"):
        SessionMiddleware(application(), secret_key=SECRET, **arguments)


@pytest.mark.parametrize("more", [{"keeper": Gatekeeper(SETTINGS["token"])}, {"settings": SETTINGS["token"]}])
def test_a_secret_beside_settings_is_refused_for_one_of_them_would_not_hold(more: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="one of"):
        SessionMiddleware(application(), secret_key=SECRET, **more)


def test_settings_without_a_session_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"\[session\]"):
        SessionMiddleware(application(), settings={})


def test_a_store_that_the_middleware_has_made_is_closed_when_the_application_shuts_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that others share is left to them."""
    closed: list[MemorySessions] = []
    monkeypatch.setattr(MemorySessions, "close", lambda store: closed.append(store))
    keeper = Gatekeeper(SETTINGS["store"])
    for given, expected in (({"keeper": keeper}, 0), ({"settings": SETTINGS["store"]}, 1)):
        app = application()
        app.add_middleware(SessionMiddleware, **given)
        with TestClient(app):
            assert len(closed) == 0
        assert len(closed) == expected


def test_without_a_middleware_the_dependency_says_what_is_missing() -> None:
    with TestClient(application()) as client, pytest.raises(SettingsError, match="SessionMiddleware"):
        client.post("/login")


def test_a_test_may_put_another_session_in_its_place() -> None:
    app = application()
    app.add_middleware(GatekeeperMiddleware, settings=SETTINGS["store"])
    app.dependency_overrides[current_session] = lambda: {"cart": [7]}
    with TestClient(app) as client:
        assert client.post("/nested").json() == {"cart": [7, 1]}


def test_within_a_gatekeeper_the_session_middleware_only_loads_early() -> None:
    app = application()
    app.add_middleware(SessionMiddleware)
    app.add_middleware(GatekeeperMiddleware, settings=SETTINGS["store"])
    with TestClient(app) as client:
        response = client.post("/write", json={"a": 1})
        assert len(response.headers.get_list("set-cookie")) == 1
        assert client.get("/read").json() == {"a": 1}


class Failing(MemorySessions):
    """A store that can be made to fail."""

    fails = False

    def ask(self, command: Any) -> Any:
        return StoreError("it does not answer") if self.fails else super().ask(command)


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("on_error", ["deny", "empty"])
def test_while_the_store_does_not_answer_sessions_are_503_or_empty_as_the_settings_say(
    around: bool, on_error: str
) -> None:
    keeper = Gatekeeper({**SETTINGS["store"], "session": {"kind": "store", "on_error": on_error, **PLAIN}})
    assert keeper.sessions is not None
    store = keeper.sessions.flow.store = Failing()
    app = application()
    if around:
        app.add_middleware(GatekeeperMiddleware, settings=keeper)
    else:
        app.add_middleware(SessionMiddleware, keeper=keeper)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.post("/write", json={"a": 1})
        store.fails = True
        expected: tuple[int, object] = (503, None) if on_error == "deny" else (200, {})
        response = client.get("/read")
        assert (response.status_code, response.json() if response.status_code == 200 else None) == expected
        assert client.post("/write", json={"b": 1}).status_code == (503 if on_error == "deny" else 200)
        if around:
            assert client.get("/untouched").status_code == 200
        store.fails = False
        assert client.get("/read").json() == {"a": 1}
