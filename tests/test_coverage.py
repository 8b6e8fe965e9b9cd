"""Which rules cover a route, and which settings are risky."""

from __future__ import annotations

from typing import Any

import pytest

from gatekeeper import Gatekeeper
from gatekeeper.coverage import Covered, RouteInfo, coverage, risks
from gatekeeper.settings import LimitSettings, load_settings


def route(path: str, *methods: str, guards: tuple[str, ...] = ()) -> RouteInfo:
    return RouteInfo(frozenset(methods) if methods else None, path, "view", guards)


def covering(match: str | None, *routes: RouteInfo, **more: Any) -> list[bool]:
    rule = {"name": "one", "rate": "5/minute", **more, **({} if match is None else {"match": match})}
    found = coverage(Gatekeeper({"limits": [rule]}), routes)
    assert [covered.route for covered in found] == list(routes)
    return ["one" in covered.rules for covered in found]


@pytest.mark.parametrize(
    ("match", "path", "covers"),
    [
        (None, "/users/{id}", True),
        ("/*", "/users/{id}", True),
        ("/users/*", "/users/{id}", True),
        ("/users/{name}", "/users/{id}", True),
        ("/users/{name}", "/users/{id}/", True),
        ("/users/{name}", "/users/{id:int}", True),
        ("/users/me", "/users/{id}", False),
        ("/users/{name}", "/users", False),
        ("/users/*", "/users", True),
        ("/users", "/users/", True),
        ("/files/{rest:path}", "/files/{p:path}", True),
        ("/files/{one}", "/files/{p:path}", False),
        ("/files/*", "/files/{p:path}", True),
        ("/static/*", "/static/*", True),
        ("/static/{name}", "/static/*", False),
        ("/{a}/x", "/{tenant}/x", True),
        ("/", "", True),
    ],
)
def test_a_rule_covers_a_route_if_it_applies_to_whatever_its_parts_stand_for(
    match: str | None, path: str, covers: bool
) -> None:
    assert covering(match, route(path, "GET")) == [covers]


def test_a_rule_for_a_method_covers_routes_that_have_it() -> None:
    routes = [route("/a", "POST"), route("/a", "GET", "HEAD", "OPTIONS"), route("/a", "GET", "POST"), route("/a")]
    assert covering("POST /a", *routes) == [True, False, True, True]
    assert covering("OPTIONS /a", *routes, route("/a", "OPTIONS")) == [False, False, False, True, True]


def test_a_rule_for_a_host_covers_its_paths() -> None:
    assert covering("api.example.com/a", route("/a", "GET"), route("/b", "GET")) == [True, False]
    assert covering("*.example.com/a", route("/a", "GET")) == [True]


def test_rules_that_limit_nothing_there_do_not_cover() -> None:
    assert covering("/a", route("/a"), shadow=True) == [False]
    assert covering("/a", route("/a"), per="message") == [False]
    rules = [
        {"name": "all", "rate": "5/minute"},
        {"name": "own", "rate": "9/minute", "match": "/a", "overrides": ["all"]},
    ]
    found = coverage(Gatekeeper({"limits": rules}), [route("/a", "GET"), route("/b", "GET")])
    assert [covered.rules for covered in found] == [("own",), ("all",)]


def test_guards_come_after_the_rules() -> None:
    keeper = Gatekeeper({"limits": [{"name": "all", "rate": "5/minute"}]})
    info = route("/a", "GET", guards=("view",))
    assert coverage(keeper, [info]) == [Covered(info, ("all", "view"))]
    assert coverage(Gatekeeper({}), [info]) == [Covered(info, ("view",))]


def risky(document: dict[str, Any], workers: int | None = None) -> list[str]:
    return [line.partition(":")[0] for line in risks(load_settings(document), workers=workers)]


@pytest.mark.parametrize("url", [None, "memory://"])
def test_memory_with_several_workers_is_a_risk(url: str | None) -> None:
    document = {} if url is None else {"store": {"url": url}}
    assert risky(document, 2) == ["store.url"]
    assert risky(document, 1) == risky(document) == []
    assert risky({"store": {"url": "redis://h"}}, 2) == []


@pytest.mark.parametrize(
    ("identity", "found"),
    [
        ({"trusted_proxies": "0.0.0.0/0"}, ["identity.trusted_proxies"]),
        ({"trusted_proxies": ["::/0", "10.0.0.0/8"]}, ["identity.trusted_proxies"]),
        ({"trusted_proxies": ["64.0.0.0/2"]}, ["identity.trusted_proxies"]),
        ({"trusted_proxies": ["10.0.0.0/8", "unix", "fd00::/8", "203.0.113.7"]}, []),
        ({"header": "Forwarded"}, ["identity.header"]),
        ({"header": "Forwarded", "trusted_proxies": "10.0.0.1"}, []),
        ({"user": "header:X-User"}, ["identity.user"]),
        ({"user": "header:X-User", "trusted_proxies": "unix"}, []),
        ({"user": str}, []),
        ({}, []),
    ],
)
def test_addresses_that_clients_may_choose_are_a_risk(identity: dict[str, Any], found: list[str]) -> None:
    assert risky({"identity": identity}) == found


@pytest.mark.parametrize(
    ("rule", "policy", "is_risk"),
    [
        ({"match": "POST /login"}, None, True),
        ({"match": "POST /login"}, "allow", True),
        ({"match": "POST /login"}, "deny", False),
        ({"match": "/oauth/token"}, "local", True),
        ({"match": "/users/{id}/password"}, "local", True),
        ({"name": "sign-in"}, "local", True),
        ({"match": "/otp"}, "local", True),
        ({"match": "/authors/{id}"}, "local", False),
        ({"match": "/footpaths"}, "local", False),
        ({"match": "/items"}, "local", False),
        ({"match": "/login", "shadow": True}, "allow", False),
    ],
)
def test_failing_open_where_passwords_are_tried_is_a_risk(
    rule: dict[str, Any], policy: str | None, is_risk: bool
) -> None:
    limit = {"name": "one", "rate": "5/minute", **rule, **({} if policy is None else {"on_error": policy})}
    document = {"store": {"url": "redis://h"}, "limits": [limit]}
    assert risky(document) == (["limits[0].on_error"] if is_risk else [])
    assert risky({"limits": [limit]}) == []  # memory always answers


def test_a_guard_that_fails_open_is_a_risk_and_nothing_shows_the_url() -> None:
    settings = load_settings({"store": {"url": "redis://:secret@h", "on_error": "deny"}})
    (line,) = risks(
        settings, workers=8, guards=[("/login", LimitSettings(name="a", rate=["1/second"], on_error="allow"))]
    )
    assert line.startswith("/login.on_error: ")
    assert "secret" not in line
    assert risks(settings, workers=8, guards=[("/login", LimitSettings(name="a", rate=["1/second"]))]) == []


def test_being_off_is_a_risk() -> None:
    assert risky({"enabled": False}) == ["enabled"]
