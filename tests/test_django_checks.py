"""System checks, and the command `manage.py gatekeeper`."""

# Django has no hints of its own
# mypy: disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from tests.django_home import MIDDLEWARE, SESSIONS  # first: Django wants its settings

# isort: split
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core import checks
from django.core.management import CommandError, call_command
from django.http import HttpRequest, HttpResponse
from django.test import override_settings
from django.urls import include, path, re_path
from django.utils.decorators import method_decorator
from django.views import View

import gatekeeper_django
from gatekeeper.errors import MissingExtra
from gatekeeper_django import limit
from gatekeeper_django.checks import check_deployment, check_settings
from gatekeeper_django.management.commands.gatekeeper import Command
from tests.scenarios import A, B
from tests.test_django import hello, nobody, site, statuses

IP = {"name": "ip", "rate": "9/minute"}


@pytest.fixture(autouse=True)
def no_workers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


def ids(found: list[Any]) -> list[str]:
    return [one.id.removeprefix("gatekeeper.") for one in found]


def test_nothing_is_wrong_with_a_sound_site() -> None:
    with site(path("", hello), policy={"limits": [IP]}):
        assert check_settings() == []


def test_django_carries_the_checks_out() -> None:
    with site(path("", hello), policy={"limits": [{"name": "a", "rate": "x"}]}):
        found = checks.run_checks(tags=[checks.Tags.security])
        assert "gatekeeper.E001" in [one.id for one in found]
    with site(path("", hello), policy={"enabled": False}):
        found = checks.run_checks(tags=[checks.Tags.security], include_deployment_checks=True)
        assert "gatekeeper.W008" in [one.id for one in found]


def test_each_error_of_the_settings_is_an_error_of_its_own_and_shows_no_value() -> None:
    with site(policy={"store": {"url": "redis:/secret"}, "limits": [{"name": "a", "rat": "1/minute"}]}):
        found = check_settings()
    assert ids(found) == ["E001"] * len(found)
    assert len(found) == 3
    assert all(one.level == checks.ERROR and one.msg.startswith("GATEKEEPER: ") for one in found)
    assert "secret" not in str(found)


def test_a_package_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> None:
        raise MissingExtra("The shared store", "shared")

    monkeypatch.setattr("gatekeeper_django.checks.keeper", lacking)
    with site():
        (found,) = check_settings()
    assert found.id == "gatekeeper.E002"
    assert "pip install 'gatekeeper-http[shared]'" in found.msg


def test_a_file_of_networks_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with site(policy={"access": {"deny": f"file:{tmp_path}/none"}}, middleware=()):
        (found,) = check_settings()
    assert found.id == "gatekeeper.E001"
    assert found.msg.startswith("GATEKEEPER: access.deny: ")


def test_a_view_that_cannot_await_what_its_limit_needs_is_an_error() -> None:
    async def ahello(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    awaited = limit("1/minute", key=nobody)
    with site(path("s", awaited(hello)), path("a", awaited(ahello))):
        (found,) = check_settings()
    assert (found.id, "/s " in found.msg) == ("gatekeeper.E003", True)


@pytest.mark.parametrize(
    ("middleware", "expected"),
    [
        ((), ["W002"]),
        ((MIDDLEWARE,), []),
        ((MIDDLEWARE, MIDDLEWARE), ["W003"]),
        (("corsheaders.middleware.CorsMiddleware", MIDDLEWARE), []),
        ((MIDDLEWARE, "corsheaders.middleware.CorsMiddleware"), ["W003"]),
        (("django.middleware.cache.UpdateCacheMiddleware", MIDDLEWARE), ["W003"]),
        ((MIDDLEWARE, "django.middleware.cache.UpdateCacheMiddleware"), []),
        (("tests.test_django_checks.Own",), []),
    ],
)
def test_the_order_of_middleware_is_looked_at(middleware: tuple[str, ...], expected: list[str]) -> None:
    with site(path("", hello), policy={"limits": [IP]}, middleware=middleware):
        assert ids(check_settings()) == expected


class Own(gatekeeper_django.GatekeeperMiddleware):
    """An application's own middleware, which is ours as well."""


@pytest.mark.parametrize(
    ("middleware", "identity", "expected"),
    [
        ((MIDDLEWARE, *SESSIONS), {}, []),
        ((MIDDLEWARE,), {}, ["W004"]),
        ((MIDDLEWARE,), {"user": lambda ticket: "ada"}, []),
    ],
)
def test_rules_by_the_user_need_somebody_who_says_who_it_is(
    middleware: tuple[str, ...], identity: dict[str, Any], expected: list[str]
) -> None:
    policy = {"identity": identity, "limits": [{**IP, "key": "user"}]}
    with site(path("", hello), policy=policy, middleware=middleware):
        assert ids(check_settings()) == expected


def test_memory_with_several_workers_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with site(path("", hello), policy={"limits": [IP]}):
        monkeypatch.setenv("WEB_CONCURRENCY", "3")
        (found,) = check_settings()
        assert (found.id, "3 workers" in found.msg) == ("gatekeeper.W001", True)
        assert check_deployment() == []
        monkeypatch.setenv("WEB_CONCURRENCY", "1")
        assert (check_settings(), check_deployment()) == ([], [])
        monkeypatch.delenv("WEB_CONCURRENCY")
        assert ids(check_deployment()) == ["W001"], "how many there are is not known"


def test_the_number_of_workers_divides_what_each_counts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    with site(policy={"limits": [IP]}):
        (limit_,) = gatekeeper_django.keeper().gate.rules[0].limits
        assert limit_.standin is not None
        assert limit_.standin.algorithm.limit == 3


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"identity": {"trusted_proxies": ["0.0.0.0/0"]}}, ["W005"]),
        ({"identity": {"header": "X-Real-IP"}}, ["W005"]),
        ({"identity": {"trusted_proxies": ["10.0.0.0/8"], "header": "X-Real-IP"}}, []),
        ({"limits": [{**IP, "key": "header:X-Api-Key"}]}, ["W007"]),
        ({"limits": [{**IP, "key": ["api_key", "route"]}]}, ["W007"]),
        ({"limits": [{**IP, "key": ["api_key", "ip"]}]}, []),
        ({"limits": [{**IP, "key": "form:email", "match": "POST /login"}, {**IP, "name": "b", "match": "POST /login"}]}, []),
        ({"limits": [{**IP, "key": "form:email", "match": "POST /login"}, {**IP, "name": "b"}]}, []),
        ({"limits": [{**IP, "key": "form:email", "match": "POST /login"}, {**IP, "name": "b", "match": "/x"}]}, ["W007"]),
    ],
)  # fmt: skip
def test_what_clients_may_choose_is_warned_of(policy: dict[str, Any], expected: list[str]) -> None:
    with site(path("", hello), policy=policy):
        assert ids(check_settings()) == expected


def test_passwords_that_are_free_while_the_store_is_down_are_warned_of(tmp_path: Any) -> None:
    pytest.importorskip("redis")
    policy = {"store": {"url": "redis://127.0.0.1:1"}, "limits": [IP]}
    login = limit("5/minute", on_error="allow", methods="POST")(hello)
    with site(
        path("accounts/login/", login), path("other", limit("5/minute", on_error="allow")(hello)), policy=policy
    ):
        (found,) = check_settings()
    assert found.id == "gatekeeper.W006"
    assert "/accounts/login/" in found.msg


def test_a_cookie_that_anybody_can_read_on_its_way_is_warned_of_under_deploy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "1")
    policy = {"limits": [{**IP, "key": ["cookie:sessionid", "ip"]}]}
    with site(path("", hello), policy=policy):
        assert (ids(check_settings()), ids(check_deployment())) == ([], ["W009"])
    with site(path("", hello), policy=policy, SESSION_COOKIE_SECURE=True):
        assert check_deployment() == []


def test_an_urlconf_that_cannot_be_read_is_for_djangos_own_checks_to_tell() -> None:
    with site(policy={"limits": [IP]}), override_settings(ROOT_URLCONF="no.such.module"):
        assert check_settings() == []


# The command


class Page(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    @method_decorator(limit("1/minute", key="user"))
    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()


@method_decorator(limit("1/minute"), name="dispatch")
class Dispatched(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()


PATTERNS = [
    path("", hello, name="home"),
    path("shop/", include(([path("item/<int:pk>/", limit("5/minute")(hello), name="item")], "shop"))),
    re_path(r"^old/(?P<slug>[a-z]+)/$", hello),
    path("page", Page.as_view()),
    path("whole", Dispatched.as_view()),
    path("login", limit("3/minute", name="login", methods="POST")(hello)),
    path("files/<path:rest>", hello),
]
POLICY = {"limits": [{"name": "shop", "rate": "9/minute", "match": "/shop/*"},
                     {"name": "old", "rate": "9/minute", "match": "GET /old/{slug}/", "penalty": {"strikes": 1}}]}  # fmt: skip


def told(*arguments: str) -> tuple[list[str], list[str]]:
    out, err = StringIO(), StringIO()
    call_command("gatekeeper", *arguments, stdout=out, stderr=err)
    return out.getvalue().splitlines(), err.getvalue().splitlines()


def test_check_lists_every_route_with_what_limits_it() -> None:
    with site(*PATTERNS, policy=POLICY):
        out, err = told("check")
    assert out == [
        "* /: no limit",
        "* /shop/item/{pk}/: shop, @limit (5/minute)",
        "* /old/{slug}/: old",
        "GET|POST /page: @limit (1/minute)",
        "GET /whole: @limit (1/minute)",
        "* /login: login (3/minute on POST)",
        "* /files/{rest:path}: no limit",
    ]
    assert err == ["warning: 2 of 7 routes have no limit"]


def test_check_warns_of_what_is_unsafe_and_fails_if_it_is_to() -> None:
    with site(path("", hello), policy={"limits": [IP], "identity": {"trusted_proxies": ["0.0.0.0/0"]}}):
        _, err = told("check", "--workers", "4")
        assert len(err) == 2
        assert "4 workers" in err[0]
        with pytest.raises(CommandError):
            told("check", "--strict")
    with site(path("", hello), policy={"limits": [IP]}):
        assert told("check", "--strict") == (["* /: ip"], [])


def test_limits_lists_the_rules_of_the_settings_and_of_views() -> None:
    with site(*PATTERNS, policy=POLICY):
        out, err = told("limits")
    assert out == [
        'shop: /shop/*: "shop";q=9;w=60',
        'old: GET /old/{slug}/: "old";q=9;w=60',
        'hello: /shop/item/{pk}/: "hello";q=5;w=60',
        'post: /page: "post";q=1;w=60',
        'Dispatched: /whole: "Dispatched";q=1;w=60',
        'login: /login: "login";q=3;w=60',
    ]
    assert err == []


def test_reset_makes_the_quota_of_one_key_whole_again() -> None:
    with site(*PATTERNS, policy={"limits": [{"name": "home", "rate": "1/minute", "match": "/"}]}):
        for name, url, method in (
            ("home", "/", "get"),
            ("login", "/login", "post"),
            ("post", "/page", "post"),
            ("Dispatched", "/whole", "get"),
        ):
            assert statuses(url, 9, A, method)[-1] == 429
            assert statuses(url, 9, B, method)[-1] == 429
            told("reset", name, A)
            assert statuses(url, 1, A, method) == [200], name
            assert statuses(url, 1, B, method) == [429], name
        with pytest.raises(CommandError, match="RULE: expected the name of a rule: home, hello"):
            told("reset", "nothing", A)


def test_bans_are_listed_and_lifted() -> None:
    with site(*PATTERNS, policy=POLICY):
        assert told("bans") == (["nobody is banned"], [])
        assert statuses("/old/a/", 10)[-1] == 429
        assert told("bans") == ([f"old: {A}: 60 s"], [])
        assert told("bans", "--lift", "old", A) == ([f"old: {A}: lifted"], [])
        assert told("bans") == (["nobody is banned"], [])
        with pytest.raises(CommandError, match="expected the name of a rule with a penalty: old"):
            told("bans", "--lift", "shop", A)


def test_the_command_line_cannot_reach_counters_in_the_memory_of_others() -> None:
    command = Command(stdout=StringIO())
    command._called_from_command_line = True
    with site(*PATTERNS, policy=POLICY), pytest.raises(CommandError, match="cannot reach them"):
        command.handle(command="bans", lift=None)


def test_the_checks_know_every_id_that_they_document() -> None:
    documented: set[str] = set()
    for module in (gatekeeper_django.checks, gatekeeper_django.session_checks):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        told = set(re.findall(r"^- gatekeeper\.([EW][0-9]{3})", text, re.MULTILINE))
        assert told == set(re.findall(r'"(?:gatekeeper\.)?([EW][0-9]{3})"', text))
        documented |= told
    page = Path(__file__).resolve().parent.parent / "docs" / "frameworks" / "django.md"
    assert documented == set(re.findall(r"gatekeeper\.([EW][0-9]{3})", page.read_text(encoding="utf-8")))
