"""Heads and bodies on the wire, without a socket: read strictly, in whatever pieces they come, and written anew."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import Any, Final, TypeVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gatekeeper.proxy import wire
from gatekeeper.proxy.wire import (
    CHUNKED,
    LONGEST_EXTENSION,
    LONGEST_LINE,
    LONGEST_TRAILERS,
    MOST_RESPONSE_FIELDS,
    UNTIL_CLOSE,
    Body,
    ResponseHead,
    WireError,
    WireRequest,
    chunk,
    connection_options,
    content_length,
    request_body,
    response_body,
    without,
)

T = TypeVar("T")


def head(line: str, *fields: str, host: str | None = "a.example") -> bytes:
    """A request's head, as it is read: without the empty line. HTTP/1.1 if the line names no version."""
    start = line if " HTTP/" in line else f"{line} HTTP/1.1"
    lines = [start, *([f"Host: {host}"] if host is not None else []), *fields]
    return "\r\n".join(lines).encode("latin-1")


def read(raw: bytes, **bounds: int) -> WireRequest:
    request = WireRequest()
    request.read(raw, **bounds)
    return request


def refused(raw: bytes, **bounds: int) -> int:
    with pytest.raises(WireError) as caught:
        read(raw, **bounds)
    return caught.value.status


def answered(line: str, *fields: str, method: str = "GET") -> ResponseHead:
    return reply("\r\n".join([f"HTTP/1.1 {line}", *fields]).encode("latin-1"), method)


def reply(raw: bytes, method: str = "GET") -> ResponseHead:
    return ResponseHead(raw, to_head=method == "HEAD")


def told(lines: Iterable[bytes]) -> list[str]:
    """Field lines with one space behind the colon, and none at the end."""
    return [
        f"{name}: {value.strip()}" for name, _, value in (line.decode("latin-1").partition(":") for line in lines)
    ]


# ------------------------------------------------------------------------------------------- heads of requests


def test_a_head_is_read_into_what_goes_on_and_what_does_not() -> None:
    request = read(
        head(
            "POST /a%20b?x=%2e%2e/;y",
            "Accept:text/html ",
            "X-Forwarded-For: 192.0.2.1",
            "Via: 1.1 other",
            "Content-Length: 12",
            "Connection: Keep-Alive, X-Own",
            "Keep-Alive: timeout=5",
            "X-Own: 1",
            "X_User: eve",
            "Proxy: http://x",
            "Expect: 100-Continue",
            "Max-Forwards: 7",
            "accept: text/plain",
        )
    )
    assert (request.method, request.verb) == ("POST", b"POST")
    assert (request.target, request.path) == (b"/a%20b?x=%2e%2e/;y", "/a b")
    assert request.host == b"a.example"
    assert told(request.lines) == ["Accept: text/html", "Via: 1.1 other", "Max-Forwards: 7", "accept: text/plain"]
    assert [(field.name, field.value) for field in request.forwarding] == [(b"x-forwarded-for", b"192.0.2.1")]
    assert request.via == [b"1.1 other"]
    assert (request.length, request.keeps_alive, request.is_old, request.expects) == (12, True, False, True)
    assert (request.max_forwards, request.readings) == (None, ())  # it is for OPTIONS
    assert request.fields("accept") == ["text/html", "text/plain"]
    assert request.field("accept") == "text/html,text/plain"
    assert (request.field("x_user"), request.field("x-user"), request.fields("none")) == (None, None, [])


def test_a_request_has_nothing_of_the_one_before_that_was_read_by_the_same_object() -> None:
    request = read(head("POST /a%2Fb", "Content-Length: 5", "Connection: close", "Via: x", "X-Real-IP: y"))
    request.read(head("GET /"))
    assert (request.length, request.keeps_alive, request.lines, request.forwarding, request.via) == (
        0,
        True,
        [],
        [],
        [],
    )


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /", 0),
        ("get /", 0),
        ("M-SEARCH /", 0),
        ("OPTIONS *", 0),
        ("GET http://b.example/x", 0),
        ("GET HTTPS://b.example", 0),
        ("GET / HTTP/1.0", 0),
        ("GET  /", 400),
        (" GET /", 400),
        ("GET /\tx", 400),
        ("GET", 400),
        ("G(T /", 400),
        ("G" * 33 + " /", 400),
        ("GET *", 400),
        ("GET x", 400),
        ("GET ?x", 400),
        ("GET /#x", 400),
        ("GET /\\x", 400),
        ("GET /\xe9", 400),
        ("GET /\x7f", 400),
        ("GET /\0", 400),
        ("GET /%00", 400),
        ("GET /%", 400),
        ("GET /%2", 400),
        ("GET /%zz", 400),
        ("GET /?%zz", 0),
        ("GET ftp://b.example/", 400),
        ("GET http:///x", 400),
        ("GET http://u@b.example/", 400),
        ("GET http://b.example:123456/", 400),
        ("GET http://[::1/", 400),
        ("CONNECT b.example:443", 405),
        ("CONNECT http://b.example/", 405),
        ("GET / HTTP/0.9", 505),
        ("GET / HTTP/1.2", 505),
        ("GET / HTTP/2.0", 505),
        ("GET / HTTP/11", 400),
        ("GET / http/1.1", 400),
        ("GET / HTTP/1.1 ", 400),
        ("GET / RTSP/1.0", 400),
        ("GET /" + "x" * (LONGEST_LINE - 14), 0),
        ("GET /" + "x" * (LONGEST_LINE - 13), 414),
    ],
)
def test_a_request_line_is_three_words_of_its_grammar(line: str, status: int) -> None:
    raw = head(line) if " HTTP/" in line or " RTSP/" not in line else line.encode() + b"\r\nHost: a"
    assert (refused(raw) if status else 0) == status
    if not status:
        read(raw)


@pytest.mark.parametrize(
    "line",
    [
        "X : 1", "X\t: 1", " X: 1", "X", ": 1", "", "X: a\rb", "X: a\nb", "X: a\0b", "X: a\x7fb", "X: a\x1bb", "X(y): 1", "X\xe9: 1",
        "X: 1\n", "\nX: 1", "X: 1\r", '"X": 1', "X y: 1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1])
def test_a_field_line_is_a_token_a_colon_and_a_value_in_both_directions(line: str, place: int) -> None:
    fields = ["Y: 2", line] if place else [line, "Y: 2"]
    assert refused(head("GET /", *fields)) == 400
    with pytest.raises(WireError) as caught:
        answered("200 OK", *fields)
    assert caught.value.status == 502


@pytest.mark.parametrize(
    "line", ["X:", "X: ", "X:\t1\t ", "x!#$%&'*+.^`|~09: 1", "X: caf\xe9", "X: a\tb : c", "X:1"]
)
def test_a_field_line_may_be_odd_and_goes_on_as_it_is_meant(line: str) -> None:
    meant = told([line.encode("latin-1")])
    for _ in range(2):  # as a line that is new, and as one that was seen
        assert told(read(head("GET /", line)).lines) == meant
        assert told(answered("200 OK", line).lines) == meant


@pytest.mark.parametrize(
    "host", ["a", "a.example:80", "A.B.:", "[::1]", "[::1]:8080", "192.0.2.1", "a,b", "x%41", "a" * 255]
)
def test_a_host_that_is_an_authority_is_taken_as_it_is(host: str) -> None:
    assert read(head("GET /", host=host)).host == host.encode()


@pytest.mark.parametrize(
    "fields",
    [
        [], ["Host:"], ["Host: a b"], ["Host: a/b"], ["Host: a@b"], ["Host: a#b"], ["Host: a:b"], ["Host: a:123456"],
        ["Host: [::1"], ["Host: ::1"], ["Host: [x]"], ["Host: a%4"], ["Host: \xe9"], ["Host: a", "Host: a"],
        ["Host: a", "hOST: b"], ["Host: " + "a" * 256], ['Host: "a"'], ["Host: a\\b"], ["Host: a?b"],
    ],
)  # fmt: skip
def test_a_request_without_one_valid_host_is_refused(fields: list[str]) -> None:
    assert refused(head("GET /", *fields, host=None)) == 400
    assert refused(head("GET http://b.example/", *fields, host=None)) == 400
    if fields:
        assert refused(head("GET / HTTP/1.0", *fields, host=None)) == 400


def test_http_1_0_need_not_name_a_host() -> None:
    assert read(head("GET / HTTP/1.0", host=None)).host is None


@pytest.mark.parametrize(
    ("target", "host", "rest"),
    [
        ("http://b.example/x?y", b"b.example", b"/x?y"),
        ("http://b.example", b"b.example", b"/"),
        ("http://b.example?y", b"b.example", b"/?y"),
        ("HTTPS://B.example:81/../x", b"B.example:81", b"/x"),
        ("http://[::1]:81//x", b"[::1]:81", b"//x"),
    ],
)
def test_the_absolute_form_names_the_host_for_everybody(target: str, host: bytes, rest: bytes) -> None:
    request = read(head(f"GET {target}", "Accept: */*"))
    assert (request.host, request.target, request.fields("host")) == (host, rest, [host.decode()])
    assert request.lines == [b"Accept: */*"]


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ([], 0),
        (["Content-Length: 0"], 0),
        (["Content-Length: 007"], 7),
        (["Content-Length: 5", "content-length: 5"], 5),
        (["Content-Length: 5, 5"], 5),
        (["Content-Length: " + "9" * 18], 10**18 - 1),
        (["Transfer-Encoding: chunked"], CHUNKED),
        (["transfer-encoding:\tCHUNKED "], CHUNKED),
    ],
)
def test_a_request_body_has_one_framing(fields: list[str], length: int) -> None:
    request = read(head("GET /", *fields))
    assert (request.length, request.lines) == (length, [])


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (["Content-Length: 5", "Content-Length: 6"], 400),
        (["Content-Length: 5, 6"], 400),
        (["Content-Length: 5,"], 400),
        (["Content-Length:"], 400),
        (["Content-Length: +5"], 400),
        (["Content-Length: 5_0"], 400),
        (["Content-Length: 0x5"], 400),
        (["Content-Length: \xb2"], 400),
        (["Content-Length: " + "9" * 19], 400),
        (["Content-Length: 5", "Transfer-Encoding: chunked"], 400),
        (["Transfer-Encoding: chunked", "Content-Length: 0"], 400),
        (["Transfer-Encoding: chunked, chunked"], 400),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 400),
        (["Transfer-Encoding: chunked, gzip"], 400),
        (["Transfer-Encoding: identity"], 400),
        (["Transfer-Encoding:"], 400),
        (["Transfer-Encoding: xchunked"], 400),
        (["Transfer-Encoding: chunked;a=b"], 400),
        (["Transfer-Encoding: \x0bchunked"], 400),
        (["Transfer-Encoding: gzip, chunked"], 501),
        (["Transfer-Encoding: gzip", "Transfer-Encoding: chunked"], 501),
        (["Expect: 100-continues"], 417),
        (["Expect: 200-ok"], 417),
    ],
)
def test_a_request_whose_framing_can_be_doubted_is_refused(fields: list[str], status: int) -> None:
    assert refused(head("POST /", *fields)) == status


def test_http_1_0_has_no_transfer_codings() -> None:
    assert refused(head("POST / HTTP/1.0", "Transfer-Encoding: chunked")) == 400


def test_a_head_has_so_many_fields_and_no_more() -> None:
    fields = [f"X-{number}: 1" for number in range(9)]
    assert len(read(head("GET /", *fields), most_fields=10).lines) == 9
    assert refused(head("GET /", *fields), most_fields=9) == 431
    answered("200 OK", *["X: 1"] * MOST_RESPONSE_FIELDS)
    with pytest.raises(WireError):
        answered("200 OK", *["X: 1"] * (MOST_RESPONSE_FIELDS + 1))


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        ("1.1", [], True),
        ("1.1", ["close"], False),
        ("1.1", ["x, CLOSE ,y"], False),
        ("1.1", ["keep-alive", "close"], False),
        ("1.1", ["closed"], True),
        ("1.1", [""], True),
        ("1.0", [], False),
        ("1.0", ["Keep-Alive"], True),
        ("1.0", ["keep-alive, close"], False),
    ],
)
def test_whether_a_connection_is_kept(version: str, connection: list[str], keeps: bool) -> None:
    fields = [f"Connection: {value}" for value in connection]
    assert read(head(f"GET / HTTP/{version}", *fields)).keeps_alive is keeps
    raw = "\r\n".join([f"HTTP/{version} 200 OK", *fields]).encode()
    assert reply(raw).keeps_alive is keeps


@pytest.mark.parametrize("named", ["X-Api-Key", "x-api-KEY", "a, ,X-Api-Key", "X-Api-Key,close", "\tX-Api-Key\t"])
def test_connection_takes_away_the_fields_it_names(named: str) -> None:
    raw = head("GET /", "X-Api-Key: 1", f"Connection: {named}", "X-API-key: 2", "X-Api-Keys: 3")
    assert read(raw).lines == [b"X-Api-Keys: 3"]
    assert answered("200 OK", "X-Api-Key: 1", f"Connection: {named}", "Set-Cookie: a").lines == [b"Set-Cookie: a"]


@pytest.mark.parametrize(
    "name",
    ["Host", "Authorization", "Cookie", "Content-Type", "Via", "Max-Forwards", "Origin", "Cache-Control", "Date"],
)
def test_connection_cannot_take_away_what_others_rely_on(name: str) -> None:
    fields = [] if name == "Host" else [f"{name}: 1"]
    request = read(head("GET /", *fields, f"Connection: {name.lower()}"))
    assert request.host == b"a.example"
    assert request.lines == [field.encode() for field in fields]


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Anything", "Forwarded", "X-Real-IP"])
def test_connection_cannot_take_away_what_a_proxy_said_and_framing(name: str) -> None:
    request = read(head("POST /", f"{name}: 1", f"Connection: {name}, content-length", "Content-Length: 3"))
    assert [claim.line for claim in request.forwarding] == [f"{name}: 1".encode()]
    assert request.length == 3


def test_the_options_of_a_connection_are_names_in_lower_case() -> None:
    assert connection_options([b"Close, X-A", b"x-b\t"]) == {b"close", b"x-a", b"x-b"}
    lines = [b"X-A: 1", b"X-C: 2"]
    assert without(lines, {b"x-a"}) == [b"X-C: 2"]
    assert without(lines, {b"close"}) == lines


@pytest.mark.parametrize(("values", "length"), [(["0"], 0), (["5", "5"], 5), (["5,\t5 "], 5), (["0" * 18], 0)])
def test_a_content_length_is_one_number(values: list[str], length: int) -> None:
    assert content_length([value.encode() for value in values], 400) == length


@pytest.mark.parametrize("status", [400, 502])
@pytest.mark.parametrize(
    "values", [[""], ["5", "6"], ["5,6"], ["-1"], ["1.0"], ["5 5"], ["٣"], ["0" * 19], ["5", ""], ["5", "05"]]
)
def test_a_content_length_that_is_not_one_number_is_refused(values: list[str], status: int) -> None:
    with pytest.raises(WireError) as caught:
        content_length([value.encode() for value in values], status)
    assert caught.value.status == status


@given(
    st.lists(
        st.text(st.characters(codec="latin-1"), max_size=20).map(lambda text: text.encode("latin-1")), min_size=1
    )
)
def test_no_content_length_is_read_that_is_not_of_ascii_digits(values: list[bytes]) -> None:
    try:
        length = content_length(values, 400)
    except WireError:
        return
    for value in values:
        for part in value.split(b","):
            assert re.fullmatch(rb"[ \t]*[0-9]+[ \t]*", part)
            assert int(part) == length


# ------------------------------------------------------------------------------------------------------- targets


def rfc3986(path: str) -> str:
    """RFC 3986, 5.2.4, word by word."""
    output = ""
    while path:
        if path.startswith("../"):
            path = path[3:]
        elif path.startswith("./"):
            path = path[2:]
        elif path.startswith("/./") or path == "/.":
            path = "/" + path[3:]
        elif path.startswith("/../") or path == "/..":
            path = "/" + path[4:]
            output = output.rpartition("/")[0]
        elif path in (".", ".."):
            path = ""
        else:
            end = path.find("/", 1)
            end = len(path) if end < 0 else end
            output, path = output + path[:end], path[end:]
    return output


def plain_dots(path: str) -> str:
    """Dot segments that are encoded, written as such."""
    return re.sub(r"(?<=/)(?:\.|%2[eE]){1,2}(?=/|\Z)", lambda dots: re.sub("%2[eE]", ".", dots[0]), path)


segments = st.one_of(
    st.sampled_from(
        ["", ".", "..", "...", "%2e", "%2E%2e", ".%2e", "%2e.", "a", "b.", ".c", "%2ea", "..;x", "%252e"]
    ),
    st.text("ab.%2eE", max_size=4).filter(lambda text: not re.search("%(?![0-9A-Fa-f]{2})", text)),
)


@settings(max_examples=500)
@given(st.lists(segments, max_size=8), st.sampled_from(["", "?", "?x=/../%2e/&y", "?/.."]))
def test_dot_segments_are_removed_as_rfc_3986_says_and_nothing_else_is_touched(
    parts: list[str], query: str
) -> None:
    path = "/" + "/".join(parts)
    request = read(head(f"GET {path}{query}"))
    assert request.target.decode() == rfc3986(plain_dots(path)) + query


@pytest.mark.parametrize(
    ("target", "path", "readings"),
    [
        ("/a/b", "/a/b", None),
        ("/a%20b?x=%2F;%25", "/a b", None),
        ("/caf%C3%A9", "/café", None),
        ("/a%2Fb", "/a/b", {"/a%2Fb"}),
        ("/a%2fb", "/a/b", {"/a%2Fb"}),
        ("/a%5Cb", "/a\\b", {"/a/b"}),
        ("/a%5cb", "/a\\b", {"/a/b"}),
        ("/a;x=1/b", "/a;x=1/b", {"/a/b"}),
        ("/a%3Bx/b", "/a;x/b", None),
        ("/a%2561", "/a%61", {"/aa"}),
        ("/a%252Fb", "/a%2Fb", {"/a/b"}),
        ("/a%255Cb;x", "/a%5Cb;x", {"/a/b", "/a\\b;x", "/a%5Cb"}),
        ("/x/..%2Fa", "/x/../a", {"/x/..%2Fa"}),
    ],
)
def test_what_other_servers_may_read_in_a_target(target: str, path: str, readings: set[str] | None) -> None:
    request = read(head(f"GET {target}"))
    assert request.path == path
    assert request.target == target.encode()
    if readings is None:
        assert request.readings == ()
    else:
        assert readings <= set(request.readings)


visible = st.text(st.sampled_from("/.;%?aAeE0125fFcC"), max_size=30).map(lambda text: "/" + text)


@settings(max_examples=400)
@given(visible)
def test_a_target_without_rare_characters_has_one_reading_and_a_path_is_none_of_the_others(target: str) -> None:
    try:
        request = read(head(f"GET {target}"))
    except WireError:
        assert re.search("%(?![0-9A-Fa-f]{2})|%00", target.partition("?")[0])
        return
    assert request.path not in request.readings
    if not re.search("%2f|%5c|%25|;", target, re.IGNORECASE):
        assert request.readings == ()


# -------------------------------------------------------------------------------------------- heads of responses


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("200 OK", b"200 OK"),
        ("200 ", b"200 "),
        ("200", b"200 "),
        ("599 Caf\xe9 \t x", b"599 Caf\xe9 \t x"),
        ("100 Continue", b"100 Continue"),
    ],
)
def test_a_status_line_goes_on_as_it_was(line: str, reason: bytes) -> None:
    response = answered(line)
    assert (response.status, response.reason) == (int(line[:3]), reason)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1  200 OK", b"HTTP/1.1 20", b"HTTP/1.1 2000", b"HTTP/1.1 099 x",
        b"HTTP/1.1 2x0", b"HTTP/1.1 200\tOK", b"HTTP/1.2 200 OK", b"HTTP/2 200", b"HTTP/0.9 200 OK", b"http/1.1 200 OK",
        b" HTTP/1.1 200 OK", b"HTTP/1.1 200 a\0b", b"HTTP/1.1 200 a\rb", b"HTTP/1.1 200 a\nb", b"ICY 200 OK",
        b"HTTP/1.1 \xd9\xa2\xd9\xa0\xd9\xa0 OK", b"\nHTTP/1.1 200 OK", b"SSH-2.0-OpenSSH",
    ],
)  # fmt: skip
def test_what_is_no_status_line_is_a_502(line: bytes) -> None:
    with pytest.raises(WireError) as caught:
        reply(line)
    assert caught.value.status == 502


LENGTH, BARE, CHUNKS = ["Content-Length: 5"], list[str](), ["Transfer-Encoding: Chunked"]


@pytest.mark.parametrize(
    ("method", "status", "fields", "length", "told"),
    [
        ("GET", 200, LENGTH, 5, 5),
        ("GET", 200, BARE, UNTIL_CLOSE, None),
        ("GET", 200, CHUNKS, CHUNKED, None),
        ("GET", 200, ["Content-Length: 0"], 0, 0),
        ("POST", 404, LENGTH, 5, 5),
        ("GET", 205, LENGTH, 5, 5),
        ("OPTIONS", 500, BARE, UNTIL_CLOSE, None),
        ("HEAD", 200, LENGTH, 0, 5),
        ("HEAD", 200, BARE, 0, None),
        ("HEAD", 200, CHUNKS, 0, None),
        ("HEAD", 404, LENGTH, 0, 5),
        ("HEAD", 304, LENGTH, 0, 5),
        ("HEAD", 204, LENGTH, 0, None),
        ("GET", 304, LENGTH, 0, 5),
        ("GET", 304, BARE, 0, None),
        ("GET", 304, CHUNKS, 0, None),
        ("GET", 204, LENGTH, 0, None),
        ("GET", 204, CHUNKS, 0, None),
        ("GET", 204, BARE, 0, None),
        ("POST", 100, BARE, 0, None),
        ("POST", 100, LENGTH, 0, None),
        ("POST", 103, CHUNKS, 0, None),
        ("GET", 101, BARE, 0, None),
        ("GET", 199, LENGTH, 0, None),
    ],
)
def test_what_has_no_body_has_none_whatever_its_fields_say(
    method: str, status: int, fields: list[str], length: int, told: int | None
) -> None:
    response = answered(f"{status} x", "X: 1", *fields, method=method)
    assert (response.length, response.told) == (length, told)
    assert response.lines == [b"X: 1"], "framing is written anew"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", [100, 200, 204, 304])
@pytest.mark.parametrize(
    "raw",
    [
        "HTTP/1.1 %d x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        "HTTP/1.1 %d x\r\nContent-Length: 5\r\nContent-Length: 6",
        "HTTP/1.1 %d x\r\nContent-Length: x",
        "HTTP/1.1 %d x\r\nTransfer-Encoding: gzip",
        "HTTP/1.1 %d x\r\nTransfer-Encoding: gzip, chunked",
        "HTTP/1.1 %d x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "HTTP/1.1 %d x\r\nTransfer-Encoding: ",
        "HTTP/1.0 %d x\r\nTransfer-Encoding: chunked",
    ],
)
def test_a_response_whose_framing_can_be_doubted_is_a_502_even_if_it_has_no_body(
    raw: str, status: int, method: str
) -> None:
    with pytest.raises(WireError) as caught:
        reply((raw % status).encode(), method)
    assert caught.value.status == 502


def test_fields_of_a_response_go_on_apart_and_in_order_and_those_of_its_connection_do_not() -> None:
    response = answered(
        "200 OK",
        "Set-Cookie: a=1",
        "Connection: X-Own",
        "X_Y: kept",
        "set-cookie: b=2, c",
        "Keep-Alive: timeout=5",
        "X-Own: 1",
        "Proxy-Authenticate: Basic",
        "Upgrade: h2c",
        "Trailer: X",
        "TE: x",
        "Via: 1.1 inner",
        "Set-Cookie: a=1",
    )
    assert response.lines == [
        b"Set-Cookie: a=1", b"X_Y: kept", b"set-cookie: b=2, c", b"Via: 1.1 inner", b"Set-Cookie: a=1",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- heads at random

LINES: Final = [
    "Host: b.example", "Host: a b", "Connection: close", "Connection: x-a, x_b,cookie", "Connection: ,", "X-A: 1", "x-a:2",
    "X_B: 3", "Content-Length: 5", "Content-Length: 5,5", "content-length: 6", "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked", "Expect: 100-continue", "Via: 1.0 x", "Max-Forwards: 0", "X-Forwarded-For: 1",
    "X-Forwarded-Host:  y ", "Forwarded: for=_x", "Cookie: a=b", "Set-Cookie: a=b", "Authorization: Basic x", "TE: trailers",
    "Trailer: X", "Upgrade: websocket", "Proxy: x", "Proxy-Connection: keep-alive", "Keep-Alive: 1", "Accept:\t*/* ", "X-Empty:",
    "X: caf\xe9", "X: a:b", "Date: now",
]  # fmt: skip
VERBS: Final = ["GET", "HEAD", "POST", "OPTIONS", "post", "CONNECT", "TRACE", "M-X", "ſ"]
TARGETS: Final = ["/", "/a/../b", "/a%2Fb;c/%2e", "*", "http://c.example/x/./y?z", "http://c.example", "/x?y=%", "//x//..", "c.example:443"]  # fmt: skip
request_lines = st.builds(
    "{} {} {}".format,
    st.sampled_from(VERBS),
    st.one_of(st.sampled_from(TARGETS), visible),
    st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0"]),
)
status_lines = st.builds(
    "{} {} {}".format,
    st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0"]),
    st.sampled_from([100, 103, 200, 204, 304, 404, 503]),
    st.sampled_from(["", "OK", "a  b ", "\xe9"]),
)


def heads(start: st.SearchStrategy[str], hosts: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Heads that are well-formed often enough."""
    return st.builds(
        lambda line, first, fields: "\r\n".join([line, *first, *fields]).encode("latin-1", "replace"),
        start,
        st.sampled_from([[host] for host in hosts] or [[]]),
        st.lists(st.sampled_from(LINES[2:]), max_size=8),
    )


def spoilt(heads: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Heads with some bytes put in, or cut out, anywhere; and what never was one."""

    def spoil(raw: bytes, place: int, cut: int, junk: bytes) -> bytes:
        at = place % (len(raw) + 1)
        return raw[:at] + junk + raw[at + cut :]

    junk = st.one_of(
        st.sampled_from(
            [b"", b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b"\r\n ", b"\xff", b"%", b"%00", b",", b"_"]
        ),
        st.binary(max_size=8),
    )
    return st.one_of(
        st.builds(spoil, heads, st.integers(0, 4000), st.integers(0, 3), junk), heads, st.binary(max_size=60)
    )


def understood(reading: Callable[[], T], *statuses: int) -> T | None:
    """What was read; None if it was refused, with one of these statuses."""
    try:
        return reading()
    except WireError as error:
        if error.status not in statuses:
            raise
        return None


requests = heads(request_lines, ["Host: a.example", "host:a.example:81 ", "Host: [::1]"])
responses = heads(status_lines, [])
methods = st.sampled_from(["GET", "HEAD", "POST"])


@settings(max_examples=400)
@given(spoilt(requests))
def test_no_bytes_make_the_reading_of_a_request_raise_anything_but_its_refusal(raw: bytes) -> None:
    request = understood(lambda: read(raw), 400, 405, 414, 417, 431, 501, 505)
    if request is None:
        return
    assert re.fullmatch(rb'/[!"$-\[\]-~]*|\*', request.target)
    assert request.length >= CHUNKED
    for line in chain(request.lines, [claim.line for claim in request.forwarding]):
        assert re.fullmatch(rb"[!#$%&'*+.^`|~0-9A-Za-z-]+: ?[^\0\r\n\x7f]*", line), (
            "no field that is spelt in two ways"
        )
    for name in ("host", "x-a", "cookie", "x_b"):
        assert (request.field(name) is None) == (not request.fields(name))


@settings(max_examples=300)
@given(spoilt(responses), methods)
def test_no_bytes_make_the_reading_of_a_response_raise_anything_but_its_refusal(raw: bytes, method: str) -> None:
    response = understood(lambda: reply(raw, method), 502)
    if response is None:
        return
    assert 100 <= response.status <= 999
    assert response.length >= UNTIL_CLOSE
    for line in response.lines:
        assert re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?[^\0\r\n\x7f]*", line)


def framing(length: int) -> list[bytes]:
    if length == UNTIL_CLOSE:
        return []
    return [b"Transfer-Encoding: chunked" if length == CHUNKED else b"Content-Length: %d" % length]


def meaning(request: WireRequest) -> tuple[Any, ...]:
    return (
        request.method, request.verb, request.target, request.path, request.host, request.lines, request.via,
        request.length, request.max_forwards, request.readings,
    )  # fmt: skip


@settings(max_examples=400)
@given(requests)
def test_a_request_that_was_written_anew_is_read_the_same_again(raw: bytes) -> None:
    request = understood(lambda: read(raw), 400, 405, 417, 501)
    assume(request is not None)
    assert request is not None
    assert request.host is not None
    lines = [b"%b %b HTTP/1.1" % (request.verb, request.target), b"Host: " + request.host, *request.lines]
    again = read(b"\r\n".join([*lines, *framing(request.length)]))
    assert meaning(again) == meaning(request)
    assert again.forwarding == []
    assert again.keeps_alive
    assert not again.expects


@settings(max_examples=300)
@given(responses, methods)
def test_a_response_that_was_written_anew_is_read_the_same_again(raw: bytes, method: str) -> None:
    response = understood(lambda: reply(raw, method), 502)
    assume(response is not None)
    assert response is not None
    told = response.length if response.told is None or response.length == CHUNKED else response.told
    lines = [
        b"HTTP/1.1 " + response.reason,
        *response.lines,
        *(framing(told) if told or response.told == 0 else []),
    ]
    again = reply(b"\r\n".join(lines), method)
    assert (again.status, again.reason, again.lines) == (response.status, response.reason, response.lines)
    assert (again.length, again.told) == (response.length, response.told)
    assert again.keeps_alive


# ---------------------------------------------------------------------------------------------------------- bodies


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


def fed(body: Body, pieces: Iterable[bytes]) -> tuple[bytes, bool, bytes]:
    """What a body gives, whether it came to its end, and what came behind that."""
    given, behind = [], b""
    for piece in pieces:
        if body.is_done:
            behind += piece
        else:
            given.append(body.take(piece))
    return b"".join(given), body.is_done, body.rest + behind


def outcome(body: Body, pieces: Iterable[bytes]) -> object:
    try:
        return fed(body, pieces)
    except WireError as error:
        return error.status


places = st.lists(st.integers(0, 5000), max_size=12)
extensions = st.sampled_from(
    [b"", b"", b";", b";a", b' ;a="b"', b"\t; x\xff", b";" + b"x" * (LONGEST_EXTENSION - 1)]
)
trailers = st.sampled_from([b"", b"", b"X: 1\r\n", b"Content-Length: 5\r\nX:\r\n", b"Y: " + b"y" * 5000 + b"\r\n"])
behind = st.sampled_from([b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n", b"0\r\n\r\n", b"\0"])


@st.composite
def chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A body, and one way to write it in chunks."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    raw = b""
    for piece in pieces:
        zeros, case = draw(st.sampled_from([b"", b"000"])), draw(st.sampled_from([b"%x", b"%X"]))
        raw += zeros + case % len(piece) + draw(extensions) + b"\r\n" + piece + b"\r\n"
    last = draw(st.sampled_from([b"0", b"0000000000000000"]))
    return b"".join(pieces), raw + last + draw(extensions) + b"\r\n" + draw(trailers) + b"\r\n"


@settings(max_examples=300)
@given(chunked(), behind, places)
def test_a_chunked_body_is_the_same_however_it_is_cut_and_what_is_behind_is_let_be(
    body: tuple[bytes, bytes], behind: bytes, places: list[int]
) -> None:
    data, raw = body
    assert fed(request_body(CHUNKED), [raw + behind]) == (data, True, behind)
    assert fed(response_body(CHUNKED), cut(raw + behind, places)) == (data, True, behind)


@settings(max_examples=100)
@given(chunked(), behind)
def test_a_chunked_body_may_come_byte_by_byte_and_is_whole_with_its_last_byte_alone(
    body: tuple[bytes, bytes], behind: bytes
) -> None:
    data, raw = body
    pieces = [raw[place : place + 1] for place in range(len(raw))]
    assert fed(request_body(CHUNKED), pieces[:-1])[1:] == (False, b"")
    assert fed(request_body(CHUNKED), [*pieces, behind]) == (data, True, behind)


@settings(max_examples=400)
@given(chunked(), places, st.integers(0, 400), st.integers(0, 2), st.binary(max_size=3))
def test_a_spoilt_chunked_body_is_refused_or_read_alike_however_it_is_cut(
    body: tuple[bytes, bytes], places: list[int], at: int, without: int, junk: bytes
) -> None:
    _, raw = body
    at %= len(raw)
    raw = raw[:at] + junk + raw[at + without :]
    whole = outcome(request_body(CHUNKED), [raw])
    assert whole == 400 or isinstance(whole, tuple)
    assert outcome(request_body(CHUNKED), cut(raw, places)) == whole
    assert outcome(request_body(CHUNKED), [raw[at : at + 1] for at in range(len(raw))]) == whole


@settings(max_examples=500)
@given(st.binary(max_size=60), places)
def test_no_bytes_make_a_chunked_body_raise_anything_but_its_refusal(raw: bytes, places: list[int]) -> None:
    whole = outcome(response_body(CHUNKED), [raw])
    assert whole == 502 or isinstance(whole, tuple)
    assert outcome(response_body(CHUNKED), cut(raw, places)) == whole


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n", b" 5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"5_0\r\n", b"-1\r\n", b"g\r\n", b";a\r\n",
        b"5\nhello\r\n", b"5\rhello", b"5 x\r\n", b"5\x00\r\n", b"5;a\x00\r\n", b"5;a\nb\r\n", b"5;a\rb\r\n", b"5\x0b\r\n",
        b"\xd9\xa5\r\nhello\r\n", b"5\r\nhelloX0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n", b"5\r\nhello0\r\n\r\n",
        b"00000000000000005\r\nhello\r\n", b"f" * 17 + b"\r\n", b"5" * 300, b"5;" + b"x" * LONGEST_EXTENSION + b"\r\n",
        b"5" + b" " * 300, b"0\r\nX\r\n\r\n", b"0\r\n X: 1\r\n\r\n", b"0\r\nX : 1\r\n\r\n", b"0\r\nX: 1\n\r\n", b"0\r\n\n", b"0\r\n\rX",
        b"0\r\nX: a\0\r\n\r\n", b"0\r\nX: " + b"y" * LONGEST_TRAILERS, b"0\r\n" + b"X: 1\r\n" * (LONGEST_TRAILERS // 6 + 1) + b"\r\n",
        b"0\n\n", b"\n0\r\n\r\n",
    ],
)  # fmt: skip
def test_chunks_that_are_not_as_they_should_be_are_refused_however_they_are_cut(raw: bytes) -> None:
    assert outcome(request_body(CHUNKED), [raw]) == 400
    assert outcome(response_body(CHUNKED), [raw]) == 502
    assert outcome(request_body(CHUNKED), [raw[at : at + 1] for at in range(len(raw))]) == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"f" * 16 + b"\r\n",
        b"1" + b" " + b";" + b"x" * (LONGEST_EXTENSION - 1) + b"\r\na\r\n",
        b"0\r\nX: " + b"y" * (LONGEST_TRAILERS - 10) + b"\r\n\r\n",
        b"0" * 15 + b"1  ;" + b"x" * (LONGEST_EXTENSION - 1) + b"\r\na\r\n",
        b"0\r\nX: " + b"y" * (LONGEST_TRAILERS - 5) + b"\r\n\r\n",
    ],
)
def test_chunks_within_their_bounds_are_taken_however_they_are_cut(raw: bytes) -> None:
    for at in range(1, len(raw)):
        assert isinstance(outcome(request_body(CHUNKED), [raw[:at], raw[at:]]), tuple), at


@settings(max_examples=300)
@given(st.binary(max_size=80), st.integers(0, 60), places)
def test_a_body_of_known_length_is_that_long_however_it_is_cut(data: bytes, length: int, places: list[int]) -> None:
    length = min(length, len(data))
    for make in (request_body, response_body):
        body = make(length)
        assert (body.is_done, body.left) == (not length, length)
        assert fed(body, cut(data, places)) == (data[:length], True, data[length:])
        short = make(len(data) + 1)
        assert fed(short, cut(data, places)) == (data, False, b"")
        assert short.left == 1


@given(st.binary(max_size=80), places)
def test_a_body_until_the_connection_closes_has_no_other_end(data: bytes, places: list[int]) -> None:
    assert fed(response_body(UNTIL_CLOSE), cut(data, places)) == (data, False, b"")


@given(st.lists(st.binary(max_size=300), max_size=8), places)
def test_what_is_written_in_chunks_is_read_again(pieces: list[bytes], places: list[int]) -> None:
    raw = b"".join(map(chunk, pieces)) + wire.LAST_CHUNK
    assert fed(request_body(CHUNKED), cut(raw, places)) == (b"".join(pieces), True, b"")


def test_no_data_is_no_chunk() -> None:
    """An empty chunk would be the last one."""
    assert chunk(b"") == b""


def test_a_body_in_chunks_tells_how_much_of_a_chunk_is_known_to_come() -> None:
    body = request_body(CHUNKED)
    assert body.take(b"ffffffff\r\nabc") == b"abc"
    assert body.left == 0xFFFFFFFF - 3


# ---------------------------------------------------------------------------------------------------------- memory


def grown(once: Callable[[int], object], times: int) -> int:
    """By how many bytes memory has grown when something was done so often, each time with another number."""
    for number in range(10):
        once(-1 - number)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(times):
            once(number)
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def names(number: int) -> list[str]:
    return [f"X-{number}-{place}: {'x' * 220}" for place in range(90)]


def values(number: int) -> list[str]:
    return [f"X: {number} {place} {'x' * 220}" for place in range(90)]


def specials(number: int) -> list[str]:
    return [
        f"{name}: {number} {place} {'x' * 200}"
        for name in (
            "Via",
            "X-Forwarded-For",
            "Connection",
            "Keep-Alive",
            "X_Under",
            "Max-Forwards",
            "Upgrade",
            "Proxy",
        )
        for place in range(11)
    ]


@pytest.mark.parametrize("fields", [names, values, specials])
def test_lines_without_end_that_are_never_the_same_do_not_fill_the_memory(
    fields: Callable[[int], list[str]],
) -> None:
    """54,000 lines of some 240 bytes are 13 MB, and with what is known of them far more."""
    assert grown(lambda number: read(head("GET /", *fields(number))), 600) < 4 << 20
    assert grown(lambda number: answered("200 OK", *fields(number)), 600) < 4 << 20


def test_start_lines_and_hosts_that_are_never_the_same_do_not_fill_the_memory() -> None:
    def once(number: int) -> None:
        read(head(f"M{abs(number)} /{number}/{'x' * 3000}/../%2F", host=f"h{abs(number)}.{'x' * 230}"))
        read(head(f"GET http://h{abs(number)}.{'x' * 230}/{'y' * 3000}"))
        answered(f"200 {number} {'x' * 3000}", f"Content-Length: {abs(number)}")

    assert grown(once, 6000) < 4 << 20


@pytest.mark.parametrize("name", ["Authorization", "Cookie", "Proxy-Authorization", "set-cookie"])
def test_lines_with_secrets_are_not_remembered(name: str) -> None:
    def once(number: int) -> None:
        fields = [f"{name}: {number} {place} {'s' * 200}" for place in range(50)]
        read(head("GET /", *fields))
        answered("200 OK", *fields)

    assert grown(once, 40) < 100_000


@pytest.mark.parametrize(("came", "goes"), [("5", "4"), ("1", "0"), ("007", "6")])
def test_an_options_has_one_hop_less_to_go(came: str, goes: str) -> None:
    request = read(head("OPTIONS /", f"Max-Forwards: {came}"))
    assert (request.max_forwards, told(request.lines)) == (int(came), [f"Max-Forwards: {goes}"])
    assert told(read(head("GET /", f"Max-Forwards: {came}")).lines) == [f"Max-Forwards: {came}"]


@pytest.mark.parametrize("fields", [["-1"], ["x"], [""], ["1" * 19], ["1", "1"]])
def test_hops_that_are_not_one_number_are_refused(fields: list[str]) -> None:
    with pytest.raises(WireError):
        read(head("OPTIONS /", *(f"Max-Forwards: {value}" for value in fields)))
