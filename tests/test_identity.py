"""Who is asking."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.http.addresses import parse_address
from gatekeeper.http.message import EnvironRequest, ScopeRequest
from gatekeeper.identity import UNKNOWN, Identity

CLIENT = "198.51.100.7"
SPOOFED = "203.0.113.9"
PROXY = "10.0.0.1"
NEAR = "10.0.0.2"
"""Another trusted proxy, between the client and PROXY."""

TRUSTED = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]


def scope(peer: str | None, *fields: tuple[str, str]) -> ScopeRequest:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in fields]
    return ScopeRequest(
        {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": headers,
            "client": None if peer is None else (peer, 40_000),
        }
    )


def environ(peer: str | None, *fields: tuple[str, str]) -> EnvironRequest:
    found: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "REMOTE_ADDR": peer or ""}
    for name, value in fields:
        key = "HTTP_" + name.upper().replace("-", "_")
        found[key] = f"{found[key]},{value}" if key in found else value
    return EnvironRequest(found)


HOMES = pytest.mark.parametrize("home", [scope, environ])


def forwarded_for(*lines: str, peer: str | None = PROXY, header: str = "x-forwarded-for", home: Any = scope) -> str:
    """The address of a client whose request came through trusted proxies that wrote these lines."""
    identity = Identity(trusted=TRUSTED, unix=True, header=header)
    return identity.address(home(peer, *((header, line) for line in lines)))


# parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (" 192.0.2.1\t", "192.0.2.1"),
        ("192.0.2.1:8080", "192.0.2.1"),
        ("192.0.2.1:1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:8080", "2001:db8::1"),
        ("::", "::"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]:80", "fe80::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("[::FFFF:192.0.2.1]:80", "192.0.2.1"),
        ("::ffff:192.0.2.1%eth0", "192.0.2.1"),
    ],
)
def test_an_address_is_read_in_each_of_its_forms(text: str, expected: str) -> None:
    assert parse_address(text) == ipaddress.ip_address(expected)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "-", "unknown", "_hidden", "localhost", "testclient", "unix:", "example.com:80",
        "192.0.2", "192.0.2.1.1", "192.0.2.256", "192.0.2.01", "0x7f.0.0.1", "2130706433", "192.0.2.1/32",
        "192.0.2.1:", "192.0.2.1:http", "192.0.2.1:-1", "192.0.2.1:1234567", "192.0.2.1:80:80", "192.0.2.1 :80",
        ":80", "::1]", "[::1", "[]", "[]:80", "[::1]80", "[::1]:", "[::1]:x", "[[::1]]", "x[::1]", "[::1] :80",
        "2001:db8::1::2", "2001:db8::12345", ":::", "2001:db8::1/64", "%eth0", "１92.0.2.1", "192.0.2.1:８0",
        "192.0.2.-1", "192.0.2.1, 192.0.2.2", "192.0.2.1\0", '"192.0.2.1"', "192.0.2.1" + " " * 60,
    ],
)  # fmt: skip
def test_what_is_no_address_is_none(text: str) -> None:
    assert parse_address(text) is None


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("0123456789abcdefx.:[]%/ \n"))
def test_no_text_makes_anything_but_an_address_or_none(text: str) -> None:
    address = parse_address(text)
    if address is not None:
        assert address.version == 4 or address.ipv4_mapped is None


@settings(max_examples=200, deadline=None)
@given(st.ip_addresses(), st.integers(0, 65_535))
def test_an_address_with_or_without_port_is_the_same(address: Any, port: int) -> None:
    bare = parse_address(str(address))
    bracketed = f"[{address}]" if address.version == 6 else str(address)
    assert bare is not None
    assert parse_address(f"{bracketed}:{port}") == bare
    assert bare in (address, getattr(address, "ipv4_mapped", None)) or str(address).startswith("64:ff9b::")


@pytest.mark.parametrize("text", ["64:ff9b::192.0.2.1", "64:ff9b::c000:201", "::ffff:192.0.2.1"])
def test_an_ipv4_client_behind_a_translator_is_that_client(text: str) -> None:
    assert str(parse_address(text)) == "192.0.2.1"


# The address


@HOMES
@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "x-real-ip"])
@pytest.mark.parametrize("peer", [CLIENT, PROXY, "127.0.0.1"])
def test_nothing_is_trusted_by_default(home: Any, header: str, peer: str) -> None:
    fields = [
        (name, f"for={SPOOFED}" if name == "forwarded" else SPOOFED) for name in ("x-forwarded-for", "forwarded")
    ]
    request = home(peer, *fields, ("x-real-ip", SPOOFED), ("client-ip", SPOOFED))
    assert Identity(header=header).address(request) == peer


@HOMES
def test_a_peer_on_a_unix_socket_is_unknown_and_not_trusted_by_default(home: Any) -> None:
    request = home(None, ("x-forwarded-for", SPOOFED))
    assert Identity().address(request) == UNKNOWN
    assert (
        Identity(trusted=[ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")]).address(request)
        == UNKNOWN
    )


@HOMES
def test_a_peer_on_a_unix_socket_is_believed_when_it_is_named(home: Any) -> None:
    identity = Identity(unix=True)
    assert identity.address(home(None, ("x-forwarded-for", f"{SPOOFED}, {CLIENT}"))) == CLIENT
    assert identity.address(home(None)) == UNKNOWN
    assert identity.address(home(CLIENT, ("x-forwarded-for", SPOOFED))) == CLIENT


@HOMES
def test_a_peer_that_is_no_trusted_proxy_is_not_believed(home: Any) -> None:
    assert forwarded_for(SPOOFED, peer=CLIENT, home=home) == CLIENT
    assert forwarded_for(SPOOFED, peer="testclient", home=home) == "testclient"


@HOMES
def test_only_the_named_header_is_read(home: Any) -> None:
    request = home(PROXY, ("forwarded", f"for={SPOOFED}"), ("x-forwarded-for", CLIENT), ("x-real-ip", SPOOFED))
    assert Identity(trusted=TRUSTED).address(request) == CLIENT


@HOMES
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], PROXY),
        ([CLIENT], CLIENT),
        ([f"{SPOOFED}, {CLIENT}"], CLIENT),
        ([f"{SPOOFED},{CLIENT},{NEAR}"], CLIENT),
        ([f"{SPOOFED}, {CLIENT} , {NEAR} ,\t10.9.9.9"], CLIENT),
        ([f"10.1.1.1, {CLIENT}, {NEAR}"], CLIENT),
        ([f"10.1.1.1, {NEAR}"], "10.1.1.1"),
        ([SPOOFED, CLIENT], CLIENT),
        ([f"{SPOOFED}, {CLIENT}", NEAR], CLIENT),
        ([CLIENT, NEAR, "10.0.0.3"], CLIENT),
        ([NEAR, CLIENT], CLIENT),
        ([f"{CLIENT}:5000"], CLIENT),
        (["[2001:db8:1:2:3::4]:5000"], "2001:db8:1:2::/64"),
        ([f"::ffff:{CLIENT}"], CLIENT),
        ([f"{CLIENT}, ::ffff:10.0.0.9"], CLIENT),
        ([f"{CLIENT}, fd00::1%eth0"], CLIENT),
    ],
)
def test_the_hops_are_walked_right_to_left_through_the_trusted(
    home: Any, lines: Sequence[str], expected: str
) -> None:
    assert forwarded_for(*lines, home=home) == expected


@HOMES
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("garbage", PROXY),
        ("", PROXY),
        ("unknown", PROXY),
        ("192.0.2.256", PROXY),
        (f"{SPOOFED}, garbage", PROXY),
        (f"{SPOOFED}, garbage, {NEAR}", NEAR),
        (f"{SPOOFED}, , {NEAR}", NEAR),
        (f"{SPOOFED}, _hidden, {NEAR}, 10.0.0.3", NEAR),
        (f"{SPOOFED} {SPOOFED}, {NEAR}", NEAR),
        (f"{SPOOFED}, {CLIENT}:http, {NEAR}", NEAR),
        (f"{SPOOFED}, " + "9" * 5000 + f", {NEAR}", NEAR),
        (f"garbage, {CLIENT}", CLIENT),
    ],
)
def test_a_malformed_hop_stops_the_walk(home: Any, line: str, expected: str) -> None:
    """What it hides cannot be known: the nearest hop that is known is counted."""
    assert forwarded_for(line, home=home) == expected


@HOMES
@pytest.mark.parametrize("start", ['"', '"x', 'x"', f'"{SPOOFED}', f'{SPOOFED}"', '\\"', '""", "'])
def test_no_quote_of_the_client_hides_the_hop_that_a_proxy_adds(home: Any, start: str) -> None:
    """X-Forwarded-For knows no quoted strings: each comma parts two hops."""
    assert forwarded_for(f"{start}, {CLIENT}", home=home) == CLIENT


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=255)))
def test_nothing_a_client_writes_changes_the_address_that_its_proxy_saw(written: str) -> None:
    for home in (scope, environ):
        assert forwarded_for(f"{written}, {CLIENT}", home=home) == CLIENT
        assert forwarded_for(written, CLIENT, home=home) == CLIENT


def test_a_header_of_one_address_is_read_by_the_same_walk() -> None:
    assert forwarded_for(CLIENT, header="x-real-ip") == CLIENT
    assert forwarded_for(SPOOFED, CLIENT, header="x-real-ip") == CLIENT
    assert forwarded_for("nobody", header="x-real-ip") == PROXY


# Forwarded, RFC 7239


@HOMES
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([f"for={CLIENT}"], CLIENT),
        ([f"For={CLIENT}"], CLIENT),
        ([f'FOR="{CLIENT}"'], CLIENT),
        ([f'for="{CLIENT}:5000"'], CLIENT),
        (['for="[2001:db8:cafe::17]"'], "2001:db8:cafe::/64"),
        (['for="[2001:db8:cafe::17]:4711"'], "2001:db8:cafe::/64"),
        ([f'for="[::ffff:{CLIENT}]"'], CLIENT),
        ([f"for={CLIENT};proto=http;by=203.0.113.43"], CLIENT),
        ([f"proto=https ; by=203.0.113.43 ; for={CLIENT}"], CLIENT),
        ([f'host="a;b,c";for={CLIENT}'], CLIENT),
        ([f'for={CLIENT};host="x;for={SPOOFED}"'], CLIENT),
        ([f'host="x;for={SPOOFED}";for={CLIENT}'], CLIENT),
        ([rf'host="\";for={SPOOFED}";for={CLIENT}'], CLIENT),
        ([f"xfor={SPOOFED};for={CLIENT}"], CLIENT),
        ([rf'for="{CLIENT[:-1]}\{CLIENT[-1]}"'], CLIENT),
        ([f"for={SPOOFED}, for={CLIENT}"], CLIENT),
        ([f'for={SPOOFED}, for={CLIENT}, for="{NEAR}:80";proto=http'], CLIENT),
        ([f"for={SPOOFED}", f"for={CLIENT}", f"for={NEAR}"], CLIENT),
        ([f'for="{SPOOFED}, {SPOOFED}", for={CLIENT}'], CLIENT),
    ],
)
def test_the_for_of_each_forwarded_element_is_a_hop(home: Any, lines: Sequence[str], expected: str) -> None:
    assert forwarded_for(*lines, header="forwarded", home=home) == expected


@HOMES
@pytest.mark.parametrize(
    "hop",
    [
        "for=unknown", "for=_hidden", 'for="_SEVKISEK"', 'for="unknown:80"', "for=", 'for=""', "for", "proto=https",
        f"by={SPOOFED}", f"for={SPOOFED};for={SPOOFED}", f'for="{SPOOFED}', f'for={SPOOFED}"',
        f"for={SPOOFED} {SPOOFED}", f"for='{SPOOFED}'", f"{SPOOFED}", f"for:{SPOOFED}", f'host="x;for={SPOOFED}"',
        f"for==({SPOOFED})", 'for="[::1"', f'for="{SPOOFED}"junk', "",
    ],
)  # fmt: skip
def test_an_element_that_tells_no_address_stops_the_walk(home: Any, hop: str) -> None:
    line = f"for={SPOOFED}, {hop}, for={NEAR}"
    if hop.count('"') % 2:
        line = hop  # what follows an open quote belongs to it
    assert forwarded_for(line, header="forwarded", home=home) == (PROXY if line == hop else NEAR)


@HOMES
@pytest.mark.parametrize("added", [f"for={CLIENT}", f'for="{CLIENT}:5000"', f"proto=http;for={CLIENT}"])
@pytest.mark.parametrize(
    "start",
    [f'for={SPOOFED};x="', f'for="{SPOOFED}";x="', f'for="{SPOOFED}', f'"for={SPOOFED}', f'for={SPOOFED};x="\\'],
)
def test_no_quote_that_the_client_leaves_open_makes_its_own_address_believed(
    home: Any, start: str, added: str
) -> None:
    found = forwarded_for(f"{start}, {added}", header="forwarded", home=home)
    assert found in (CLIENT, PROXY)


# Networks of IPv6


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (128, "2001:db8:1:2:3:4:5:6"),
        (64, "2001:db8:1:2::/64"),
        (56, "2001:db8:1::/56"),
        (48, "2001:db8:1::/48"),
        (1, "::/1"),
    ],
)
def test_clients_of_one_ipv6_network_are_one(prefix: int, expected: str) -> None:
    assert Identity(ipv6_prefix=prefix).address(scope("2001:db8:1:2:3:4:5:6")) == expected


def test_ipv6_clients_are_told_apart_by_their_64_bits_by_default() -> None:
    identity = Identity()
    addresses = [identity.address(scope(text)) for text in ("2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1")]
    assert addresses[0] == addresses[1] != addresses[2]


@pytest.mark.parametrize("prefix", [1, 64, 96, 128])
def test_mapped_ipv4_clients_are_unmapped_before_the_prefix(prefix: int) -> None:
    """Else all IPv4 clients of a socket that takes both would share one bucket."""
    identity = Identity(ipv6_prefix=prefix, trusted=TRUSTED)
    assert identity.address(scope("::ffff:192.0.2.1")) == "192.0.2.1"
    assert identity.address(scope("::ffff:192.0.2.2")) == "192.0.2.2"
    assert identity.address(scope(f"::ffff:{PROXY}", ("x-forwarded-for", CLIENT))) == CLIENT


def test_one_client_has_one_name_however_its_address_is_spelt() -> None:
    identity = Identity(ipv6_prefix=128)
    spellings = ("2001:db8::1", "2001:DB8::1", "2001:0db8:0:0::1", "[2001:db8::1]:80", "2001:db8::1%eth0")
    assert {identity.address(scope(text)) for text in spellings} == {"2001:db8::1"}


def test_a_peer_without_an_address_keeps_its_name_within_bounds() -> None:
    assert Identity().address(scope("testclient")) == "testclient"
    assert len(Identity().address(scope("x" * 10_000))) <= 64


# What is remembered


def test_what_is_remembered_is_bounded_under_a_rotation_of_addresses() -> None:
    identity = Identity(trusted=TRUSTED)
    most = 0
    for number in range(20_000):
        written = str(ipaddress.IPv4Address((198 << 24) + number))
        assert identity.address(scope(PROXY, ("x-forwarded-for", written))) == written
        identity.address(scope(PROXY, ("x-forwarded-for", f"made up {number}")))
        identity.address(scope(PROXY, ("x-forwarded-for", f"{number}".rjust(1000, "x"))))
        most = max(most, len(identity._known))
    assert most <= 8192
    assert max(map(len, identity._known)) <= 64
    assert identity.address(scope(PROXY, ("x-forwarded-for", CLIENT))) == CLIENT


def test_what_is_remembered_of_a_hop_does_not_change_what_a_peer_is() -> None:
    identity = Identity(trusted=TRUSTED)
    for _ in range(2):
        assert identity.address(scope(PROXY, ("x-forwarded-for", f"{SPOOFED}, {CLIENT}"))) == CLIENT
        assert identity.address(scope(CLIENT, ("x-forwarded-for", SPOOFED))) == CLIENT
        assert identity.address(scope(PROXY)) == PROXY


# The user


@HOMES
def test_a_user_is_read_from_a_field_of_trusted_peers_only(home: Any) -> None:
    identity = Identity(trusted=TRUSTED, user_field="x-user")
    assert identity.named_user(home(PROXY, ("x-user", "alice"))) == "alice"
    assert identity.named_user(home(f"::ffff:{PROXY}", ("x-user", "alice"))) == "alice"
    assert identity.named_user(home(CLIENT, ("x-user", "alice"))) is None
    assert identity.named_user(home(CLIENT, ("x-user", "alice"), ("x-forwarded-for", PROXY))) is None
    assert identity.named_user(home("testclient", ("x-user", "alice"))) is None
    assert identity.named_user(home(None, ("x-user", "alice"))) is None


@HOMES
def test_a_user_is_read_from_a_unix_peer_when_that_is_named(home: Any) -> None:
    assert Identity(unix=True, user_field="x-user").named_user(home(None, ("x-user", "alice"))) == "alice"


@HOMES
def test_without_a_named_field_or_with_an_empty_one_there_is_no_user(home: Any) -> None:
    assert Identity(trusted=TRUSTED).named_user(home(PROXY, ("x-user", "alice"))) is None
    identity = Identity(trusted=TRUSTED, user_field="x-user")
    assert identity.named_user(home(PROXY)) is None
    assert identity.named_user(home(PROXY, ("x-user", ""))) is None
