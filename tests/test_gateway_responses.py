"""What upstreams answer, in bytes: what the gateway does not let through, and what reaches a client of what it does.

Numbers in front are those of the rules of the wire: 1 to 9 framing, 10 surplus, 11 hop by hop, 13 interim answers,
20 and 23 fields, 26 bounds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest

from tests.gateway import (
    OK,
    POOL,
    Ended,
    Stage,
    Talk,
    answering,
    chunked,
    closing,
    request,
    response,
    says,
    staged,
)

GET = request("GET /")
HEAD = request("HEAD /")
OLD = request("GET / HTTP/1.0")

INNER = (b"kernel", b"127.0.0.1", b"secret", b".py", b"Traceback")
"""What no answer of the gateway itself may hold. (Each bad answer below names a secret.)"""


def settings(urls: Mapping[str, str]) -> dict[str, Any]:
    return {
        "pools": {"kernel": {"upstreams": [urls["up"]], **POOL}},
        "routes": [{"match": "/*", "pool": "kernel"}],
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("gateway"), settings) as stage:
        yield stage


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    shared.clear()
    yield shared
    shared.check()


def bad(says: str, raw: bytes) -> Any:
    return pytest.param(raw, id=says)


def with_fields(*fields: str | bytes, body: bytes = b"secret") -> bytes:
    return response("200 OK", *fields, body=body)


def length(value: str | bytes) -> bytes:
    return with_fields(b"Content-Length: " + (value.encode() if isinstance(value, str) else value))


def coding(value: str | bytes, *more: str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return with_fields(b"Transfer-Encoding: " + value, *more, body=chunked(b"secret"))


def line(text: str | bytes) -> bytes:
    """An answer whose first line is this."""
    return (text.encode("latin-1") if isinstance(text, str) else text) + b"\r\nContent-Length: 6\r\n\r\nsecret"


CL, TE = "Content-Length: 6", "Transfer-Encoding: chunked"

BAD = [
    # 1: two framings
    bad("1 Content-Length, then Transfer-Encoding", with_fields(CL, TE, body=chunked(b"secret"))),
    bad("1 Transfer-Encoding, then Content-Length", with_fields(TE, CL, body=chunked(b"secret"))),
    bad("1 a Content-Length of 0 beside Transfer-Encoding", with_fields("Content-Length: 0", TE, body=chunked(b"secret"))),
    bad("1 identity beside Content-Length", with_fields(CL, "Transfer-Encoding: identity")),
    # 2: Transfer-Encoding
    bad("2 a coding other than chunked", coding("gzip")),
    bad("2 identity", coding("identity")),
    bad("2 chunked, then another", coding("chunked, gzip")),
    bad("2 another, then chunked", coding("gzip, chunked")),
    bad("2 chunked twice in a list", coding("chunked, chunked")),
    bad("2 chunked twice in two fields", coding("chunked", TE)),
    bad("2 two fields, another and chunked", coding("gzip", TE)),
    bad("2 no coding at all", coding("")),
    bad("2 xchunked", coding("xchunked")),
    bad("2 quoted", coding('"chunked"')),
    bad("2 with a parameter", coding("chunked;q=1")),
    bad("2 a vertical tab before", coding("\x0bchunked")),
    bad("2 the Kelvin sign is no k", coding("chun\u212aed")),
    bad("2 in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"secret")),
    # 3: Content-Length
    bad("3 a plus", length("+6")),
    bad("3 a minus", length("-6")),
    bad("3 an underscore", length("0_6")),
    bad("3 a space within", length("6 6")),
    bad("3 hexadecimal", length("0x6")),
    bad("3 a fraction", length("6.0")),
    bad("3 Arabic digits", length("\u0666")),
    bad("3 a superscript in Latin-1", length(b"\xb3")),
    bad("3 none", length("")),
    bad("3 a vertical tab before", length("\x0b6")),
    bad("3 a list of two values", length("6, 7")),
    bad("3 two fields that differ", with_fields(CL, "Content-Length: 7")),
    bad("3 19 digits", length("1" * 19)),
    bad("3 thousands of digits", length("9" * 5000)),
    # 4: white space and line ends
    bad("4 a space before the colon of Content-Length", with_fields("Content-Length : 6")),
    bad("4 a space before the colon of Transfer-Encoding", with_fields("Transfer-Encoding : chunked", body=chunked(b"secret"))),
    bad("4 a tab before the colon", with_fields(CL, "X-A\t: b")),
    bad("4 a folded line", with_fields(CL, "X-A: b", " c: d")),
    bad("4 a line folded by a tab", with_fields(CL, "X-A: b", "\tc")),
    bad("4 a folded Transfer-Encoding", with_fields("Transfer-Encoding:", " chunked", body=chunked(b"secret"))),
    bad("4 a space before the first field", with_fields(" X-A: b", CL)),
    bad("4 a bare CR in a value", with_fields(CL, "X-A: b\rSet-Cookie: c=d")),
    bad("4 a bare CR in a name", with_fields(CL, "X-\rA: b")),
    bad("4 a bare CR before the end of the head", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\r\nsecret\r\n\r\n"),
    bad("4 a bare LF ends a field", with_fields(CL, "X-A: b\nSet-Cookie: c=d")),
    bad("4 a bare LF ends the status line", b"HTTP/1.1 200 OK\nContent-Length: 6\r\n\r\nsecret"),
    bad("4 bare LF everywhere", b"HTTP/1.1 200 OK\nContent-Length: 10\n\nsecret\r\n\r\n"),
    bad("4 a bare LF ends the head", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\nsecret\r\n\r\n"),
    bad("4 a NUL in a value", with_fields(CL, "X-A: b\0c")),
    bad("4 a NUL in a name", with_fields(CL, "X-\0A: b")),
    # the status line
    bad("18 another protocol", line("ICY 200 OK")),
    bad("18 HTTP/2", line("HTTP/2 200 OK")),
    bad("18 HTTP/2.0", line("HTTP/2.0 200 OK")),
    bad("18 HTTP/0.9", line("HTTP/0.9 200 OK")),
    bad("18 HTTP/1.10", line("HTTP/1.10 200 OK")),
    bad("18 a version in lower case", line("http/1.1 200 OK")),
    bad("18 no version", line("200 OK")),
    bad("18 two digits", line("HTTP/1.1 20 OK")),
    bad("18 four digits", line("HTTP/1.1 2000 OK")),
    bad("18 no digits", line("HTTP/1.1 OK")),
    bad("18 a status below 100", line("HTTP/1.1 099 OK")),
    bad("18 a status of 000", line("HTTP/1.1 000 OK")),
    bad("18 a plus in the status", line("HTTP/1.1 +20 OK")),
    bad("18 Arabic digits in the status", line("HTTP/1.1 \u0662\u0660\u0660 OK".encode())),
    bad("18 two spaces", line("HTTP/1.1  200 OK")),
    bad("18 a tab", line("HTTP/1.1\t200 OK")),
    bad("18 a space before", line(" HTTP/1.1 200 OK")),
    bad("18 text without a head", b"secret\r\n\r\n"),
    bad("18 a request in place of an answer", b"GET /secret HTTP/1.1\r\nHost: a\r\n\r\n"),
    bad("18 an empty line before", b"\r\n" + line("HTTP/1.1 200 OK")),
    bad("18 a TLS alert", b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n"),
    bad("20 a NUL in the reason", line("HTTP/1.1 200 O\0K")),
    bad("20 a bare CR in the reason", line("HTTP/1.1 200 O\rK")),
    # 14
    bad("14 a switch of protocols", response("101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade")),
    # 20: names
    bad("20 an empty name", with_fields(CL, ": b")),
    bad("20 no colon", with_fields(CL, "secret")),
    bad("20 a space in a name", with_fields(CL, "X A: b")),
    bad("20 a parenthesis in a name", with_fields(CL, "X(A): b")),
    bad("20 a name beyond ASCII", with_fields(CL, b"X-\xc3\xa4: b")),
    # 26: bounds
    bad("26 a field larger than a head may be", with_fields(CL, "X-A: " + "a" * 300_000)),
    bad("26 thousands of fields", with_fields(CL, *["a: b"] * 50_000)),
    bad("26 a status line without end", b"HTTP/1.1 200 " + b"O" * 300_000),
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD)
def test_a_malformed_answer_becomes_a_502_and_its_connection_is_dropped(stage: Stage, raw: bytes) -> None:
    def script(talk: Talk) -> None:
        talk.take()
        try:
            talk.send(raw)
        finally:
            talk.until_end()

    stage.up.script = script
    client = stage.client()
    answer = client.ask(GET)
    while answer.status < 200:
        answer = client.answer()
    assert (answer.status, answer.complete) == (502, True)
    assert (answer.get("proxy-status") or b"").startswith(b"gatekeeper; error=")
    assert answer.get("cache-control") == b"no-store"
    assert not [inner for inner in INNER if inner in answer.head + answer.body]
    assert not answer.all("set-cookie")
    stage.up.until(lambda: 0 in stage.up.ends)
    assert len(stage.up.requests) == 1  # not asked again: it has answered
    # Neither the client's connection nor the next request is the worse for it.
    stage.up.script = answering(OK)
    assert client.ask(GET).body == b"ok"
    assert (stage.up.connections, len(stage.up.requests)) == (2, 2)


@pytest.mark.parametrize("split", ["byte by byte", "in two"])
@pytest.mark.parametrize(
    "raw",
    [
        bad("two framings", with_fields(CL, TE, body=b"")),
        bad("a bare LF", with_fields(CL, "X-A: b\nSet-Cookie: c=d", body=b"")),
        bad("a folded line", with_fields("X-A: b", " c", body=b"")),
        bad("a bare CR", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\r\nsecret\r\n\r\n"),
    ],
)
def test_a_malformed_answer_is_one_however_it_is_cut(stage: Stage, raw: bytes, split: str) -> None:
    for place in range(1, len(raw), 3) if split == "in two" else [0]:

        def script(talk: Talk, place: int = place) -> None:
            talk.take()
            if place:
                talk.send(raw[:place])
                if place % 8 == 0:
                    stage.settle()
                talk.send(raw[place:])
            else:
                talk.slowly(raw)
            talk.until_end()

        stage.up.script = script
        assert stage.ask(GET).status == 502


@pytest.mark.parametrize(
    "raw",
    [
        bad("nothing", b""),
        bad("a part of the status line", b"HTTP/1.1 20"),
        bad("a part of the head", b"HTTP/1.1 200 OK\r\nX-Secret: a"),
        bad("all but the end of the head", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n"),
        bad("an interim answer alone", response("103 Early Hints")),
    ],
)
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_an_upstream_that_leaves_before_the_head_is_whole_is_a_502(stage: Stage, raw: bytes, how: str) -> None:
    stage.up.script = closing(raw, by_reset=how == "reset")
    client = stage.client()
    answer = client.ask(request("POST /", "Content-Length: 2", body=b"hi"))
    while answer.status < 200:
        answer = client.answer()
    assert answer.status == 502
    assert (answer.get("proxy-status") or b"").startswith(b"gatekeeper; error=")
    assert b"Secret" not in answer.head
    assert len(stage.up.requests) == 1
    stage.up.script = answering(OK)
    assert client.ask(GET).body == b"ok"


def good(
    says: str, raw: bytes, body: bytes = b"", framing: str = "length", *, asked: bytes = GET, status: int = 200
) -> Any:
    return pytest.param(asked, raw, status, body, framing, id=says)


WHOLE = [
    good("by its length", says(b"hello"), b"hello"),
    good("a length of 0", with_fields("Content-Length: 0", body=b"")),
    good("in chunks", with_fields(TE, body=chunked(b"he", b"llo")), b"hello", "chunked"),
    good("empty in chunks", with_fields(TE, body=chunked()), b"", "chunked"),
    good("2 chunked in capitals", coding("CHUNKED"), b"secret", "chunked"),
    good("3 a length repeated", with_fields(CL, CL), b"secret"),
    good("3 a length listed twice", length("6, 6"), b"secret"),
    good("3 zeros before", length("006"), b"secret"),
    good("5 extensions are dropped", with_fields(TE, body=b"5;a=b\r\nhello\r\n0;c\r\n\r\n"), b"hello", "chunked"),
    good("5 sizes of 16 digits", with_fields(TE, body=b"5".zfill(16) + b"\r\nhello\r\n000\r\n\r\n"), b"hello", "chunked"),
    good("6 trailers are dropped", with_fields(TE, "Trailer: X-A", body=b"5\r\nhello\r\n0\r\nX-A: b\r\nContent-Length: 9\r\nSet-Cookie: x=y\r\n\r\n"), b"hello", "chunked"),
    good("no reason", response("200 ", CL, body=b"secret"), b"secret"),
    good("a reason beyond ASCII", response("200 na\u00efve", CL, body=b"secret"), b"secret"),
    good("a status of nobody's", response("299 Odd", CL, body=b"secret"), b"secret", status=299),
    good("an error's body", response("503 No", CL, body=b"secret"), b"secret", status=503),
    good("an answer of HTTP/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\nhello", b"hello"),
    # 8: no body, whatever the fields say
    good("8 HEAD keeps Content-Length", with_fields("Content-Length: 5000", body=b""), asked=HEAD, framing="length 5000"),
    good("8 HEAD with chunked", with_fields(TE, body=b""), asked=HEAD, framing="any"),
    good("8 HEAD without framing", with_fields("X-A: b", body=b""), asked=HEAD, framing="any"),
    good("8 HEAD of an error", response("404 No", "Content-Length: 9"), asked=HEAD, framing="length 9", status=404),
    good("8 204", response("204 No Content"), framing="none", status=204),
    good("8 204 with a length", response("204 No Content", "Content-Length: 5"), framing="any", status=204),
    good("8 204 with chunked", response("204 No Content", TE), framing="none", status=204),
    good("8 304", response("304 Not Modified", 'ETag: "x"'), framing="none", status=304),
    good("8 304 with a length", response("304 Not Modified", "Content-Length: 5"), framing="any", status=304),
    good("8 304 with chunked", response("304 Not Modified", TE), framing="any", status=304),
    good("8 a method that is not quite HEAD", says(b"hello"), b"hello", asked=request("head /")),
    good("8 205", response("205 Reset Content", "Content-Length: 0"), status=205),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "raw", "status", "body", "framing"), WHOLE)
def test_a_whole_answer_arrives_and_both_connections_are_used_again(
    stage: Stage, asked: bytes, raw: bytes, status: int, body: bytes, framing: str
) -> None:
    stage.up.script = answering(raw, OK)
    client = stage.client()
    answer = client.ask(asked)
    assert (answer.status, answer.body, answer.complete, answer.closes) == (status, body, True, False)
    assert not answer.all("trailer")
    if framing == "chunked":
        assert answer.chunked
    elif framing == "none":
        assert answer.length is None
        assert not answer.chunked
    elif framing.startswith("length"):
        assert answer.length == int(framing[7:] or len(body))
    # Were a body taken or left that is none, the next answer would not be this one.
    assert client.ask(GET).body == b"ok"
    assert stage.up.connections == 1


@pytest.mark.parametrize(
    ("asked", "raw"),
    [
        pytest.param(GET, says(b"hello") + OK, id="a second answer"),
        pytest.param(GET, says(b"hello") + b"secret", id="bytes"),
        pytest.param(GET, says(b"hello") + b"\r\n", id="an empty line"),
        pytest.param(GET, with_fields(TE, body=chunked(b"hello")) + OK, id="a second answer behind chunks"),
        pytest.param(HEAD, says(b"hello"), id="the body of a HEAD"),
        pytest.param(HEAD, with_fields(TE, body=chunked(b"hello")), id="the chunks of a HEAD"),
        pytest.param(GET, response("204 No", "Content-Length: 5", body=b"hello"), id="the body of a 204"),
        pytest.param(GET, response("304 No", "Content-Length: 5", body=b"hello"), id="the body of a 304"),
        pytest.param(GET, response("304 No", TE, body=chunked(b"hello")), id="the chunks of a 304"),
    ],
)
def test_10_what_comes_behind_an_answer_is_nobodys_and_its_connection_is_dropped(
    stage: Stage, asked: bytes, raw: bytes
) -> None:
    stage.up.script = answering(raw, says(b"the next"))
    client = stage.client()
    answer = client.ask(asked)
    assert answer.body in (b"hello", b"")
    stage.up.until(lambda: 0 in stage.up.ends)
    assert client.ask(GET).body == b"the next"
    assert stage.up.connections == 2


def test_10_what_comes_without_having_been_asked_for_is_nobodys(stage: Stage) -> None:
    ready = threading.Event()

    def script(talk: Talk) -> None:
        talk.answer(OK)
        if not ready.is_set():
            ready.wait(5)
            talk.send(says(b"poison"))
            stage.settle()
            talk.until_end()

    stage.up.script = script
    client = stage.client()
    assert client.ask(GET).body == b"ok"
    ready.set()
    stage.up.until(lambda: 0 in stage.up.ends)
    for _ in range(5):
        assert client.ask(GET).body == b"ok"
    assert stage.up.connections == 2


BROKEN = [
    pytest.param(GET, with_fields("Content-Length: 50", body=b"a part"), False, id="by length, closed"),
    pytest.param(GET, with_fields("Content-Length: 50", body=b"a part"), True, id="by length, reset"),
    pytest.param(GET, with_fields("Content-Length: 50", body=b""), False, id="by length, closed behind the head"),
    pytest.param(GET, with_fields(TE, body=b"6\r\na part\r\n"), False, id="in chunks, closed between"),
    pytest.param(GET, with_fields(TE, body=b"6\r\na part\r\n"), True, id="in chunks, reset between"),
    pytest.param(GET, with_fields(TE, body=b"20\r\na part"), False, id="in chunks, closed within"),
    pytest.param(GET, with_fields(TE, body=b"6\r\na part\r\n0\r\n"), False, id="in chunks, closed before the very end"),
    pytest.param(GET, with_fields(TE, body=b""), False, id="in chunks, closed behind the head"),
    pytest.param(GET, with_fields("X-A: b", body=b"a part"), True, id="until the end, reset"),
    pytest.param(GET, b"HTTP/1.0 200 OK\r\n\r\na part", True, id="until the end of HTTP/1.0, reset"),
    pytest.param(OLD, with_fields("Content-Length: 50", body=b"a part"), False, id="by length, closed, to HTTP/1.0"),
    pytest.param(OLD, with_fields(TE, body=b"6\r\na part\r\n"), False, id="in chunks, closed, to HTTP/1.0"),
    pytest.param(OLD, with_fields(TE, body=b"6\r\na part\r\n"), True, id="in chunks, reset, to HTTP/1.0"),
    pytest.param(OLD, with_fields("X-A: b", body=b"a part"), True, id="until the end, reset, to HTTP/1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "raw", "by_reset"), BROKEN)
def test_9_an_answer_that_is_broken_off_never_looks_complete(
    stage: Stage, asked: bytes, raw: bytes, by_reset: bool
) -> None:
    """The head has been read by the client when the upstream leaves."""
    head_read = threading.Event()

    def script(talk: Talk) -> None:
        head, end, part = raw.partition(b"\r\n\r\n")
        talk.answer(head + end + part)
        head_read.wait(15)
        if by_reset:
            talk.reset()
        else:
            talk.close()

    stage.up.script = script
    client = stage.client()
    client.send(asked)
    client.wait_for(b"\r\n\r\n")
    head_read.set()
    answer = client.answer()
    assert answer.status == 200
    assert not answer.complete
    assert answer.ended == "reset"
    assert b"a part".startswith(answer.body.partition(b"\r\n")[2] if answer.chunked else answer.body)
    assert len(stage.up.requests) == 1
    stage.up.script = answering(OK)
    assert stage.ask(GET).body == b"ok"


@pytest.mark.parametrize(
    "body",
    [
        bad("no size", b"g\r\nsecret"),
        bad("a prefix", b"0x6\r\nsecret\r\n0\r\n\r\n"),
        bad("a plus", b"+6\r\nsecret\r\n0\r\n\r\n"),
        bad("an underscore", b"0_6\r\nsecret\r\n0\r\n\r\n"),
        bad("a space behind", b"6 \r\nsecret\r\n0\r\n\r\n"),
        bad("17 digits", b"6".zfill(17) + b"\r\nsecret\r\n0\r\n\r\n"),
        bad("a bare LF behind the size", b"6\nsecret\r\n0\r\n\r\n"),
        bad("an extension of 300 bytes", b"6;a=" + b"b" * 300 + b"\r\nsecret\r\n0\r\n\r\n"),
        bad("a bare LF in an extension", b"6;a\n\r\nsecret\r\n0\r\n\r\n"),
        bad("nothing behind the data", b"6\r\nsecret0\r\n\r\n"),
        bad("a bare LF behind the data", b"6\r\nsecret\n0\r\n\r\n"),
        bad("more data than said", b"5\r\nsecret\r\n0\r\n\r\n"),
        bad("less data than said", b"7\r\nsecret\r\n0\r\n\r\n"),
        bad("a bare LF as the end", b"6\r\nsecret\r\n0\r\n\n"),
        bad("a folded trailer", b"6\r\nsecret\r\n0\r\nX: y\r\n z\r\n\r\n"),
        bad("a trailer with a space before the colon", b"6\r\nsecret\r\n0\r\nX : y\r\n\r\n"),
        bad("a NUL in a trailer", b"6\r\nsecret\r\n0\r\nX: \0\r\n\r\n"),
        bad("trailers without end", b"6\r\nsecret\r\n0\r\n" + b"X: y\r\n" * 60_000),
    ],
)
def test_5_chunks_that_are_not_as_they_should_be_break_the_answer_off(stage: Stage, body: bytes) -> None:
    def script(talk: Talk) -> None:
        talk.answer(with_fields(TE, body=b""))
        talk.send(b"2\r\nok\r\n")
        talk.send(body)
        talk.until_end()

    stage.up.script = script
    answer = None
    try:
        answer = stage.ask(GET)
    except Ended:  # a reset may overtake the head
        pass
    # If all of it came at once, the head need not have been sent on yet.
    assert answer is None or (answer.status, answer.complete) in [(200, False), (502, True)]
    stage.up.until(lambda: 0 in stage.up.ends)
    stage.up.script = answering(OK)
    assert stage.ask(GET).body == b"ok"


@pytest.mark.parametrize("raw", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_9_an_answer_without_framing_lasts_until_the_end(stage: Stage, raw: bytes) -> None:
    body = Random(9).randbytes(300_000)
    stage.up.script = closing(raw + body)
    client = stage.client()
    answer = client.ask(GET)
    assert (answer.status, answer.body, answer.complete) == (200, body, True)
    assert answer.chunked
    stage.up.script = answering(OK)
    assert client.ask(GET).body == b"ok"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(with_fields(TE, body=chunked(b"he", b"llo")), id="of chunks"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nhello", id="without framing"),
    ],
)
def test_9_to_a_client_of_http_1_0_nothing_is_chunked(stage: Stage, raw: bytes) -> None:
    stage.up.script = closing(raw)
    client = stage.client()
    answer = client.ask(request("GET / HTTP/1.0", "Connection: keep-alive"))
    assert not answer.all("transfer-encoding")
    assert (answer.status, answer.body, answer.complete, answer.ended) == (200, b"hello", True, "fin")


def test_what_passes_passes_byte_for_byte_and_in_order(stage: Stage) -> None:
    fields: list[str | bytes] = [
        "Date: Tue, 15 Nov 1994 08:12:31 GMT",
        "Server: odd/1.0 (x)",
        "Set-Cookie: a=b; Path=/",
        "X-A: 1",
        "Set-Cookie: c=d, e=f; Expires=Wed, 09 Jun 2021 10:18:14 GMT",
        "X-B: ",
        b"X-C: caf\xc3\xa9 \xff",
        "Set-Cookie: a=b; Path=/",
        "x-a: 2",
        'ETag: W/"x"',
        "Cache-Control: no-cache",
        "Cache-Control: private",
        "Content-Encoding: gzip",
        "Vary: Accept",
        "X_Y: z",
        'WWW-Authenticate: Basic realm="x"',
    ]
    stage.up.script = answering(with_fields(*fields, CL))
    answer = stage.ask(GET)
    lines = answer.head[:-4].split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    kept = [text for text in lines[1:] if not text.lower().startswith(b"content-length:")]
    assert kept == [text.encode() if isinstance(text, str) else text for text in fields]
    assert answer.body == b"secret"


def test_11_fields_of_the_upstreams_connection_stay_behind(stage: Stage) -> None:
    stage.up.script = answering(
        with_fields(
            "Connection: X-A, Keep-Alive, Content-Length, Set-Cookie2",
            "Keep-Alive: timeout=5",
            "Proxy-Connection: keep-alive",
            "X-A: 1",
            "X-B: 2",
            "Upgrade: h2c",
            "Trailer: X-C",
            "TE: gzip",
            "Proxy-Authenticate: Basic",
            CL,
        )
    )
    answer = stage.ask(GET)
    assert [name.lower() for name, _ in answer.fields] == [b"x-b", b"content-length"]
    assert answer.body == b"secret"


def test_11_an_upstream_that_closes_is_no_reason_to_close_the_client(stage: Stage) -> None:
    stage.up.script = closing(with_fields("Connection: close", CL))
    client = stage.client()
    for _ in range(3):
        answer = client.ask(GET)
        assert (answer.status, answer.body, answer.closes) == (200, b"secret", False)
    assert stage.up.connections == 3


def test_13_interim_answers_are_forwarded_as_they_come(stage: Stage) -> None:
    seen = threading.Event()

    def script(talk: Talk) -> None:
        talk.answer(response("103 Early Hints", "Link: </a.css>; rel=preload", "Connection: X-A", "X-A: b"))
        seen.wait(15)  # it does not wait for the answer itself
        talk.send(response("103 Early Hints", "Link: </b.css>"), response("102 Processing"), OK)

    stage.up.script = script
    client = stage.client()
    client.send(GET + GET)
    first = client.answer()
    assert (first.status, first.fields) == (103, [(b"Link", b"</a.css>; rel=preload")])
    seen.set()
    assert [client.answer().status for _ in range(3)] == [103, 102, 200]
    assert [client.answer().status for _ in range(4)] == [103, 103, 102, 200]
    assert stage.up.connections == 1


def test_13_interim_answers_do_not_go_to_http_1_0(stage: Stage) -> None:
    interim = response("100 Continue") + response("103 Early Hints", "Link: </a>")
    stage.up.script = answering(interim + OK)
    client = stage.client()
    answer = client.ask(request("GET / HTTP/1.0"))
    assert (answer.status, answer.body) == (200, b"ok")
    assert client.end() == "fin"


def test_13_a_body_that_waits_for_100_is_asked_for_once(stage: Stage) -> None:
    def script(talk: Talk) -> None:
        talk.send(response("100 Continue"))
        talk.answer(says(talk.take()))

    stage.up.script = script
    client = stage.client()
    for _ in range(2):
        first = client.ask(request("POST /", "Expect: 100-continue", "Content-Length: 5"))
        assert (first.status, first.line) == (100, b"HTTP/1.1 100 Continue")
        last = client.ask(b"hello", "POST")
        assert (last.status, last.body) == (200, b"hello")
    assert [request.get("expect") for request in stage.up.requests] == [b"100-continue"] * 2
    assert stage.up.connections == 1


def test_13_a_body_that_does_not_wait_for_100_passes_too(stage: Stage) -> None:
    stage.up.script = lambda talk: talk.send(response("100 Continue"), says(talk.take()))
    client = stage.client()
    client.send(request("POST /", "Expect: 100-Continue", TE, body=chunked(b"hello")))
    assert client.answer().status == 100
    assert client.answer().body == b"hello"
    stage.up.script = lambda talk: talk.send(says(talk.take()))  # an upstream that leaves it out
    client.send(request("POST /", "Expect: 100-continue", TE, body=chunked(b"hello")))
    assert client.answer().body == b"hello"


def test_13_a_417_instead_of_100_arrives_and_the_body_is_not_waited_for(stage: Stage) -> None:
    def script(talk: Talk) -> None:
        talk.send(response("417 No", "Content-Length: 2", body=b"no"))
        talk.until_end()

    stage.up.script = script
    client = stage.client()
    answer = client.ask(request("POST /", "Expect: 100-continue", "Content-Length: 5"))
    assert (answer.status, answer.body) == (417, b"no")
    # Whether a body follows is not known: what comes next can be no request.
    assert answer.closes
    assert client.end() == "fin"
    stage.up.until(lambda: 0 in stage.up.ends)


def test_13_expect_of_http_1_0_is_not_asked_for(stage: Stage) -> None:
    stage.up.script = lambda talk: talk.send(response("100 Continue"), says(talk.take()))
    answer = stage.ask(request("POST / HTTP/1.0", "Expect: 100-continue", "Content-Length: 5", body=b"hello"))
    assert (answer.status, answer.body) == (200, b"hello")


def test_8_a_head_in_a_pipeline_does_not_put_the_answers_out_of_step(stage: Stage) -> None:
    def script(talk: Talk) -> None:
        text = says(talk.request.target)
        talk.answer(text[:-2] if talk.request.method == b"HEAD" else text)

    stage.up.script = script
    methods = ["HEAD", "GET", "HEAD", "HEAD", "GET", "GET", "HEAD", "GET"]
    client = stage.client()
    client.send(b"".join(request(f"{method} /{place}") for place, method in enumerate(methods)))
    for place, method in enumerate(methods):
        answer = client.answer(method)
        assert (answer.length, answer.body) == (2, b"" if method == "HEAD" else b"/%d" % place)
    assert stage.up.connections == 1


def test_an_answer_passes_however_it_is_cut(stage: Stage) -> None:
    raw = with_fields("X-A: b", TE, body=b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nX: y\r\n\r\n")
    client = stage.client()
    for place in range(len(raw)):

        def script(talk: Talk, place: int = place) -> None:
            talk.answer(raw[:place])
            if not place:
                return talk.slowly(raw)
            if place % 8 == 0:
                stage.settle()
            talk.send(raw[place:])

        stage.up.script = script
        answer = client.ask(GET)
        assert (answer.body, answer.complete, answer.get("x-a")) == (b"hello", True, b"b")
    assert stage.up.connections == 1


def test_bytes_of_an_answer_arrive_before_it_is_whole(stage: Stage) -> None:
    steps = [threading.Event() for _ in range(4)]

    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number, step in enumerate(steps):
            step.wait(15)
            talk.send(b"8\r\ndata: %d\n\r\n" % number)
        talk.send(b"0\r\n\r\n")

    stage.up.script = script
    client = stage.client()
    client.send(GET)
    client.through(b"\r\n\r\n")
    for number, step in enumerate(steps):
        step.set()
        client.through(b"data: %d\n" % number)
    assert client.through(b"0\r\n\r\n")


@pytest.mark.parametrize("framing", ["by its length", "in chunks", "until the end"])
def test_an_answer_of_20_megabytes_arrives_byte_for_byte(stage: Stage, framing: str) -> None:
    random = Random(20)
    body = random.randbytes(20_000_000)

    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\n")
        if framing == "in chunks":
            talk.send(b"Transfer-Encoding: chunked\r\n\r\n")
        elif framing == "by its length":
            talk.send(b"Content-Length: %d\r\n\r\n" % len(body))
        else:
            talk.send(b"\r\n")
        at = 0
        while at < len(body):
            piece = body[at : at + random.choice([1, 100, 5000, 65_536, 1_000_000])]
            talk.send(b"%x\r\n%s\r\n" % (len(piece), piece) if framing == "in chunks" else piece)
            at += len(piece)
        if framing == "in chunks":
            talk.send(b"0\r\n\r\n")
        elif framing == "until the end":
            talk.close()

    stage.up.script = script
    answer = stage.ask(GET)
    assert answer.complete
    assert answer.body == body
    assert answer.chunked == (framing != "by its length")
