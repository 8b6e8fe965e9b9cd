"""What clients send to the gateway, in bytes: what it refuses, and what reaches an upstream of what it does not.

Numbers in front are those of the rules of the wire: 1 to 7 framing, 11 hop by hop, 18 and 19 the target, 20 to 23
fields, 26 bounds.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest

from tests.gateway import POOL, Stage, Talk, chunked, echo, request, says, staged

SMUGGLED = request("GET /smuggled")
"""Stands behind each refused message, and must not be taken for a request."""


def settings(urls: Mapping[str, str]) -> dict[str, Any]:
    return {
        "listen": {"max_body": "64MiB"},
        "identity": {"user": "header:X-User"},
        "limits": [
            {"name": "front", "rate": "1/hour", "match": "/admin/*"},
            {"name": "doors", "rate": "1/hour", "match": "POST /login"},
            {"name": "guarded", "rate": "1000000/hour", "match": "/vault/*"},
        ],
        "pools": {
            "kernel": {"upstreams": [urls["up"]], **POOL},
            "annex": {"upstreams": [urls["other"]], **POOL},
        },
        "routes": [
            {"match": "/*", "pool": "kernel"},
            {"match": "/other/*", "pool": "annex"},
            {"match": "b.example/*", "pool": "annex"},
        ],
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("gateway"), settings, ["up", "other"]) as stage:
        yield stage


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    shared.clear()
    yield shared
    shared.check()


def bad(says: str, raw: bytes, *statuses: int) -> Any:
    return pytest.param(raw, statuses or (400,), id=says)


def post(*fields: str | bytes, body: bytes = b"hello", version: str = "1.1") -> bytes:
    return request(f"POST / HTTP/{version}", *fields, body=body)


def get(*fields: str | bytes) -> bytes:
    return request("GET /", *fields)


def length(value: str | bytes) -> bytes:
    """A POST whose Content-Length is this."""
    return post(b"Content-Length: " + (value.encode() if isinstance(value, str) else value))


def coding(value: str | bytes, *more: str) -> bytes:
    """A POST in which Transfer-Encoding is this, and whose body is chunked."""
    value = value.encode() if isinstance(value, str) else value
    return post(b"Transfer-Encoding: " + value, *more, body=chunked(b"hello"))


CL, TE = "Content-Length: 5", "Transfer-Encoding: chunked"

REFUSED = [
    # 1: two framings
    bad("1 Content-Length, then Transfer-Encoding", post(CL, TE, body=b"0\r\n\r\n")),
    bad("1 Transfer-Encoding, then Content-Length", post(TE, CL, body=chunked(b"hello"))),
    bad("1 a Content-Length of 0 beside Transfer-Encoding", post("Content-Length: 0", TE, body=chunked(b"hello"))),
    bad("1 a Content-Length on both sides", post(CL, TE, CL, body=chunked(b"hello"))),
    bad("1 two framings on GET", request("GET /", CL, TE, body=b"0\r\n\r\n")),
    bad("1 an unknown coding beside Content-Length", post("Transfer-Encoding: xchunked", CL), 400, 501),
    bad("1 an empty Transfer-Encoding beside Content-Length", post("Transfer-Encoding:", CL)),
    bad("1 two framings in HTTP/1.0", post(CL, TE, body=b"0\r\n\r\n", version="1.0")),
    # 2: Transfer-Encoding
    bad("2 a coding other than chunked", coding("gzip"), 400, 501),
    bad("2 identity", coding("identity"), 400, 501),
    bad("2 chunked, then another", coding("chunked, gzip"), 400, 501),
    bad("2 chunked, then identity", coding("chunked, identity"), 400, 501),
    bad("2 another, then chunked", coding("gzip, chunked"), 501),
    bad("2 an unknown coding, then chunked", coding("br, chunked"), 501),
    bad("2 chunked twice in a list", coding("chunked, chunked")),
    bad("2 chunked twice in two fields", coding("chunked", TE)),
    bad("2 two fields, chunked and another", coding("chunked", "Transfer-Encoding: gzip"), 400, 501),
    bad("2 two fields, another and chunked", coding("gzip", TE), 400, 501),
    bad("2 two fields, identity and chunked", coding("identity", TE), 400, 501),
    bad("2 no coding at all", coding("")),
    bad("2 a comma before", coding(",chunked"), 400, 501),
    bad("2 a comma behind", coding("chunked,"), 400, 501),
    bad("2 xchunked", coding("xchunked"), 400, 501),
    bad("2 chunkedx", coding("chunkedx"), 400, 501),
    bad("2 quoted", coding('"chunked"'), 400, 501),
    bad("2 with a parameter", coding("chunked;q=1"), 400, 501),
    bad("2 a vertical tab before", coding("\x0bchunked"), 400, 501),
    bad("2 a vertical tab behind", coding("chunked\x0b"), 400, 501),
    bad("2 a form feed before", coding("\x0cchunked"), 400, 501),
    bad("2 a no-break space before", coding(b"\xa0chunked"), 400, 501),
    bad("2 a NUL behind", coding("chunked\0")),
    bad("2 the Kelvin sign is no k", coding("chun\u212aed"), 400, 501),
    bad("2 split by a space", coding("chunk ed"), 400, 501),
    bad("2 in HTTP/1.0", post(TE, body=chunked(b"hello"), version="1.0")),
    bad("2 in HTTP/1.0 on GET", request("GET / HTTP/1.0", TE, body=chunked())),
    # 3: Content-Length
    bad("3 a plus", length("+5")),
    bad("3 a minus", length("-5")),
    bad("3 an underscore", length("5_0")),
    bad("3 a space within", length("5 0")),
    bad("3 hexadecimal", length("0x5")),
    bad("3 hexadecimal without prefix", length("a")),
    bad("3 a fraction", length("5.0")),
    bad("3 an exponent", length("5e0")),
    bad("3 Arabic digits", length("\u0665")),
    bad("3 a superscript in Latin-1", length(b"\xb2")),
    bad("3 full-width digits", length("\uff15")),
    bad("3 quoted", length('"5"')),
    bad("3 none", length("")),
    bad("3 a semicolon", length("5;")),
    bad("3 a vertical tab before", length("\x0b5")),
    bad("3 a form feed behind", length("5\x0c")),
    bad("3 a no-break space", length(b"5\xa0")),
    bad("3 a NUL", length("5\0")),
    bad("3 a list of two values", length("5, 6")),
    bad("3 a list with none", length("5,")),
    bad("3 a list with none first", length(",5")),
    bad("3 two fields that differ", post(CL, "Content-Length: 6")),
    bad("3 two fields that differ in spelling", post(CL, "Content-Length: +5")),
    bad("3 19 digits", length("1" * 19)),
    bad("3 19 digits that are a small number", length("5".zfill(19))),
    bad("3 2 ** 64 + 5", length(str(2**64 + 5))),
    bad("3 thousands of digits", length("9" * 5000)),
    bad("3 more than max_body", length(str(64 * 2**20 + 1)), 413),
    bad("3 18 digits are much more than max_body", length("9" * 18), 413),
    # 4: white space and line ends in the head
    bad("4 a space before the colon of Content-Length", post("Content-Length : 5")),
    bad("4 a space before the colon of Transfer-Encoding", post("Transfer-Encoding : chunked", body=chunked())),
    bad("4 a tab before the colon", post("Transfer-Encoding\t: chunked", body=chunked())),
    bad("4 a space before the colon of any field", get("X-A : b")),
    bad("4 a line folded by a space", get("X-A: b", " c: d")),
    bad("4 a line folded by a tab", get("X-A: b", "\tc: d")),
    bad("4 a folded Transfer-Encoding", post("Transfer-Encoding:", " chunked", body=chunked())),
    bad("4 a folded Host", request("GET /", "Host:", " a.example", host=None)),
    bad("4 a space before the first field", b"GET / HTTP/1.1\r\n Host: a.example\r\n\r\n"),
    bad("4 a tab before the first field", b"GET / HTTP/1.1\r\n\tX: y\r\nHost: a.example\r\n\r\n"),
    bad("4 a line of a space", get("X-A: b", " ", "X-C: d")),
    bad("4 a bare CR in a value", get("X-A: b\rTransfer-Encoding: chunked")),
    bad("4 a bare CR at a value's end", get("X-A: b\r")),
    bad("4 a bare CR in a name", get("X-\rA: b")),
    bad("4 a bare CR before the end of the head", b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\r\n\r\n"),
    bad("4 a bare LF ends a field", get("X-A: b\nTransfer-Encoding: chunked")),
    bad("4 bare LF everywhere", b"GET / HTTP/1.1\nHost: a.example\n\n"),
    bad("4 a bare LF ends the request line", b"GET / HTTP/1.1\nHost: a.example\r\n\r\n"),
    bad("4 a bare LF ends the head", b"GET / HTTP/1.1\r\nHost: a.example\r\n\n"),
    bad("4 a bare LF before the request line", b"\nGET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("4 a bare CR before the request line", b"\rGET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("4 LF CR", b"GET / HTTP/1.1\n\rHost: a.example\n\r\n\r"),
    bad("4 a NUL in a value", get("X-A: b\0c")),
    bad("4 a NUL in a name", get("X-\0A: b")),
    bad("4 a NUL in the target", request("GET /\0")),
    bad("4 a NUL before the request", b"\0GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("4 empty lines without end before the request line", b"\r\n" * 20000, 400, 431),
    # 18: the request line
    bad("18 HTTP/0.9", b"GET /\r\n\r\n", 400, 505),
    bad("18 HTTP/0.9 with fields", b"GET /\r\nHost: a.example\r\n\r\n", 400, 505),
    bad("18 HTTP/0.9, named", request("GET / HTTP/0.9"), 505),
    bad("18 HTTP/1.2", request("GET / HTTP/1.2"), 505),
    bad("18 HTTP/2.0", request("GET / HTTP/2.0"), 505),
    bad("18 HTTP/2", request("GET / HTTP/2"), 400, 505),
    bad("18 HTTP/3.0", request("GET / HTTP/3.0"), 505),
    bad("18 HTTP/1.10", request("GET / HTTP/1.10"), 400, 505),
    bad("18 HTTP/11.1", request("GET / HTTP/11.1"), 400, 505),
    bad("18 HTTP/01.1", request("GET / HTTP/01.1"), 400, 505),
    bad("18 HTTP/1", request("GET / HTTP/1"), 400, 505),
    bad("18 HTTP/1.", request("GET / HTTP/1."), 400, 505),
    bad("18 HTTP/1.1 and more", request("GET / HTTP/1.1x"), 400, 505),
    bad("18 HTTP/1,1", request("GET / HTTP/1,1"), 400, 505),
    bad("18 Arabic digits in the version", b"GET / HTTP/\xd9\xa1.\xd9\xa1\r\nHost: a.example\r\n\r\n", 400, 505),
    bad("18 two versions", request("GET / HTTP/1.1 HTTP/1.1")),
    bad("18 a version in lower case", b"GET / http/1.1\r\nHost: a.example\r\n\r\n", 400, 505),
    bad("18 the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 505),
    bad("18 RTSP", b"SETUP / RTSP/1.0\r\nHost: a.example\r\nCSeq: 1\r\n\r\n", 400, 505),
    bad("18 SIP", b"INVITE sip:a@b.example SIP/2.0\r\nVia: x\r\n\r\n", 400, 505),
    bad("18 an answer in place of a request", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400, 505),
    bad("18 a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2),
    bad("18 two spaces before the target", b"GET  / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 two spaces behind the target", b"GET /  HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 a tab before the target", b"GET\t/ HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 a tab behind the target", b"GET /\tHTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 a space behind the version", b"GET / HTTP/1.1 \r\nHost: a.example\r\n\r\n", 400, 505),
    bad("18 a space before the method", b" GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 no target", b"GET HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 an empty target", b"GET  HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 no method", b"/ HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 an empty method", b" / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 a method that is no token", b"G(T / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 a method beyond ASCII", "GÉT / HTTP/1.1\r\nHost: a.example\r\n\r\n".encode()),
    bad("18 a colon in the method", b"GET: / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
    bad("18 a request line alone", b"hello\r\n\r\n"),
    bad("18 CONNECT", request("CONNECT db.example:5432", host="db.example:5432"), 405),
    # 18: Host
    bad("18 no Host", b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\n"),
    bad("18 no Host beside absolute-form", b"GET http://a.example/ HTTP/1.1\r\n\r\n"),
    bad("18 two Hosts", get("Host: b.example")),
    bad("18 two Hosts alike", get("Host: a.example")),
    bad("18 two Hosts in HTTP/1.0", request("GET / HTTP/1.0", "Host: b.example")),
    bad("18 two Hosts beside absolute-form", request("GET http://a.example/", "Host: b.example")),
    bad("18 an empty Host beside another", get("Host:")),
    bad("18 a space in Host", request("GET /", host="a.example b")),
    bad("18 a slash in Host", request("GET /", host="a.example/b")),
    bad("18 a query in Host", request("GET /", host="a.example?b")),
    bad("18 a fragment in Host", request("GET /", host="a.example#b")),
    bad("18 a user in Host", request("GET /", host="me@a.example")),
    bad("18 a backslash in Host", request("GET /", host="a.example\\b")),
    bad("18 a scheme in Host", request("GET /", host="http://a.example")),
    bad("18 Unicode in Host", request("GET /", host="\u00e4.example")),
    bad("18 a port that is no number", request("GET /", host="a.example:http")),
    bad("18 a port that is too great", request("GET /", host="a.example:100000")),
    bad("18 two ports", request("GET /", host="a.example:80:80")),
    bad("18 a bracket that stays open", request("GET /", host="[::1")),
    bad("18 no address in the brackets", request("GET /", host="[a.example]")),
    bad("18 a quote in Host", request("GET /", host='a"b')),
    bad("18 a comma between two Hosts", request("GET /", host="a.example, b.example")),
    bad("18 a control in Host", request("GET /", host="a\x01b")),
    # 18: the target
    bad("18 a relative path", request("GET index.html")),
    bad("18 authority-form", request("GET a.example:80")),
    bad("18 * on GET", request("GET *")),
    bad("18 * and more", request("OPTIONS *x")),
    bad("18 a fragment", request("GET /a#b")),
    bad("18 a fragment in a query", request("GET /?a#b")),
    bad("18 a fragment in absolute-form", request("GET http://a.example/#b")),
    bad("18 a user in absolute-form", request("GET http://me@a.example/")),
    bad("18 no host in absolute-form", request("GET http:///admin")),
    bad("18 no host but a port in absolute-form", request("GET http://:80/")),
    bad("18 a wrong port in absolute-form", request("GET http://a.example:http/")),
    bad("18 another scheme", request("GET ftp://a.example/")),
    bad("18 a scheme without slashes", request("GET http:/admin")),
    bad("18 a scheme alone", request("GET http:")),
    bad("18 a backslash in absolute-form", request("GET http://a.example\\b/")),
    # 19: characters of the target
    bad("19 a backslash", request("GET /a\\b")),
    bad("19 a tab", request("GET /a\tb")),
    bad("19 a control", request("GET /a\x01b")),
    bad("19 DEL", request("GET /a\x7fb")),
    bad("19 a space", request("GET /a b")),
    bad("19 bytes beyond ASCII", "GET /é HTTP/1.1\r\nHost: a.example\r\n\r\n".encode()),
    bad("19 a control in the query", request("GET /?a\x01b")),
    bad("19 bytes beyond ASCII in the query", "GET /?é HTTP/1.1\r\nHost: a.example\r\n\r\n".encode()),
    bad("19 %00", request("GET /a%00b")),
    bad("19 %00 at the end", request("GET /a%00")),
    bad("19 a backslash in disguise", request("GET /x%5C..%5Cvault/x")),
    bad("19 a backslash in disguise as the slash", request("GET /vault%5cx")),
    bad("19 a parameter that some cut off", request("GET /vault;v=1/x")),
    bad("19 a parameter that some cut off at the end", request("GET /vault;v=1")),
    bad("19 a parameter behind dots", request("GET /x/..;/vault/x")),
    bad("19 what is encoded twice", request("GET /%2576ault/x")),
    bad("19 dots encoded twice", request("GET /x/%252e%252e/vault/x")),
    bad("19 a slash encoded twice", request("GET /vault%252Fx")),
    bad("19 a slash in disguise that would change the route", request("GET /other%2Fx")),
    bad("19 a parameter that would change the route", request("GET /other;v/x")),
    # 20: names and values
    bad("20 an empty name", get(": b")),
    bad("20 no colon", get("X-A")),
    bad("20 a space in a name", get("X A: b")),
    bad("20 a parenthesis in a name", get("X(A): b")),
    bad("20 a quote in a name", get('X"A: b')),
    bad("20 a slash in a name", get("X/A: b")),
    bad("20 a name beyond ASCII", get("X-\u00e4: b".encode())),
    bad("20 DEL in a name", get("X-\x7f: b")),
    bad("20 a control in a name", get("\x01X: b")),
    bad("20 a bracket in a name", get("X[A]: b")),
    bad("20 an at sign in a name", get("X@A: b")),
    # 13
    bad("13 an expectation that nobody knows", post(CL, "Expect: the-unexpected"), 417),
    bad("13 an expectation beside the known one", post(CL, "Expect: 100-continue, more"), 417),
    # 26: bounds
    bad("26 a target longer than 8 KiB", request("GET /" + "a" * 9000), 414),
    bad("26 a target longer than the whole head may be", request("GET /" + "a" * 40000), 414),
    bad("26 a method without end", b"A" * 40000, 400, 414, 431, 501),
    bad("26 a method of 9000 letters", request("A" * 9000 + " /"), 400, 414, 501),
    bad("26 a field larger than a head may be", get("X-A: " + "a" * 40000), 431),
    bad("26 a field's name larger than a head may be", get("a" * 40000 + ": b"), 431),
    bad("26 a head larger than it may be", get(*[f"X-{i}: {'a' * 600}" for i in range(90)]), 431),
    bad("26 a head that does not end", get("X-A: " + "a" * 70000)[:-4], 431),
    bad("26 101 fields", get(*[f"X-{i}: a" for i in range(100)]), 431),
    bad("26 thousands of short fields", get(*["a:b"] * 5000), 431),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "statuses"), REFUSED)
def test_a_malformed_request_is_refused_the_connection_closed_and_no_upstream_sees_a_byte(
    stage: Stage, raw: bytes, statuses: tuple[int, ...]
) -> None:
    client = stage.client()
    client.send(raw + SMUGGLED)
    answer = client.answer()
    assert (answer.status, answer.complete) in [(status, True) for status in statuses]
    assert answer.closes
    assert client.end() == "fin"
    stage.settle()
    for upstream in stage.upstreams.values():
        assert (upstream.connections, upstream.targets) == (0, [])


@pytest.mark.parametrize("split", ["byte by byte", "in two"])
@pytest.mark.parametrize(
    ("raw", "status"),
    [
        pytest.param(post(CL, TE, body=b""), 400, id="two framings"),
        pytest.param(get("X-A: b\nX-C: d"), 400, id="a bare LF"),
        pytest.param(get("X-A: b", " c"), 400, id="a folded line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\r\n", 400, id="a bare CR"),
        pytest.param(get("Host: a.example"), 400, id="two Hosts"),
    ],
)
def test_a_malformed_request_is_refused_however_it_is_cut(
    stage: Stage, raw: bytes, status: int, split: str
) -> None:
    raw += SMUGGLED
    for place in range(1, len(raw)) if split == "in two" else [0]:
        client = stage.client()
        if place:
            client.send(raw[:place])
            if place % 8 == 0:
                stage.settle()  # both parts would else come as one
            client.upload(raw[place:])
        else:
            client.upload(raw, piece=1)
        assert client.answer().status == status
        client.close()
    assert stage.up.connections == 0


def chunk_error(says: str, body: bytes) -> Any:
    return pytest.param(body, id=says)


@pytest.mark.parametrize(
    "body",
    [
        chunk_error("a prefix", b"0x5\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a plus", b"+5\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a minus", b"-5\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a minus before zero", b"-0\r\n\r\n"),
        chunk_error("an underscore", b"0_5\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a space before", b" 5\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a space behind", b"5 \r\nhello\r\n0\r\n\r\n"),
        chunk_error("a tab behind", b"5\t\r\nhello\r\n0\r\n\r\n"),
        chunk_error("no hexadecimal digit", b"g\r\nhello\r\n0\r\n\r\n"),
        chunk_error("Arabic digits", "\u0665\r\nhello\r\n0\r\n\r\n".encode()),
        chunk_error("none", b"\r\nhello\r\n0\r\n\r\n"),
        chunk_error("none but an extension", b";a=b\r\nhello\r\n0\r\n\r\n"),
        chunk_error("17 digits", b"5".zfill(17) + b"\r\nhello\r\n0\r\n\r\n"),
        chunk_error("2 ** 64 + 5", b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
        chunk_error("digits without end", b"0" * 70000),
        chunk_error("a bare LF behind the size", b"5\nhello\r\n0\r\n\r\n"),
        chunk_error("a bare CR behind the size", b"5\rhello\r\n0\r\n\r\n"),
        chunk_error("two CRs behind the size", b"5\r\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a NUL behind the size", b"5\0\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a quote behind the size", b"5\"\r\nhello\r\n0\r\n\r\n"),
        chunk_error("an extension of 300 bytes", b"5;a=" + b"b" * 300 + b"\r\nhello\r\n0\r\n\r\n"),
        chunk_error("an extension without end", b"5;a=" + b"b" * 70000),
        chunk_error("a bare LF in an extension", b"5;a=b\nhello\r\n0\r\n\r\n"),
        chunk_error("a bare CR in an extension", b"5;a=\rb\r\nhello\r\n0\r\n\r\n"),
        chunk_error("a NUL in an extension", b"5;a=\0\r\nhello\r\n0\r\n\r\n"),
        chunk_error("nothing behind the data", b"5\r\nhello0\r\n\r\n"),
        chunk_error("more data than said", b"5\r\nhelloo\r\n0\r\n\r\n"),
        chunk_error("less data than said", b"5\r\nhell\r\n0\r\n\r\n"),
        chunk_error("a bare LF behind the data", b"5\r\nhello\n0\r\n\r\n"),
        chunk_error("a bare CR behind the data", b"5\r\nhello\r0\r\n\r\n"),
        chunk_error("LF CR behind the data", b"5\r\nhello\n\r0\r\n\r\n"),
        chunk_error("a bare LF behind the last size", b"5\r\nhello\r\n0\n\r\n"),
        chunk_error("a bare LF as the end", b"5\r\nhello\r\n0\r\n\n"),
        chunk_error("a bare CR before the end", b"5\r\nhello\r\n0\r\n\r\r\n"),
        chunk_error("data behind the last size", b"5\r\nhello\r\n0\r\nX\r\n\r\n"),
        chunk_error("a trailer with a space before the colon", b"0\r\nX-A : b\r\n\r\n"),
        chunk_error("a folded trailer", b"0\r\nX-A: b\r\n c\r\n\r\n"),
        chunk_error("a trailer that begins with a space", b"0\r\n X-A: b\r\n\r\n"),
        chunk_error("a bare LF in a trailer", b"0\r\nX-A: b\nX-C: d\r\n\r\n"),
        chunk_error("a bare CR in a trailer", b"0\r\nX-A: b\rX-C: d\r\n\r\n"),
        chunk_error("a NUL in a trailer", b"0\r\nX-A: \0\r\n\r\n"),
        chunk_error("an empty name of a trailer", b"0\r\n: b\r\n\r\n"),
        chunk_error("a request in place of trailers", b"0\r\nGET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n"),
        chunk_error("a trailer without end", b"0\r\nX-A: " + b"b" * 70000),
        chunk_error("trailers without end", b"0\r\n" + b"X-A: b\r\n" * 20000),
    ],
)  # fmt: skip
def test_5_a_body_that_is_not_chunked_as_it_should_be_is_refused_and_never_becomes_whole(
    stage: Stage, body: bytes
) -> None:
    client = stage.client()
    client.send(post(TE, body=b""))
    client.upload(body + SMUGGLED)
    answer = client.answer()
    assert answer.status in ({400, 431} if len(body) > 9999 else {400})
    assert answer.closes
    assert client.end() in ("fin", "reset") if len(body) > 9999 else client.end() == "fin"
    stage.settle()
    stage.up.until(lambda: not stage.up.open)
    assert stage.up.completed == []
    assert b"/smuggled" not in stage.up.targets


def test_5_a_chunk_larger_than_a_body_may_be_is_refused(stage: Stage) -> None:
    client = stage.client()
    client.send(post(TE, body=b"FFFFFFFFFFFFFFFF\r\nhello"))
    assert client.answer().status == 413
    assert client.end() == "fin"
    stage.up.until(lambda: not stage.up.open)
    assert stage.up.completed == []


def good(says: str, raw: bytes, head: bytes, framing: str = "none", body: bytes = b"") -> Any:
    return pytest.param(raw, head, framing, body, id=says)


HEAD = b"POST / HTTP/1.1\r\nHost: a.example\r\n\r\n"


PASSED = [
    good("a plain request", get("Accept: */*"), get("Accept: */*")),
    good("a body by its length", post(CL), HEAD, "5", b"hello"),
    good("a chunked body", post(TE, body=chunked(b"he", b"llo")), HEAD, "chunked", b"hello"),
    good("an empty chunked body", post(TE, body=chunked()), HEAD, "chunked"),
    good("a length of 0", post("Content-Length: 0", body=b""), HEAD, "0"),
    # 2, 3: other spellings of the framing
    good("2 chunked in capitals", coding("CHUNKED"), HEAD, "chunked", b"hello"),
    good("2 a tab before chunked", coding("\tchunked"), HEAD, "chunked", b"hello"),
    good("2 white space behind chunked", coding("chunked \t"), HEAD, "chunked", b"hello"),
    good("2 no space before chunked", post("transfer-encoding:chunked", body=chunked(b"x")), HEAD, "chunked", b"x"),
    good("3 a length repeated", post(CL, CL), HEAD, "5", b"hello"),
    good("3 a length listed twice", length("5, 5"), HEAD, "5", b"hello"),
    good("3 white space around", length("\t 5 \t"), HEAD, "5", b"hello"),
    good("3 zeros before are no octal", post("Content-Length: 010", body=b"0123456789"), HEAD, "10", b"0123456789"),
    # 4
    good("4 an empty line before", b"\r\n" + get(), get()),
    good("4 two empty lines before", b"\r\n\r\n" + get(), get()),
    # 5, 6: chunks
    good("5 extensions are dropped", post(TE, body=b"5;a=b;c=\"d\"\r\nhello\r\n0;e\r\n\r\n"), HEAD, "chunked", b"hello"),
    good("5 sizes in capitals", post(TE, body=b"A\r\n0123456789\r\n0\r\n\r\n"), HEAD, "chunked", b"0123456789"),
    good("5 sizes of 16 digits", post(TE, body=b"5".zfill(16) + b"\r\nhello\r\n" + b"0" * 16 + b"\r\n\r\n"), HEAD, "chunked", b"hello"),
    good("6 trailers are dropped", post(TE, "Trailer: X-A", body=b"5\r\nhello\r\n0\r\nX-A: b\r\nX-C: d\r\n\r\n"), HEAD, "chunked", b"hello"),
    good("6 trailers change neither framing nor target", post(TE, body=b"5\r\nhello\r\n0\r\nContent-Length: 50\r\nHost: b.example\r\nTransfer-Encoding: gzip\r\nAuthorization: x\r\nCookie: y\r\n\r\n"), HEAD, "chunked", b"hello"),
    # 7: a body where none is expected
    good("7 GET with a length", request("GET /", CL, body=b"hello"), get(), "5", b"hello"),
    good("7 GET with chunks", request("GET /", TE, body=chunked(b"hello")), get(), "chunked", b"hello"),
    good("7 DELETE with a length", request("DELETE /", CL, body=b"hello"), request("DELETE /"), "5", b"hello"),
    good("7 a body that looks like a request", post(f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED), HEAD, str(len(SMUGGLED)), SMUGGLED),
    # 10, 14: nothing is upgraded
    good("10 Upgrade with a length", post("Connection: Upgrade", "Upgrade: websocket", f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED), HEAD, str(len(SMUGGLED)), SMUGGLED),
    good("10 Upgrade with chunks", post("Connection: Upgrade", "Upgrade: h2c", TE, body=chunked(SMUGGLED)), HEAD, "chunked", SMUGGLED),
    good("14 Upgrade to HTTP/2", get("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"), get()),
    good("14 Upgrade to WebSocket", get("Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Version: 13"), get("Sec-WebSocket-Version: 13")),
    # 11: hop by hop
    good("11 fields of the connection", get("Connection: keep-alive", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "Proxy-Authorization: Basic eA==", "Proxy-Authenticate: Basic", "TE: gzip", "X-A: b"), get("X-A: b")),
    good("11 fields that Connection names", get("X-A: 1", "Connection: x-a, X-C", "X-B: 2", "x-c: 3", "X-A: 4"), get("X-B: 2")),
    good("11 fields that a second Connection names", get("Connection: keep-alive", "X-A: 1", "Connection: X-A"), get()),
    good("11 Connection takes no end-to-end field away", post("Connection: Host, Authorization, Content-Length, X-Forwarded-For, X-Forwarded-Host, X-Forwarded-Proto, Via", CL, "Authorization: Basic eA=="), post("Authorization: Basic eA==", body=b""), "5", b"hello"),
    good("11 Connection does not take the chunks away", post("Connection: Transfer-Encoding", TE, body=chunked(b"hello")), HEAD, "chunked", b"hello"),
    good("11 an odd Connection", get("Connection: , ,;,close-not,\t,"), get()),
    # 18: absolute-form
    good("18 absolute-form", request("GET http://c.example/x?y", host="c.example"), request("GET /x?y", host="c.example")),
    good("18 absolute-form overrides Host", request("GET http://c.example:8080/x", host="a.example"), request("GET /x", host="c.example:8080")),
    good("18 absolute-form without a path", request("GET http://c.example", host="c.example"), request("GET /", host="c.example")),
    good("18 absolute-form with a query alone", request("GET http://c.example?x=/../y", host="c.example"), request("GET /?x=/../y", host="c.example")),
    good("18 a scheme in capitals", request("GET HTTP://c.example/", host="c.example"), request("GET /", host="c.example")),
    good("18 a Host with a port", request("GET /", host="a.example:8080"), request("GET /", host="a.example:8080")),
    good("18 a Host that is an address", request("GET /", host="[2001:db8::1]:8080"), request("GET /", host="[2001:db8::1]:8080")),
    # 19: dot segments go, all else stays
    good("19 a dot", request("GET /a/./b"), request("GET /a/b")),
    good("19 two dots", request("GET /a/../b"), request("GET /b")),
    good("19 dots at the end", request("GET /a/b/.."), request("GET /a/")),
    good("19 a dot at the end", request("GET /a/b/."), request("GET /a/b/")),
    good("19 too many dots", request("GET /../../a"), request("GET /a")),
    good("19 dots in disguise", request("GET /a/%2e%2E/b/%2E/c"), request("GET /b/c")),
    good("19 dots half in disguise", request("GET /a/.%2e/b/%2e./c"), request("GET /c")),
    good("19 dots in absolute-form", request("GET http://a.example/x/../y"), request("GET /y")),
    good("19 three dots are a name", request("GET /a/.../b"), request("GET /a/.../b")),
    good("19 dots within a name", request("GET /a..b/.c/d."), request("GET /a..b/.c/d.")),
    good("19 dots in the query", request("GET /a?x=/../y&z=%2e%2e/%2f"), request("GET /a?x=/../y&z=%2e%2e/%2f")),
    good("19 empty segments", request("GET //a//b//"), request("GET //a//b//")),
    good("19 a slash in disguise that changes nothing", request("GET /a%2Fb%2fc"), request("GET /a%2Fb%2fc")),
    good("19 a backslash in disguise that changes nothing", request("GET /a%5Cb"), request("GET /a%5Cb")),
    good("19 parameters that change nothing", request("GET /a;v=1/b;w"), request("GET /a;v=1/b;w")),
    good("19 a percent sign that changes nothing", request("GET /100%25/%2541"), request("GET /100%25/%2541")),
    good("19 escapes are not rewritten", request("GET /%61%7e%C3%a9/~"), request("GET /%61%7e%C3%a9/~")),
    good("19 characters that browsers leave", request('GET /a"b<c>d^e`f{g|h}'), request('GET /a"b<c>d^e`f{g|h}')),
    good("19 the query as it came", request("GET /?a=1&a=2&&=?/?"), request("GET /?a=1&a=2&&=?/?")),
    good("19 an empty query", request("GET /a?"), request("GET /a?")),
    # 20, 21, 23: fields
    good("20 all that a token may hold", get("!#$%&'*+.^`|~0aZ-: b"), get("!#$%&'*+.^`|~0aZ-: b")),
    good("20 bytes beyond ASCII in a value", get(b"X-A: caf\xc3\xa9 \xff"), get(b"X-A: caf\xc3\xa9 \xff")),
    good("20 an empty value", get("X-A: ", "X-B: c"), get("X-A: ", "X-B: c")),
    good("20 a tab within a value", get("X-A: b\tc"), get("X-A: b\tc")),
    good("20 colons in a value", get("X-A: b: c"), get("X-A: b: c")),
    good("21 fields with an underscore", get("X_User: eve", "X-A: b", "Content_Length: 5", "Transfer_Encoding: chunked", "_: x", "X-Forwarded_For: 6.6.6.6"), get("X-A: b")),
    good("21 Proxy", get("Proxy: http://evil.example/", "X-A: b"), get("X-A: b")),
    good("21 what only trusted proxies may say", get("X-Forwarded-For: 6.6.6.6", "X-Forwarded-Port: 1", "X-Forwarded-Prefix: /x", "X-Forwarded-Server: s", "X-Forwarded-Whatever: t", "Forwarded: for=6.6.6.6", "X-Real-IP: 6.6.6.6", "X-User: root", "X-A: b"), get("X-A: b")),
    good("23 repeated fields stay apart and in order", get("X-A: 1", "X-B: 2", "X-A: 3", "x-a: 4", "Cookie: a=b", "X-A: 1", "Cookie: c=d"), get("X-A: 1", "X-B: 2", "X-A: 3", "x-a: 4", "Cookie: a=b", "X-A: 1", "Cookie: c=d")),
    good("25 a body is not decompressed", post("Content-Encoding: gzip", CL, "Accept-Encoding: gzip"), post("Content-Encoding: gzip", "Accept-Encoding: gzip", body=b""), "5", b"hello"),
    # methods, bounds
    good("a method of nobody's", request("BREW /pot"), request("BREW /pot")),
    good("a method in lower case", request("get /"), request("get /")),
    good("26 100 fields", get(*[f"X-{i}: a" for i in range(99)]), get(*[f"X-{i}: a" for i in range(99)])),
    good("26 a head of 31 KiB", get(*[f"X-{i}: {'a' * 630}" for i in range(49)]), get(*[f"X-{i}: {'a' * 630}" for i in range(49)])),
    good("26 a target of 8000 bytes", request("GET /" + "a" * 8000), request("GET /" + "a" * 8000)),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "head", "framing", "body"), PASSED)
def test_what_is_well_formed_reaches_the_upstream_framed_anew_and_else_as_it_was(
    stage: Stage, raw: bytes, head: bytes, framing: str, body: bytes
) -> None:
    client = stage.client()
    answer = client.ask(raw)
    assert (answer.status, answer.body, answer.closes) == (200, b"ok", False)
    request = stage.up.one()
    assert request.plain == head
    # A method that expects a body may be given a length of 0 where it had none.
    assert request.framing == framing
    assert request.body == body
    # The connection is at the start of a request again.
    assert client.ask(b"GET /next HTTP/1.1\r\nHost: a.example\r\n\r\n").status == 200
    assert stage.up.targets[1:] == [b"/next"]
    assert stage.up.connections == 1


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        pytest.param(get("Accept: */*"), b"", id="without a body"),
        pytest.param(b"\r\n\r\n" + post(CL), b"hello", id="with a body and empty lines before"),
        pytest.param(
            post(TE, body=b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nX: y\r\n\r\n"), b"hello", id="with chunks and trailers"
        ),
    ],
)
def test_a_request_passes_however_it_is_cut(stage: Stage, raw: bytes, body: bytes) -> None:
    client = stage.client()
    client.slowly(raw)
    assert client.answer().status == 200
    for place in range(1, len(raw)):
        client.send(raw[:place])
        if place % 8 == 0:
            stage.settle()
        client.send(raw[place:])
        assert client.answer().status == 200
    assert len(stage.up.completed) == len(raw)
    assert {request.body for request in stage.up.requests} == {body}
    assert len({(request.plain, request.framing) for request in stage.up.requests}) == 1
    assert stage.up.connections == 1


def test_26_a_head_that_is_too_large_is_refused_though_it_comes_byte_by_byte(stage: Stage) -> None:
    client = stage.client()
    sent = client.upload(get("X-A: " + "a" * 60000), piece=1)
    assert client.answer().status == 431
    assert client.end() in ("fin", "reset")
    assert 32 * 1024 <= sent < 60000
    assert stage.up.connections == 0


def test_21_x_forwarded_and_via_are_the_gateways_own(stage: Stage) -> None:
    stage.ask(get("X-Forwarded-For: 6.6.6.6", "Via: 1.0 fred", "X-Forwarded-Host: evil.example"))
    request = stage.up.one()
    assert request.get("x-forwarded-for") == b"127.0.0.1"
    assert request.get("x-forwarded-proto") == b"http"
    assert request.get("x-forwarded-host") == b"a.example"
    via = b", ".join(request.all("via")).split(b", ")
    assert via[0] == b"1.0 fred"
    assert re.fullmatch(rb"1\.1 gatekeeper-[A-Za-z0-9_-]{4,}", via[1])
    assert not request.all("forwarded")


def test_11_connection_cannot_take_away_what_the_gateway_adds(stage: Stage) -> None:
    stage.ask(get("Connection: X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host, Via, close"))
    request = stage.up.one()
    assert request.get("x-forwarded-for") == b"127.0.0.1"
    assert request.get("x-forwarded-proto") == b"http"
    assert request.get("x-forwarded-host") == b"a.example"
    assert request.get("via")


def test_18_absolute_form_also_names_the_forwarded_host_and_the_route(stage: Stage) -> None:
    assert stage.ask(request("GET http://b.example/x", "X-A: b", host="a.example")).status == 200
    got = stage.upstreams["other"].one()
    assert (got.target, got.get("host"), got.get("x-forwarded-host")) == (b"/x", b"b.example", b"b.example")
    assert stage.up.requests == []


@pytest.mark.parametrize("host", ["b.example", "B.EXAMPLE", "b.example:8080", "b.example."])
def test_19_a_route_of_a_host_is_not_missed_by_a_spelling_of_it(stage: Stage, host: str) -> None:
    assert stage.ask(request("GET /x", host=host)).status == 200
    assert stage.upstreams["other"].one().get("host") == host.encode()
    assert stage.up.requests == []


@pytest.mark.parametrize("target", ["/other/x", "/other", "/x/../other/y", "/%6fther/x", "/./other/", "//other/x"])
def test_19_a_route_is_chosen_by_what_is_forwarded(stage: Stage, target: str) -> None:
    assert stage.ask(request(f"GET {target}")).status == 200
    assert len(stage.upstreams["other"].requests) == 1
    assert stage.up.requests == []


def test_18_options_of_the_whole_server_is_no_malformed_request(stage: Stage) -> None:
    client = stage.client()
    assert client.ask(request("OPTIONS *")).status in (200, 204, 404)
    assert client.ask(get()).status == 200


@pytest.mark.parametrize("line", ["TRACE /", "CONNECT /", "CONNECT http://a.example/"])
def test_12_trace_and_connect_are_refused_whatever_their_target(stage: Stage, line: str) -> None:
    assert stage.ask(request(line, "Max-Forwards: 9")).status == 405
    assert stage.up.connections == 0


def test_12_a_request_that_comes_round_again_is_refused(stage: Stage) -> None:
    stage.ask(get())
    via = stage.up.one().get("via")
    assert via is not None
    for value in (via, b"1.0 fred, " + via, via + b" (a comment), 1.1 other"):
        assert stage.ask(get(b"Via: " + value)).status == 508
    assert stage.ask(get("Via: 1.1 gatekeeper-other")).status == 200
    assert len(stage.up.requests) == 2


WALKS = [
    "/admin/y", "/admin", "/admin/", "//admin//z", "/./admin/x", "/admin/../admin/x", "/%61dmin/x", "/%61%64%6d%69%6e",
    "/x/%2e%2e/admin/q", "/x/../admin/q", "/x/y/../../admin", "/admin/.", "/.//admin/x", "/..//admin/x", "/%2e/admin/x",
    "/q/../admin//../x", "/q/%2e%2e/admin//%2e%2e/x", "/x//../../admin/z", "/admin/a//../../b/../admin",
    "/admin%2Fx", "/admin%2f", "/%2Fadmin/x", "/x%2f..%2fadmin/x", "/..%2Fadmin/x", "/%2e%2e%2fadmin/x", "/%2e%2e/admin/x",
    "/admin%5Cx", "/%5cadmin/x", "/x/..%5cadmin/x", "/x%5C..%5Cadmin", "/admin\\x", "/\\admin/x", "\\admin",
    "/admin;a=b", "/admin;a=b/x", "/;a/admin/x", "/x/..;/admin/x", "/x/..;a=b/admin/x", "/.;/admin/x", "/admin/;x", "/admin/x;y=z",
    "/%2561dmin/x", "/admin%252Fx", "/x/%252e%252e/admin/x", "/%25%361dmin/x", "/x/%25%32%65%252e/admin",
    "/admin%00", "/admin%00/x", "/%00/admin/x", "/admin%0a", "/admin?x", "/admin/?/../x", "/admin/#x", "/admin#",
    "http://a.example/admin/x", "http://a.example//admin", "http://a.example/x/../admin/x", "HTTP://other.example/admin/x", "http://a.example:80/%61dmin",
]  # fmt: skip


@pytest.mark.parametrize("target", WALKS)
def test_19_a_rule_is_not_walked_round_by_any_spelling_of_the_path(stage: Stage, target: str) -> None:
    stage.ask(request("GET /admin/x"))  # the one of the hour, unless it is spent
    stage.up.clear()
    client = stage.client()
    answer = client.ask(request(f"GET {target}"))
    assert answer.status in (400, 429)
    assert answer.status == 400 or not answer.closes
    assert (stage.up.connections, stage.up.targets) == (0, [])


def test_19_a_rule_is_not_walked_round_by_another_method_host_or_framing(stage: Stage) -> None:
    stage.ask(request("GET /admin/x"))
    stage.ask(request("POST /login", "Content-Length: 0"))
    stage.up.clear()
    for raw in (
        request("HEAD /admin/x"),
        request("POST /admin/x", CL, body=b"hello"),
        request("BREW /admin/x"),
        request("GET /admin/x", host="b.example"),
        request("GET /admin/x HTTP/1.0", host=None),
        request("GET /admin/x", "X-Forwarded-For: 192.0.2.1", "Forwarded: for=192.0.2.2", "X-Real-IP: 192.0.2.3"),
        request("GET /admin/x", "X-Original-URL: /", "X-Rewrite-URL: /", "X-HTTP-Method-Override: PUT"),
        request("OPTIONS /admin/x"),
        request("post /login", "Content-Length: 0"),
        request("POST /login/", TE, body=chunked(b"x")),
        b"\r\n" + request("GET /admin/x"),
    ):
        assert stage.ask(raw, raw.split()[0].decode()).status == 429, raw
    assert stage.up.requests == stage.upstreams["other"].requests == []


def test_a_refusal_by_a_rule_keeps_the_connection_and_says_when_to_come_again(stage: Stage) -> None:
    client = stage.client()
    client.ask(request("GET /admin/x"))
    answer = client.ask(request("GET /admin/x"))
    assert answer.status == 429
    assert int(answer.get("retry-after") or b"") > 0
    assert answer.get("cache-control") == b"no-store"
    assert client.ask(get()).status == 200


def test_a_body_behind_a_refusal_never_becomes_a_request(stage: Stage) -> None:
    stage.ask(request("GET /admin/x"))
    stage.up.clear()
    for raw in (
        request("POST /admin/x", f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED),
        request("POST /admin/x", TE, body=chunked(SMUGGLED)),
        request("GET /admin/x", f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED),
        request("TRACE /", f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED),
    ):
        client = stage.client()
        client.send(raw + request("GET /after"))
        answer = client.answer()
        assert answer.status in (400, 405, 429)
        if answer.closes:
            assert client.end() == "fin"
        else:
            assert client.answer().status == 200
    assert set(stage.up.targets) <= {b"/after"}


def test_the_gateways_own_answers_name_nothing_that_is_inside(stage: Stage) -> None:
    refused = [
        stage.ask(raw)
        for raw in (
            request("GET /", "Host: b.example"),
            request("GET /admin/x"),
            request("GET /admin/x"),
            request("GET /admin/x", "Accept: text/html"),
            request("GET /", "Accept: text/html", "X Y: z"),
            request("CONNECT a.example:1"),
            get("X-A: " + "a" * 40000),
            coding("gzip"),
        )
    ]
    for answer in refused:
        if answer.status == 200:
            continue
        told = answer.head + answer.body
        for inner in (
            b"kernel",
            b"annex",
            b"127.0.0.1",
            b".toml",
            b".py",
            b"Traceback",
            str(stage.up.port).encode(),
        ):
            assert inner not in told
        assert answer.get("cache-control") == b"no-store"
        assert answer.length == len(answer.body) > 0
        kind = answer.get("content-type") or b""
        assert kind.startswith((b"application/problem+json", b"text/plain"))
    assert b"text/plain" in (refused[3].get("content-type") or b"")
    assert b"problem" in (refused[2].get("content-type") or b"")


def test_what_no_route_is_for_is_a_404_that_tells_nothing_of_what_is_inside(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def routed(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "pools": {"kernel": {"upstreams": [urls["up"]], **POOL}},
            "routes": [{"match": "/inside/*", "pool": "kernel"}, {"match": "c.example/", "pool": "kernel"}],
        }

    with staged(tmp_path_factory.mktemp("routed"), routed) as stage:
        client = stage.client()
        for raw in (
            get(),
            get("Accept: text/html"),
            request("GET /insidee"),
            request("GET /inside/../x"),
            request("GET /x", host="c.example"),
            request("HEAD /"),
            request("POST /", "Content-Length: 5", body=b"hello"),
        ):
            answer = client.ask(raw)
            assert (answer.status, answer.closes) == (404, False)
            for inner in (b"kernel", b"inside", b"127.0.0.1", str(stage.up.port).encode()):
                assert inner not in answer.head + answer.body
            assert answer.get("cache-control") == b"no-store"
        assert stage.up.connections == 0
        assert client.ask(request("GET /", host="c.example")).status == 200
        assert client.ask(request("GET /x/../inside")).status == 200
        stage.check()


def test_10_to_a_client_of_http_1_0_the_connection_is_closed_behind_the_answer(stage: Stage) -> None:
    client = stage.client()
    answer = client.ask(request("GET / HTTP/1.0", host=None))
    assert (answer.status, answer.body) == (200, b"ok")
    assert client.end() == "fin"
    got = stage.up.one()
    assert got.line == b"GET / HTTP/1.1"
    assert got.get("host")


def test_a_client_of_http_1_0_may_ask_to_keep_the_connection(stage: Stage) -> None:
    client = stage.client()
    answer = client.ask(request("GET / HTTP/1.0", "Connection: keep-alive"))
    assert answer.body == b"ok"
    if (answer.get("connection") or b"").lower() == b"keep-alive":
        assert client.ask(get()).status == 200
    else:
        assert client.end() == "fin"


def test_11_a_client_that_asks_to_close_is_told_so_and_closed(stage: Stage) -> None:
    client = stage.client()
    client.send(get("Connection: Close") + SMUGGLED)
    answer = client.answer()
    assert (answer.status, answer.closes) == (200, True)
    assert client.end() == "fin"
    assert stage.up.targets == [b"/"]
    # The upstream's connection lives on.
    assert stage.ask(get()).status == 200
    assert stage.up.connections == 1


def test_connections_to_an_upstream_are_kept_and_used_again(stage: Stage) -> None:
    for _ in range(5):
        assert stage.ask(get()).status == 200
        assert stage.ask(post(CL)).status == 200
    client = stage.client()
    for _ in range(10):
        assert client.ask(post(TE, body=chunked(b"x"))).status == 200
    assert len(stage.up.completed) == 20
    assert stage.up.connections == 1


def test_a_pipeline_of_fifty_is_answered_in_order_whatever_the_upstreams_take(stage: Stage) -> None:
    random = Random(50)

    def script(talk: Talk) -> None:
        threading.Event().wait(random.choice([0, 0, 0.001, 0.004]))
        talk.answer(says(talk.request.target + b" " + talk.take()))

    for upstream in stage.upstreams.values():
        upstream.script = script
    targets = [f"/{'other/' * random.randrange(2)}{number}" for number in range(50)]
    bodies = [b"b%d" % number if random.random() < 0.5 else b"" for number in range(50)]
    client = stage.client()
    client.send(
        b"".join(
            request(f"POST {target}", f"Content-Length: {len(body)}", body=body)
            if len(body) % 2
            else request(f"POST {target}", TE, body=chunked(body))
            for target, body in zip(targets, bodies, strict=True)
        )
    )
    for target, body in zip(targets, bodies, strict=True):
        assert client.answer().body == target.encode() + b" " + body
    assert len(stage.up.requests) + len(stage.upstreams["other"].requests) == 50


def test_refusals_stand_in_their_place_in_a_pipeline(stage: Stage) -> None:
    stage.ask(request("GET /admin/x"))
    client = stage.client()
    client.send(
        get() + request("GET /admin/x") + get() + request("HEAD /admin/x") + get() + get("bad header: x") + get()
    )
    statuses = [client.answer(method).status for method in ("GET", "GET", "GET", "HEAD", "GET", "GET")]
    assert statuses == [200, 429, 200, 429, 200, 400]
    assert client.end() == "fin"
    assert len(stage.up.requests) in (3, 4)  # with the one of the first line, if that was the hour's


def test_a_request_behind_a_body_in_transit_waits_for_its_turn(stage: Stage) -> None:
    stage.up.script = echo
    random = Random(3)
    body = random.randbytes(3_000_000)
    client = stage.client()
    sender = threading.Thread(
        target=client.send,
        args=(
            request("POST /a", f"Content-Length: {len(body)}", body=body),
            request("GET /b"),
            request("POST /c", TE, body=chunked(body[:100_000], body[100_000:200_000])),
            request("GET /d"),
        ),
    )
    sender.start()
    assert client.answer().body == body
    assert client.answer().body == b""
    assert client.answer().body == body[:200_000]
    assert client.answer().body == b""
    sender.join()
    assert stage.up.targets == [b"/a", b"/b", b"/c", b"/d"]
    assert stage.up.connections == 1


@pytest.mark.parametrize("framing", ["by its length", "in chunks"])
def test_a_body_of_20_megabytes_arrives_byte_for_byte(stage: Stage, framing: str) -> None:
    random = Random(20)
    body = random.randbytes(20_000_000)
    pieces = []
    at = 0
    while at < len(body):
        size = random.choice([1, 100, 5000, 65_536, 1_000_000])
        pieces.append(body[at : at + size])
        at += size
    client = stage.client()
    if framing == "in chunks":
        client.send(request("PUT /", TE))
        for piece in pieces:
            client.send(b"%x\r\n" % len(piece), piece, b"\r\n")
        client.send(b"0\r\n\r\n")
    else:
        client.send(request("PUT /", f"Content-Length: {len(body)}"), *pieces)
    assert client.answer().status == 200
    assert stage.up.one().body == body
    assert stage.up.one().framing == ("chunked" if framing == "in chunks" else "20000000")


def test_22_a_trusted_proxy_is_believed_and_appended_to(tmp_path_factory: pytest.TempPathFactory) -> None:
    def trusting(urls: Mapping[str, str]) -> dict[str, Any]:
        return {**settings({**urls, "other": urls["up"]}), "identity": {"trusted_proxies": ["127.0.0.0/8"], "user": "header:X-User"}}  # fmt: skip

    with staged(tmp_path_factory.mktemp("trusting"), trusting) as stage:
        stage.ask(
            get(
                "Connection: X-Forwarded-For",
                "X-Forwarded-For: 192.0.2.7",
                "X-Forwarded-Proto: https",
                "X-Forwarded-Host: shop.example",
                "X-User: ada",
                "X_User: eve",
            )
        )
        got = stage.up.requests[0]
        assert b", ".join(got.all("x-forwarded-for")) == b"192.0.2.7, 127.0.0.1"
        assert got.get("x-forwarded-proto") == b"https"
        assert got.get("x-forwarded-host") == b"shop.example"
        assert got.get("x-user") == b"ada"
        stage.ask(get("X-Forwarded-For: 192.0.2.7", "X-Forwarded-For: 192.0.2.8"))
        got = stage.up.requests[1]
        assert b", ".join(got.all("x-forwarded-for")) == b"192.0.2.7, 192.0.2.8, 127.0.0.1"
        assert got.get("x-forwarded-proto") == b"http"
        assert got.get("x-forwarded-host") == b"a.example"
        # A rule counts the client behind the proxy, not the proxy.
        statuses = [
            stage.ask(request("GET /admin/x", f"X-Forwarded-For: {client}")).status
            for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "6.6.6.6, 192.0.2.2")
        ]
        assert statuses == [200, 429, 200, 429]
        stage.check()


@pytest.mark.parametrize("kind", ["forwarded", "none"])
def test_22_the_forwarding_field_is_the_one_that_was_set(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    def told(urls: Mapping[str, str]) -> dict[str, Any]:
        return {**settings({**urls, "other": urls["up"]}), "listen": {"forwarded": kind}}

    with staged(tmp_path_factory.mktemp(kind), told) as stage:
        stage.ask(get("Forwarded: for=6.6.6.6", "X-Forwarded-For: 6.6.6.6", "X-Forwarded-Host: evil"))
        got = stage.up.one()
        assert not [name for name, _ in got.fields if name.lower().startswith(b"x-forwarded")]
        if kind == "none":
            assert not got.all("forwarded")
        else:
            pairs = dict(pair.split(b"=") for pair in (got.get("forwarded") or b"").lower().split(b";"))
            assert {name: value.strip(b'"') for name, value in pairs.items()} == {
                b"for": b"127.0.0.1",
                b"proto": b"http",
                b"host": b"a.example",
            }
        assert got.get("via")
        stage.check()
