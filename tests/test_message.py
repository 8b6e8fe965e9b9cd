"""One request gives the same values whether it came as an ASGI scope or as a WSGI environ."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.http.message import EnvironRequest, Request, ScopeRequest, split_list

Headers = list[tuple[str, str]]


def as_scope(
    target: str = "/",
    method: str = "GET",
    headers: Headers | None = None,
    peer: str | None = "192.0.2.1",
    mount: str = "",
) -> ScopeRequest:
    """The scope that a server makes of a request; `target` and `mount` are percent-encoded."""
    return ScopeRequest(
        {
            "type": "http",
            "method": method,
            "path": unquote(mount + target),
            "root_path": unquote(mount),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers or []],
            "client": None if peer is None else (peer, 40_000),
        }
    )


def as_environ(
    target: str = "/",
    method: str = "GET",
    headers: Headers | None = None,
    peer: str | None = "192.0.2.1",
    mount: str = "",
) -> EnvironRequest:
    """The environ that a server makes of the same request (PEP 3333)."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": unquote_to_bytes(mount).decode("latin-1"),
        "PATH_INFO": unquote_to_bytes(target).decode("latin-1"),
    }
    for name, value in headers or []:
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = "HTTP_" + key
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    if peer is not None:
        environ["REMOTE_ADDR"] = peer
    return EnvironRequest(environ)


HOMES = pytest.mark.parametrize("home", [as_scope, as_environ])


@HOMES
@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a%20b", "/a b"),
        ("/a%2Fb", "/a/b"),
        ("/caf%C3%A9", "/café"),
        ("/%E2%82%AC", "/€"),
        ("/%F0%9F%9A%AA", "/🚪"),
        ("/caf%E9", "/caf\N{REPLACEMENT CHARACTER}"),
        ("/%252e%252e", "/%2e%2e"),
        ("/%0A", "/\n"),
        ("//a/../b/", "//a/../b/"),
    ],
)
def test_the_path_is_decoded_once_as_utf_8_and_left_as_it_is(home: Any, target: str, path: str) -> None:
    assert home(target).path == path


@HOMES
def test_the_path_begins_with_the_mount_prefix(home: Any) -> None:
    assert home("/x", mount="/caf%C3%A9").path == "/café/x"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=20), st.sampled_from(["", "/app", "/%C3%A9"]))
def test_any_bytes_give_the_same_path_in_both_homes(raw: bytes, mount: str) -> None:
    target = "/" + quote_from_bytes(raw, safe="/")
    assert as_scope(target, mount=mount).path == as_environ(target, mount=mount).path


@HOMES
@pytest.mark.parametrize("method", ["post", "Post", "POST"])
def test_the_method_is_in_upper_case(home: Any, method: str) -> None:
    assert home(method=method).method == "POST"


def test_a_websocket_begins_as_a_get() -> None:
    assert ScopeRequest({"type": "websocket", "path": "/ws", "headers": []}).method == "GET"


@HOMES
@pytest.mark.parametrize("peer", ["192.0.2.1", "2001:db8::1", "testclient"])
def test_the_peer_is_the_other_end_of_the_connection(home: Any, peer: str) -> None:
    assert home(peer=peer).peer == peer


@HOMES
def test_a_peer_on_a_unix_socket_has_no_address(home: Any) -> None:
    assert not home(peer=None).peer
    assert not home(peer="").peer


HEADERS: Headers = [
    ("Host", "example.com"),
    ("X-User", "élan"),
    ("X-Empty", ""),
    ("Content-Type", "text/plain"),
    ("Content-Length", "3"),
]


@HOMES
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "example.com"),
        ("x-user", "élan"),
        ("x-empty", ""),
        ("content-type", "text/plain"),
        ("content-length", "3"),
        ("x-none", None),
        ("http-host", None),
        ("request-method", None),
    ],
)
def test_a_field_is_found_by_its_name_in_lower_case(home: Any, name: str, value: str | None) -> None:
    request: Request = home(headers=HEADERS)
    assert request.field(name) == value
    assert request.fields(name) == ([] if value is None else [value])


def test_a_scope_keeps_repeated_fields_apart_in_their_order_and_an_environ_has_them_joined() -> None:
    headers = [("X-Tag", "a"), ("Host", "h"), ("X-Tag", "b, c")]
    assert as_scope(headers=headers).fields("x-tag") == ["a", "b, c"]
    assert as_environ(headers=headers).fields("x-tag") == ["a,b, c"]
    # What names a user or a key is therefore read joined, so that both homes see one value.
    assert as_scope(headers=headers).field("x-tag") == as_environ(headers=headers).field("x-tag") == "a,b, c"


def test_a_scope_whose_names_are_not_in_lower_case_is_read_too() -> None:
    scope = {"type": "http", "path": "/", "method": "GET", "headers": [(b"X-User", b"u"), (b"x-USER", b"v")]}
    assert ScopeRequest(scope).field("x-user") == "u,v"
    assert ScopeRequest(scope).fields("x-user") == ["u", "v"]


def test_an_environ_without_path_or_peer_is_read_too() -> None:
    request = EnvironRequest({"REQUEST_METHOD": "OPTIONS"})
    assert (request.path, request.peer) == ("", None)


def test_what_a_request_came_as_is_kept_as_it_is() -> None:
    scope = {"type": "http", "path": "/", "method": "GET", "headers": []}
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
    assert ScopeRequest(scope).native is scope
    assert EnvironRequest(environ).native == environ


TOKENS = st.text("abc;= .:[]", min_size=1).map(lambda text: text.strip() or "a")
MEMBERS = TOKENS | st.text('ab,\\" ').map(lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(MEMBERS, min_size=1, max_size=4), max_size=4))
def test_the_members_of_a_list_are_the_same_in_both_homes(lines: list[list[str]]) -> None:
    headers = [("X-List", ", ".join(members)) for members in lines]
    expected = [member for members in lines for member in members]
    assert split_list(as_scope(headers=headers).fields("x-list")) == expected
    assert split_list(as_environ(headers=headers).fields("x-list")) == expected


@pytest.mark.parametrize(
    ("values", "members"),
    [
        ([], []),
        (["a"], ["a"]),
        (["a,b"], ["a", "b"]),
        ([" a ,\tb\t"], ["a", "b"]),
        (["a", "b,c"], ["a", "b", "c"]),
        (['"a,b",c'], ['"a,b"', "c"]),
        (['x="a,b";y, z'], ['x="a,b";y', "z"]),
        ([r'"a\",b",c'], [r'"a\",b"', "c"]),
        ([r'"a\\",b'], [r'"a\\"', "b"]),
        ([r"a\,b"], ["a\\", "b"]),
        (['"a', "b"], ['"a', "b"]),  # a line ends what it left open
    ],
)
def test_a_list_is_split_at_commas_outside_quoted_strings(values: list[str], members: list[str]) -> None:
    assert split_list(values) == members


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text() | st.text('",\\ a')))
def test_no_text_breaks_the_splitting_of_lists(values: list[str]) -> None:
    assert len(split_list(values)) <= sum(value.count(",") + 1 for value in values)
