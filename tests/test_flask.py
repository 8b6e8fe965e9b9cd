"""The Flask extension: one policy in the habits of Flask."""

from __future__ import annotations

import gc
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    after_this_request,
    current_app,
    g,
    jsonify,
    request,
    session,
    stream_with_context,
)
from flask.views import MethodView, View
from werkzeug import exceptions
from werkzeug.local import LocalProxy
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, EnvironBuilder
from werkzeug.wrappers import Response as Answer

from gatekeeper import Gatekeeper as Keeper
from gatekeeper import Limited, SettingsError
from gatekeeper.commands import Batch, Hits, Replies
from gatekeeper.errors import StoreError
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.testing import VirtualClock, assert_limited, assert_not_limited, disabled, virtual
from gatekeeper.wsgi import GatekeeperMiddleware
from gatekeeper_flask import Gatekeeper, Refused, TooManyRequests
from gatekeeper_flask.home import MOST_PREFIXES, FlaskTicket

A, B = {"REMOTE_ADDR": "192.0.2.1"}, {"REMOTE_ADDR": "198.51.100.2"}
"""Two clients."""

pytestmark = pytest.mark.usefixtures("gatekeeper_fresh")  # what is left is told to the second

DEFAULT = {"limits": [{"name": "default", "rate": "2/minute"}]}


def bare(**more: Any) -> Flask:
    app = Flask("shop", **more)
    app.testing = True

    @app.get("/")
    def index() -> str:
        return "index"

    @app.get("/item/<int:number>")
    def item(number: int) -> str:
        return f"item {number}"

    return app


def statuses(client: Client, path: str, times: int, who: Mapping[str, str] = A, method: str = "GET") -> list[int]:
    return [ask(client, path, who, method).status_code for _ in range(times)]


def ask(client: Client, path: str = "/", who: Mapping[str, str] = A, method: str = "GET", **more: Any) -> Any:
    return client.open(path, method=method, environ_overrides=dict(who), buffered=True, **more)


# Applications and settings


def test_one_extension_serves_several_applications_each_with_its_own_counters() -> None:
    gk = Gatekeeper()
    apps = [bare(), bare()]
    for app, rate in zip(apps, ("1/minute", "2/minute"), strict=True):
        app.config["GATEKEEPER_LIMITS"] = [{"name": "default", "rate": rate}]
        gk.init_app(app)
    assert [statuses(app.test_client(), "/", 3) for app in apps] == [[200, 429, 429], [200, 200, 429]]
    assert statuses(apps[0].test_client(), "/", 2, B) == [200, 429]


def test_the_extension_keeps_no_application() -> None:
    gk = Gatekeeper(bare(), DEFAULT)
    assert not any(isinstance(value, Flask) for value in vars(gk).values())
    gc.collect()
    with pytest.raises(RuntimeError, match="0 applications"):
        _ = gk.keeper


def test_an_application_is_limited_by_one_gatekeeper() -> None:
    app = bare()
    Gatekeeper(app, DEFAULT)
    with pytest.raises(RuntimeError, match="has a Gatekeeper already"):
        Gatekeeper(app, DEFAULT)


def test_a_decorator_of_an_extension_that_was_not_given_the_application_does_not_pass_silently() -> None:
    app = bare()
    app.add_url_rule("/x", view_func=Gatekeeper().limit("5/minute")(lambda: "x"), endpoint="x")
    with pytest.raises(RuntimeError, match="call its init_app"):
        ask(app.test_client(), "/x")


def first_rate(app: Flask) -> str:
    (rule,) = app.extensions["gatekeeper"].keeper.gate.rules
    return str(rule.limits[0].policy)


def test_the_config_stands_above_the_settings_given_key_by_key(tmp_path: Path) -> None:
    app = bare()
    app.config["GATEKEEPER"] = {"limits": [{"name": "a", "rate": "3/minute"}], "store": {"max_keys": 7}}
    app.config["GATEKEEPER_STORE_ON_ERROR"] = "deny"
    app.config["GATEKEEPER_STORE_URL"] = None
    app.config["GATEKEEPER_ACCESS"] = {"deny": "203.0.113.0/24"}
    gk = Gatekeeper(settings=DEFAULT)
    gk.init_app(app)
    settings = gk.keeper.settings
    assert first_rate(app) == '"a";q=3;w=60'
    assert (settings.store.max_keys, settings.store.on_error, settings.store.url) == (7, "deny", None)
    assert settings.access.deny == ["203.0.113.0/24"]


def test_a_path_is_relative_to_the_application_and_the_config_stands_above_the_file(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text('[[limits]]\nname = "f"\nrate = "4/minute"\n', encoding="utf-8")
    plain = bare(root_path=str(tmp_path))
    Gatekeeper(plain, "limits.toml")
    above = bare(root_path=str(tmp_path))
    above.config.update(GATEKEEPER="limits.toml", GATEKEEPER_RESPONSE_X_RATELIMIT="seconds")
    Gatekeeper(above)
    assert first_rate(plain) == first_rate(above) == '"f";q=4;w=60'
    assert ask(above.test_client()).headers["X-RateLimit-Remaining"] == "3"


def test_environment_variables_with_flasks_prefix_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_GATEKEEPER_LIMITS", json.dumps([{"name": "env", "rate": "9/minute"}]))
    monkeypatch.setenv("FLASK_GATEKEEPER_STORE__max_keys", "12")
    app = bare()
    app.config.from_prefixed_env()
    gk = Gatekeeper(app)
    assert (first_rate(app), gk.keeper.settings.store.max_keys) == ('"env";q=9;w=60', 12)


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ({"GATEKEEPER_LIMITS": [{"name": "a"}], "GATEKEEPER_STORE_UR": "x"}, ["store.ur: unknown key", "limits[0].rate"]),
        ({"GATEKEEPER": 7}, ["GATEKEEPER: expected a mapping, or the path of a file, and not int"]),
        ({"GATEKEEPER": "no/such.toml", "GATEKEEPER_ENABLED": True}, ["No such file"]),
        ({"GATEKEEPER": Keeper({}), "GATEKEEPER_ENABLED": True}, ["GATEKEEPER_ENABLED: goes with a mapping or a file"]),
        ({"GATEKEEPER_STORE": "memory://", "GATEKEEPER_STORE_TIMEOUT": "1s"}, ["store_timeout: unknown key"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_with_the_config_is_told_at_once(config: dict[str, Any], problems: list[str]) -> None:
    app = bare()
    app.config.update(config)
    with pytest.raises(SettingsError) as raised:
        Gatekeeper(app)
    assert all(problem in str(raised.value) for problem in problems)
    assert "gatekeeper" not in app.extensions


def test_limits_can_be_off_by_the_config_and_switched_on_again() -> None:
    app = bare()
    app.config["GATEKEEPER_ENABLED"] = False
    gk = Gatekeeper(app, DEFAULT)
    client = app.test_client()
    assert statuses(client, "/", 4) == [200] * 4
    assert "RateLimit" not in ask(client).headers
    gk.keeper.enabled = True
    assert statuses(client, "/", 3) == [200, 200, 429]


def test_functions_that_must_be_awaited_are_refused_under_wsgi() -> None:
    async def user(ticket: object) -> str:
        return "ada"

    with pytest.raises(SettingsError, match=r"identity\.user: expected a function that is not asynchronous"):
        Gatekeeper(bare(), {"identity": {"user": user}})
    app = bare()
    with pytest.raises(SettingsError, match="expected functions that are not asynchronous"):
        Gatekeeper(app).limit("5/minute", key=user)(lambda: "x")
    gk = Gatekeeper()
    _kept = gk.limit("5/minute", key=user)(lambda: "x")
    with pytest.raises(SettingsError, match="expected functions that are not asynchronous"):
        gk.init_app(bare())


# Rules of the settings


def test_each_client_has_a_quota_and_is_told_of_it() -> None:
    app = bare()
    Gatekeeper(app, DEFAULT)
    client = app.test_client()
    first = ask(client)
    assert (first.headers["RateLimit"], first.headers["RateLimit-Policy"]) == (
        '"default";r=1;t=61',
        '"default";q=2;w=60',
    )
    assert "Retry-After" not in first.headers
    assert statuses(client, "/", 2) == [200, 429]
    assert statuses(client, "/item/7", 2, B) == [200, 200]
    assert statuses(client, "/", 1, B) == [429]


def test_a_refusal_is_a_problem_document_that_is_not_cached() -> None:
    app = bare()
    Gatekeeper(app, {"limits": [{"name": "default", "rate": "1/minute"}]})
    client = app.test_client()
    ask(client)
    refused = ask(client)
    assert refused.status_code == 429
    assert refused.content_type == "application/problem+json"
    assert json.loads(refused.data)["violated-policies"] == ["default"]
    assert refused.headers.getlist("RateLimit") == ['"default";r=0;t=61']
    assert (refused.headers["Retry-After"], refused.headers["Cache-Control"]) == ("61", "no-store")
    assert ask(client, method="HEAD").data == b""


def test_what_no_route_is_for_is_limited_too() -> None:
    app = bare()
    Gatekeeper(app, DEFAULT)
    client = app.test_client()
    assert statuses(client, "/no/such/page", 3) == [404, 404, 429]
    assert statuses(client, "/", 3, B, "DELETE") == [405, 405, 429]


def test_an_error_handler_gets_the_refusal_and_what_it_leaves_out_is_added() -> None:
    app = bare()
    Gatekeeper(app, DEFAULT)
    seen: list[exceptions.TooManyRequests] = []

    @app.errorhandler(429)
    def too_many(error: exceptions.TooManyRequests) -> tuple[Response, int]:
        seen.append(error)
        return jsonify(wait=error.retry_after), 429

    client = app.test_client()
    assert statuses(client, "/", 2) == [200, 200]
    refused = ask(client)
    assert (refused.status_code, refused.json) == (429, {"wait": 61})
    assert [
        refused.headers.getlist(name) for name in ("Retry-After", "RateLimit", "Cache-Control", "Content-Type")
    ] == [
        ["61"],
        ['"default";r=0;t=61'],
        ["no-store"],
        ["application/json"],
    ]
    (error,) = seen
    assert isinstance(error, TooManyRequests)
    assert isinstance(error, Limited)
    assert error.description == "The request would exceed a quota. Try again in 61 seconds."
    assert 60 < error.verdict.retry_after <= 61
    assert error.ticket.address == "192.0.2.1"
    assert error.get_response().headers["Retry-After"] == "61"


@pytest.mark.parametrize(
    "kind", [TooManyRequests, exceptions.TooManyRequests, exceptions.HTTPException, Refused, Limited, Exception]
)
def test_a_handler_of_any_class_of_the_error_sees_it(kind: type[Exception]) -> None:
    app = bare()
    Gatekeeper(app, DEFAULT)
    app.register_error_handler(kind, lambda error: ("handled", 429, {"Retry-After": "7"}))
    client = app.test_client()
    assert statuses(client, "/", 2) == [200, 200]
    refused = ask(client)
    assert (refused.data, refused.headers.getlist("Retry-After")) == (b"handled", ["7"])


def test_a_handler_that_answers_otherwise_is_believed() -> None:
    app = bare()
    Gatekeeper(app, DEFAULT)
    app.register_error_handler(429, lambda error: ("queued", 202))
    client = app.test_client()
    assert statuses(client, "/", 3) == [200, 200, 202]
    answer = ask(client)
    assert "Retry-After" not in answer.headers
    assert answer.headers["RateLimit"] == '"default";r=0;t=61'


def test_the_handler_of_a_blueprint_is_for_its_routes() -> None:
    app, api = bare(), Blueprint("api", __name__, url_prefix="/api")
    api.get("/x")(lambda: "x")
    api.register_error_handler(429, lambda error: ("of the blueprint", 429))
    app.register_blueprint(api)
    Gatekeeper(app, {"limits": [{"name": "default", "rate": "1/minute"}]})
    client = app.test_client()
    assert [ask(client, path).data for path in ("/api/x", "/api/x", "/")][1:] == [
        b"of the blueprint",
        ask(client).data,
    ]


def test_a_refused_request_runs_no_code_of_the_application_but_what_answers_it() -> None:
    app = bare()
    ran: list[str] = []

    @app.before_request
    def before() -> None:
        ran.append("before")

    Gatekeeper(app, {"limits": [{"name": "default", "rate": "1/minute"}]})

    @app.after_request
    def cors(response: Response) -> Response:
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response

    @app.teardown_request
    def teardown(error: BaseException | None) -> None:
        ran.append("teardown")

    client = app.test_client()
    ask(client)
    assert ran == ["before", "teardown"]
    refused = ask(client)
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (429, "*")
    assert ran == ["before", "teardown", "teardown"]


def test_preflights_pass_so_that_a_browser_may_read_a_refusal() -> None:
    app = bare()
    Gatekeeper(app, {"limits": [{"name": "default", "rate": "1/minute"}]})
    headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "GET"}
    client = app.test_client()
    assert [ask(client, method="OPTIONS", headers=headers).status_code for _ in range(3)] == [200] * 3
    assert statuses(client, "/", 2) == [200, 429]


def test_the_answer_to_refusals_can_be_that_of_the_settings() -> None:
    app = bare()
    Gatekeeper(app, {**DEFAULT, "response": {"body": "wait {retry_after}", "x_ratelimit": "seconds"}})
    client = app.test_client()
    statuses(client, "/", 2)
    refused = ask(client)
    assert (refused.data, refused.headers.getlist("X-RateLimit-Remaining")) == (b"wait 61", ["0"])


def test_a_denied_network_is_answered_403_on_exempt_routes_too() -> None:
    app = bare()
    gk = Gatekeeper(app, {"access": {"deny": "192.0.2.0/24"}})
    gk.exempt(app.view_functions["index"])
    app.register_error_handler(403, lambda error: (f"no, {error.code}", 403))
    client = app.test_client()
    assert [ask(client, path).data for path in ("/", "/item/1", "/static/x")] == [b"no, 403"] * 3
    assert statuses(client, "/", 1, B) == [200]


class Broken(MemoryStore):
    """A store that does not answer."""

    def ask(self, batch: Hits) -> Replies:
        if isinstance(batch, Batch) and batch.local:
            return super().ask(batch)
        return [StoreError("it does not answer")] * len(batch)


class Remote:
    """As the Gatekeeper sees one that is on another machine."""

    local = False

    def __init__(self) -> None:
        self._broken = Broken()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broken, name)


def test_a_rule_that_denies_without_its_store_is_a_503_that_handlers_see() -> None:
    app = bare()
    gk = Gatekeeper(app, {"limits": [{"name": "a", "rate": "1/minute", "on_error": "deny"}]})
    gk.keeper.use(Remote())
    app.add_url_rule("/x", view_func=gk.limit("5/minute", on_error="deny")(lambda: "x"), endpoint="x")
    app.register_error_handler(503, lambda error: (f"down {error.retry_after}", 503))
    client = app.test_client()
    assert [ask(client, path).data for path in ("/", "/x")] == [b"down 1"] * 2


def test_a_refusal_holds_whatever_flask_makes_of_the_request() -> None:
    """Its hook is not asked where the session cannot be opened."""
    app = bare()

    class Interface:
        @staticmethod
        def open_session(app: Flask, request: object) -> None:
            raise ConnectionError("no session store")

        is_null_session = staticmethod(lambda session: True)

    app.session_interface = Interface()  # type: ignore[assignment]
    app.testing = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.logger.disabled = True
    Gatekeeper(app, DEFAULT)
    client = app.test_client()
    assert statuses(client, "/", 3) == [500, 500, 429]
    assert ask(client).headers["Retry-After"] == "61"
    user = bare()
    user.session_interface, user.testing, user.logger.disabled = app.session_interface, False, True
    Gatekeeper(
        user, {"identity": {"user": lambda: "ada"}, "limits": [{"name": "u", "rate": "2/minute", "key": "user"}]}
    )
    assert statuses(user.test_client(), "/", 3) == [500, 500, 429]


# Users


def logged_in() -> Any:
    """As Flask-Login has it: within a request, from the session, loaded once."""
    if "_user" not in g:
        g._user = session.get("name")
        g.loads = g.get("loads", 0) + 1
    return g._user or ""


current_user: Any = LocalProxy(logged_in)
USERS = [{"name": "user", "rate": "2/minute", "key": "user"}]


def user_app(user: Callable[..., Any], limits: list[dict[str, Any]] = USERS) -> Flask:
    app = bare()
    app.secret_key = "a key for tests"
    Gatekeeper(app, {"identity": {"user": user}, "limits": limits})

    @app.get("/login/<name>")
    def login(name: str) -> str:
        session["name"] = name
        return "welcome"

    return app


@pytest.mark.parametrize(
    "user",
    [
        lambda: current_user or None,
        lambda ticket: current_user or None,
        lambda: LocalProxy(lambda: logged_in() or None),
        lambda ticket: LocalProxy(lambda: logged_in() or None),
        lambda ticket: str(current_user) or None,
    ],
)
def test_the_user_of_a_login_extension_has_a_quota_wherever_he_comes_from(user: Callable[..., Any]) -> None:
    app = user_app(user)
    ada, bob = app.test_client(), app.test_client()
    assert (ask(ada, "/login/ada").status_code, ask(bob, "/login/bob").status_code) == (200, 200)
    # Each was nobody then, and so an address.
    assert [ask(ada, who=who).status_code for who in (A, B, A)] == [200, 200, 429]
    assert statuses(bob, "/", 3) == [200, 200, 429]


def test_a_user_is_asked_for_after_the_before_request_functions_and_they_run_once() -> None:
    app = user_app(lambda: g.user)
    ran: list[str] = []

    @app.before_request
    def authenticate() -> None:
        ran.append("authenticate")
        g.user = request.headers["X-Name"]

    client = app.test_client()
    names = ["ada", "ada", "bob", "ada"]
    assert [ask(client, headers={"X-Name": name}).status_code for name in names] == [200, 200, 200, 429]
    assert len(ran) == 4


def test_a_request_made_while_another_waits_for_its_user_leaves_that_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gatekeeper_flask.home.IN_USE", [])  # as where no function is decorated
    app = user_app(lambda: g.user, [{**USERS[0], "match": "/"}])

    @app.before_request
    def authenticate() -> None:
        if request.path == "/":
            g.user = app.test_client().get("/item/7").text

    assert [ask(app.test_client(), who=who).status_code for who in (A, B, A)] == [200, 200, 429]


@pytest.mark.parametrize("how", ["answers", "aborts"])
def test_what_a_before_request_function_answers_is_counted_all_the_same(how: str) -> None:
    app = user_app(lambda: request.authorization and request.authorization.username)

    @app.before_request
    def authenticate() -> Any:
        if how == "aborts":
            abort(401)
        return "wrong password", 401

    client = app.test_client()
    assert [ask(client, auth=(name, "guess")).status_code for name in ("ada", "ada", "ada", "bob")] == [
        401,
        401,
        429,
        401,
    ]


def test_rules_that_need_no_function_are_decided_before_flask_sees_the_request() -> None:
    app = user_app(lambda: g.user, [{"name": "address", "rate": "1/minute", "match": "/item/*"}, *USERS])
    seen: list[str] = []

    @app.before_request
    def authenticate() -> None:
        seen.append(request.path)
        g.user = "ada"

    client = app.test_client()
    # /item/* is under both rules: one batch, so nothing is spent of the user's quota by what the address refuses
    assert statuses(client, "/item/1", 3) == [200, 429, 429]
    assert statuses(client, "/", 2) == [200, 429]
    only = user_app(lambda: g.user, [{"name": "address", "rate": "1/minute"}])
    only.before_request(authenticate)
    seen.clear()
    assert statuses(only.test_client(), "/", 3) == [200, 429, 429]
    assert seen == ["/"]


def test_a_body_is_counted_by_and_still_read_by_the_application() -> None:
    app = user_app(
        lambda: request.form.get("name"),
        [{"name": "a", "rate": "1/minute", "match": "POST /in", "key": ["user", "form:name", "json:a.b"]}],
    )

    @app.post("/in")
    def enter() -> str:
        return request.form["name"]

    client = app.test_client()
    answers = [ask(client, "/in", method="POST", data={"name": name}) for name in ("ada", "ada", "bob")]
    assert [(answer.status_code, answer.data[:4]) for answer in answers] == [
        (200, b"ada"),
        (429, b'{"ty'),
        (200, b"bob"),
    ]


def test_a_body_is_counted_by_though_a_before_request_function_or_that_of_the_user_has_read_it() -> None:
    limits = [
        {"name": "a", "rate": "1/minute", "key": "json:name"},
        {"name": "b", "rate": "9/minute", "key": "user"},
    ]
    app = user_app(lambda: request.get_json()["name"], limits)
    app.before_request(lambda: request.get_data() and None)

    @app.post("/in")
    def enter() -> Any:
        return request.get_json()["name"]

    client = app.test_client()
    answers = [ask(client, "/in", method="POST", json={"name": name}) for name in ("ada", "bob", "ada", "bob")]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert answers[1].data == b"bob"


def test_a_body_too_long_to_be_counted_by_is_a_413_that_handlers_see() -> None:
    limits = [{"name": "a", "rate": "1/minute", "key": "form:name"}]
    app = bare()
    Gatekeeper(app, {"identity": {"max_body": "1KiB"}, "limits": limits})
    app.register_error_handler(413, lambda error: ("too long", 413))
    client = app.test_client()
    assert ask(client, method="POST", data={"name": "x" * 2000}).data == b"too long"
    doubled: dict[str, Any] = {"data": "name=a&name=b", "content_type": "application/x-www-form-urlencoded"}
    assert ask(client, method="POST", **doubled).status_code == 400
    unread: dict[str, Any] = {"data": "name=" + "y" * 900, "content_type": "application/x-www-form-urlencoded"}
    assert ask(client, method="POST", **unread).status_code == 405


def test_an_error_of_a_function_is_the_applications() -> None:
    def user() -> str:
        raise LookupError("no user")

    app = user_app(user)
    app.register_error_handler(LookupError, lambda error: ("handled", 500))
    assert ask(app.test_client()).data == b"handled"


# Decorators


def limited_item(gk: Gatekeeper, **more: Any) -> Callable[..., str]:
    @gk.limit("2/minute", **more)
    def limited(number: int = 0) -> str:
        return f"limited {number}"

    return limited


def test_a_view_has_a_quota_for_each_client_known_by_the_routes_template() -> None:
    app = bare()
    gk = Gatekeeper(app)
    view = limited_item(gk)
    app.add_url_rule("/thing/<int:number>", "one", view)
    app.add_url_rule("/other/<int:number>", "two", view)
    client = app.test_client()
    assert [ask(client, f"/thing/{number}").status_code for number in (1, 2, 3)] == [200, 200, 429]
    assert statuses(client, "/thing/4", 2, B) == [200, 200]
    assert statuses(client, "/other/1", 3) == [200, 200, 429]
    answer = ask(client, "/other/1", B)
    assert answer.headers["RateLimit"] == '"limited";r=1;t=61'
    refused = ask(client, "/thing/1")
    assert (refused.headers["Retry-After"], refused.headers.getlist("RateLimit")) == ("61", ['"limited";r=0;t=61'])


@pytest.mark.parametrize("more", [{"name": "mine"}, {"scope": "ours"}])
def test_with_a_name_or_a_scope_all_its_routes_have_one_quota(more: dict[str, str]) -> None:
    app = bare()
    view = limited_item(Gatekeeper(app), **more)
    app.add_url_rule("/thing/<int:number>", "one", view)
    app.add_url_rule("/other/<int:number>", "two", view)
    client = app.test_client()
    assert [ask(client, path).status_code for path in ("/thing/1", "/other/1", "/thing/1", "/other/2")] == [
        200,
        200,
        429,
        429,
    ]
    assert statuses(client, "/thing/4", 1, B) == [200]


def test_the_error_handler_sees_the_refusal_of_a_decorator() -> None:
    app = bare()
    app.add_url_rule("/x", "x", limited_item(Gatekeeper(app)))
    app.register_error_handler(429, lambda error: (f"wait {error.retry_after}", 429))
    client = app.test_client()
    assert statuses(client, "/x", 2) == [200, 200]
    refused = ask(client, "/x")
    assert (refused.data, refused.headers["Retry-After"], refused.headers["Cache-Control"]) == (
        b"wait 61",
        "61",
        "no-store",
    )


def test_a_refusal_that_the_application_catches_is_its_own_affair() -> None:
    app = bare()
    helper = limited_item(Gatekeeper(app, {"limits": [{"name": "all", "rate": "9/minute", "give_back": "5xx"}]}))

    @app.get("/x")
    def x() -> str:
        try:
            return helper(1)
        except Limited:
            return "instead"

    client = app.test_client()
    answers = [ask(client, "/x") for _ in range(3)]
    assert [(answer.status_code, answer.data) for answer in answers] == [(200, b"limited 1")] * 2 + [
        (200, b"instead")
    ]
    assert "Retry-After" not in answers[-1].headers


def test_rules_of_the_settings_and_of_a_view_are_charged_once_each() -> None:
    app = bare()
    gk = Gatekeeper(app, {"limits": [{"name": "all", "rate": "9/minute"}]})
    app.add_url_rule("/x", "x", limited_item(gk))

    @app.get("/left")
    def left() -> dict[str, int]:
        return {charge.limit.name: charge.verdict.remaining for charge in gk.ticket.charges}

    client = app.test_client()
    answer = ask(client, "/x")
    assert answer.headers["RateLimit-Policy"] == '"all";q=9;w=60, "limited";q=2;w=60'
    assert answer.headers["RateLimit"] == '"limited";r=1;t=61'
    assert statuses(client, "/x", 2) == [200, 429]
    assert ask(client, "/left").json == {"all": 5}


def test_a_blueprints_prefix_is_of_the_template() -> None:
    app = bare()
    gk = Gatekeeper(app)
    inner = Blueprint("inner", __name__, url_prefix="/inner")
    inner.add_url_rule("/x/<int:number>", "x", limited_item(gk))
    outer = Blueprint("outer", __name__, url_prefix="/outer")
    outer.register_blueprint(inner)
    app.register_blueprint(outer)
    app.register_blueprint(outer, name="again", url_prefix="/again")
    client = app.test_client()
    for prefix in ("/outer/inner/x", "/again/inner/x"):
        assert [ask(client, f"{prefix}/{number}").status_code for number in (1, 2, 3)] == [200, 200, 429]
        assert statuses(client, f"{prefix}/1", 1, B) == [200]


def test_an_application_under_two_mounts_has_a_quota_under_each_but_not_under_any_number() -> None:
    app = bare()
    app.add_url_rule("/x", "x", limited_item(Gatekeeper(app)))
    client = Client(DispatcherMiddleware(app, {"/v1": app, "/v2": app}), Answer)
    for mount in ("", "/v1", "/v2"):
        assert statuses(client, f"{mount}/x", 3) == [200, 200, 429]
    made_up = [
        client.open("/x", environ_overrides={**A, "SCRIPT_NAME": f"/{number}"}, buffered=True).status_code
        for number in range(MOST_PREFIXES + 20)
    ]
    assert made_up.count(429) >= 16
    assert len(app.extensions["gatekeeper"]._rules) <= MOST_PREFIXES + 2


def test_a_host_or_subdomain_is_of_the_route() -> None:
    app = Flask("hosts", subdomain_matching=True, static_folder=None)
    app.config["SERVER_NAME"] = "example.com"
    view = limited_item(Gatekeeper(app))
    app.add_url_rule("/x", "a", view, subdomain="a")
    app.add_url_rule("/x", "b", view, subdomain="b")
    client = app.test_client()
    for name in ("a", "b"):
        answers = [client.get("/x", base_url=f"http://{name}.example.com").status_code for _ in range(3)]
        assert answers == [200, 200, 429]


def test_a_request_spends_the_quota_of_a_name_once_whoever_asks_for_it() -> None:
    app = bare()
    gk = Gatekeeper(app, {"limits": [{"name": "x", "rate": "4/minute"}]})
    view = gk.limit("4/minute", name="x")(gk.limit("2/minute", name="x")(lambda: "x"))
    app.add_url_rule("/x", "x", view)
    app.add_url_rule("/y", "y", lambda: "y")
    client = app.test_client()
    assert statuses(client, "/x", 3) == [200, 200, 429]
    assert ask(client, "/y", B).headers["RateLimit-Policy"] == '"x";q=4;w=60'
    assert statuses(client, "/y", 4, B) == [200, 200, 200, 429]


def test_a_limit_may_count_by_a_parameter_of_the_path() -> None:
    app = bare()
    gk = Gatekeeper(app)

    @app.route("/<shop>/<int:number>")
    @gk.limit("2/minute", key=["ip", "param:number"])
    def goods(shop: str, number: int) -> str:
        return shop

    client = app.test_client()
    assert [statuses(client, path, 1)[0] for path in ("/a/1", "/b/1", "/c/1", "/a/2")] == [200, 200, 429, 200]
    assert statuses(client, "/a/1", 1, B) == [200]


@pytest.mark.parametrize("methods", [["post"], "POST"])
def test_only_some_methods_can_be_limited(methods: str | list[str]) -> None:
    app = bare()
    app.add_url_rule("/x", "x", limited_item(Gatekeeper(app), methods=methods), methods=["GET", "POST"])
    client = app.test_client()
    assert statuses(client, "/x", 3, method="POST") == [200, 200, 429]
    assert statuses(client, "/x", 5) == [200] * 5


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        (["POTS"], "did you mean POST?"),
        ("GET POST", 'such as "POST"'),
        ([], 'such as "POST"'),
        ([1], 'such as "POST"'),
    ],
)
def test_methods_that_are_none_are_told_when_the_limit_is_made(methods: Any, told: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        Gatekeeper(bare()).limit("1/minute", methods=methods)


def test_limits_stand_one_above_the_other() -> None:
    app = bare()
    gk = Gatekeeper(app)
    view = gk.limit("3/minute", key="global")(limited_item(gk))
    app.add_url_rule("/x", "x", view)
    client = app.test_client()
    answer = ask(client, "/x")
    assert answer.headers["RateLimit-Policy"] == '"limited-2";q=3;w=60, "limited";q=2;w=60'
    assert statuses(client, "/x", 2) == [200, 429]
    assert statuses(client, "/x", 1, B) == [429]  # the one above was spent: the application ran for it


def test_class_based_views_are_limited_by_their_decorators_and_on_their_methods() -> None:
    app = bare()
    gk = Gatekeeper(app)

    class Whole(MethodView):
        decorators: ClassVar = [gk.limit("2/minute")]

        def get(self) -> str:
            return "whole"

    class Single(MethodView):
        init_every_request = False

        @gk.limit("2/minute")
        def post(self, number: int) -> str:
            return f"posted {number}"

        def get(self, number: int) -> str:
            return "free"

    class Plain(View):
        methods: ClassVar = ["GET"]

        @gk.limit("1/minute")
        def dispatch_request(self) -> str:
            return "plain"

    app.add_url_rule("/one", view_func=Whole.as_view("one"))
    app.add_url_rule("/two", view_func=Whole.as_view("two"))
    app.add_url_rule("/single/<int:number>", view_func=Single.as_view("single"))
    app.add_url_rule("/more/<int:number>", view_func=Single.as_view("more"))
    app.add_url_rule("/plain", view_func=Plain.as_view("plain"))
    client = app.test_client()
    assert ask(client, "/two").headers["RateLimit"] == '"two";r=1;t=61'
    assert [statuses(client, path, 3) for path in ("/one", "/two")] == [[200, 200, 429], [200, 429, 429]]
    assert statuses(client, "/one", 1, B) == [200]
    assert [ask(client, f"/single/{n}", method="POST").status_code for n in (1, 2, 3)] == [200, 200, 429]
    assert statuses(client, "/more/1", 3, method="POST") == [200, 200, 429]
    assert statuses(client, "/single/1", 4) == [200] * 4
    assert statuses(client, "/plain", 2) == [200, 429]


def test_a_function_that_views_call_has_one_quota_for_each_client() -> None:
    app = bare()
    gk = Gatekeeper(app)

    @gk.limit("2/minute")
    def send_mail() -> str:
        return "sent"

    app.add_url_rule("/a", "a", lambda: send_mail())
    app.add_url_rule("/b", "b", lambda: send_mail())
    client = app.test_client()
    assert [ask(client, path).status_code for path in ("/a", "/b", "/a")] == [200, 200, 429]
    assert statuses(client, "/a", 1, B) == [200]
    with app.app_context(), virtual():
        assert [send_mail(), send_mail()] == ["sent", "sent"]
        with pytest.raises(Limited):
            send_mail()
    with pytest.raises(Limited), virtual():  # there is but one application
        [send_mail() for _ in range(3)]


def test_decorators_of_others_above_and_below_do_not_hide_a_limit() -> None:
    import functools

    def other(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    app = bare()
    view = other(Gatekeeper(app).limit("2/minute")(other(lambda number: "x")))
    app.add_url_rule("/a/<int:number>", "a", view)
    app.add_url_rule("/b/<int:number>", "b", view)
    client = app.test_client()
    assert [statuses(client, path, 3) for path in ("/a/1", "/b/1")] == [[200, 200, 429]] * 2


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (MethodView, "expected a view, not a class; put it into the class's `decorators`"),
        (staticmethod(lambda: "x"), "put @limit below @staticmethod"),
        (Flask("x"), "there is default_limit"),
        ("index", "expected a function, and not str"),
    ],
)
def test_what_a_limit_would_silently_not_limit_is_refused(target: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        Gatekeeper().limit("5/minute")(target)


def test_an_asynchronous_generator_is_refused() -> None:
    async def rows() -> Any:
        yield "row"

    with pytest.raises(TypeError, match="asynchronous generator"):
        Gatekeeper().limit("5/minute")(rows)


@pytest.mark.parametrize("settings", [{"match": "/x"}, {"rat": 1}, {"key": "form:name"}, {"rate": "5/minuten"}])
def test_wrong_settings_of_a_decorator_are_told_when_it_is_made(settings: dict[str, Any]) -> None:
    rate = settings.pop("rate", "5/minute")
    with pytest.raises(SettingsError):
        Gatekeeper().limit(rate, **settings)


def test_shared_limits_have_one_quota_and_charge_a_request_once() -> None:
    app = bare()
    gk = Gatekeeper(app)
    shared = gk.shared_limit("4/minute", scope="database")

    @shared
    def query() -> str:
        return "rows"

    app.add_url_rule("/a", "a", shared(lambda: query()))
    app.add_url_rule("/b", "b", shared(lambda: "b"))
    client = app.test_client()
    assert [ask(client, path).status_code for path in ("/a", "/b", "/a", "/b", "/a", "/b")] == [200] * 4 + [429] * 2
    assert statuses(client, "/b", 1, B) == [200]


def test_keys_costs_and_exemptions_are_functions_in_the_way_of_flask() -> None:
    app = bare()
    gk = Gatekeeper(app)
    view = gk.limit(
        "4/minute",
        key=lambda: request.headers.get("X-Team"),
        cost=lambda: int(request.args.get("cost", 1)),
        exempt=lambda: "X-Free" in request.headers,
    )(lambda: "x")
    app.add_url_rule("/x", "x", view)
    client = app.test_client()

    def team(name: str, path: str = "/x", **headers: str) -> int:
        return int(ask(client, path, headers={"X-Team": name, **headers}).status_code)

    assert [team("red", "/x?cost=3"), team("red", "/x?cost=2"), team("red"), team("red")] == [200, 429, 200, 429]
    assert [team("blue"), team("red", **{"X-Free": "1"})] == [200, 200]


# Blueprints, exemptions, defaults


def nested(gk: Gatekeeper, outer_rate: str | None, inner_rate: str | None) -> Flask:
    app = bare()
    outer, inner = Blueprint("outer", __name__, url_prefix="/o"), Blueprint("inner", __name__, url_prefix="/i")
    for blueprint, rate in ((outer, outer_rate), (inner, inner_rate)):
        blueprint.add_url_rule("/x", "x", lambda: "x")
        blueprint.add_url_rule("/y", "y", lambda: "y")
        if rate is not None:
            gk.limit(rate)(blueprint)
    outer.register_blueprint(inner)
    app.register_blueprint(outer)
    gk.init_app(app)
    return app


def test_a_limit_on_a_blueprint_is_for_each_of_its_routes_and_of_those_nested_in_it() -> None:
    client = nested(Gatekeeper(), "2/minute", None).test_client()
    for path in ("/o/x", "/o/y", "/o/i/x"):
        assert statuses(client, path, 3) == [200, 200, 429]
        assert statuses(client, path, 1, B) == [200]
    assert statuses(client, "/", 4) == [200] * 4
    assert ask(client, "/o/x", B).headers["RateLimit"] == '"outer";r=0;t=61'


def test_limits_of_nested_blueprints_hold_together() -> None:
    client = nested(Gatekeeper(), "3/minute", "2/minute").test_client()
    assert statuses(client, "/o/i/x", 3) == [200, 200, 429]
    assert statuses(client, "/o/x", 4) == [200, 200, 200, 429]
    inner_only = nested(Gatekeeper(), None, "1/minute").test_client()
    assert [statuses(inner_only, path, 2) for path in ("/o/i/x", "/o/x")] == [[200, 429], [200, 200]]


def test_limit_blueprint_says_the_same_and_a_blueprint_in_use_is_not_passed_over_silently() -> None:
    app, api = bare(), Blueprint("api", __name__, url_prefix="/api")
    api.add_url_rule("/x", "x", lambda: "x")
    gk = Gatekeeper(app)
    gk.limit_blueprint(api, "1/minute", name="api", methods=["GET"])
    app.register_blueprint(api)
    assert statuses(app.test_client(), "/api/x", 2) == [200, 429]
    with pytest.raises(AssertionError, match="can no longer be called"):
        gk.limit("5/minute")(api)
    with pytest.raises(TypeError, match="expected a Blueprint"):
        gk.limit_blueprint(app, "5/minute")  # type: ignore[arg-type]


def test_an_exempt_view_is_under_its_own_limit_alone() -> None:
    app, api = bare(), Blueprint("api", __name__, url_prefix="/api")
    gk = Gatekeeper(settings={"limits": [{"name": "all", "rate": "1/minute"}]})
    gk.limit("1/minute")(api)
    api.add_url_rule("/health", "health", gk.exempt(lambda: "ok"))
    api.add_url_rule("/own", "own", gk.exempt(gk.limit("2/minute")(lambda: "ok")))
    api.add_url_rule("/healthy", "healthy", lambda: "no")
    app.register_blueprint(api)
    gk.init_app(app)
    client = app.test_client()
    assert statuses(client, "/api/health", 4) == [200] * 4
    assert "RateLimit" not in ask(client, "/api/health").headers
    assert statuses(client, "/api/own", 3) == [200, 200, 429]
    assert statuses(client, "/api/healthy", 2) == [200, 429]  # its path begins as that of an exempt view
    assert statuses(client, "/api/health", 2, B, "POST") == [405, 429]


def test_an_exempt_blueprint_is_with_those_nested_in_it() -> None:
    gk = Gatekeeper(settings={"limits": [{"name": "all", "rate": "1/minute"}]})
    app = bare()
    outer, inner = Blueprint("outer", __name__, url_prefix="/o"), Blueprint("inner", __name__, url_prefix="/<lang>")
    inner.add_url_rule("/x", "x", lambda lang: "x")
    outer.register_blueprint(inner)
    app.register_blueprint(gk.exempt(outer))
    gk.init_app(app)
    client = app.test_client()
    assert statuses(client, "/o/en/x", 4) == [200] * 4
    assert statuses(client, "/o/en/z", 2) == [404, 429]


def test_a_class_based_view_is_exempt_by_its_decorators() -> None:
    gk = Gatekeeper(settings={"limits": [{"name": "all", "rate": "1/minute"}]})

    class Health(MethodView):
        decorators: ClassVar = [gk.exempt]

        def get(self) -> str:
            return "ok"

    app = bare()
    app.add_url_rule("/health", view_func=Health.as_view("health"))
    gk.init_app(app)
    assert statuses(app.test_client(), "/health", 3) == [200] * 3
    for target in (Health, Health().get, "health"):
        with pytest.raises(TypeError, match="exempt: expected a view"):
            gk.exempt(target)  # type: ignore[type-var]


@pytest.fixture
def static(tmp_path: Path) -> Flask:
    for folder in ("static", "files"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.css").write_text("a", encoding="utf-8")
    app = bare(root_path=str(tmp_path))
    app.add_url_rule("/static/login", "login", lambda: "login")
    app.add_url_rule("/named", "static_", lambda: "named")
    blueprint = Blueprint("b", __name__, root_path=str(tmp_path), static_folder="files", url_prefix="/b")
    app.register_blueprint(blueprint)
    return app


def test_static_files_are_under_no_rule_that_is_for_all_requests(static: Flask) -> None:
    Gatekeeper(static, {"limits": [{"name": "all", "rate": "1/minute"}]})
    client = static.test_client()
    for path in ("/static/a.css", "/b/files/a.css"):
        assert statuses(client, path, 3) == [200] * 3
    assert statuses(client, "/static/login", 2) == [200, 429]
    assert statuses(client, "/static/a.css", 2, B, "POST") == [405, 429]


@pytest.mark.parametrize("url", ["", "/"])
def test_static_files_at_the_root_are_exempt_and_paths_that_name_no_file_are_not(tmp_path: Path, url: str) -> None:
    (tmp_path / "a.css").write_text("a")
    app = Flask("root", static_folder=str(tmp_path), static_url_path=url)
    app.add_url_rule("/item/<number>", "item", lambda number: number)
    Gatekeeper(app, DEFAULT)
    client = app.test_client()
    assert statuses(client, "/a.css", 4) == [200] * 4
    assert statuses(client, "/item/1", 3) == [200, 200, 429]
    assert statuses(client, "/a.css", 1) == [200]
    for path in ("/guess", "/%00", "/..%2f..%2fetc%2fpasswd", "/sub/../../x"):
        assert statuses(client, path, 1) == [429]
    assert statuses(client, "/guess", 3, B) == [404, 404, 429]


def test_a_rule_that_names_static_files_is_for_them(static: Flask) -> None:
    limits = [{"name": "all", "rate": "1/minute"}, {"name": "files", "rate": "2/minute", "match": "/static/*"}]
    gk = Gatekeeper(static, {"limits": limits, "access": {"allow": B["REMOTE_ADDR"]}})
    client = static.test_client()
    with virtual(gk) as clock:
        assert_limited(client, "/static/a.css", after=2, clock=clock, environ_overrides=A)
    assert ask(client, "/static/a.css").headers["RateLimit-Policy"] == '"files";q=2;w=60'
    assert statuses(client, "/static/a.css", 2) == [200, 429]
    assert statuses(client, "/static/a.css", 3, B) == [200] * 3
    with disabled(gk):
        assert_not_limited(client, "/static/a.css", times=5, environ_overrides=A)


def test_static_files_can_be_limited_as_all_else(static: Flask) -> None:
    static.config["GATEKEEPER_EXEMPT_STATIC"] = False
    Gatekeeper(static, DEFAULT)
    assert statuses(static.test_client(), "/static/a.css", 3) == [200, 200, 429]


@pytest.mark.parametrize("early", [True, False])
def test_a_default_limit_is_for_each_route_that_has_none_of_its_own(early: bool) -> None:
    app = bare()
    gk = Gatekeeper()
    if early:
        gk.default_limit("2/minute")
    gk.init_app(app)
    if not early:
        gk.default_limit("2/minute")
    gk.default_limit("100/day")
    app.add_url_rule("/own", "own", gk.limit("3/minute")(lambda: "own"))
    app.add_url_rule("/free", "free", gk.exempt(lambda: "free"))
    client = app.test_client()
    assert statuses(client, "/", 3) == [200, 200, 429]
    assert statuses(client, "/item/1", 3) == [200, 200, 429]
    assert statuses(client, "/", 1, B) == [200]
    assert statuses(client, "/own", 4) == [200, 200, 200, 429]
    assert statuses(client, "/free", 4) == [200] * 4
    assert statuses(client, "/no/such", 4) == [404] * 4
    assert ask(client, "/", B).headers["RateLimit-Policy"] == '"default";q=2;w=60, "default-2";q=100;w=86400'


# Asynchronous views


def test_asynchronous_views_and_methods_are_limited() -> None:
    app = bare()
    gk = Gatekeeper(app)

    @app.get("/x/<int:number>")
    @gk.limit("2/minute")
    async def x(number: int) -> str:
        return f"x {number} {gk.ticket.address}"

    class Views(MethodView):
        @gk.limit("1/minute")
        async def get(self) -> str:
            return "got"

    class Decorated(MethodView):
        decorators: ClassVar = [gk.limit("1/minute")]

        async def get(self) -> str:
            return "got"

    app.add_url_rule("/views", view_func=Views.as_view("views"))
    app.add_url_rule("/decorated", view_func=Decorated.as_view("decorated"))
    app.add_url_rule("/free", "free", gk.exempt(x))
    client = app.test_client()
    assert ask(client, "/x/1").data == b"x 1 192.0.2.1"
    assert statuses(client, "/x/2", 2) == [200, 429]
    assert statuses(client, "/x/2", 1, B) == [200]
    assert [statuses(client, path, 2) for path in ("/views", "/decorated")] == [[200, 429]] * 2


# The end of a request


def leased(gk: Gatekeeper) -> int:
    """How many could still begin."""
    (rule,) = gk.keeper.gate.rules
    (verdict,) = gk.keeper.store.ask(Batch([(rule.limits[0], "192.0.2.1", 1)], spend=False))
    return verdict.remaining + verdict.allowed  # type: ignore[union-attr]


def streaming(gk: Gatekeeper) -> Flask:
    app = bare()

    @app.get("/stream")
    def stream() -> Response:
        fails = "fail" in request.args

        def rows() -> Iterator[str]:
            yield "row"
            if fails:
                raise LookupError("the rows have gone")
            yield "!"

        return Response(rows())

    gk.init_app(app)
    return app


CONCURRENT = {"limits": [{"name": "slow", "concurrency": 2, "match": "/stream"}]}


def test_a_lease_lasts_until_the_stream_ends_is_left_or_breaks() -> None:
    gk = Gatekeeper(settings=CONCURRENT)
    client = streaming(gk).test_client()
    assert leased(gk) == 2
    first, second = (client.get("/stream", environ_overrides=A) for _ in range(2))
    assert (first.headers["RateLimit"], leased(gk)) == ('"slow";r=1;t=1', 0)
    assert ask(client, "/stream").status_code == 429
    assert (second.data, leased(gk)) == (b"row!", 1)
    first.close()
    assert leased(gk) == 2
    second.close()
    assert leased(gk) == 2
    broken = client.get("/stream?fail=1", environ_overrides=A)
    with pytest.raises(LookupError):
        _ = broken.data
    broken.close()
    assert leased(gk) == 2


def test_a_lease_of_a_view_lasts_as_long_as_its_stream() -> None:
    app = bare()
    gk = Gatekeeper(app)

    @app.get("/stream")
    @gk.limit(concurrency=1)
    def stream() -> Response:
        return Response(iter(["a", "b"]))

    client = app.test_client()
    held = client.get("/stream", environ_overrides=A)
    assert statuses(client, "/stream", 1) == [429]
    assert statuses(client, "/stream", 1, B) == [200]
    held.close()
    assert statuses(client, "/stream", 2) == [200, 200]


def test_outcomes_that_do_not_count_are_given_back_and_errors_are_outcomes() -> None:
    app = bare()
    app.testing = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.logger.disabled = True
    gk = Gatekeeper(
        app, {"limits": [{"name": "a", "rate": "2/minute", "match": "/in", "give_back": ["2xx", "5xx"]}]}
    )

    @app.get("/in")
    @gk.limit("2/minute", give_back=["2xx", "500"], name="view")
    def enter() -> tuple[str, int]:
        if "raise" in request.args:
            raise LookupError
        return "entered", int(request.args.get("status", "200"))

    client = app.test_client()
    assert statuses(client, "/in", 5) == [200] * 5
    assert statuses(client, "/in?raise=1", 5) == [500] * 5
    app.config["PROPAGATE_EXCEPTIONS"] = True
    for _ in range(5):
        with pytest.raises(LookupError):
            ask(client, "/in?raise=1")
    assert statuses(client, "/in?status=401", 3) == [401, 401, 429]


def test_a_failing_teardown_ends_the_request_too() -> None:
    gk = Gatekeeper(settings=CONCURRENT)
    app = streaming(gk)

    @app.teardown_request
    def fail(error: BaseException | None) -> None:
        raise OSError("the connection has gone")

    for _ in range(3):
        with pytest.raises(OSError, match="has gone"):
            ask(app.test_client(), "/stream?fail=0")
    assert leased(gk) == 2


def test_what_a_request_has_cost_is_told_by_the_application() -> None:
    app = bare()
    gk = Gatekeeper(app, {"limits": [{"name": "rows", "rate": "10/minute", "cost": 5, "settle": "app"}]})

    @app.get("/rows/<int:count>")
    def rows(count: int) -> str:
        gk.ticket.settle(count)
        return "rows"

    client = app.test_client()
    assert [ask(client, f"/rows/{count}").headers["RateLimit"] for count in (1, 2, 7)] == [
        '"rows";r=5;t=61', '"rows";r=4;t=61', '"rows";r=2;t=61',
    ]  # fmt: skip
    assert ask(client, "/rows/1").status_code == 429


def test_within_a_stream_a_limit_counts_by_the_client(gatekeeper_fresh: VirtualClock) -> None:
    app = bare()
    gk = Gatekeeper(app)

    @gk.limit("3/minute")
    def row() -> str:
        return "row "

    @app.get("/stream")
    def stream() -> Response:
        def rows() -> Iterator[str]:
            try:
                while True:
                    yield row()
            except TooManyRequests as error:
                yield f"wait {error.retry_after}"

        return Response(stream_with_context(rows()))

    client = app.test_client()
    assert ask(client, "/stream").data == b"row row row wait 61"
    assert ask(client, "/stream").data == b"wait 61"
    assert ask(client, "/stream", B).data == b"row row row wait 61"


def test_requests_leave_nothing_for_the_garbage_collector() -> None:
    app = bare()
    gk = Gatekeeper(
        app, {"limits": [{"name": "a", "rate": "3/minute"}, {"name": "b", "rate": "9/minute", "give_back": "4xx"}]}
    )
    app.add_url_rule("/x", "x", gk.limit("2/minute")(lambda: "x"))
    client = Client(app, Answer)
    statuses(client, "/x", 1)

    def tickets() -> int:
        return sum(issubclass(type(one), FlaskTicket) for one in gc.get_objects())  # a lazy one wakes of isinstance

    gc.collect()
    gc.disable()
    try:
        before = tickets()
        assert statuses(client, "/x", 4) == [200, 429, 429, 429]  # by the view, then by the rule
        assert statuses(client, "/", 4, B) == [200, 200, 200, 429]
        assert tickets() == before
    finally:
        gc.enable()


def test_threads_share_one_count() -> None:
    app = bare()
    Gatekeeper(app, {"limits": [{"name": "a", "rate": "20/minute"}]})
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.extend(statuses(app.test_client(), "/", 10))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found.count(200), found.count(429)) == (20, 20)


# Among other middleware


def test_without_its_middleware_a_decorator_still_enforces() -> None:
    app = bare()
    gk = Gatekeeper(app)
    app.add_url_rule("/x", "x", gk.limit("2/minute", give_back="5xx")(lambda: "x"))
    app.wsgi_app = MethodType(Flask.wsgi_app, app)  # type: ignore[method-assign]
    client = app.test_client()
    assert statuses(client, "/x", 3) == [200, 200, 429]
    assert statuses(client, "/x", 1, B) == [200]
    with app.test_request_context("/x", environ_base=B):
        assert app.dispatch_request() == "x"
        with pytest.raises(TooManyRequests):
            app.dispatch_request()
    with app.test_request_context("/"), pytest.raises(RuntimeError, match="did not come through"):
        _ = gk.ticket


def test_the_same_policy_around_the_application_is_charged_once() -> None:
    keeper = Keeper({"limits": [{"name": "a", "rate": "2/minute"}]})
    app = bare()
    gk = Gatekeeper(app, keeper)
    app.add_url_rule("/x", "x", gk.limit("9/minute")(lambda: "x"))
    app.wsgi_app = GatekeeperMiddleware(app.wsgi_app, keeper)  # type: ignore[method-assign]
    client = app.test_client()
    assert ask(client, "/x").headers["RateLimit-Policy"] == '"a";q=2;w=60, "x";q=9;w=60'.replace('"x"', '"lambda"')
    assert statuses(client, "/x", 2) == [200, 429]


def test_another_policy_around_the_application_is_asked_first_and_tells_its_own() -> None:
    app = bare()
    Gatekeeper(app, {"limits": [{"name": "inner", "rate": "2/minute"}]})
    outer = GatekeeperMiddleware(app, {"limits": [{"name": "outer", "rate": "4/minute", "give_back": "429"}]})
    client = Client(outer, Answer)
    answer = ask(client)
    assert answer.headers.getlist("RateLimit") == ['"inner";r=1;t=61', '"outer";r=3;t=61']
    assert statuses(client, "/", 6) == [200, *[429] * 5]


def test_a_limit_of_the_core_within_flask_is_a_429_of_the_client_too() -> None:
    keeper = Keeper({})
    app = bare()
    Gatekeeper(app, keeper)
    app.testing = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.logger.disabled = True
    app.add_url_rule("/x", "x", keeper.limit("2/minute")(lambda: "x"))
    client = app.test_client()
    assert statuses(client, "/x", 3) == [200, 200, 429]
    assert statuses(client, "/x", 1, B) == [200]
    app.config["PROPAGATE_EXCEPTIONS"] = True
    assert ask(client, "/x").headers["Retry-After"] == "61"


def test_a_middleware_within_that_begins_late_changes_nothing() -> None:
    app = bare()
    app.wsgi_app = _late(app.wsgi_app)  # type: ignore[method-assign]
    Gatekeeper(
        app,
        {"identity": {"user": lambda: request.path}, "limits": [{"name": "a", "rate": "1/minute", "key": "user"}]},
    )
    client = app.test_client()
    assert [statuses(client, path, 2) for path in ("/", "/item/1")] == [[200, 429]] * 2


def _late(wsgi_app: Any) -> Any:
    def late(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield from wsgi_app(environ, start_response)

    return late


def test_a_request_within_a_request_is_one_of_its_own() -> None:
    app = bare()
    Gatekeeper(app, {"limits": [{"name": "a", "rate": "3/minute"}]})

    @app.get("/twice")
    def twice() -> str:
        return str(ask(current_app.test_client(), "/").status_code)

    client = app.test_client()
    assert [(answer.status_code, answer.data) for answer in (ask(client, "/twice") for _ in range(2))] == [
        (200, b"200"),
        (200, b"429"),
    ]


def test_functions_after_this_request_run_on_refusals() -> None:
    app = bare()
    limited = limited_item(Gatekeeper(app))

    @app.get("/x")
    def x() -> str:
        @after_this_request
        def mark(response: Response) -> Response:
            response.headers["X-Mark"] = "1"
            return response

        return limited()

    client = app.test_client()
    assert [ask(client, "/x").headers.get("X-Mark") for _ in range(3)] == ["1", "1", "1"]


# Tests of applications


def test_the_test_kit_reaches_the_application_by_any_name() -> None:
    app = bare()
    gk = Gatekeeper(app, {"store": {"url": "memory://"}, **DEFAULT})
    client = app.test_client()
    for targets in ((), (gk,), (app.wsgi_app,)):
        with virtual(*targets) as clock:
            assert_limited(client, "/", after=2, clock=clock)
            assert_limited(client, "/", after=2, environ_overrides=B)
        with disabled(*targets):
            assert_not_limited(client, "/", times=5)


def test_a_fresh_clock_lets_a_client_in_again(gatekeeper_fresh: VirtualClock) -> None:
    app = bare()
    Gatekeeper(app, DEFAULT)
    client = app.test_client()
    assert statuses(client, "/", 3) == [200, 200, 429]
    gatekeeper_fresh.advance(61)
    assert statuses(client, "/", 1) == [200]


@pytest.mark.parametrize("is_read", [False, True])
def test_a_body_that_the_server_forgets_holds_nothing(is_read: bool) -> None:
    app = bare()
    gk = Gatekeeper(app)
    app.add_url_rule("/slow", "slow", gk.limit(concurrency=1)(lambda: Response(iter(["a", "b"]))))
    builder = EnvironBuilder(path="/slow")
    for _ in range(3):
        told: list[str] = []
        body: Any = app.wsgi_app(builder.get_environ(), lambda status, *_, told=told: told.append(status))
        assert told == ["200 OK"]
        if is_read:
            assert next(iter(body)) == b"a"
        del body
        gc.collect()


# What is wrong with what the extension is told


@pytest.mark.parametrize("workers", ["four", "4", 0, -1, True, 1.5])
def test_a_number_of_workers_that_is_none_is_told_when_the_application_is_made(workers: object) -> None:
    app = bare()
    app.config["GATEKEEPER_WORKERS"] = workers
    with pytest.raises(SettingsError, match=r"^GATEKEEPER_WORKERS: expected a whole number from 1 upwards$"):
        Gatekeeper(app, DEFAULT)
    assert "gatekeeper" not in app.extensions


def test_a_number_of_workers_that_is_none_is_told_beside_one_that_was_given() -> None:
    app = bare()
    app.config["GATEKEEPER_WORKERS"] = "four"
    with pytest.raises(SettingsError, match="GATEKEEPER_WORKERS"):
        Gatekeeper(app, DEFAULT, workers=4)


@pytest.mark.parametrize("workers", [1, 4, None])
def test_a_number_of_workers_may_be_told_by_the_config(workers: int | None) -> None:
    app = bare()
    app.config["GATEKEEPER_WORKERS"] = workers
    Gatekeeper(app, DEFAULT)
    assert first_rate(app) == '"default";q=2;w=60'


def test_a_function_of_two_parameters_is_told_when_it_is_given() -> None:
    """One of none is called as Flask's users write them; one that is named is called with the ticket."""
    for function in (lambda ticket, more: "x", "os:getcwd"):
        with pytest.raises(SettingsError, match=r"^key: expected a function of the request, that is of one"):
            Gatekeeper().limit("5/minute", key=function)
        with pytest.raises(SettingsError, match=r"^identity\.user: expected a function of the request"):
            Gatekeeper(bare(), {"identity": {"user": function}})
