"""`flask gatekeeper …`: what is covered, what is risky, counters, bans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Blueprint, Flask
from flask.views import MethodView

from gatekeeper.errors import StoreError
from gatekeeper.stores.memory import MemoryStore
from gatekeeper_flask import Gatekeeper
from gatekeeper_flask.routes import template

A, B = {"REMOTE_ADDR": "192.0.2.1"}, {"REMOTE_ADDR": "198.51.100.2"}


def shop(**settings: Any) -> tuple[Flask, Gatekeeper]:
    app = Flask("shop", static_folder=None)
    app.config["GATEKEEPER"] = settings
    gk = Gatekeeper(app)

    class Items(MethodView):
        @gk.limit("3/minute")
        def get(self, number: int) -> str:
            return "item"

    api = Blueprint("api", __name__, url_prefix="/api")
    gk.limit("10/minute")(api)
    api.add_url_rule("/items/<int:number>", view_func=Items.as_view("items"))
    api.add_url_rule("/health", "health", gk.exempt(lambda: "ok"))
    app.register_blueprint(api)

    @app.post("/login")
    @gk.limit("5/minute")
    def login() -> str:
        return "in"

    app.add_url_rule("/", "index", lambda: "index")
    return app, gk


def run(app: Flask, *arguments: str) -> Result:
    return app.test_cli_runner().invoke(args=["gatekeeper", *arguments])


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("/a/<name>", "/a/{name}"),
        ("/a/<int:n>/<path:rest>", "/a/{n}/{rest:path}"),
        ("/<any(a, 'b,c'):x>/<string(length=2):y>", "/{x}/{y}"),
        ("/plain", "/plain"),
    ],
)
def test_a_template_is_told_in_the_words_of_patterns(rule: str, told: str) -> None:
    assert template(rule) == told


def test_check_lists_each_route_with_what_limits_it_and_warns_of_the_uncovered() -> None:
    app, _ = shop(limits=[{"name": "api", "rate": "9/minute", "match": "/api/*"}])
    result = run(app, "check")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "GET /: no limit",
        "GET /api/health: no limit (exempt)",
        "GET /api/items/{number}: api, api, get",
        "POST /login: login",
    ]
    assert result.stderr == "warning: / (index): no rule covers it\n"
    assert run(app, "check", "--strict").exit_code == 1


def test_check_warns_of_what_is_risky_about_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "limits": [{"name": "all", "rate": "9/minute"}],
        "identity": {"trusted_proxies": "0.0.0.0/0"},
    }
    app, _ = shop(**settings)
    told = run(app, "check").stderr
    assert "trusts everybody" in told
    assert "workers" not in told
    assert "with 4 workers" in run(app, "check", "--workers", "4").stderr
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    assert "with 3 workers" in run(app, "check").stderr
    assert run(app, "check", "--workers", "0").exit_code == 2


def test_check_warns_of_a_limit_above_its_route() -> None:
    app = Flask("shop", static_folder=None)
    gk = Gatekeeper(app, {"limits": [{"name": "all", "rate": "9/minute"}]})

    @gk.limit("1/minute")
    @app.route("/wrong")
    def wrong() -> str:
        return "wrong"

    @app.route("/right")
    @gk.limit("1/minute")
    def right() -> str:
        return "right"

    label = f"{__name__}.{wrong.__qualname__}"
    line = f"warning: {label}: its limit stands above its route and limits nothing: put it below\n"
    assert run(app, "check").stderr == line
    client = app.test_client()
    assert [client.get(path).status_code for path in ("/wrong", "/wrong", "/right", "/right")] == [
        200,
        200,
        200,
        429,
    ]


def test_check_warns_of_a_login_that_is_open_while_the_store_does_not_answer(tmp_path: Path) -> None:
    app, _ = shop(store={"url": f"shared://{tmp_path}/counters", "on_error": "allow"})
    told = run(app, "check").stderr
    assert 'login (/login).on_error: "allow" lets all pass' in told


def test_static_files_are_told_as_such_with_the_rules_that_name_them() -> None:
    app = Flask("shop")
    limits = [{"name": "all", "rate": "9/minute"}, {"name": "files", "rate": "9/minute", "match": "/static/*"}]
    Gatekeeper(app, {"limits": limits})
    assert run(app, "check").stdout == "GET /static/{filename:path}: files (static)\n"


def test_limits_lists_the_rules_and_the_limits_of_views() -> None:
    app, gk = shop(limits=[{"name": "all", "rate": ["9/minute", "50/hour"]}])
    gk.default_limit("7/minute")
    assert run(app, "limits").stdout.splitlines() == [
        'all: all requests: "all-60s";q=9;w=60, "all-3600s";q=50;w=3600',
        'api: /api/items/{number} (api.items): "api";q=10;w=60',
        'get: /api/items/{number} (api.items): "get";q=3;w=60',
        'login: /login (login): "login";q=5;w=60',
        'default: / (index): "default";q=7;w=60',
    ]


def statuses(app: Flask, times: int, who: dict[str, str] = A, **more: Any) -> list[int]:
    client = app.test_client()
    return [client.get("/", environ_overrides=who, buffered=True, **more).status_code for _ in range(times)]


def test_reset_makes_a_quota_whole_again_for_one_client() -> None:
    app, _ = shop(limits=[{"name": "all", "rate": "2/minute"}])
    assert [statuses(app, 3), statuses(app, 3, B)] == [[200, 200, 429]] * 2
    result = run(app, "reset", "all", "192.0.2.1")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "counters in memory" in result.stderr
    assert [statuses(app, 1), statuses(app, 1, B)] == [[200], [429]]


@pytest.mark.parametrize(
    ("key", "values", "who", "headers"),
    [
        ("ip", ["2001:db8::77"], {"REMOTE_ADDR": "2001:db8::1"}, {}),
        ("header:X-Team", ["red"], A, {"X-Team": "red"}),
        ("header:X-Team", ["192.0.2.1"], A, {}),
        ("api_key", ["a-key"], A, {"X-API-Key": "a-key"}),
        (["ip", "header:X-Team"], ["192.0.2.1", "red"], A, {"X-Team": "red"}),
        (["ip", "header:X-Team"], ["192.0.2.1", "192.0.2.1"], A, {}),
    ],
)
def test_reset_finds_the_quota_by_the_parts_of_its_key(
    key: Any, values: list[str], who: dict[str, str], headers: dict[str, str]
) -> None:
    app, _ = shop(limits=[{"name": "all", "rate": "1/minute", "key": key}])
    assert statuses(app, 2, who, headers=headers) == [200, 429]
    assert run(app, "reset", "all", *values).exit_code == 0
    assert statuses(app, 1, who, headers=headers) == [200]


def test_reset_reaches_the_limits_of_views() -> None:
    app, _ = shop()
    client = app.test_client()

    def log_in() -> int:
        return client.post("/login", environ_overrides=A, buffered=True).status_code

    assert [log_in() for _ in range(6)] == [200] * 5 + [429]
    assert run(app, "reset", "login", "192.0.2.1").exit_code == 0
    assert log_in() == 200


def test_a_rule_that_is_not_there_and_a_key_of_other_parts_are_wrong() -> None:
    app, _ = shop(limits=[{"name": "all", "rate": "1/minute", "key": ["ip", "method"]}])
    unknown = run(app, "reset", "al", "192.0.2.1")
    assert unknown.exit_code == 2
    assert "RULE: expected the name of a rule: all, api, get, login" in unknown.stderr
    short = run(app, "reset", "all", "192.0.2.1")
    assert short.exit_code == 2
    assert "KEY: expected 2, one for each of: ip, method" in short.stderr


BANNING = {"name": "all", "rate": "1/minute", "penalty": {"strikes": 1, "ban": "1h"}}


def test_bans_are_listed_and_lifted() -> None:
    app, _ = shop(limits=[BANNING])
    assert statuses(app, 3) == [200, 429, 429]
    assert run(app, "bans").stdout in ("all 192.0.2.1 3600 s\n", "all 192.0.2.1 3599 s\n")
    assert run(app, "bans", "--lift", "all", "192.0.2.1").exit_code == 0
    assert run(app, "bans").stdout == ""
    wrong = run(app, "bans", "--lift", "other", "192.0.2.1")
    assert wrong.exit_code == 2
    assert "RULE: expected the name of a rule with a penalty: all" in wrong.stderr


class Silent(MemoryStore):
    def ask(self, batch: Any) -> Any:
        return [StoreError("the store does not answer")] * len(batch)

    def keys(self, limit: Any) -> list[str]:
        raise StoreError("the store does not answer")


@pytest.mark.parametrize("arguments", [["bans"], ["reset", "all", "192.0.2.1"]])
def test_a_store_that_does_not_answer_is_told_and_ends_with_1(arguments: list[str]) -> None:
    app = Flask("shop")
    Gatekeeper(app, {"limits": [BANNING]}, store=Silent())
    result = run(app, *arguments)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "the store does not answer")
