"""Sessions in Flask: `flask.session` by the interface, with the extension and without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask, flash, get_flashed_messages, jsonify, request, session, stream_with_context
from flask.testing import FlaskClient

import gatekeeper_flask
from gatekeeper import Gatekeeper, SessionError, SettingsError, StoreError
from gatekeeper.stores.sessions.memory import MemorySessions
from gatekeeper_flask import SessionInterface

SECRET = os.urandom(32).hex()


def application(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update(SECRET_KEY=SECRET, **config)

    @app.get("/read")
    def read() -> Any:
        return jsonify(dict(session))

    @app.post("/write")
    def write() -> Any:
        session.update(request.get_json())
        return jsonify(dict(session))

    @app.post("/nested")
    def nested() -> Any:
        session.setdefault("cart", []).append(1)
        return ""

    @app.post("/permanent")
    def permanent() -> Any:
        session.permanent = True
        return ""

    @app.post("/login")
    def login() -> Any:
        session["sub"] = "7"
        session.rotate()  # type: ignore[attr-defined]
        return ""

    @app.post("/logout")
    def logout() -> Any:
        session.clear()
        return ""

    @app.post("/flash")
    def flashes() -> Any:
        flash("hello", "info")
        return ""

    @app.get("/flashed")
    def flashed() -> Any:
        return jsonify(get_flashed_messages(with_categories=True))

    @app.get("/stream")
    def stream() -> Any:
        session["streamed"] = True
        return app.response_class(stream_with_context(iter([str(session["streamed"]), "!"])))

    @app.get("/untouched")
    def untouched() -> str:
        return ""

    @app.get("/fails")
    def fails() -> str:
        session["failed"] = True
        raise RuntimeError

    @app.post("/datetime")
    def of_time() -> str:
        session["at"] = datetime.now(UTC)
        return ""

    @app.get("/async")
    async def awaited() -> Any:
        session["async"] = True
        return jsonify(dict(session))

    return app


def extended(kind: str, **config: Any) -> Flask:
    app = application(GATEKEEPER_SESSION={"kind": kind, "cookie": {"secure": False}}, **config)
    gatekeeper_flask.Gatekeeper(app)
    return app


def alone(**config: Any) -> Flask:
    app = application(**config)
    app.session_interface = SessionInterface()
    return app


def stored(**config: Any) -> Flask:
    app = application(**config)
    app.session_interface = SessionInterface({"session": {"kind": "store", "cookie": {"secure": False}}})
    return app


WAYS: dict[str, Callable[..., Flask]] = {
    "extension, token": lambda **config: extended("token", **config),
    "extension, store": lambda **config: extended("store", **config),
    "token": alone,
    "store": stored,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[..., Flask]:
    return WAYS[request.param]


@pytest.fixture
def client(way: Callable[..., Flask]) -> FlaskClient:
    # Flask's client sends a Secure cookie over HTTPS alone.
    client = way().test_client()
    client.environ_base["wsgi.url_scheme"] = "https"
    return client


def cookies(client: FlaskClient) -> dict[str, str]:
    return {cookie.key: cookie.value for cookie in (client._cookies or {}).values()}


def test_what_one_request_writes_the_next_one_reads(client: FlaskClient) -> None:
    assert client.get("/read").json == {}
    assert client.post("/write", json={"a": [1]}).json == {"a": [1]}
    assert client.get("/read").json == {"a": [1]}


def test_a_session_that_nobody_touches_leaves_no_trace(client: FlaskClient) -> None:
    client.post("/write", json={"a": 1})
    response = client.get("/untouched")
    assert "Set-Cookie" not in response.headers
    assert "Vary" not in response.headers


def test_a_session_that_is_read_varies_by_cookie_and_sets_none(client: FlaskClient) -> None:
    client.post("/write", json={"a": 1})
    response = client.get("/read")
    assert response.headers["Vary"] == "Cookie"
    assert "Set-Cookie" not in response.headers


def test_what_changes_within_a_list_is_kept(client: FlaskClient) -> None:
    client.post("/nested")
    client.post("/nested")
    assert client.get("/read").json == {"cart": [1, 1]}


def test_a_login_rotates_and_a_cleared_session_is_ended(client: FlaskClient) -> None:
    client.post("/write", json={"a": 1})
    before = cookies(client)
    client.post("/login")
    assert cookies(client) != before
    assert client.get("/read").json == {"a": 1, "sub": "7"}
    client.post("/logout")
    assert cookies(client) == {}
    assert client.get("/read").json == {}


def test_flashed_messages_are_shown_once(client: FlaskClient) -> None:
    client.post("/flash")
    assert client.get("/flashed").json == [["info", "hello"]]
    assert client.get("/flashed").json == []


def test_a_streaming_response_reads_the_session(client: FlaskClient) -> None:
    assert client.get("/stream").text == "True!"
    assert client.get("/read").json == {"streamed": True}


def test_an_async_view_has_the_session(client: FlaskClient) -> None:
    assert client.get("/async").json == {"async": True}


def test_a_view_that_fails_is_a_500_and_flask_keeps_what_it_wrote(client: FlaskClient) -> None:
    assert client.get("/fails").status_code == 500
    assert client.get("/read").json == {"failed": True}, "as with Flask's own"


def test_the_test_client_opens_the_session(client: FlaskClient) -> None:
    with client.session_transaction() as found:
        found["a"] = {"b": [1]}
    assert client.get("/read").json == {"a": {"b": [1]}}
    with client.session_transaction() as found:
        assert found["a"] == {"b": [1]}
        found["a"]["b"].append(2)
    assert client.get("/read").json == {"a": {"b": [1, 2]}}


def test_a_cookie_of_anything_is_an_empty_session(way: Callable[..., Flask]) -> None:
    client = way().test_client(use_cookies=False)
    for value in ("x", "a.b", "a.b.c", "x" * 9000, "2~x"):
        for name in ("session", "__Host-session"):
            response = client.get("/read", headers={"Cookie": f"{name}={value}"})
            assert (response.status_code, response.json) == (200, {})


def test_what_json_cannot_hold_is_a_clear_error(way: Callable[..., Flask]) -> None:
    app = way()
    app.testing = True
    with pytest.raises(SessionError, match=r"session\['at'\]"):
        app.test_client().post("/datetime")


def test_a_permanent_session_outlives_the_browser_and_another_one_does_not(way: Callable[..., Flask]) -> None:
    client = way(PERMANENT_SESSION_LIFETIME=timedelta(days=3)).test_client()
    assert "Max-Age" not in client.post("/write", json={"a": 1}).headers["Set-Cookie"]
    assert f"Max-Age={3 * 86400}" in client.post("/permanent").headers["Set-Cookie"]


def test_the_config_of_the_cookie_stands_above_the_settings(way: Callable[..., Flask]) -> None:
    app = way(
        SESSION_COOKIE_NAME="mine",
        SESSION_COOKIE_DOMAIN="example.org",
        SESSION_COOKIE_PATH="/app",
        SESSION_COOKIE_HTTPONLY=False,
        SESSION_COOKIE_SECURE=True,
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_PARTITIONED=True,
    )
    pair, *attributes = app.test_client().post("/write", json={"a": 1}).headers["Set-Cookie"].split("; ")
    assert pair.startswith("mine=")
    assert set(attributes) == {"Path=/app", "Domain=example.org", "Secure", "SameSite=Strict", "Partitioned"}


@pytest.mark.parametrize("config", [{"SESSION_COOKIE_PATH": "/app"}, {"SESSION_COOKIE_DOMAIN": "example.org"}])
def test_a_config_that_forbids_the_prefix_of_the_cookie_gives_it_a_name_without(config: dict[str, str]) -> None:
    """Browsers drop a `__Host-` cookie that has a path or a domain."""
    assert alone().test_client().post("/write", json={"a": 1}).headers["Set-Cookie"].startswith("__Host-session=")
    assert alone(**config).test_client().post("/write", json={"a": 1}).headers["Set-Cookie"].startswith("session=")


@pytest.mark.parametrize(
    "config",
    [
        {"SESSION_COOKIE_NAME": "__Host-mine", "SESSION_COOKIE_PATH": "/app"},
        {"SESSION_COOKIE_NAME": "__Secure-mine", "GATEKEEPER_SESSION": {"cookie": {"secure": False}}},
        {"SESSION_COOKIE_SAMESITE": "None", "GATEKEEPER_SESSION": {"cookie": {"secure": False}}},
        {"SESSION_COOKIE_PARTITIONED": True, "GATEKEEPER_SESSION": {"cookie": {"secure": False}}},
    ],
)
def test_a_config_whose_cookie_browsers_drop_is_refused_at_the_start(config: dict[str, Any]) -> None:
    settings = {"kind": "token", **config.pop("GATEKEEPER_SESSION", {})}
    with pytest.raises(SettingsError, match=r"SESSION_COOKIE_\*"):
        gatekeeper_flask.Gatekeeper(application(GATEKEEPER_SESSION=settings, **config))


@pytest.mark.parametrize("refreshes", [True, False])
def test_a_session_that_is_not_to_be_refreshed_is_written_when_it_changes_alone(refreshes: bool) -> None:
    """SESSION_REFRESH_EACH_REQUEST = False: its age is no reason."""
    app = alone(SESSION_REFRESH_EACH_REQUEST=refreshes)
    flow = app.session_interface.flow(app)  # type: ignore[attr-defined]
    now = flow._clock()
    flow._clock = lambda: now
    client = app.test_client()
    client.environ_base["wsgi.url_scheme"] = "https"
    client.post("/write", json={"a": 1})
    now += flow.idle // 2
    assert ("Set-Cookie" in client.get("/read").headers) == refreshes
    assert "Set-Cookie" in client.post("/write", json={"a": 2}).headers


def test_a_fallback_of_the_secret_still_opens_sessions() -> None:
    old, new = os.urandom(32).hex(), os.urandom(32).hex()
    before = application()
    before.secret_key = old
    before.session_interface = SessionInterface()
    client = before.test_client()
    client.environ_base["wsgi.url_scheme"] = "https"
    field = client.post("/write", json={"a": 1}).headers["Set-Cookie"].split(";")[0]
    for fallbacks, expected in (([old], {"a": 1}), ([], {})):
        after = application(SECRET_KEY_FALLBACKS=fallbacks)
        after.secret_key = new
        after.session_interface = SessionInterface()
        assert after.test_client(use_cookies=False).get("/read", headers={"Cookie": field}).json == expected


def test_a_weak_secret_or_none_is_a_clear_error() -> None:
    for secret in (None, "short"):
        app = application()
        app.secret_key = secret
        app.testing = True
        app.session_interface = SessionInterface()
        with pytest.raises(SettingsError, match="key"):
            app.test_client().get("/read")


def test_rules_count_by_the_user_of_the_session() -> None:
    app = application(
        GATEKEEPER={
            "session": {"kind": "store", "cookie": {"secure": False}},
            "identity": {"user": "session:sub"},
            "limits": [{"name": "users", "rate": "2/hour", "key": "user", "match": "/read"}],
        }
    )
    gatekeeper_flask.Gatekeeper(app)
    one, two = app.test_client(), app.test_client()
    one.post("/write", json={"sub": "1"})
    two.post("/write", json={"sub": "2"})
    assert [one.get("/read").status_code for _ in range(3)] == [200, 200, 429]
    assert two.get("/read").status_code == 200


def test_two_applications_have_sessions_of_their_own() -> None:
    gk = gatekeeper_flask.Gatekeeper()
    clients = []
    for name in ("one", "two"):
        app = application(GATEKEEPER_SESSION={"kind": "store", "cookie": {"secure": False, "name": name}})
        gk.init_app(app)
        clients.append(app.test_client())
    clients[0].post("/write", json={"a": 1})
    assert [client.get("/read").json for client in clients] == [{"a": 1}, {}]


def test_who_does_not_touch_the_session_gets_no_vary_with_or_without_a_cookie(client: FlaskClient) -> None:
    assert "Vary" not in client.get("/untouched").headers


def test_a_policy_that_says_so_makes_the_cookie_outlive_the_browser() -> None:
    app = application(GATEKEEPER_SESSION={"kind": "store", "cookie": {"secure": False, "persistent": True}})
    gatekeeper_flask.Gatekeeper(app)
    assert "Max-Age=1800" in app.test_client().post("/write", json={"a": 1}).headers["Set-Cookie"]


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
    settings = {"kind": "store", "on_error": on_error, "cookie": {"secure": False}}
    app = application(GATEKEEPER_SESSION=settings if around else None)
    if around:
        flow = gatekeeper_flask.Gatekeeper(app).keeper.sessions.flow  # type: ignore[union-attr]
    else:
        keeper = Gatekeeper({"keys": [SECRET], "session": settings})
        app.session_interface = SessionInterface(keeper)
        flow = app.session_interface.flow(app)
    store = flow.store = Failing()
    client = app.test_client()
    client.post("/write", json={"a": 1})
    store.fails = True
    response = client.get("/read")
    assert response.status_code == (503 if on_error == "deny" else 200)
    if on_error == "deny":
        assert response.headers["Retry-After"] == "1"
        assert client.post("/logout").status_code == 503
    else:
        assert response.json == {}
    assert client.get("/untouched").status_code == 200
    new = app.test_client()
    response = new.post("/write", json={"b": 1})
    assert response.status_code == (503 if on_error == "deny" else 200)
    assert "Set-Cookie" not in response.headers
    store.fails = False
    assert client.get("/read").json == {"a": 1}


def test_an_error_handler_of_the_application_may_answer_that_the_store_does_not() -> None:
    app = application(GATEKEEPER_SESSION={"kind": "store", "cookie": {"secure": False}})
    flow = gatekeeper_flask.Gatekeeper(app).keeper.sessions.flow  # type: ignore[union-attr]
    app.register_error_handler(503, lambda error: ("come back later", 503))
    store = flow.store = Failing()
    client = app.test_client()
    client.post("/write", json={"a": 1})
    store.fails = True
    response = client.get("/read")
    assert (response.status_code, response.text) == (503, "come back later")
