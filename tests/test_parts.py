"""The parts of a request that quotas are counted by and rings hash."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.errors import GatekeeperError
from gatekeeper.http.message import EnvironRequest, ScopeRequest
from gatekeeper.http.parts import EXPECTED, LONGEST_COOKIES, PARTS, PartError, cookie, part
from gatekeeper.ratelimit.rates import parse_rates
from gatekeeper.ratelimit.rules import KEYS, KeyPartError, Rule, key_part, secret


class Subject(ScopeRequest):
    """A request whose client is known."""

    def __init__(self, fields: list[tuple[str, str]], path: str = "/a/../b", user: str | None = None) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        super().__init__(
            {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": QUERY}
        )
        self.address = "192.0.2.1"
        self.user = user
        self.ip = ipaddress.ip_address(self.address)
        self.api_key = None
        self.claims: dict[str, Any] = {"team": 7, "admin": True, "name": "", "list": []}
        self.answers: dict[object, Any] = {}


QUERY = b"a=1+2&twice=1&x&e=&%74wice=2"
FIELDS = [("host", "Shop.Example.COM.:8080"), ("x-tenant", "t"), ("x-empty", ""), ("cookie", 'a=1; sid="x y"; e=')]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ip", "192.0.2.1"),
        ("user", "alice"),
        ("method", "POST"),
        ("host", "shop.example.com"),
        ("path", "/b"),
        ("header:X-Tenant", "t"),
        ("header:x-tenant", "t"),
        ("header:X-Empty", None),
        ("header:X-None", None),
        ("cookie:a", "1"),
        ("cookie:sid", "x y"),
        ("cookie:A", None),
        ("cookie:e", None),
        ("cookie:none", None),
        ("ip/24", "192.0.2.0/24"),
        ("ip/8/48", "192.0.0.0/8"),
        ("query:a", "1 2"),
        ("query:twice", None),
        ("query:e", None),
        ("query:none", None),
        ("claim:team", "7"),
        ("claim:admin", "true"),
        ("claim:name", None),
        ("claim:list", None),
        ("claim:none", None),
    ],
)
def test_a_part_is_read_by_its_name(text: str, expected: str | None) -> None:
    assert part(text)(Subject(FIELDS, user="alice")) == expected


def test_a_request_may_lack_each_part_but_its_address_method_and_path() -> None:
    bare = Subject([])
    assert {name for name in PARTS if not PARTS[name](bare)} == {"user", "api_key", "host"}
    assert part("header:x")(bare) is None
    assert part("cookie:x")(bare) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "IP", "route", "global", "hunter2", "ip ", "header", "header:", "header:a b", "header:a_b", "header:a:b",
        "header:é", "header:" + "a" * 65, "cookie", "cookie:", "cookie:a b", "cookie:a=b", "cookie:a;b", 'cookie:"a"',
        "cookie:é", "cookie:a\n", "cookie:" + "a" * 65, "query:", "query:a b", ":a",
        "claim:", "ip/", "ip/0", "ip/33", "ip/24/0", "ip/24/129", "ip/24/48/1", "ip/-1", "ip/٣",
    ],
)  # fmt: skip
def test_what_names_no_part_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(PartError) as caught:
        part(text)
    assert str(caught.value) == f"expected {EXPECTED}"
    assert isinstance(caught.value, GatekeeperError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", ["path", "hunter2", "", "header:a b", "cookie:", "Route"])
def test_a_rule_has_a_vocabulary_of_its_own(text: str) -> None:
    with pytest.raises(KeyPartError) as caught:
        key_part(text)
    assert str(caught.value) == f"expected {KEYS}"


def test_a_rule_counts_by_a_cookie_and_by_the_address_of_who_has_none() -> None:
    rule = Rule("a", parse_rates("5/minute"), keys=["cookie:sid"])
    assert rule.key(Subject(FIELDS)) == f"={secret('x y')}"
    assert rule.key(Subject([])) == "@192.0.2.1"
    several = Rule("a", parse_rates("5/minute"), keys=["route", "cookie:a", "global"], route="/x/{y}")
    assert several.key(Subject(FIELDS)) == f"6=/x/{{y}}|32={secret('1')}|0=|"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], None),
        ([""], None),
        (["sid"], None),
        (["=1"], None),
        (["sid="], ""),
        (["sid=1"], "1"),
        (["sid=1;sid=2"], "1"),
        (["xsid=0; sid=1"], "1"),
        (["sidx=0; sid=1"], "1"),
        (["SID=0; sid=1"], "1"),
        (["sid =0; sid=1"], "1"),
        (["a=sid=0; sid=1"], "1"),
        (["\tsid=1 \t;a=2"], "1"),
        (["sid=a=b"], "a=b"),
        (["sid=a,b"], "a,b"),
        (['sid="1"'], "1"),
        (['sid=""'], ""),
        (['sid="'], '"'),
        (['sid="1'], '"1'),
        (['sid="1;2"'], '"1'),  # a quote holds no semicolon together (RFC 6265, 5.2)
        (["a=1", "b=2; sid=3", "sid=4"], "3"),  # as HTTP/2 splits them
        ([";;;", "sid=1;"], "1"),
    ],
)
def test_the_first_cookie_of_a_name_is_the_one(fields: list[str], expected: str | None) -> None:
    assert cookie(fields, "sid") == expected


def test_cookies_are_looked_through_up_to_a_bound_and_no_value_is_cut() -> None:
    filler = "a=" + "x" * (LONGEST_COOKIES - 10)
    assert cookie([f"{filler}; sid=1"], "sid") == "1"
    assert cookie([f"{filler}; sid=12345"], "sid") is None
    assert cookie([filler, "sid=1"], "sid") == "1"
    assert cookie([filler, "sid=1; b=23456789"], "sid") == "1"
    assert cookie([filler, "b=23456789", "sid=1"], "sid") is None
    assert cookie(["sid=" + "x" * LONGEST_COOKIES], "sid") is None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text('sid=; ",\\\t\x00é') | st.text(), max_size=4))
def test_no_cookie_field_raises_and_a_value_is_part_of_what_came(fields: list[str]) -> None:
    value = cookie(fields, "sid")
    assert value is None or (";" not in value and any(value in field for field in fields))


@settings(max_examples=200, deadline=None)
@given(st.text('sid=; "x,', max_size=40))
def test_a_cookie_is_the_same_in_each_shell(text: str) -> None:
    environ: dict[str, Any] = {"REQUEST_METHOD": "GET", "HTTP_COOKIE": text}
    assert cookie(EnvironRequest(environ).fields("cookie"), "sid") == cookie(
        Subject([("cookie", text)]).fields("cookie"), "sid"
    )
