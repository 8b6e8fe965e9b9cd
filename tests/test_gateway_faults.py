"""What happens on the way: upstreams that refuse, hang and break off; clients that leave, stall and flood; the end.

Where a bound of time is the matter it is half a second in a gateway of its own, and what comes of it is waited for.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from random import Random
from typing import Any

import pytest

from tests.gateway import (
    OK,
    POOL,
    Client,
    Deaf,
    Ended,
    Gateway,
    Refusing,
    Stage,
    Talk,
    Upstream,
    answering,
    chunked,
    closing,
    request,
    response,
    says,
    silent,
    staged,
)

GET = request("GET /")
TE = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    refusing = [Refusing(), Refusing()]

    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "limits": [{"name": "front", "rate": "1/hour", "match": "/limited"}],
            "pools": {
                "one": {"upstreams": [urls["up"]], **POOL},
                "half": {"upstreams": [refusing[0].url, urls["up"]], **POOL},
                "none": {"upstreams": [each.url for each in refusing], **POOL},
                "two": {"upstreams": [urls["a"], urls["b"]], **POOL},
            },
            "routes": [
                {"match": "/*", "pool": "one"},
                {"match": "/half/*", "pool": "half"},
                {"match": "/none/*", "pool": "none"},
                {"match": "/two/*", "pool": "two"},
            ],
        }

    with staged(tmp_path_factory.mktemp("gateway"), settings, ["up", "a", "b"], refusing) as stage:
        yield stage


@pytest.fixture
def stage(shared: Stage) -> Iterator[Stage]:
    shared.clear()
    yield shared
    shared.check()


@pytest.fixture(scope="module")
def shared_hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    deaf = Deaf()

    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        soon = {"connect_timeout": "500ms", "response_timeout": "500ms", "read_timeout": "500ms", **POOL}
        return {
            "listen": {
                "head_timeout": "500ms",
                "idle_timeout": "500ms",
                "body_timeout": "500ms",
                "least_rate": 1000,
                "max_body": "64KiB",
            },
            "pools": {
                "one": {"upstreams": [urls["up"]], **soon},
                "deaf": {"upstreams": [deaf.url], **soon},
                "half": {"upstreams": [deaf.url, urls["up"]], **soon},
            },
            "routes": [
                {"match": "/*", "pool": "one"},
                {"match": "/deaf/*", "pool": "deaf"},
                {"match": "/half/*", "pool": "half"},
            ],
        }

    with staged(tmp_path_factory.mktemp("hasty"), settings, ["up"], [deaf]) as stage:
        yield stage


@pytest.fixture
def hasty(shared_hasty: Stage) -> Iterator[Stage]:
    """A gateway whose bounds of time are half a second, and 64 KiB for a body."""
    shared_hasty.clear()
    yield shared_hasty
    shared_hasty.check()


def drop(talk: Talk) -> None:
    """Takes a request and closes without a word."""
    talk.take()
    talk.close()


def about_upstreams(answer: Any) -> None:
    """What holds of each answer in an upstream's place."""
    assert (answer.get("proxy-status") or b"").startswith(b"gatekeeper; error=")
    assert answer.get("cache-control") == b"no-store"
    told = answer.head + answer.body
    assert b"127.0.0.1" not in told
    assert b"half" not in told.lower()


# ---------------------------------------------------------------------------------------------- no connection


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "BREW"])
def test_16_of_two_upstreams_of_which_one_refuses_the_other_answers(stage: Stage, method: str) -> None:
    for number in range(10):
        body = b"hello" * 1000 if number % 2 else b""
        answer = stage.ask(request(f"{method} /half/{number}", f"Content-Length: {len(body)}", body=body))
        assert (answer.status, stage.up.requests[-1].body) == (200, body)
    assert len(stage.up.completed) == 10


def test_17_if_all_refuse_it_is_a_503_that_says_when_to_come_again(stage: Stage) -> None:
    client = stage.client()
    for raw in (request("GET /none"), request("POST /none", "Content-Length: 5", body=b"hello")):
        answer = client.ask(raw)
        assert answer.status == 503
        assert int(answer.get("retry-after") or b"") > 0
        about_upstreams(answer)
        if answer.closes:
            client = stage.client()
    assert client.ask(GET).status == 200


def test_17_a_connection_that_takes_too_long_is_a_504(hasty: Stage) -> None:
    answer = hasty.ask(request("GET /deaf"))
    assert answer.status == 504
    about_upstreams(answer)


def test_16_of_two_upstreams_of_which_one_cannot_be_reached_the_other_answers(hasty: Stage) -> None:
    for _ in range(4):
        assert hasty.ask(request("POST /half", "Content-Length: 5", body=b"hello")).status == 200
    assert [request.body for request in hasty.up.completed] == [b"hello"] * 4


def test_an_upstream_on_a_unix_socket_answers_and_is_a_503_when_it_is_gone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("u")
    upstream = Upstream(directory / "s")

    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "pools": {"one": {"upstreams": [upstream.url], **POOL}},
            "routes": [{"match": "/*", "pool": "one"}],
        }

    try:
        with staged(directory, settings) as stage:
            client = stage.client()
            assert client.ask(request("PUT /a?b", "Content-Length: 5", body=b"hello")).status == 200
            assert client.ask(GET).status == 200
            assert upstream.connections == 1
            assert upstream.requests[0].get("host") == b"a.example"
            assert upstream.requests[0].body == b"hello"
            upstream.close()
            answer = client.ask(GET)
            assert answer.status == 503
            assert str(directory).encode() not in answer.head + answer.body
            stage.check()
    finally:
        upstream.close()


# -------------------------------------------------------------------------------------- retry, stale connections


def both(stage: Stage) -> tuple[Upstream, Upstream]:
    return stage.upstreams["a"], stage.upstreams["b"]


@pytest.mark.parametrize(
    ("raw", "times"),
    [
        pytest.param(request("GET /two"), 2, id="GET twice"),
        pytest.param(request("HEAD /two"), 2, id="HEAD twice"),
        pytest.param(request("OPTIONS /two"), 2, id="OPTIONS twice"),
        pytest.param(request("DELETE /two"), 2, id="DELETE twice"),
        pytest.param(request("PUT /two", "Content-Length: 0"), 2, id="PUT without a body twice"),
        pytest.param(request("PUT /two", "Content-Length: 5", body=b"hello"), 1, id="PUT with a body once"),
        pytest.param(request("GET /two", TE, body=chunked(b"hello")), 1, id="GET with a body once"),
        pytest.param(request("POST /two", "Content-Length: 0"), 1, id="POST once"),
        pytest.param(request("POST /two", TE, body=chunked(b"hello")), 1, id="POST with a body once"),
        pytest.param(request("PATCH /two", "Content-Length: 0"), 1, id="PATCH once"),
        pytest.param(request("BREW /two"), 1, id="an unknown method once"),
        pytest.param(request("get /two"), 1, id="a method in lower case is an unknown one"),
    ],
)
def test_16_what_breaks_without_an_answer_is_asked_again_once_if_that_does_no_harm(
    stage: Stage, raw: bytes, times: int
) -> None:
    for upstream in both(stage):
        upstream.script = drop
    answer = stage.ask(raw)
    assert answer.status == 502
    about_upstreams(answer)
    assert sum(len(upstream.requests) for upstream in both(stage)) == times


def test_16_what_is_asked_again_is_answered(stage: Stage) -> None:
    for _ in range(10):
        left = [drop]

        def script(talk: Talk, left: Any = left) -> None:
            (left.pop() if left else answering(says(b"again")))(talk)

        for upstream in both(stage):
            upstream.script = script
        assert stage.ask(request("GET /two/x?y", "X-A: b")).body == b"again"
    seen = [request for upstream in both(stage) for request in upstream.requests]
    assert len(seen) == 20
    assert len({request.plain for request in seen}) == 1


@pytest.mark.parametrize("part", [b"H", b"HTTP/1.1 200 OK\r\nX-A:", response("103 Early Hints")])
@pytest.mark.parametrize("by_reset", [False, True])
def test_16_nothing_is_asked_again_once_a_byte_of_an_answer_came(stage: Stage, part: bytes, by_reset: bool) -> None:
    for upstream in both(stage):
        upstream.script = closing(part, by_reset=by_reset)
    client = stage.client()
    answer = client.ask(request("GET /two"))
    if answer.status == 103:
        answer = client.answer()
    assert answer.status == 502
    assert sum(len(upstream.requests) for upstream in both(stage)) == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["speaks first", "speaks first and closes", "closes at once", "resets at once"])
def test_17_an_upstream_that_does_not_wait_for_a_request_is_a_502_at_once(
    stage: Stage, how: str, method: str
) -> None:
    def greeting(talk: Talk) -> None:
        if "speaks" in how:
            talk.send(b"SSH-2.0-OpenSSH_9.2\r\n")
        if "closes" in how:
            talk.close()
        elif "resets" in how:
            talk.reset()
        else:
            talk.until_end()

    stage.up.greeting = greeting
    began = time.monotonic()
    client = stage.client()
    for number in range(5):
        answer = client.ask(request(f"{method} /{number}", "Content-Length: 0"))
        # To break before anything was asked may count as not having been reached.
        assert answer.status in (502, 503)
        about_upstreams(answer)
    assert time.monotonic() - began < 10
    stage.up.greeting = None
    assert client.ask(GET).status == 200


def test_17_an_answer_that_comes_before_the_request_outlives_no_connection(stage: Stage) -> None:
    def greeting(talk: Talk) -> None:
        talk.send(says(b"poison"))

    stage.up.greeting = greeting
    for _ in range(10):
        answer = stage.ask(GET)
        # It may have come when the request was on its way: then nobody can tell.
        assert answer.status in (200, 502)
    stage.up.greeting = None
    stage.clear()
    assert stage.ask(GET).body == b"ok"


def test_16_a_post_on_a_kept_connection_that_breaks_is_not_asked_again(stage: Stage) -> None:
    stage.ask(GET)
    stage.up.script = drop
    assert stage.ask(request("POST /", "Content-Length: 5", body=b"hello")).status == 502
    assert (len(stage.up.requests), stage.up.connections) == (2, 1)


@pytest.mark.parametrize("by_reset", [False, True])
def test_16_an_upstream_that_closes_behind_every_answer_fails_no_get(stage: Stage, by_reset: bool) -> None:
    def script(talk: Talk) -> None:
        talk.answer(OK)
        if by_reset:
            stage.settle()  # else it may take the answer away
            talk.reset()
        else:
            talk.close()

    stage.up.script = script
    client = stage.client()
    assert [client.ask(GET).status for _ in range(30)] == [200] * 30


def test_16_a_connection_whose_end_was_seen_is_not_used_for_a_post(stage: Stage) -> None:
    stage.up.script = closing(OK)
    client = stage.client()
    for number in range(10):
        assert client.ask(request("POST /", "Content-Length: 5", body=b"hello")).status == 200
        stage.up.until(lambda: not stage.up.open)
        stage.settle()
        assert stage.up.connections == number + 1


def test_16_a_connection_that_breaks_when_it_is_used_again_fails_no_get(stage: Stage) -> None:
    """As a server that closes an idle connection in the moment the next request comes."""
    used = set()

    def script(talk: Talk) -> None:
        if talk.number in used:
            drop(talk)
        else:
            used.add(talk.number)
            talk.answer(OK)

    stage.up.script = script
    client = stage.client()
    assert [client.ask(GET).status for _ in range(20)] == [200] * 20


def test_an_upstream_that_fails_again_and_again_is_left_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        health = {"failures": 3, "eject_for": "1m", "eject_at_most": "5m"}
        return {
            "pools": {"two": {"upstreams": [urls["a"], urls["b"]], "health": health}},
            "routes": [{"match": "/*", "pool": "two"}],
        }

    with staged(tmp_path_factory.mktemp("health"), settings, ["a", "b"]) as stage:
        bad, right = both(stage)
        bad.script = drop
        assert [stage.ask(GET).status for _ in range(40)] == [200] * 40
        assert (len(bad.requests), len(right.requests)) == (3, 40)
        stage.check()


# ------------------------------------------------------------------------------------------ upstreams that hang


def test_17_an_answer_whose_head_comes_too_late_is_a_504_and_the_client_is_kept(hasty: Stage) -> None:
    hasty.up.script = silent
    client = hasty.client()
    answer = client.ask(GET)
    assert answer.status == 504
    about_upstreams(answer)
    hasty.up.until(lambda: 0 in hasty.up.ends)
    assert len(hasty.up.requests) == 1  # it may be at work on it: it is not asked again
    hasty.up.script = answering(OK)
    assert client.ask(GET).body == b"ok"


def test_17_a_head_that_trickles_in_is_too_late_all_the_same(hasty: Stage) -> None:
    def script(talk: Talk) -> None:
        talk.take()
        talk.send(b"HTTP/1.1 200 OK\r\n")
        while not talk.readable(0.05):
            talk.send(b"X-A: b\r\n")
        talk.until_end()

    hasty.up.script = script
    assert hasty.ask(GET).status == 504
    hasty.up.until(lambda: 0 in hasty.up.ends)


@pytest.mark.parametrize(
    "part",
    [b"Content-Length: 50\r\n\r\na part", b"Transfer-Encoding: chunked\r\n\r\n6\r\na part\r\n", b"\r\na part"],
)
def test_9_an_answer_that_does_not_go_on_is_broken_off(hasty: Stage, part: bytes) -> None:
    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\n" + part)
        talk.until_end()

    hasty.up.script = script
    answer = hasty.ask(GET)
    assert (answer.status, answer.complete, answer.ended) == (200, False, "reset")
    hasty.up.until(lambda: 0 in hasty.up.ends)


# ----------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("by_reset", [False, True])
def test_15_a_client_that_leaves_before_the_first_byte_takes_the_upstreams_connection_along(
    stage: Stage, by_reset: bool
) -> None:
    stage.up.script = silent
    client = stage.client()
    client.send(GET + request("GET /behind"))
    stage.up.until(lambda: stage.up.requests)
    began = time.monotonic()
    if by_reset:
        client.reset()
    else:
        client.close()
    stage.up.until(lambda: 0 in stage.up.ends)
    assert time.monotonic() - began < 3
    stage.settle()
    assert stage.up.targets == [b"/"]


@pytest.mark.parametrize("by_reset", [False, True])
def test_15_a_client_that_leaves_in_the_midst_of_an_answer_takes_the_upstreams_connection_along(
    stage: Stage, by_reset: bool
) -> None:
    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\na part\r\n")
        talk.until_end()

    stage.up.script = script
    client = stage.client()
    client.send(GET)
    client.wait_for(b"a part")
    if by_reset:
        client.reset()
    else:
        client.close()
    stage.up.until(lambda: 0 in stage.up.ends)
    stage.up.script = answering(OK)
    assert stage.ask(GET).status == 200


@pytest.mark.parametrize("by_reset", [False, True])
@pytest.mark.parametrize("framing", ["Content-Length: 5000", TE])
def test_15_a_client_that_leaves_in_the_midst_of_its_body_never_makes_a_whole_request(
    stage: Stage, framing: str, by_reset: bool
) -> None:
    client = stage.client()
    client.send(request("POST /", framing, body=b"5\r\nhello\r\n"))
    stage.up.until(lambda: stage.up.requests)
    if by_reset:
        client.reset()
    else:
        client.close()
    stage.up.until(lambda: 0 in stage.up.ends)
    assert stage.up.completed == []


def test_15_a_client_that_left_is_logged_as_a_499(tmp_path_factory: pytest.TempPathFactory) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "listen": {"access_log": True},
            "pools": {"one": {"upstreams": [urls["up"]]}},
            "routes": [{"match": "/*", "pool": "one"}],
        }

    with staged(tmp_path_factory.mktemp("log"), settings) as stage:
        assert stage.ask(request("GET /fine?x=y")).status == 200
        line = stage.gateway.until_line(lambda line: "/fine" in line)
        assert "127.0.0.1" in line
        assert "GET" in line
        assert "200" in line
        stage.up.script = silent
        client = stage.client()
        client.send(request("POST /left", "Content-Length: 0"))
        stage.up.until(lambda: len(stage.up.requests) == 2)
        client.close()
        assert "499" in stage.gateway.until_line(lambda line: "/left" in line)
        # What a client writes makes no line of its own.
        stage.up.script = answering(OK)
        stage.ask(request("GET /%0a127.0.0.1%20GET%20/forged%20200"))
        stage.ask(request("GET /a\nb"))
        stage.gateway.until_line(lambda line: "forged" in line)
        assert not [line for line in stage.gateway.lines if line.startswith("127.0.0.1 GET /forged")]
        stage.check()


# ------------------------------------------------------------------------------------- early answers to uploads


LARGE = Random(413).randbytes(30_000_000)


def upload(stage: Stage, framing: str) -> tuple[Client, int]:
    """A client that sends something large until an answer comes, and how much it sent."""
    client = stage.client()
    if framing == TE:
        client.send(request("POST /", TE))
        sent = client.upload(chunked(*(LARGE[at : at + 50_000] for at in range(0, len(LARGE), 50_000))))
    else:
        client.send(request("POST /", f"Content-Length: {len(LARGE)}"))
        sent = client.upload(LARGE)
    return client, sent


@pytest.mark.parametrize("framing", ["by its length", TE])
@pytest.mark.parametrize("leaves", [False, True])
def test_10_an_early_answer_of_the_upstream_arrives_and_stops_the_upload(
    stage: Stage, framing: str, leaves: bool
) -> None:
    taken = []

    def script(talk: Talk) -> None:
        talk.exactly(100_000)
        talk.send(response("413 Content Too Large", "Content-Length: 5", body=b"large"))
        if leaves:
            stage.settle()
            talk.reset()
        else:
            rest, how = talk.rest()
            taken.append(len(rest))
            talk.upstream.note_end(talk, how)

    stage.up.script = script
    client, sent = upload(stage, framing)
    answer = client.answer()
    assert (answer.status, answer.body, answer.closes) == (413, b"large", True)
    assert client.end() == "fin"
    assert sent < len(LARGE)
    if not leaves:
        stage.up.until(lambda: 0 in stage.up.ends)
        assert taken[0] < len(LARGE)
    assert stage.up.completed == []
    stage.up.script = answering(OK)
    assert stage.ask(GET).status == 200


def test_10_an_early_answer_arrives_at_a_client_that_only_looks_when_it_has_sent_all(stage: Stage) -> None:
    go = threading.Event()

    def script(talk: Talk) -> None:
        talk.send(response("401 Unauthorized", "Content-Length: 2", body=b"no"))
        go.wait(15)  # were it read, the whole body might be there before the answer is seen
        talk.until_end()

    stage.up.script = script
    client = stage.client()
    client.send(request("POST /", f"Content-Length: {len(LARGE)}", body=LARGE))
    answer = client.answer()
    go.set()
    assert (answer.status, answer.body, answer.closes) == (401, b"no", True)
    assert client.end() == "fin"


def test_10_what_follows_an_upload_that_was_stopped_is_no_request(stage: Stage) -> None:
    def script(talk: Talk) -> None:
        talk.send(response("401 Unauthorized", "Content-Length: 2", body=b"no"))
        talk.until_end()

    stage.up.script = script
    client = stage.client()
    client.send(request("POST /", "Content-Length: 50", body=b"hello"))
    assert client.answer().status == 401
    client.send(b"x" * 45 + request("GET /smuggled") + request("GET /smuggled"))
    assert client.end() == "fin"
    stage.settle()
    assert stage.up.targets == [b"/"]


def test_26_the_gateways_own_413_comes_before_the_body(hasty: Stage) -> None:
    client, sent = upload(hasty, "by its length")
    answer = client.answer()
    assert (answer.status, answer.closes) == (413, True)
    assert client.end() == "fin"
    assert sent < len(LARGE)
    assert hasty.up.connections == 0


def test_26_the_gateways_own_413_stops_chunks_beyond_the_bound(hasty: Stage) -> None:
    client, sent = upload(hasty, TE)
    answer = client.answer()
    assert (answer.status, answer.closes) == (413, True)
    assert client.end() == "fin"
    assert sent < len(LARGE)
    hasty.up.until(lambda: not hasty.up.open)
    assert hasty.up.completed == []


def test_26_the_gateways_own_413_arrives_at_a_client_that_only_looks_when_it_has_sent_all(hasty: Stage) -> None:
    client = hasty.client()
    client.send(request("POST /", "Content-Length: 8000000", body=LARGE[:8_000_000]))
    assert client.answer().status == 413


def test_26_a_body_of_exactly_the_bound_passes(hasty: Stage) -> None:
    body = LARGE[: 64 * 1024]
    client = hasty.client()
    assert client.ask(request("POST /", f"Content-Length: {len(body)}", body=body)).status == 200
    assert client.ask(request("POST /", TE, body=chunked(body[:1000], body[1000:]))).status == 200
    assert client.ask(request("POST /", TE, body=chunked(body, b"x"))).status == 413


# --------------------------------------------------------------------------- clients that stall, trickle and flood


def test_26_a_head_that_is_not_whole_in_time_is_a_408(hasty: Stage) -> None:
    client = hasty.client()
    client.send(b"GET / HTTP/1.1\r\nHost: a.exa")
    answer = client.answer()
    assert (answer.status, answer.closes) == (408, True)
    assert client.end() == "fin"
    assert hasty.up.connections == 0


@pytest.mark.parametrize("kept", [False, True])
def test_26_the_time_of_a_head_is_for_all_of_it_not_for_each_byte(hasty: Stage, kept: bool) -> None:
    client = hasty.client()
    if kept:
        assert client.ask(GET).status == 200
    sent = client.trickle(request("GET /", *["X-A: b"] * 50))
    assert sent < 200
    assert client.answer().status == 408
    assert client.end() in ("fin", "reset")


def test_26_empty_lines_without_end_are_no_way_to_stay(hasty: Stage) -> None:
    client = hasty.client()
    assert client.trickle(b"\r\n" * 500) < 500
    try:
        assert client.answer().status in (400, 408)
    except Ended:
        pass


def test_26_a_connection_on_which_nothing_comes_is_closed(hasty: Stage) -> None:
    client = hasty.client()
    try:
        assert client.answer().status == 408
    except Ended as ended:
        assert ended.how == "fin"  # noqa: PT017 - to close without a word is as good


def test_26_a_kept_connection_without_a_request_is_closed_without_a_word(hasty: Stage) -> None:
    client = hasty.client()
    assert client.ask(GET).status == 200
    assert client.end() == "fin"


@pytest.mark.parametrize("framing", ["Content-Length: 5000", TE])
def test_26_a_body_that_does_not_go_on_is_a_408_and_never_whole(hasty: Stage, framing: str) -> None:
    client = hasty.client()
    client.send(request("POST /", framing, body=b"5\r\nhello\r\n"))
    answer = client.answer()
    assert (answer.status, answer.closes) == (408, True)
    assert client.end() == "fin"
    hasty.up.until(lambda: not hasty.up.open)
    assert hasty.up.completed == []


def test_26_a_body_that_trickles_in_is_a_408(hasty: Stage) -> None:
    client = hasty.client()
    client.send(request("POST /", "Content-Length: 5000"))
    assert client.trickle(b"x" * 1000) < 1000
    assert client.answer().status == 408
    hasty.up.until(lambda: not hasty.up.open)
    assert hasty.up.completed == []


def test_26_a_body_that_comes_steadily_may_take_longer_than_a_pause_may(hasty: Stage) -> None:
    client = hasty.client()
    client.send(request("POST /", "Content-Length: 10000"))
    for _ in range(10):
        assert not client.readable(0.1)
        client.send(b"x" * 1000)
    assert client.answer().status == 200


def test_26_an_upstream_that_takes_a_body_slowly_but_steadily_gets_all_of_it_and_one_that_does_not_is_a_504(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "listen": {"body_timeout": "500ms"},
            "pools": {"one": {"upstreams": [urls["up"]], **POOL}},
            "routes": [{"match": "/*", "pool": "one"}],
        }

    def slowly(talk: Talk) -> None:
        for _ in range(30):
            threading.Event().wait(0.05)
            talk.exactly(1_000_000)
        talk.send(OK)
        talk.request.complete = True

    def never(talk: Talk) -> None:
        go.wait(15)
        talk.until_end()

    go = threading.Event()
    with staged(tmp_path_factory.mktemp("steady"), settings) as stage:
        stage.up.script = slowly
        client, sent = upload(stage, "by its length")
        assert client.answer().status == 200
        assert sent == len(LARGE)
        stage.up.script = never
        client, sent = upload(stage, "by its length")
        assert client.answer().status == 504
        assert sent < len(LARGE)
        go.set()
        stage.check()


def test_26_an_answer_that_takes_its_time_is_no_idle_connection(hasty: Stage) -> None:
    """Three parts, each later than nothing but together later than any bound."""

    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for _ in range(8):
            talk.readable(0.1)
            talk.send(b"x")

    hasty.up.script = script
    assert hasty.ask(GET).body == b"x" * 8


def test_26_a_client_that_does_not_read_is_left_and_the_upstream_too(hasty: Stage) -> None:
    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LARGE), LARGE)
        talk.until_end()

    hasty.up.script = script
    client = hasty.client(buffer=4096)
    client.send(GET + request("GET /behind"))
    hasty.up.until(lambda: 0 in hasty.up.ends)
    answer = client.answer()
    assert (answer.status, answer.complete, answer.ended) == (200, False, "reset")
    assert hasty.up.targets == [b"/"]


def test_26_a_client_that_reads_slowly_but_steadily_gets_everything(hasty: Stage) -> None:
    hasty.up.script = answering(says(LARGE[:6_000_000]))
    client = hasty.client(buffer=65536)
    client.send(GET)
    client.through(b"\r\n\r\n")
    got = b""
    while len(got) < 6_000_000:
        got += client.exactly(min(500_000, 6_000_000 - len(got)))
        threading.Event().wait(0.1)
    assert got == LARGE[:6_000_000]


def test_an_upstream_is_not_read_faster_than_the_client_reads(stage: Stage) -> None:
    sent = []

    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        for _ in range(100):
            talk.send(LARGE[:1_000_000])
            sent.append(1)
            talk.upstream.told()

    stage.up.script = script
    client = stage.client(buffer=65536)
    client.send(GET)
    client.wait_for(b"\r\n\r\n")
    stage.up.until(lambda: sent)
    quiet = time.monotonic() + 0.5
    count = len(sent)
    while time.monotonic() < quiet:
        threading.Event().wait(0.05)
        if len(sent) != count:
            quiet, count = time.monotonic() + 0.5, len(sent)
    assert count < 30  # what the kernel's buffers hold, and little more
    answer = client.answer()
    assert (answer.complete, len(answer.body)) == (True, 100_000_000)
    assert answer.body == LARGE[:1_000_000] * 100


def stuck(client: Client, data: bytes) -> int:
    """Send until nothing was taken for half a second. Returns how much was."""
    view, sent = memoryview(data), 0
    client.socket.settimeout(0.5)
    try:
        while sent < len(view):
            sent += client.socket.send(view[sent : sent + 65536])
    except TimeoutError:
        pass
    finally:
        client.socket.settimeout(15)
    return sent


def test_a_client_is_not_read_faster_than_the_upstream_reads(stage: Stage) -> None:
    go = threading.Event()

    def script(talk: Talk) -> None:
        go.wait(15)
        body = talk.take()
        talk.send(OK if body == LARGE else says(b"other"))

    stage.up.script = script
    client = stage.client()
    client.send(request("PUT /", f"Content-Length: {len(LARGE)}"))
    sent = stuck(client, LARGE)
    assert sent < 25_000_000
    go.set()
    client.send(LARGE[sent:])
    assert client.answer().body == b"ok"


def test_26_a_pipeline_without_end_is_not_read_while_the_first_is_not_answered(stage: Stage) -> None:
    go = threading.Event()

    def script(talk: Talk) -> None:
        if talk.request.target == b"/first":
            go.wait(15)
        talk.answer(OK)

    stage.up.script = script
    client = stage.client()
    client.send(request("GET /first"))
    stage.up.until(lambda: stage.up.requests)
    one = request("GET /more", "X-A: " + "a" * 10_000)
    sent = stuck(client, one * 2500)
    assert sent < 20_000_000
    go.set()
    assert [client.answer().status for _ in range(20)] == [200] * 20
    assert len(stage.up.requests) >= 20
    client.reset()
    stage.ask(GET)


def test_26_a_client_that_asks_and_asks_and_does_not_read_is_not_read_either(stage: Stage) -> None:
    """Of what the gateway answers itself: a request is shorter than the answer to it."""
    client = stage.client(buffer=4096)
    one = request("GET /limited")
    stage.ask(one)
    assert stage.ask(one).status == 429
    sent = stuck(client, one * 800_000)
    assert sent < 20_000_000
    resident = stage.gateway.resident()
    assert resident < 200 * 2**20


def test_26_answers_are_not_gathered_for_a_client_that_does_not_read(stage: Stage) -> None:
    stage.up.script = answering(says(LARGE[:200_000]))
    before = stage.gateway.resident()
    client = stage.client(buffer=4096)
    client.send(GET * 5000)
    count, quiet = 0, time.monotonic() + 0.5
    while time.monotonic() < quiet:
        threading.Event().wait(0.05)
        if len(stage.up.requests) != count:
            count, quiet = len(stage.up.requests), time.monotonic() + 0.5
        assert count < 500
    assert stage.gateway.resident() - before < 20 * 2**20
    # And it is served on as it reads.
    assert [client.answer().body == LARGE[:200_000] for _ in range(200)] == [True] * 200


def test_26_one_address_has_so_many_connections_and_no_more(tmp_path_factory: pytest.TempPathFactory) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "listen": {"max_connections_per_address": 3},
            "pools": {"one": {"upstreams": [urls["up"]]}},
            "routes": [{"match": "/*", "pool": "one"}],
        }

    with staged(tmp_path_factory.mktemp("few"), settings) as stage:
        clients = [stage.client() for _ in range(3)]
        assert [client.ask(GET).status for client in clients] == [200] * 3
        for _ in range(5):
            more = stage.client()
            try:
                more.send(GET)
            except OSError:
                pass
            with pytest.raises((Ended, OSError)):
                more.answer()
        assert [client.ask(GET).status for client in clients] == [200] * 3
        clients[0].close()
        for _ in range(1000):  # until the gateway has seen it leave
            try:
                assert stage.ask(GET).status == 200
                break
            except (Ended, OSError):
                pass
        else:
            pytest.fail("a place that became free is not given away")
        stage.check()


def test_26_of_trusted_proxies_as_many_connections_come_as_like(tmp_path_factory: pytest.TempPathFactory) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "listen": {"max_connections_per_address": 2},
            "identity": {"trusted_proxies": ["127.0.0.1"]},
            "pools": {"one": {"upstreams": [urls["up"]]}},
            "routes": [{"match": "/*", "pool": "one"}],
        }

    with staged(tmp_path_factory.mktemp("proxies"), settings) as stage:
        clients = [stage.client() for _ in range(20)]
        assert [client.ask(GET).status for client in clients] == [200] * 20
        stage.check()


def test_26_so_many_connections_are_open_and_no_more(tmp_path_factory: pytest.TempPathFactory) -> None:
    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        return {
            "listen": {"max_connections": 3},
            "pools": {"one": {"upstreams": [urls["up"]]}},
            "routes": [{"match": "/*", "pool": "one"}],
        }

    with staged(tmp_path_factory.mktemp("full"), settings) as stage:
        clients = [stage.client() for _ in range(3)]
        assert [client.ask(GET).status for client in clients] == [200] * 3
        more = [stage.client() for _ in range(3)]
        for client in more:
            try:
                client.send(GET)
            except OSError:
                pass
        assert [client.ask(GET).status for client in clients for _ in range(5)] == [200] * 15
        assert len(stage.up.requests) == 18
        for client in clients:
            client.close()
        for _ in range(1000):
            try:
                assert stage.ask(GET).status == 200
                break
            except (Ended, OSError):
                pass
        else:
            pytest.fail("places that became free are not given away")
        stage.check()


# ----------------------------------------------------------------------------------------------------- the end


def draining(stage_directory: Any, urls: Mapping[str, str], drain: str) -> Gateway:
    return Gateway(
        {
            "listen": {"drain_timeout": drain},
            "pools": {"one": {"upstreams": [urls["up"]]}},
            "routes": [{"match": "/*", "pool": "one"}],
        },
        stage_directory,
    )


@pytest.fixture
def up() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()
    assert not upstream.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_on_its_way_when_the_end_comes_is_finished_and_no_more_is_taken(
    tmp_path_factory: pytest.TempPathFactory, up: Upstream, number: int
) -> None:
    go = threading.Event()

    def script(talk: Talk) -> None:
        if talk.request.target == b"/streaming":
            talk.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
            go.wait(15)
            talk.send(b"world")
        elif talk.request.target == b"/waiting":
            go.wait(15)
            talk.answer(says(b"waited"))
        else:
            talk.answer(says(talk.take()))

    up.script = script
    gateway = draining(tmp_path_factory.mktemp("drain"), {"up": up.url}, "20s")
    clients = [Client(gateway.port) for _ in range(4)]
    try:
        idle, waiting, streaming, uploading = clients
        assert idle.ask(GET).status == 200
        waiting.send(request("GET /waiting"))
        streaming.send(request("GET /streaming"))
        streaming.wait_for(b"hello")
        uploading.send(request("POST /uploading", "Content-Length: 10", body=b"hello"))
        up.until(lambda: len(up.requests) == 4)
        began = time.monotonic()
        gateway.signal(number)
        assert idle.end() == "fin"  # it drains by now
        try:  # refused, or left standing until the gateway is gone
            late = Client(gateway.port)
            clients.append(late)
            late.send(request("GET /late"))
        except OSError:
            pass
        uploading.send(b"world")
        answer = uploading.answer()
        assert (answer.body, answer.closes) == (b"helloworld", True)
        assert uploading.end() == "fin"
        assert gateway.process.poll() is None
        go.set()
        answer = waiting.answer()
        assert (answer.body, answer.complete, answer.closes) == (b"waited", True, True)
        assert waiting.end() == "fin"
        answer = streaming.answer()
        assert (answer.body, answer.complete) == (b"helloworld", True)
        assert streaming.end() == "fin"
        assert gateway.wait() == 0
        assert time.monotonic() - began < 15
        assert b"/late" not in up.targets
        gateway.stop()
    finally:
        for client in clients:
            client.close()
        if gateway.process.poll() is None:
            gateway.process.kill()
            gateway.wait()


def test_an_end_that_nothing_hinders_comes_at_once(tmp_path_factory: pytest.TempPathFactory, up: Upstream) -> None:
    gateway = draining(tmp_path_factory.mktemp("drain"), {"up": up.url}, "60s")
    with Client(gateway.port) as client, Client(gateway.port) as other:
        assert client.ask(GET).status == 200
        other.send(b"GET / HT")  # has not said what it wants
        began = time.monotonic()
        gateway.stop()
        assert time.monotonic() - began < 15


def test_what_takes_too_long_at_the_end_is_broken_off(
    tmp_path_factory: pytest.TempPathFactory, up: Upstream
) -> None:
    def script(talk: Talk) -> None:
        talk.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\na part\r\n")
        talk.until_end()

    up.script = script
    gateway = draining(tmp_path_factory.mktemp("drain"), {"up": up.url}, "500ms")
    with Client(gateway.port) as client, Client(gateway.port) as uploading:
        client.send(GET)
        client.wait_for(b"a part")
        uploading.send(request("POST /", "Content-Length: 10", body=b"hello"))
        up.until(lambda: len(up.requests) == 2)
        gateway.stop()
        assert not client.answer().complete
        up.until(lambda: not up.open)
        assert len(up.completed) == 1


def test_a_second_signal_ends_it_at_once(tmp_path_factory: pytest.TempPathFactory, up: Upstream) -> None:
    up.script = silent
    gateway = draining(tmp_path_factory.mktemp("drain"), {"up": up.url}, "5m")
    with Client(gateway.port) as idle, Client(gateway.port) as client:
        up.script = answering(OK)
        assert idle.ask(GET).status == 200
        up.script = silent
        client.send(GET)
        up.until(lambda: len(up.requests) == 2)
        gateway.signal()
        assert idle.end() == "fin"
        assert gateway.process.poll() is None
        gateway.signal()
        gateway.wait()
        assert gateway.refuses()
        assert client.rest()[0] == b""


def test_a_worker_does_not_outlive_its_parent(tmp_path_factory: pytest.TempPathFactory, up: Upstream) -> None:
    gateway = draining(tmp_path_factory.mktemp("orphan"), {"up": up.url}, "500ms")
    with Client(gateway.port) as client:
        assert client.ask(GET).status == 200
        gateway.process.kill()
        assert client.end() == "fin"
        gateway.wait()
        assert gateway.refuses()


def test_a_parent_does_not_outlive_its_worker(tmp_path_factory: pytest.TempPathFactory, up: Upstream) -> None:
    gateway = draining(tmp_path_factory.mktemp("childless"), {"up": up.url}, "500ms")
    (worker,) = gateway.workers
    os.kill(worker, signal.SIGKILL)
    assert gateway.wait() != 0
    assert gateway.refuses()


def test_no_request_is_lost_while_it_ends(tmp_path_factory: pytest.TempPathFactory, up: Upstream) -> None:
    """Clients that ask again and again get whole answers until they are told to close, or nothing at all."""
    gateway = draining(tmp_path_factory.mktemp("drain"), {"up": up.url}, "10s")
    told: list[str] = []

    def ask() -> None:
        try:
            with Client(gateway.port) as client:
                for _ in chain([1], repeat(1)):
                    answer = client.ask(GET)
                    if not answer.complete or answer.status != 200:
                        told.append(f"{answer.line!r} {answer.complete}")
                    if answer.closes:
                        return
        except Ended as ended:
            if ended.got:
                told.append(f"a part: {ended.got!r}")
        except OSError:
            pass

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    up.until(lambda: len(up.requests) > 200)
    gateway.signal()
    for thread in threads:
        thread.join(15)
    assert gateway.wait() == 0
    assert told == []
