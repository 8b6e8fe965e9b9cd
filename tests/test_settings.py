"""Settings: what is wrong with them is told all at once, a line each, and never shows a value."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args, get_origin
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from gatekeeper import Gatekeeper
from gatekeeper.decorators import Guard
from gatekeeper.errors import GatekeeperError, SettingsError
from gatekeeper.settings import (
    GREATEST_FILE,
    LimitSettings,
    PoolSettings,
    Settings,
    TcpAddress,
    UnixAddress,
    json_schema,
    load_settings,
    nth,
    parse_address,
    warnings,
)

SECRET = "hunter2"
"""Stands in as many wrong values as can be, and must show in no error."""


def problems_of(source: Any) -> tuple[str, ...]:
    """What is wrong with settings, held to be one line a problem without the secret."""
    with pytest.raises(SettingsError) as caught:
        load_settings(source)
    error = caught.value
    assert str(error) == "\n".join(error.problems)
    assert SECRET not in str(error)
    assert SECRET not in repr(error)
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None  # a traceback would show the values
    assert all(problem and "\n" not in problem for problem in error.problems)
    return error.problems


def limit(**values: Any) -> dict[str, Any]:
    return {"limits": [{"name": "a", "rate": "5/minute", **values}]}


def pool(**values: Any) -> dict[str, Any]:
    return {"pools": {"api": {"upstreams": ["http://127.0.0.1:9001"], **values}}}


def ring(**values: Any) -> dict[str, Any]:
    return pool(policy="ring", **values)


def upstreams(*values: Any) -> dict[str, Any]:
    return pool(upstreams=list(values))


def routes(*values: Any) -> dict[str, Any]:
    return {**pool(), "routes": list(values)}


def listen(**values: Any) -> dict[str, Any]:
    return {"listen": values}


def the_pool(document: dict[str, Any]) -> PoolSettings:
    return load_settings(document).pools["api"]


class Policy:
    """A policy of one's own."""


def user_function(request: object) -> str:
    return "alice"


EVERYTHING: dict[str, Any] = {
    "store": {"url": "memory://", "max_keys": 1000, "on_error": "deny"},
    "identity": {
        "trusted_proxies": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1", "unix"],
        "header": "Forwarded",
        "ipv6_prefix": 56,
        "user": "header:X-User",
    },
    "response": {"fields": False},
    "limits": [
        {"name": "default", "rate": "300/minute"},
        {
            "name": "login",
            "match": "POST /login",
            "rate": ["5/minute", "20/hour"],
            "key": ["ip", "route", "header:X-Tenant"],
            "algorithm": "sliding_counter",
            "cost": 2,
            "on_error": "allow",
            "give_back": ["404", "5xx", "disconnect"],
            "preflights": True,
        },
        {"name": "bursty.1", "rate": "10/second", "burst": 50, "key": ["user", "cookie:sid"]},
    ],
    "listen": {
        "address": "[::1]:0",
        "forwarded": "forwarded",
        "head_timeout": "1s",
        "idle_timeout": "50ms",
        "body_timeout": "1d",
        "least_rate": "1KiB",
        "drain_timeout": "0s",
        "max_head": 65536,
        "max_fields": 50,
        "max_body": "10MB",
        "max_connections": 1,
        "max_connections_per_address": 0,
        "access_log": True,
    },
    "pools": {
        "api": {
            "policy": "round_robin",
            "upstreams": [
                "http://a:9001",
                {"url": "http+unix:///run/b.sock", "id": "b", "weight": 2, "max_in_flight": 100},
                {"url": "http://c"},
            ],
            "connect_timeout": "1s",
            "response_timeout": "1m",
            "read_timeout": "1h",
            "idle_timeout": "0ms",
            "health": {"failures": 1, "eject_for": "1m", "eject_at_most": "1m"},
        },
        "carts.1": {"policy": "ring", "key": "cookie:sid", "vnodes": 40, "upstreams": "http://d"},
    },
    "routes": [{"match": "/*", "pool": "api"}, {"match": "GET *.example.com/carts/{id}", "pool": "carts.1"}],
}
"""A document that sets everything."""

TOML = """\
[store]
url = "memory://"

[identity]
trusted_proxies = "10.0.0.0/8"

[[limits]]
name = "login"
match = "POST /login"
rate = ["5/minute", "20/hour"]
"""


# What is right


def test_nothing_need_be_set() -> None:
    settings = load_settings({})
    assert settings.limits == []
    assert settings.identity.trusted_proxies == []
    assert settings.identity.header == "X-Forwarded-For"
    assert settings.store.url is None


def test_everything_can_be_set() -> None:
    settings = load_settings(EVERYTHING)
    assert settings.store.max_keys == 1000
    assert settings.identity.trusted_proxies == ["10.0.0.0/8", "2001:db8::/32", "192.0.2.1", "unix"]
    assert settings.response.fields is False
    assert [rule.counted_by for rule in settings.limits] == ["sliding_window", "sliding_counter", "gcra"]
    assert (settings.listen.place, settings.listen.least_rate) == (TcpAddress("::1", 0), 1024)
    assert [upstream.id for upstream in settings.pools["api"].upstreams] == ["http://a:9001", "b", "http://c"]
    assert settings.pools["carts.1"].key == "cookie:sid"
    assert [route.pool for route in settings.routes] == ["api", "carts.1"]


def test_one_text_stands_for_a_list_of_one() -> None:
    (rule,) = load_settings(limit(key="user", give_back="5xx")).limits
    assert (rule.rate, rule.key, rule.give_back) == (["5/minute"], ["user"], ["5xx"])


def test_settings_are_their_own_source() -> None:
    settings = load_settings(EVERYTHING)
    assert load_settings(settings) is settings


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_the_same_as_its_mapping(tmp_path: Path, kind: type[str] | type[Path]) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(TOML, encoding="utf-8")
    assert load_settings(kind(path)) == load_settings(
        {
            "store": {"url": "memory://"},
            "identity": {"trusted_proxies": ["10.0.0.0/8"]},
            "limits": [{"name": "login", "match": "POST /login", "rate": ["5/minute", "20/hour"]}],
        }
    )


def test_the_user_may_be_a_function_or_the_name_of_one() -> None:
    assert load_settings({"identity": {"user": user_function}}).identity.user is user_function
    assert load_settings({"identity": {"user": "json:dumps"}}).identity.user is json.dumps
    assert load_settings({"identity": {"user": "pathlib:Path.as_posix"}}).identity.user is Path.as_posix


def test_settings_are_frozen() -> None:
    settings = load_settings(EVERYTHING)
    for model, field, value in [
        (settings, "limits", []),
        (settings.store, "max_keys", 1),
        (settings.identity, "user", None),
        (settings.response, "fields", True),
        (settings.limits[0], "cost", 5),
        (settings.listen, "max_head", 1),
        (settings.pools["api"], "key", "user"),
        (settings.pools["api"].upstreams[0], "weight", 2),
        (settings.pools["api"].health, "failures", 2),
        (settings.routes[0], "pool", "b"),
    ]:
        before = getattr(model, field)
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, field, value)
        assert getattr(model, field) == before


def test_the_defaults_of_the_schema_are_written_as_in_a_file() -> None:
    defaults = {
        name: field.get("default") for name, field in json_schema()["$defs"]["ListenSettings"]["properties"].items()
    }
    assert (defaults["head_timeout"], defaults["max_head"], defaults["least_rate"]) == ("10s", "32KiB", 256)


def test_loading_leaves_the_mapping_as_it_was() -> None:
    before = json.dumps(EVERYTHING)
    load_settings(EVERYTHING)
    assert json.dumps(EVERYTHING) == before


# Durations, sizes, addresses


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1ms", 10**6),
        ("50ms", 50 * 10**6),
        ("10s", 10 * 10**9),
        ("010s", 10 * 10**9),
        ("5m", 300 * 10**9),
        ("1h", 3600 * 10**9),
        ("1d", 86_400 * 10**9),
        ("365d", 365 * 86_400 * 10**9),
        ("31536000000ms", 365 * 86_400 * 10**9),
    ],
)
def test_a_duration_is_read_as_nanoseconds(text: str, nanoseconds: int) -> None:
    assert load_settings(listen(head_timeout=text)).listen.head_timeout == nanoseconds


@pytest.mark.parametrize(
    "value",
    [
        "", "s", "10", "10 s", " 10s", "10s\n", "1.5s", "+1s", "-1s", "1_0s", "10S", "10sec", "1us", "1w", "1h30m", "infs",
        "\N{ARABIC-INDIC DIGIT ONE}s", "\N{FULLWIDTH DIGIT ONE}s", "\N{SUPERSCRIPT TWO}s", "nans", "1e3s", "0s", "0d",
        "366d", "31536001s", "9" * 12 + "s", "9" * 100_000 + "s", "\ud800",
        0, 10, -1, 1.5, float("nan"), float("inf"), True, None, b"10s", ["10s"], {"s": 10},
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused(value: Any) -> None:
    (problem,) = problems_of(listen(head_timeout=value))
    assert problem.startswith('listen.head_timeout: expected a duration such as "50ms", "10s"')
    assert len(problem) < 150


@pytest.mark.parametrize("text", ["0s", "0ms", "0d"])
def test_nothing_is_a_duration_where_it_means_something(text: str) -> None:
    assert load_settings(listen(drain_timeout=text)).listen.drain_timeout == 0
    assert the_pool(pool(idle_timeout=text)).idle_timeout == 0


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (1 << 50, 1 << 50),
        ("1", 1),
        ("2KiB", 2048),
        ("3MiB", 3 << 20),
        ("4GiB", 4 << 30),
        ("2KB", 2000),
        ("3MB", 3_000_000),
        ("4GB", 4_000_000_000),
        ("1048576GiB", 1 << 50),
    ],
)
def test_a_size_is_read_as_bytes(value: Any, size: int) -> None:
    assert load_settings(listen(max_body=value)).listen.max_body == size


@pytest.mark.parametrize(
    "value",
    [
        "", "KiB", "1 KiB", "1kib", "1K", "1B", "1TiB", "1.5MiB", "-1", "+1", "1_000", "0x10", "1e3", "1KiB\n", "0", "0GiB",
        "\N{ARABIC-INDIC DIGIT ONE}KiB", "\N{SUPERSCRIPT TWO}", "1048577GiB", "9" * 100_000, "\ud800", "nan",
        0, -1, (1 << 50) + 1, pytest.param(10**5000, id="huge"), 1.0, float("nan"), float("inf"), True, False, None, b"1", [1],
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused(value: Any) -> None:
    (problem,) = problems_of(listen(max_body=value))
    assert problem.startswith("listen.max_body: expected a number of bytes, or a size such as ")
    assert len(problem) < 200


@pytest.mark.parametrize(
    ("text", "shown", "place"),
    [
        ("127.0.0.1:8080", "127.0.0.1:8080", TcpAddress("127.0.0.1", 8080)),
        ("0.0.0.0:0", "0.0.0.0:0", TcpAddress("0.0.0.0", 0)),
        ("localhost:65535", "localhost:65535", TcpAddress("localhost", 65535)),
        ("My-Host.Example.com:080", "my-host.example.com:80", TcpAddress("my-host.example.com", 80)),
        ("a_b:1", "a_b:1", TcpAddress("a_b", 1)),
        ("[::]:80", "[::]:80", TcpAddress("::", 80)),
        ("[2001:DB8:0::1]:80", "[2001:db8::1]:80", TcpAddress("2001:db8::1", 80)),
        ("unix:/run/gatekeeper.sock", "unix:/run/gatekeeper.sock", UnixAddress("/run/gatekeeper.sock")),
        ("unix:/" + "a" * 106, "unix:/" + "a" * 106, UnixAddress("/" + "a" * 106)),
        ("unix:/run/é", "unix:/run/é", UnixAddress("/run/é")),
    ],
)
def test_an_address_is_a_host_with_a_port_or_a_socket(text: str, shown: str, place: Any) -> None:
    found = load_settings(listen(address=text)).listen
    assert (found.address, found.place) == (shown, place)
    assert parse_address(text) == place


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":8080", "8080", "localhost", "localhost:", "localhost:65536", "localhost:-1", "localhost:+1",
        "localhost:1 ", " localhost:1", "localhost:1\n", "localhost:080808", "localhost:\N{ARABIC-INDIC DIGIT ONE}",
        "*:80", "::1:80", "[::1]", "[::1]80", "[::1%eth0]:80", "[127.0.0.1]:80", "[]:80", "[:::]:80",
        "127.1:80", "1:80", "0x7f.1:80", "256.0.0.1:80", "1.2.3.4.5:80", "127.0.0.01:80",
        "-a:80", "a-:80", "a..b:80", ".a:80", "a.:80", "é:80", "a/b:80", "u@h:80", "http://h:80", "a" * 64 + ":80",
        ".".join(["a" * 60] * 5) + ":80",
        "unix:", "unix:run", "unix:/", "unix:/a/", "unix:/a?b", "unix:/a#b", "unix:/a%20b", "unix:/a\0b", "unix:/a\nb",
        "unix:/" + "a" * 107, "unix:/" + "é" * 54, "unix:/\ud800", "UNIX:/a", "unix://run/../\x1b", "a" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_address(text)
    (problem,) = problems_of(listen(address=text))
    assert problem.startswith("listen.address: expected ")


@pytest.mark.parametrize(
    ("text", "url", "place"),
    [
        ("http://127.0.0.1:9001", "http://127.0.0.1:9001", TcpAddress("127.0.0.1", 9001)),
        ("http://Api", "http://api", TcpAddress("api", 80)),
        ("HTTP://api:80", "http://api", TcpAddress("api", 80)),
        ("http://api:8080", "http://api:8080", TcpAddress("api", 8080)),
        ("http://[::1]", "http://[::1]", TcpAddress("::1", 80)),
        ("http://[::80]:80", "http://[::80]", TcpAddress("::80", 80)),
        ("http://[::80]:81", "http://[::80]:81", TcpAddress("::80", 81)),
        ("http+unix:///run/a.sock", "http+unix:///run/a.sock", UnixAddress("/run/a.sock")),
    ],
)
def test_an_upstream_is_known_by_its_url_in_one_spelling(text: str, url: str, place: Any) -> None:
    for given_as in (text, {"url": text}, {"url": text, "id": None}):
        (upstream,) = the_pool(upstreams(given_as)).upstreams
        assert (upstream.url, upstream.id, upstream.place) == (url, url, place)
    (named,) = the_pool(upstreams({"id": "b", "url": text})).upstreams
    assert (named.url, named.id, named.weight, named.max_in_flight) == (url, "b", 1, None)


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "a:80", "//a", "ftp://a", "http:a", "http:/a", "http://", "http://:80", "http://a:", "http://a:0",
        "http://a:65536", "http://a:1x", "http://a/", "http://a/b", "http://a?b", "http://a#b", "http://a:80/",
        f"http://user:{SECRET}@a", f"http://{SECRET}@a:80", f"http://a:{SECRET}@b", "http://a b", "http://a\n", "http://a\0",
        "http://127.1", "http://2130706433", "http://é", "http://[::1", "http://\ud800", " http://a", "http+unix://a",
        "http+unix:///a?b", "http+unix:///a%2fb", "http+unix:///", "http+unix:/a", "https+unix:///a", "http://" + "a" * 10**5,
    ],
)  # fmt: skip
def test_what_is_no_url_of_an_upstream_is_refused(text: str) -> None:
    (problem,) = problems_of(upstreams("http://ok", text))
    assert problem.startswith("pools.api.upstreams[1]: expected ")


@pytest.mark.parametrize("text", ["https://a", f"https://user:{SECRET}@a:443/x", "HTTPS://a"])
def test_tls_to_an_upstream_is_told_not_to_be_there_yet(text: str) -> None:
    assert problems_of(upstreams(text)) == (
        'pools.api.upstreams[0]: expected "http://host:port"; TLS to upstreams is not there yet',
    )


@pytest.mark.parametrize("kind", [str, list])
def test_one_upstream_may_be_a_text_or_a_list_of_one(kind: Any) -> None:
    (upstream,) = the_pool(pool(upstreams="http://a" if kind is str else ["http://a"])).upstreams
    assert upstream.url == "http://a"


def test_the_gateway_listens_at_home_unless_told_otherwise() -> None:
    settings = load_settings({})
    assert (settings.pools, settings.routes) == ({}, [])
    second = 10**9
    assert settings.listen.model_dump() == {
        "address": "127.0.0.1:8080",
        "workers": 1,
        "forwarded": "x-forwarded",
        "head_timeout": 10 * second,
        "idle_timeout": 75 * second,
        "body_timeout": 30 * second,
        "least_rate": 256,
        "drain_timeout": 10 * second,
        "max_head": 32 << 10,
        "max_fields": 100,
        "max_body": 1 << 30,
        "max_connections": 16_384,
        "max_connections_per_address": 512,
        "access_log": False,
    }


def test_a_pool_needs_its_upstreams_alone() -> None:
    second = 10**9
    assert the_pool(pool()).model_dump(exclude={"upstreams"}) == {
        "policy": "least_connections",
        "pass_identity": False,
        "key": "ip",
        "vnodes": 160,
        "affinity": None,
        "connect_timeout": 2 * second,
        "response_timeout": 30 * second,
        "read_timeout": 60 * second,
        "idle_timeout": 4 * second,
        "health": {"failures": 3, "eject_for": 10 * second, "eject_at_most": 300 * second},
    }


def test_a_policy_may_be_a_class_or_the_name_of_one_and_then_go_by_a_key() -> None:
    assert the_pool(pool(policy=Policy, key="user")).policy is Policy
    assert the_pool(pool(policy="json:JSONDecoder", key="header:X-User")).policy is json.JSONDecoder
    assert [the_pool(ring(key=key)).key for key in ("ip", "path", "cookie:a")] == ["ip", "path", "cookie:a"]


def test_an_upstream_may_be_given_twice_with_an_id_each() -> None:
    twice = the_pool(upstreams("http://a", {"id": "b", "url": "http://a"}, {"id": "c", "url": "http://a"}))
    assert [upstream.id for upstream in twice.upstreams] == ["http://a", "b", "c"]


def test_what_is_wrong_with_pools_and_routes_is_told_together() -> None:
    problems = problems_of(
        {
            "listen": {"address": SECRET, "max_head": SECRET},
            "pools": {
                "api": {"upstreams": ["http://a", SECRET, "http://a"], "key": "ip", "read_timeout": SECRET},
                "b c": {"upstreams": []},
            },
            "routes": [{"match": "/*", "pool": "apl"}, {"match": "/*", "pool": "b c", "zzz": 1}],
        }
    )
    assert sorted(problem.partition(": ")[0] for problem in problems) == [
        "listen.address", "listen.max_head", 'pools."b c"', 'pools."b c".upstreams', "pools.api.key",
        "pools.api.read_timeout", "pools.api.upstreams[1]", "pools.api.upstreams[2]", "routes[0].pool",
        "routes[1].match", "routes[1].zzz",
    ]  # fmt: skip


def test_what_is_odd_but_right_is_a_warning() -> None:
    user = limit(key=["ip", "user"])
    document = {**user, **ring(key="user"), "routes": [{"match": "/*", "pool": "api"}]}
    nobody = "no identity.user tells the user, so each client is its address"
    assert warnings(load_settings(document)) == [f"limits[0].key: {nobody}", f"pools.api.key: {nobody}"]
    assert warnings(load_settings({**document, "identity": {"user": "header:X-User"}})) == []
    assert warnings(load_settings(pool())) == ["pools.api: no route leads to it"]
    assert warnings(load_settings({})) == []


def test_what_is_wrong_in_a_list_is_told_by_its_place() -> None:
    for values, place in (
        ({"rate": ["5/minute", SECRET]}, "2nd"),
        ({"key": ["ip", "user", SECRET]}, "3rd"),
        ({"give_back": ["404", SECRET]}, "2nd"),
    ):
        (problem,) = problems_of(limit(**values))
        assert problem.endswith(f"(see the {place})")
    (problem,) = problems_of({"identity": {"trusted_proxies": ["unix"] * 10 + [SECRET]}})
    assert problem.endswith("(see the 11th)")
    (problem,) = problems_of(limit(rate=SECRET))
    assert "see the" not in problem


def test_places_are_counted_as_people_do() -> None:
    assert [nth(place) for place in (0, 1, 2, 3, 10, 11, 12, 20, 21, 110)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "111th",
    ]  # fmt: skip


# What is wrong


@pytest.mark.parametrize(
    ("document", "path", "expected"),
    [
        ({"store": SECRET}, "store", "expected a table (a mapping), such as { url = … }"),
        ({"store": [SECRET]}, "store", "expected a table (a mapping), such as { url = … }"),
        ({"store": {"url": f"redis:/user:{SECRET}@host"}}, "store.url", "expected the URL of a store"),
        ({"store": {"url": {"password": SECRET}}}, "store.url", "expected a valid string"),
        ({"store": {"max_keys": SECRET}}, "store.max_keys", "expected a valid integer"),
        ({"store": {"max_keys": 0}}, "store.max_keys", "expected greater than or equal to 1"),
        ({"store": {"max_keys": 1.5}}, "store.max_keys", "expected a valid integer"),
        ({"store": {"on_error": SECRET}}, "store.on_error", "expected 'local', 'allow' or 'deny'"),
        ({"identity": SECRET}, "identity", "expected a table (a mapping), such as { trusted_proxies = … }"),
        ({"identity": {"trusted_proxies": SECRET}}, "identity.trusted_proxies", "expected networks"),
        ({"identity": {"trusted_proxies": ["10.0.0.0/8", SECRET]}}, "identity.trusted_proxies", "expected networks"),
        ({"identity": {"trusted_proxies": ["10.0.0.1/8"]}}, "identity.trusted_proxies", "no bit set behind the prefix"),
        ({"identity": {"trusted_proxies": ["10.0.0.0/33"]}}, "identity.trusted_proxies", "expected networks"),
        ({"identity": {"trusted_proxies": {SECRET: SECRET}}}, "identity.trusted_proxies", "expected a string, or a list of strings"),
        ({"identity": {"trusted_proxies": [7]}}, "identity.trusted_proxies[0]", "expected a valid string"),
        ({"identity": {"header": f"{SECRET}, Forwarded"}}, "identity.header", "expected the name of one field"),
        ({"identity": {"header": ""}}, "identity.header", "expected the name of one field"),
        ({"identity": {"header": "X_Forwarded_For"}}, "identity.header", "expected the name of one field"),
        ({"identity": {"header": ["Forwarded", SECRET]}}, "identity.header", "expected a valid string"),
        ({"identity": {"ipv6_prefix": 0}}, "identity.ipv6_prefix", "expected greater than or equal to 1"),
        ({"identity": {"ipv6_prefix": 129}}, "identity.ipv6_prefix", "expected less than or equal to 128"),
        ({"identity": {"ipv6_prefix": SECRET}}, "identity.ipv6_prefix", "expected a valid integer"),
        ({"identity": {"user": SECRET}}, "identity.user", 'expected "session:NAME"'),
        ({"identity": {"user": ""}}, "identity.user", 'expected "session:NAME"'),
        ({"identity": {"user": 7}}, "identity.user", 'expected "session:NAME"'),
        ({"identity": {"user": {"name": SECRET}}}, "identity.user", 'expected "session:NAME"'),
        ({"identity": {"user": "header:"}}, "identity.user", 'expected "session:NAME"'),
        ({"identity": {"user": f"header:{SECRET} x"}}, "identity.user", 'expected "session:NAME"'),
        ({"identity": {"user": f"{SECRET}:function"}}, "identity.user", "expected a module that can be imported"),
        ({"identity": {"user": f"json.{SECRET}:function"}}, "identity.user", "expected a module that can be imported"),
        ({"identity": {"user": f"json:{SECRET}"}}, "identity.user", "expected a name that the module has"),
        ({"identity": {"user": f"json:dumps.{SECRET}"}}, "identity.user", "expected a name that the module has"),
        ({"identity": {"user": "os:sep"}}, "identity.user", "function"),
        ({"identity": {"user": "sys:maxsize"}}, "identity.user", "function"),
        ({"response": {"fields": SECRET}}, "response.fields", "expected a valid boolean"),
        ({"limits": SECRET}, "limits", "two brackets"),
        ({"limits": {"name": SECRET}}, "limits", "two brackets"),
        ({"limits": [SECRET]}, "limits[0]", "expected a table (a mapping), such as { name = …, rate = … }"),
        ({"limits": [{"rate": "5/minute"}]}, "limits[0].name", "expected a value, there is none"),
        ({"limits": [{"name": SECRET}]}, "limits[0].rate", "expected a value, there is none"),
        (limit(name=f"{SECRET} x"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name=""), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name="é"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name="a\n"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name="*5"), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name=SECRET * 10), "limits[0].name", "expected 1 to 64 letters"),
        (limit(name=[SECRET]), "limits[0].name", "expected a valid string"),
        (limit(rate=SECRET), "limits[0].rate", "expected a rate"),
        (limit(rate=f"5/{SECRET}"), "limits[0].rate", "expected a rate"),
        (limit(rate="0/minute"), "limits[0].rate", "expected a rate"),
        (limit(rate=["5/minute", SECRET]), "limits[0].rate", "expected a rate"),
        (limit(rate=["5/minute", "9/minute"]), "limits[0].rate", "expected one rate a period"),
        (limit(rate=[]), "limits[0].rate", "expected at least one rate"),
        (limit(rate=5), "limits[0].rate", "expected a string, or a list of strings"),
        (limit(rate=[{SECRET: SECRET}]), "limits[0].rate[0]", "expected a valid string"),
        (limit(match=SECRET), "limits[0].match", "expected a pattern"),
        (limit(match=f"/{SECRET}*"), "limits[0].match", "expected a pattern"),
        (limit(match=[SECRET]), "limits[0].match", "expected a valid string"),
        (limit(key=SECRET), "limits[0].key", "expected ip, ip/BITS, user"),
        (limit(key=["ip", SECRET]), "limits[0].key", "expected ip, ip/BITS, user"),
        (limit(key=[]), "limits[0].key", "expected at least one part"),
        (limit(key="header:"), "limits[0].key", "header:NAME"),
        (limit(key=f"cookie:{SECRET} x"), "limits[0].key", "cookie:NAME"),
        (limit(key=f"header:{SECRET} x"), "limits[0].key", "header:NAME"),
        (limit(key="header:\N{CYRILLIC CAPITAL LETTER KA}"), "limits[0].key", "header:NAME"),
        (limit(key=[7]), "limits[0].key", "expected a string, or a list"),
        (limit(algorithm=SECRET), "limits[0].algorithm", "expected 'sliding_window', 'gcra'"),
        (limit(burst=0), "limits[0].burst", "expected greater than or equal to 1"),
        (limit(burst=SECRET), "limits[0].burst", "expected a valid integer"),
        (limit(burst=10**9 + 1), "limits[0].burst", "expected less than or equal to 1000000000"),
        (limit(burst=9, algorithm="fixed_window"), "limits[0]", "gcra"),
        (limit(burst=9, rate=["5/minute", "9/hour"]), "limits[0]", "expected one rate beside a burst"),
        (limit(cost=0), "limits[0].cost", "expected a number from 1"),
        (limit(cost=SECRET), "limits[0].cost", "expected a number from 1"),
        (limit(cost=6), "limits[0]", "expected a cost within the rate"),
        (limit(cost=6, rate=["9/minute", "5/hour"]), "limits[0]", "expected a cost within the rate"),
        (limit(cost=4, burst=3), "limits[0]", "expected a cost within the rate"),
        (limit(on_error=SECRET), "limits[0].on_error", "expected 'local', 'allow' or 'deny'"),
        (limit(give_back=SECRET), "limits[0].give_back", "expected statuses"),
        (limit(give_back=["404", SECRET]), "limits[0].give_back", "expected statuses"),
        (limit(give_back="600"), "limits[0].give_back", "expected statuses"),
        (limit(give_back="4x"), "limits[0].give_back", "expected statuses"),
        (limit(give_back=[404]), "limits[0].give_back[0]", "expected a valid string"),
        (limit(penalty=SECRET), "limits[0].penalty", "expected a table (a mapping), such as { strikes = … }"),
        (limit(preflights=SECRET), "limits[0].preflights", "expected a valid boolean"),
        ({"listen": SECRET}, "listen", "expected a table (a mapping), such as { address = … }"),
        (listen(address=SECRET), "listen.address", 'expected "host:port"'),
        (listen(address=8080), "listen.address", "expected a valid string"),
        (listen(address=f"unix:{SECRET}"), "listen.address", "expected an absolute path"),
        (listen(forwarded=SECRET), "listen.forwarded", "expected 'x-forwarded', 'forwarded' or 'none'"),
        (listen(head_timeout=SECRET), "listen.head_timeout", "expected a duration"),
        (listen(head_timeout="0s"), "listen.head_timeout", "above 0s, at most 365d"),
        (listen(head_timeout=10), "listen.head_timeout", "expected a duration"),
        (listen(idle_timeout="0ms"), "listen.idle_timeout", "above 0s, at most 365d"),
        (listen(body_timeout="366d"), "listen.body_timeout", "at most 365d"),
        (listen(least_rate=-1), "listen.least_rate", "0 to 1073741824 bytes"),
        (listen(drain_timeout="-1s"), "listen.drain_timeout", '"1d", at most 365d'),
        (listen(max_head=SECRET), "listen.max_head", "expected a number of bytes"),
        (listen(max_head=1023), "listen.max_head", "1024 to 16777216 bytes"),
        (listen(max_head="17MiB"), "listen.max_head", "1024 to 16777216 bytes"),
        (listen(max_fields=0), "listen.max_fields", "expected greater than or equal to 1"),
        (listen(max_fields=True), "listen.max_fields", "expected a valid integer"),
        (listen(max_fields=float("nan")), "listen.max_fields", "expected a valid integer"),
        (listen(max_body=0), "listen.max_body", "1 to 1125899906842624 bytes"),
        (listen(max_body=10**100), "listen.max_body", "1 to 1125899906842624 bytes"),
        (listen(max_connections=0), "listen.max_connections", "expected greater than or equal to 1"),
        (listen(max_connections_per_address=-1), "listen.max_connections_per_address", "expected greater than or equal to 0"),
        (listen(access_log="yes"), "listen.access_log", "expected a valid boolean"),
        ({"pools": SECRET}, "pools", "[pools.NAME]"),
        ({"pools": [{"upstreams": SECRET}]}, "pools", "[pools.NAME]"),
        ({"pools": {"api": SECRET}}, "pools.api", "[pools.NAME]"),
        ({"pools": {"api": {}}}, "pools.api.upstreams", "expected a value, there is none"),
        ({"pools": {"a b": {"upstreams": ["http://a"]}}}, 'pools."a b"', "expected 1 to 64 letters"),
        ({"pools": {"": {"upstreams": ["http://a"]}}}, 'pools.""', "expected 1 to 64 letters"),
        ({"pools": {"a" * 65: {"upstreams": ["http://a"]}}}, f'pools."{"a" * 64}"', "expected 1 to 64 letters"),
        ({"pools": {7: {"upstreams": ["http://a"]}}}, "pools[7]", "expected a valid string"),
        (pool(policy=SECRET), "pools.api.policy", "expected round_robin, random, least_connections, ring"),
        (pool(policy="rnig"), "pools.api.policy", 'did you mean "ring"?'),
        (pool(policy="least_connection"), "pools.api.policy", 'did you mean "least_connections"?'),
        (pool(policy=None), "pools.api.policy", "expected round_robin"),
        (pool(policy=[SECRET]), "pools.api.policy", "expected round_robin"),
        (pool(policy=True), "pools.api.policy", "expected round_robin"),
        (pool(policy=f"{SECRET}:Name"), "pools.api.policy", "expected a module that can be imported"),
        (pool(policy=f"json:{SECRET}"), "pools.api.policy", "expected a name that the module has"),
        (pool(policy="os:sep"), "pools.api.policy", "or a class"),
        (pool(key="ip"), "pools.api.key", "goes with the policy ring"),
        (pool(key="ip", policy="random"), "pools.api.key", "goes with the policy ring"),
        (pool(vnodes=160), "pools.api.vnodes", "goes with the policy ring"),
        (pool(vnodes=160, policy=Policy), "pools.api.vnodes", "goes with the policy ring"),
        (pool(vnodes=160, policy="json:JSONDecoder"), "pools.api.vnodes", "goes with the policy ring"),
        (ring(key=SECRET), "pools.api.key", "expected ip, user, header:NAME, cookie:NAME, query:NAME, claim:NAME or path"),
        (ring(key="method"), "pools.api.key", "expected ip, user"),
        (ring(key="host"), "pools.api.key", "expected ip, user"),
        (ring(key="cokie:sid"), "pools.api.key", 'claim:NAME or path; did you mean "cookie:sid"?'),
        (ring(key="route"), "pools.api.key", "expected ip, user"),
        (ring(key=f"header:{SECRET} x"), "pools.api.key", "expected ip, user"),
        (ring(key=["ip"]), "pools.api.key", "expected a valid string"),
        (ring(vnodes=0), "pools.api.vnodes", "expected greater than or equal to 1"),
        (ring(vnodes=10**9), "pools.api.vnodes", "expected less than or equal to 10000"),
        (ring(vnodes=True), "pools.api.vnodes", "expected a valid integer"),
        (ring(vnodes=10_000, upstreams=[{"url": "http://a", "weight": 101}]), "pools.api", "at most 1000000 points"),
        (upstreams(), "pools.api.upstreams", "expected at least one upstream"),
        (upstreams(*(f"http://a{place}" for place in range(10_001))), "pools.api.upstreams", "expected at most 10000 upstreams"),
        (pool(upstreams=None), "pools.api.upstreams", "expected a list of URLs"),
        (pool(upstreams={"url": SECRET}), "pools.api.upstreams", "expected a list of URLs"),
        (pool(upstreams=SECRET), "pools.api.upstreams", 'expected "http://host:port"'),
        (upstreams("http://a", SECRET), "pools.api.upstreams[1]", 'expected "http://host:port"'),
        (upstreams("http://a", 7), "pools.api.upstreams", "(see the 2nd)"),
        (upstreams({"id": SECRET}), "pools.api.upstreams[0].url", "expected a value, there is none"),
        (upstreams({"url": SECRET}), "pools.api.upstreams[0].url", 'expected "http://host:port"'),
        (upstreams({"url": [SECRET]}), "pools.api.upstreams[0].url", "expected a valid string"),
        (upstreams({"url": "http://a", "id": f"{SECRET} x"}), "pools.api.upstreams[0].id", "expected 1 to 64 letters"),
        (upstreams({"url": "http://a", "id": ""}), "pools.api.upstreams[0].id", "expected 1 to 64 letters"),
        (upstreams({"url": "http://a", "id": f"http://{SECRET}"}), "pools.api.upstreams[0].id", "expected 1 to 64 letters"),
        (upstreams({"url": "http://a", "id": 7}), "pools.api.upstreams[0].id", "expected a valid string"),
        (upstreams({"url": "http://a", "weight": 0}), "pools.api.upstreams[0].weight", "expected greater than or equal to 1"),
        (upstreams({"url": "http://a", "weight": 1001}), "pools.api.upstreams[0].weight", "expected less than or equal to 1000"),
        (upstreams({"url": "http://a", "weight": 1.5}), "pools.api.upstreams[0].weight", "expected a valid integer"),
        (upstreams({"url": "http://a", "max_in_flight": 0}), "pools.api.upstreams[0].max_in_flight", "expected greater than or equal to 1"),
        (upstreams({"url": "http://a", "max_in_flight": float("inf")}), "pools.api.upstreams[0].max_in_flight", "expected a valid integer"),
        (upstreams("http://a", "http://A:80"), "pools.api.upstreams[1]", "upstreams[0] has the same"),
        (upstreams("http://a", {"url": "http://a"}), "pools.api.upstreams[1]", "expected each URL once"),
        (upstreams({"url": "http://a", "id": SECRET}, "http://c", {"url": "http://b", "id": SECRET}), "pools.api.upstreams[2].id", "upstreams[0] is known by the same"),
        (pool(connect_timeout="0s"), "pools.api.connect_timeout", "above 0s"),
        (pool(response_timeout="5"), "pools.api.response_timeout", "expected a duration"),
        (pool(read_timeout=None), "pools.api.read_timeout", "expected a duration"),
        (pool(idle_timeout="4 s"), "pools.api.idle_timeout", "expected a duration"),
        (pool(health=SECRET), "pools.api.health", "expected a table (a mapping), such as { failures = … }"),
        (pool(health={"failures": 0}), "pools.api.health.failures", "expected greater than or equal to 1"),
        (pool(health={"eject_for": "0s"}), "pools.api.health.eject_for", "above 0s"),
        (pool(health={"eject_for": SECRET}), "pools.api.health.eject_for", "expected a duration"),
        (pool(health={"eject_for": "6m"}), "pools.api.health", "expected eject_for within eject_at_most"),
        (pool(health={"eject_for": "2s", "eject_at_most": "1s"}), "pools.api.health", "expected eject_for within"),
        ({"routes": SECRET}, "routes", "two brackets"),
        ({"routes": {"match": SECRET}}, "routes", "two brackets"),
        (routes(SECRET), "routes[0]", "expected a table (a mapping), such as { match = …, pool = … }"),
        (pool(affinity=SECRET), "pools.api.affinity", "expected a table (a mapping), such as { cookie = … }"),
        (pool(affinity={"cookie": f"{SECRET} x"}), "pools.api.affinity.cookie", "String should match pattern"),
        (pool(affinity={"cookie": ""}), "pools.api.affinity.cookie", "String should match pattern"),
        (pool(affinity={"cookie": "__Host-gk", "secure": False}), "pools.api.affinity.cookie", "expected secure = true beside the prefix __Host-"),
        (pool(affinity={"cookie": "__secure-gk", "secure": False}), "pools.api.affinity.cookie", "expected secure = true beside the prefix __secure-"),
        (pool(affinity={"samesite": "none", "secure": False}), "pools.api.affinity.samesite", 'expected secure = true beside "none"'),
        (pool(affinity={"samesite": SECRET}), "pools.api.affinity.samesite", "expected 'lax', 'strict' or 'none'"),
        (pool(affinity={"header": f"{SECRET} x"}), "pools.api.affinity.header", "expected the name of a field of its own"),
        (pool(affinity={"header": "Cookie"}), "pools.api.affinity.header", "expected the name of a field of its own"),
        (pool(affinity={"header": "X-Forwarded-For"}), "pools.api.affinity.header", "expected the name of a field of its own"),
        (pool(affinity={"header": "X-Pin", "secure": True}), "pools.api.affinity.secure", "goes with a cookie"),
        (pool(affinity={"ttl": "0s"}), "pools.api.affinity.ttl", "above 0s"),
        (pool(affinity={"strict": "yes"}), "pools.api.affinity.strict", "expected a valid boolean"),
        (pool(affinity={"ccokie": "a"}), "pools.api.affinity.ccokie", 'did you mean "cookie"?'),
        ({**pool(affinity={"cookie": "s"}), "session": {"kind": "token", "cookie": {"name": "s"}}}, "pools.api.affinity.cookie", "another name than that of the session"),
        ({"session": {}}, "session.kind", "expected a value"),
        ({"session": {"kind": "token", "idle": "2h", "absolute": "1h"}}, "session.idle", "expected at most absolute"),
        ({"session": {"kind": "store", "encrypt": True}}, "session.encrypt", 'goes with kind = "token"'),
        ({"session": {"kind": "token", "grace": "1s"}}, "session.grace", 'goes with kind = "store"'),
        ({"session": {"kind": "store", "store": f"ftp://{SECRET}"}}, "session.store", "expected memory://"),
        (
            {"session": {"kind": "token", "cookie": {"name": "__Host-a", "domain": "example.org"}}},
            "session.cookie.name", 'expected path = "/" and no domain beside the prefix __Host-',
        ),
        (
            {"session": {"kind": "token", "cookie": {"name": "__Secure-a", "secure": False}}},
            "session.cookie.name", "expected secure = true beside the prefix __Secure-",
        ),
        (
            {"session": {"kind": "token", "cookie": {"samesite": "none", "secure": False}}},
            "session.cookie.samesite", "expected secure = true",
        ),
        (
            {"session": {"kind": "token", "cookie": {"partitioned": True, "secure": False}}},
            "session.cookie.partitioned", "expected secure = true",
        ),
        ({"session": {"kind": "token", "cookie": {"name": "a b"}}}, "session.cookie.name", "match"),
        ({**pool(affinity={"cookie": "__Host-session.3"}), "session": {"kind": "token"}}, "pools.api.affinity.cookie", "another name than that of the session"),
        ({"pools": {"api": {"upstreams": "http://a", "affinity": {"cookie": "gk_b"}}, "b": {"upstreams": "http://b", "affinity": {}}}}, "pools.b.affinity.cookie", "expected a name of its own; pools.api has the same"),
        (upstreams({"url": "http://a", "drain": 1}), "pools.api.upstreams[0].drain", "expected a valid boolean"),
        (upstreams({"url": "http://a", "drain": True}, {"url": "http://b", "drain": True}), "pools.api.upstreams", "expected at least one that does not drain"),
        (pool(affinity={}, vnodes=10_000, upstreams=[{"url": "http://a", "weight": 101}]), "pools.api", "at most 1000000 points"),
        (routes({"match": "/*"}), "routes[0].pool", "expected a value, there is none"),
        (routes({"pool": "api"}), "routes[0].match", "expected a value, there is none"),
        (routes({"match": SECRET, "pool": "api"}), "routes[0].match", "expected a pattern"),
        (routes({"match": None, "pool": "api"}), "routes[0].match", "expected a valid string"),
        (routes({"match": "/*", "pool": 7}), "routes[0].pool", "expected a valid string"),
        (routes({"match": "/*", "pool": b"api"}), "routes[0].pool", "expected a valid string"),
        (routes({"match": "/*", "pool": "apii"}), "routes[0].pool", 'expected the name of a pool; did you mean "api"?'),
        (routes({"match": "/*", "pool": SECRET}), "routes[0].pool", "expected the name of a pool: api"),
        ({"routes": [{"match": "/*", "pool": SECRET}]}, "routes[0].pool", "there is none: each is a [pools.NAME]"),
        (routes({"match": "/a/{x}", "pool": "api"}, {"match": "/a/{y}/", "pool": "api"}), "routes[1].match", "routes[0] is for the same requests"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_by_its_path_and_what_was_expected(document: Any, path: str, expected: str) -> None:
    (problem,) = problems_of(document)
    assert problem.startswith(f"{path}: ")
    assert expected in problem


def tables_of(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The paths of the tables in a model, but for those in lists and those with names of their own."""
    for name, field in model.model_fields.items():
        kinds = () if get_origin(field.annotation) in (list, dict) else get_args(field.annotation)
        for kind in (field.annotation, *kinds):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield (name,)
                yield from ((name, *path) for path in tables_of(kind))


@pytest.mark.parametrize("path", list(tables_of(Settings)), ids=".".join)
def test_in_the_place_of_any_table_one_is_expected_in_words_for_toml_and_python(path: tuple[str, ...]) -> None:
    """Some keys that it has are told, and never the name of a class of ours."""
    document: Any = SECRET
    for key in reversed(path):
        document = {key: document}
    told = next(line for line in problems_of(document) if line.startswith(f"{'.'.join(path)}: "))
    assert re.fullmatch(r"[a-z._]+: expected a table \(a mapping\), such as \{ ([a-z_]+ = …(, )?)+ \}", told)


@pytest.mark.parametrize("value", [SECRET, {"name": SECRET}, 7])
def test_in_the_place_of_rules_a_list_is_expected_in_words_for_toml_and_python(value: object) -> None:
    assert problems_of({"limits": value}) == (
        "limits: expected a list of tables (mappings), which TOML has under a [[limits]] each (two brackets)",
    )


class Asks:
    """Calls of which one takes a request, and others do not."""

    def __call__(self, request: object, more: object) -> str:
        return "x"

    def nothing(self) -> str:
        return "x"

    def one(self, request: object) -> str:
        return "x"

    async def two(self, request: object, more: object) -> str:
        return "x"


def wrapper_of_none(request: object) -> str:
    return Asks().nothing()


wrapper_of_none.__wrapped__ = Asks().nothing  # type: ignore[attr-defined]  # as functools.wraps does


@pytest.mark.parametrize(
    "function",
    [
        lambda: "x", Asks(), Asks().nothing, Asks().two, partial(user_function, "a"), partial(lambda a, b, c: "x", 1),
        lambda *, request: "x", f"{__name__}:Asks.one", "os:getcwd",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "path", ["limits[0].key", "limits[0].tier", "limits[0].cost", "limits[0].exempt", "identity.user"]
)
def test_a_function_that_cannot_be_called_with_the_request_alone_is_told(function: Any, path: str) -> None:
    key = path.rpartition(".")[2]
    tiers = {"tiers": {"pro": "9/minute"}} if key == "tier" else {}
    document = {"identity": {"user": function}} if key == "user" else limit(**{key: function}, **tiers)
    assert problems_of(document) == (f"{path}: expected a function of the request, that is of one parameter",)


@pytest.mark.parametrize(
    "function",
    [
        user_function, wrapper_of_none, Asks().one, partial(lambda a, b: "x", 1), lambda *all: "x",
        lambda request, more=1: "x", str, itemgetter("a"), MagicMock(), f"{__name__}:user_function",
    ],
)  # fmt: skip
def test_a_function_that_can_be_called_with_the_request_is_taken_and_what_does_not_tell(function: Any) -> None:
    """A wrapper is judged by itself, and not by what it wraps."""
    load_settings({"identity": {"user": function}, **limit(key=["ip", function], cost=function, exempt=function)})


def test_which_of_several_functions_has_the_wrong_parameters_is_told() -> None:
    (problem,) = problems_of(limit(key=["ip", lambda: "x"]))
    assert problem.endswith("of one parameter (see the 2nd)")


def test_a_handler_of_refusals_has_parameters_of_its_own() -> None:
    load_settings({"response": {"handler": lambda ticket, refusal: refusal}})


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("cooki:a", 'did you mean "cookie:a"?'),
        ("cokie:a", 'did you mean "cookie:a"?'),
        ("heder:X-Tenant", 'did you mean "header:X-Tenant"?'),
        ("parm:a", 'did you mean "param:a"?'),
        ("usr", 'did you mean "user"?'),
        ("get:q", "there is no module of that name"),
        ("user:a", "there is no module of that name"),
        (f"{SECRET}:function", "there is no module of that name"),
    ],
)
def test_a_misspelt_part_of_a_key_is_not_told_as_a_module(text: str, hint: str) -> None:
    for path, rule in (("key", {"key": text}), ("tier", {"tier": text, "tiers": {"pro": "9/minute"}})):
        (problem,) = problems_of(limit(**rule))
        assert problem.startswith(f"limits[0].{path}: expected ip, ip/BITS, user, ")
        assert problem.endswith(f'or "package.module:function"; {hint}')


def test_a_module_in_a_package_that_cannot_be_imported_is_told_as_such() -> None:
    (problem,) = problems_of(limit(key="cooki.es:a"))
    assert problem.startswith("limits[0].key: expected a module that can be imported")


def test_a_decorator_is_not_offered_keys_that_it_refuses() -> None:
    for written in ({"method": "POST"}, {"macth": "/a"}, {"override": "a"}):
        with pytest.raises(SettingsError) as caught:
            Guard("5/minute", None, written)
        (problem,) = caught.value.problems
        known = problem.partition("; expected ")[2].split(", ")
        assert problem.startswith(f"{next(iter(written))}: unknown key; expected name, rate, ")
        assert {*LimitSettings.model_fields} - {*known} == {"match", "per", "overrides"}


def test_affinity_has_a_cookie_named_by_the_pool_unless_it_is_told_another_or_a_field_alone() -> None:
    """Its own name for each pool, with the attributes that browsers want; both ways where both are named."""
    made = the_pool(pool(affinity={})).affinity
    assert made is not None
    assert made.model_dump() == {
        "cookie": None, "header": None, "ttl": 3600 * 10**9, "strict": False, "secure": True, "samesite": "lax",
    }  # fmt: skip
    assert made.cookie_of("api") == "gk_api"
    for affinity, cookie in (({"header": "X-Pin"}, None), ({"header": "X-Pin", "cookie": "c"}, "c")):
        told = the_pool(pool(affinity=affinity)).affinity
        assert told is not None
        assert (told.header, told.cookie_of("api")) == ("X-Pin", cookie)


def test_with_affinity_a_pool_may_have_a_key_and_vnodes_whatever_its_policy() -> None:
    """They are of the ring to which clients fall whose upstream is gone."""
    made = the_pool(pool(policy="random", key="header:X-Tenant", vnodes=40, affinity={}))
    assert (made.key, made.vnodes) == ("header:X-Tenant", 40)


def test_affinity_needs_keys() -> None:
    """There is no default secret: what signs pins is told, or there are none."""
    with pytest.raises(SettingsError, match=r"^keys: expected some for pools\.api\.affinity, such as "):
        Gatekeeper(pool(affinity={}))


def test_rules_that_share_a_name_are_told_by_their_places() -> None:
    rules = [{"name": name, "rate": "5/minute"} for name in (SECRET, "b", SECRET)]
    (problem,) = problems_of({"limits": rules})
    assert problem.startswith("limits[2].name: ")
    assert "limits[0]" in problem
    assert "limits[1]" not in problem


def test_names_that_clients_could_not_tell_apart_are_told() -> None:
    rules = [{"name": "a", "rate": ["5/minute", "6/hour"]}, {"name": "a-60s", "rate": "7/minute"}]
    (problem,) = problems_of({"limits": rules})
    assert problem.startswith("limits[1].name: expected a name of its own")


def test_what_is_wrong_between_values_is_told_beside_what_is_wrong_with_one() -> None:
    rules = [
        {"name": "a", "rate": "5/minute", "cost": 6, "match": SECRET},
        {"name": "a", "rate": "5/minute", "burst": 3, "algorithm": "fixed_window", "fieldz": 1},
    ]
    problems = problems_of({"limits": rules, "wrong": 1})
    assert sorted(problem.partition(": ")[0] for problem in problems) == [
        "limits[0]", "limits[0].match", "limits[1]", "limits[1].fieldz", "limits[1].name", "wrong",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "path", "near"),
    [
        ({"stroe": {"url": SECRET}}, "stroe", "store"),
        ({"limit": [SECRET]}, "limit", "limits"),
        ({"store": {"ulr": SECRET}}, "store.ulr", "url"),
        ({"store": {"max_key": SECRET}}, "store.max_key", "max_keys"),
        ({"identity": {"trusted_proxy": SECRET}}, "identity.trusted_proxy", "trusted_proxies"),
        ({"identity": {"headers": SECRET}}, "identity.headers", "header"),
        ({"response": {"field": SECRET}}, "response.field", "fields"),
        (limit(mach=SECRET), "limits[0].mach", "match"),
        (limit(giveback=SECRET), "limits[0].giveback", "give_back"),
        ({"pool": {}}, "pool", "pools"),
        ({"route": []}, "route", "routes"),
        (listen(adress=SECRET), "listen.adress", "address"),
        (pool(polciy=SECRET), "pools.api.polciy", "policy"),
        (limit(penalty={"strike": SECRET}), "limits[0].penalty.strike", "strikes"),
        (pool(health={"failurs": SECRET}), "pools.api.health.failurs", "failures"),
        (upstreams("http://a", {"url": "http://b", "wieght": SECRET}), "pools.api.upstreams[1].wieght", "weight"),
        (routes({"match": "/*", "pool": "api", "mtach": SECRET}), "routes[0].mtach", "match"),
    ],
)
def test_a_misspelt_key_is_told_with_the_nearest_right_one(document: Any, path: str, near: str) -> None:
    assert problems_of(document) == (f'{path}: unknown key; did you mean "{near}"?',)


@pytest.mark.parametrize(
    ("document", "path", "known"),
    [
        (
            {"zzz": SECRET},
            "zzz",
            [
                "enabled",
                "keys",
                "store",
                "access",
                "identity",
                "session",
                "response",
                "limits",
                "listen",
                "pools",
                "routes",
            ],
        ),
        (pool(zzz=SECRET), "pools.api.zzz", ["policy", "key", "vnodes", "upstreams"]),
        (pool(health={"zzz": SECRET}), "pools.api.health.zzz", ["failures", "eject_for", "eject_at_most"]),
        (upstreams({"url": "http://a", "zzz": SECRET}), "pools.api.upstreams[0].zzz", ["url", "id", "weight"]),
        ({"store": {"zzz": SECRET}}, "store.zzz", ["url", "timeout", "max_keys"]),
        (limit(zzz=SECRET), "limits[0].zzz", ["name", "rate", "concurrency"]),
    ],
)
def test_a_key_that_is_near_to_none_is_told_with_all_that_are_known(
    document: Any, path: str, known: list[str]
) -> None:
    (problem,) = problems_of(document)
    assert problem.startswith(f"{path}: unknown key; expected {', '.join(known)}")


@pytest.mark.parametrize("key", ["a\nb", "\x1b[31mred", "a.b", "", "x" * 10_000, "\ud800", 7, (1, 2), None, b"a"])
def test_no_key_breaks_the_line_or_fills_the_screen(key: Any) -> None:
    one = {"upstreams": ["http://a"]}
    for document in (
        {key: SECRET},
        {"store": {key: SECRET}},
        limit() | {key: SECRET},
        {"pools": {"api": {**one, key: SECRET}}},
        {"pools": {key: one}} if key != "a.b" else {"pools": {key: SECRET}},
    ):
        (problem,) = problems_of(document)
        assert problem.isprintable()
        assert len(problem) < 300


def test_all_that_is_wrong_is_told_together() -> None:
    problems = problems_of(
        {
            "stroe": {},
            "store": {"url": SECRET, "max_keys": SECRET},
            "identity": {"trusted_proxies": SECRET, "ipv6_prefix": 0, "user": SECRET},
            "limits": [
                {"name": "a", "rate": SECRET, "match": SECRET, "key": SECRET},
                {"name": "b", "rate": "5/minute"},
                {"name": f"{SECRET} c", "rates": SECRET, "burst": SECRET},
                {"name": "d", "rate": "5/minute", "cost": 6},
            ],
            "response": {"fields": SECRET},
        }
    )
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        "identity.ipv6_prefix",
        "identity.trusted_proxies",
        "identity.user",
        "limits[0].key",
        "limits[0].match",
        "limits[0].rate",
        "limits[2].burst",
        "limits[2].name",
        "limits[2].rate",
        "limits[2].rates",
        "limits[3]",
        "response.fields",
        "store.max_keys",
        "store.url",
        "stroe",
    ]


@pytest.mark.parametrize("source", [None, 7, b"hunter2", [SECRET], (SECRET,), {SECRET}])
def test_what_is_no_source_of_settings_is_told_by_its_kind(source: Any) -> None:
    (problem,) = problems_of(source)
    assert type(source).__name__ in problem


def test_settings_that_hold_themselves_are_refused() -> None:
    document: dict[str, Any] = {"limits": []}
    document["limits"].append(document)
    document["store"] = document
    assert problems_of(document)


KEYS = [
    "name",
    "rate",
    "match",
    "key",
    "url",
    "user",
    "header",
    "limits",
    "zzz",
    "pool",
    "policy",
    "api",
    "upstreams",
    "id",
    "weight",
    "vnodes",
    "health",
    "eject_for",
    "address",
    "max_head",
    "idle_timeout",
]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(SECRET)
    | st.sampled_from(["unix", "1/day", "ring", "http://a", "/*", "api", "10s", "1KiB"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def test_sessions_that_no_other_process_reads_are_warned_of() -> None:
    for session, told in (
        ({"kind": "store"}, True),
        ({"kind": "store", "store": "memory://"}, True),
        ({"kind": "store", "store": "sqlite:////var/lib/shop.db"}, False),
        ({"kind": "token"}, False),
    ):
        found = warnings(load_settings({"keys": ["k" * 40], "session": session}))
        assert any(line.startswith("session.store: memory") for line in found) is told, session


SECTIONS = [
    "enabled", "keys", "store", "access", "identity", "limits", "response", "session", "listen", "pools", "routes", "zzz",
]  # fmt: skip


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(SECTIONS), JSON, max_size=3))
def test_no_document_makes_anything_but_settings_or_a_settings_error(document: dict[str, Any]) -> None:
    told = ""
    try:
        load_settings(document)
    except SettingsError as error:
        told = str(error)
    assert SECRET not in told


# Files


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f'[store]\nurl = "{SECRET}\n', 2),
        (f"[store]\nurl = {SECRET}\n", 2),
        (f'[store]\nurl = "{SECRET}" {SECRET}\n', 2),
        (f"[store]\n\n{SECRET}\n", 3),
        ("[store]\n[store]\n", 2),
        (f'[store]\nurl = "\\{SECRET}"\n', 2),
        ("[store\n", 1),
        (f"a = 2024-02-30 # {SECRET}\n", 1),
    ],
)
def test_an_error_of_toml_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(text, encoding="utf-8")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: expected TOML: ")
    assert f"line {line}," in problem


def test_each_error_of_a_file_begins_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(f'[stroe]\n[store]\nurl = "{SECRET}"\n', encoding="utf-8")
    assert sorted(problems_of(path)) == [
        f"{path}: store.url: expected the URL of a store: memory://, shared:///PATH, redis://HOST:PORT/DB (rediss, redis+cluster, redis+sentinel, unix; or valkey), or a storage URI of limits",
        f'{path}: stroe: unknown key; did you mean "store"?',
    ]


def test_what_a_module_raised_is_the_cause_of_the_error_and_a_way_round_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising.py").write_text(f"raise ZeroDivisionError('{SECRET}')\n", encoding="utf-8")
    (tmp_path / "lacking.py").write_text("import no_such_module", encoding="utf-8")
    (tmp_path / "circle.py").write_text("from circle2 import nothing\n", encoding="utf-8")
    (tmp_path / "circle2.py").write_text("import circle\n", encoding="utf-8")
    (tmp_path / "reading.py").write_text(
        "from gatekeeper import Gatekeeper\n"
        "Gatekeeper({'limits': [{'name': 'a', 'rate': '1/second', 'key': 'reading:later'}]})\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    for module, cause, told in (
        ("raising", ZeroDivisionError, "importing it raised ZeroDivisionError"),
        (
            "circle",
            ImportError,
            "importing it raised ImportError: put what the settings name in a module of its own",
        ),
        (
            "reading",
            SettingsError,
            "importing it raised SettingsError: put what the settings name in a module of its own",
        ),
        ("lacking", ModuleNotFoundError, "importing it raised ModuleNotFoundError"),
        (f"no.{SECRET}", type(None), "importing it raised ModuleNotFoundError"),
        (SECRET, type(None), "there is no module of that name"),
    ):
        for key in (f"{module}:function", ["ip", f"{module}:function"]):
            sys.modules.pop(module, None)
            with pytest.raises(SettingsError) as error:
                load_settings({"limits": [{"name": "a", "rate": "1/minute", "key": key}]})
            (problem,) = error.value.problems
            assert told in problem
            assert ("of its own" in problem) == ("of its own" in told)
            assert SECRET not in problem
            assert type(error.value.__cause__) is cause
            with pytest.raises(SettingsError) as error:
                Guard("1/minute", None, {"key": key})
            assert type(error.value.__cause__) is cause


def test_no_repr_shows_a_secret_of_the_settings() -> None:
    url = f"redis://user:{SECRET}@127.0.0.1:1/0"
    exempt = [f"header:X-Key={SECRET}", "user:bob"]
    limit = {
        "name": "a",
        "rate": "1/minute",
        "exempt": exempt,
        "tier": "header:X-Plan",
        "tiers": {"pro": "2/minute"},
    }
    settings = load_settings({"store": {"url": url}, "limits": [limit]})
    with closing(Gatekeeper(settings)) as keeper:
        (rule,) = keeper.gate.rules
        shown = [settings, settings.store, *settings.limits, keeper, keeper.gate, keeper.store, rule, rule.exempt]
        for one in (*shown, *rule.limits):
            assert SECRET not in repr(one) + str(one), type(one)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert problems_of(path) == (f"{path}: No such file or directory",)
    assert problems_of(str(path)) == (f"{path}: No such file or directory",)


def test_a_directory_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == (f"{tmp_path}: Is a directory",)


def test_a_pipe_or_a_device_in_place_of_a_file_is_told_and_neither_waited_for_nor_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        expected = "expected a regular file, and no pipe or device"
        assert problems_of(path) == (f"{path}: {expected}",)
        networks = {"access": {"deny": f"file:{path}"}}
        with pytest.raises(SettingsError) as error:
            Gatekeeper(networks)
        assert error.value.problems == (f"access.deny: {path}: {expected}",)


def test_a_path_that_no_file_can_have_is_told_and_not_as_wrong_toml() -> None:
    (problem,) = problems_of("none\0.toml")
    assert "TOML" not in problem


def test_a_file_that_is_not_utf_8_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_bytes(f"# {SECRET}\n[store]\n# caf".encode() + b"\xe9\n")
    assert problems_of(path) == (f"{path}: expected UTF-8 (line 3)",)


def test_a_file_that_is_too_great_is_told_by_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_bytes(b"#" * (GREATEST_FILE + 1))
    assert problems_of(path) == (f"{path}: expected at most {GREATEST_FILE} bytes",)


def test_a_file_of_the_greatest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_bytes(b"#" * GREATEST_FILE)
    assert load_settings(path) == Settings()


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "{a = " * 100_000])
def test_a_file_that_is_nested_too_deep_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(text, encoding="utf-8")
    assert problems_of(path) == (f"{path}: expected TOML that is not nested so deep",)


def test_a_number_of_thousands_of_digits_is_not_told_as_nesting(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text("[store]\nmax_keys = " + "9" * 5000, encoding="utf-8")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert "nested" not in problem


def test_the_error_is_a_value_error_of_this_package() -> None:
    assert issubclass(SettingsError, GatekeeperError)
    assert issubclass(SettingsError, ValueError)


def test_a_byte_order_mark_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.toml"
    path.write_text(TOML, encoding="utf-8-sig")
    assert problems_of(path) == (f"{path}: expected UTF-8 without a byte order mark, and the file begins with one",)


# The JSON Schema

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}

KEYWORDS = {
    "$defs", "$ref", "additionalProperties", "anyOf", "const", "default", "description", "enum", "items", "maximum",
    "minimum", "pattern", "properties", "required", "title", "type",
}  # fmt: skip
"""The words of JSON Schema that `accepts` understands."""


def accepts(schema: Any, value: Any, root: Any) -> bool:
    """Whether a schema accepts a value (JSON Schema 2020-12, as far as our schema uses it)."""
    assert set(schema) <= KEYWORDS, f"unknown words {set(schema) - KEYWORDS}"
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root)
    if "anyOf" in schema and not any(accepts(one, value, root) for one in schema["anyOf"]):
        return False
    if "type" not in schema:
        return not isinstance(value, dict) or set(schema.get("required", [])) <= set(value)
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if kind == "integer":
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if kind == "string":
        return re.search(schema.get("pattern", ""), value) is not None
    if kind == "array":
        return all(accepts(schema["items"], item, root) for item in value)
    if kind == "object":
        if "properties" not in schema:
            return all(accepts(schema["additionalProperties"], item, root) for item in value.values())
        known = schema["properties"]
        assert schema["additionalProperties"] is False
        return (
            set(value) <= set(known)
            and set(schema.get("required", [])) <= set(value)
            and all(accepts(known[name], item, root) for name, item in value.items())
        )
    return True


def test_the_schema_has_a_description_and_sound_references_everywhere() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == {*SECTIONS} - {"zzz"} == set(Settings.model_fields)
    for model in (schema, *schema["$defs"].values()):
        assert model["type"] == "object"
        assert model["description"]
        assert set(model.get("required", [])) <= set(model["properties"])
        for name, field in model["properties"].items():
            if "$ref" in field:
                assert field["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            else:
                assert field["description"], name
                assert "default" in field or name in model["required"]


@pytest.mark.parametrize(
    "document",
    [
        {},
        EVERYTHING,
        limit(),
        limit(key="user", match="/api/*", give_back="5xx"),
        {"identity": {"trusted_proxies": "unix", "user": "json:dumps"}},
        listen(max_head="64KiB", least_rate=0, drain_timeout="0s"),
        pool(upstreams="http://a"),
        upstreams("http://a", {"url": "http://b", "id": "b"}),
        routes({"match": "/*", "pool": "api"}),
    ],
)
def test_a_right_document_passes_the_schema_and_the_settings(document: dict[str, Any]) -> None:
    schema = json_schema()
    assert accepts(schema, document, schema)
    load_settings(document)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"stroe": {}},
        {"store": {"url": "redis"}},
        {"store": {"max_keys": 0}},
        {"identity": {"ipv6_prefix": 129}},
        {"identity": {"trusted_proxies": [7]}},
        {"identity": {"user": 7}},
        {"limits": {}},
        {"limits": [{"name": "a"}]},
        limit(algorithm="leaky"),
        limit(burst=0),
        limit(rate=5),
        limit(on_error="panic"),
        limit(preflights="maybe"),
        listen(head_timeout=10),
        listen(head_timeout="10"),
        listen(max_head=0),
        listen(max_head="32kb"),
        listen(forwarded="all"),
        {"pools": []},
        {"pools": {"api": {}}},
        pool(zzz=1),
        pool(policy=7),
        pool(upstreams=7),
        upstreams(7),
        upstreams({}),
        upstreams({"url": "http://a", "weight": 0}),
        pool(health={"failures": "3"}),
        routes({"match": "/*"}),
        routes("/*"),
    ],
)
def test_a_wrong_document_passes_neither_the_schema_nor_the_settings(document: Any) -> None:
    schema = json_schema()
    assert not accepts(schema, document, schema)
    with pytest.raises(SettingsError):
        load_settings(document)


BEARER = {"issuer": "https://id.example.com/", "audience": "api", "jwks_url": "https://id.example.com/keys"}


@pytest.mark.parametrize(
    "url",
    [
        "https://keys.example.net",
        "https://keys.example.net:8443/a/keys?v=1",
        "https://[2001:db8::1]/keys",
        "http://127.0.0.1:9000/keys",
        "http://[::1]/keys",
        "http://localhost:9000/keys",
    ],
)
def test_keys_of_a_provider_are_read_over_tls_or_on_this_machine(url: str) -> None:
    read = load_settings({"identity": {"user": "bearer:sub", "bearer": {**BEARER, "jwks_url": url}}})
    assert read.identity.bearer is not None
    assert read.identity.bearer.jwks_url == url
    assert url not in repr(read), "a query may hold a secret"


@pytest.mark.parametrize(
    "url",
    [
        "", "keys.example.net",  "http://keys.example.net/keys", "http://10.0.0.1/keys", "http://127.0.0.1.example.com/keys",
        "http://localhost.example.com/", "ftp://127.0.0.1/keys", "file:///etc/passwd", "https://", "https:///keys",
        "https://me:hunter2@keys.example.net/", "https://keys.example.net:0/", "https://keys.example.net:99999/",
        "https://keys.example.net:x/", "https://[::1", "https://keys.example.net/#keys", "https://keys.example.net/ keys",
        "https://keys.example.net/\r\nHost: other", "https://id.éxample.com/", "HTTPS://keys.example.net/",
    ],
)  # fmt: skip
def test_another_address_for_the_keys_of_a_provider_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings({"identity": {"user": "bearer:sub", "bearer": {**BEARER, "jwks_url": url}}})
    (problem,) = error.value.problems
    assert problem.startswith("identity.bearer.jwks_url: expected an address of https")
    assert "keys.example.net" not in problem


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        ({"user": "bearer:sub"}, "identity.bearer: expected a table with issuer, audience and jwks_url"),
        ({"bearer": BEARER}, 'identity.bearer: goes with user = "bearer:CLAIM"'),
        ({"user": "session:sub", "bearer": BEARER}, 'identity.bearer: goes with user = "bearer:CLAIM"'),
        ({"user": "bearer:sub", "bearer": {"issuer": "x", "audience": "y"}}, "identity.bearer.jwks_url: expected a"),
        ({"user": "bearer:sub", "bearer": {**BEARER, "issuer": ""}}, "identity.bearer.issuer: expected"),
        ({"user": "bearer:sub", "bearer": {**BEARER, "audience": ["a"]}}, "identity.bearer.audience: expected"),
        ({"user": "bearer:sub", "bearer": {**BEARER, "algorithms": []}}, "identity.bearer.algorithms: expected at"),
        ({"user": "bearer:sub", "bearer": {**BEARER, "algorithms": ["HS256"]}}, "identity.bearer.algorithms[0]: exp"),
        ({"user": "bearer:sub", "bearer": {**BEARER, "algorithms": ["none"]}}, "identity.bearer.algorithms[0]: exp"),
        ({"user": "bearer:sub", "bearer": {**BEARER, "secret": "x"}}, "identity.bearer.secret: unknown key"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_tokens_of_a_provider_is_told(identity: dict[str, object], told: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings({"identity": identity})
    (problem,) = error.value.problems
    assert problem.startswith(told)


@pytest.mark.parametrize(
    "identity", [{"user": "session:sub"}, {"user": "bearer:sub", "bearer": BEARER}, {"from_gateway": True}]
)
def test_a_session_a_token_and_a_gateway_tell_claims(identity: dict[str, object]) -> None:
    limit = {"name": "a", "rate": "1/second", "key": "claim:team"}
    assert not any("claims" in line for line in warnings(load_settings({"identity": identity, "limits": [limit]})))
    assert any("claims" in line for line in warnings(load_settings({"limits": [limit]})))
