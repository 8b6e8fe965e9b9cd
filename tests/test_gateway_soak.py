"""Long trials of the gateway, by `make soak`: upstreams killed under load, clients by the hundred that stall, junk."""

from __future__ import annotations

import re
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import h11
import pytest

from tests.gateway import (
    OK,
    POOL,
    Answer,
    Client,
    Ended,
    Gateway,
    Service,
    Stage,
    Talk,
    chunked,
    closing,
    request,
    response,
    says,
    silent,
    staged,
)

pytestmark = pytest.mark.soak

GET = request("GET /")
MIB = 1024 * 1024


def plain(urls: Mapping[str, str], **listen: Any) -> dict[str, Any]:
    return {
        "listen": {"max_connections_per_address": 0, **listen},
        "pools": {"one": {"upstreams": [urls["up"]], **POOL}},
        "routes": [{"match": "/*", "pool": "one"}],
    }


def together(count: int, work: Callable[[int], None]) -> list[threading.Thread]:
    """Threads that do this, each with its number. Those of them that fail fail the test (pytest sees to it)."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_of_three_upstreams_one_is_killed_again_and_again_and_nothing_fails_that_had_not_begun(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    services = [Service() for _ in range(3)]
    over = threading.Event()
    told: Counter[str] = Counter()
    gateway = Gateway(
        {
            "pools": {
                "three": {
                    "upstreams": [service.url for service in services],
                    "health": {"failures": 3, "eject_for": "200ms", "eject_at_most": "1s"},
                }
            },
            "routes": [{"match": "/*", "pool": "three"}],
        },
        tmp_path_factory.mktemp("kill"),
    )

    def ask(number: int) -> None:
        random = Random(number)
        place = 0
        client = Client(gateway.port)
        while not over.is_set():
            place += 1
            method = random.choice(["GET", "GET", "GET", "POST", "PUT"])
            body = b"b%d" % place if method != "GET" else b""
            fields = [f"Content-Length: {len(body)}"] if body else []
            kept = False
            try:
                answer = client.ask(request(f"{method} /{number}/{place}", *fields, body=body))
            except (Ended, OSError) as ended:
                told[f"{method} lost: {ended}"] += 1
            else:
                kept = answer.complete and not answer.closes
                if not answer.complete:
                    told[f"{method} had begun"] += 1
                else:
                    told[f"{method} {answer.status}"] += 1
                    assert answer.status != 200 or answer.body == f"/{number}/{place} ".encode() + body
            if not kept:
                client.close()
                client = Client(gateway.port)
        client.close()

    threads = together(8, ask)
    try:
        for number in range(30):
            victim = services[number % 3]
            victim.kill()
            threading.Event().wait(0.3)
            victim.start()
            threading.Event().wait(0.3)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for service in services:
            service.kill()
        gateway.stop()
    # What takes a body that was sent is not asked twice, so of those a few may fail; all else may not.
    assert set(told) <= {"GET 200", "GET had begun", "POST 200", "POST 502", "POST had begun", "PUT 200", "PUT 502", "PUT had begun"}, told  # fmt: skip
    assert told["GET 200"] > 1000
    assert told["POST 502"] + told["PUT 502"] < 30 * 8
    assert told["GET had begun"] < 30


def quick(stage: Stage, until: Callable[[], bool]) -> float:
    """Ask as an ordinary client until this is true. Returns the longest wait for an answer."""
    longest = 0.0
    client = stage.client()
    while not until():
        began = time.monotonic()
        answer = client.ask(GET)
        assert (answer.status, answer.body) == (200, b"ok")
        longest = max(longest, time.monotonic() - began)
        threading.Event().wait(0.01)
    return longest


def test_hundreds_that_send_a_head_byte_by_byte_are_cut_off_and_others_served(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = lambda urls: plain(urls, head_timeout="2s")  # noqa: E731
    with staged(tmp_path_factory.mktemp("loris"), settings) as stage:
        ordinary = stage.client()
        assert ordinary.ask(GET).status == 200
        before = stage.gateway.descriptors()
        slow = [stage.client() for _ in range(400)]
        head = request("GET /slow", *["X-A: b"] * 90)
        left = dict(enumerate(slow))
        began = time.monotonic()
        place = 0
        longest = 0.0
        while left and time.monotonic() - began < 20:
            for number, client in list(left.items()):
                if client.readable():
                    try:
                        assert client.answer().status == 408
                    except Ended:
                        pass
                    del left[number]
                    continue
                try:
                    client.send(head[place : place + 1])
                except OSError:
                    del left[number]
            place += 1
            asked = time.monotonic()
            assert ordinary.ask(GET).status == 200
            longest = max(longest, time.monotonic() - asked)
        assert not left
        assert longest < 1
        for client in slow:
            client.close()
        stage.settle()
        assert stage.gateway.descriptors() <= before + 5
        assert b"/slow" not in stage.up.targets
        stage.check()


def is_broken(client: Client) -> bool:
    """Whether a connection is reset, or becomes so in time; nothing is read to find out."""
    watch = select.poll()
    watch.register(client.socket, 0)  # errors and hang-ups are told in any case
    return bool(watch.poll(15_000))


def test_hundreds_that_do_not_read_or_do_not_write_are_cut_off_and_others_served(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    large = Random(1).randbytes(16 * MIB)

    def script(talk: Talk) -> None:
        talk.answer(says(large) if talk.request.target == b"/large" else OK)

    settings = lambda urls: plain(urls, body_timeout="3s", head_timeout="60s")  # noqa: E731
    with staged(tmp_path_factory.mktemp("slow"), settings) as stage:
        stage.up.script = script
        before = stage.gateway.resident()
        deaf = [stage.client(buffer=4096) for _ in range(40)]
        for client in deaf:
            client.send(request("GET /large"))
        mute = [stage.client() for _ in range(100)]
        for client in mute:
            client.send(request("POST /mute", "Content-Length: 5000", body=b"hello"))
        assert quick(stage, lambda: all(client.readable() for client in mute)) < 5
        assert [client.answer().status for client in mute] == [408] * 100
        # The kernel, and not the gateway, holds what they do not read.
        assert stage.gateway.resident() - before < 100 * MIB
        stage.up.until(lambda: len(stage.up.ends) >= len(deaf) + len(mute))
        # What the kernel still takes counts as read, so it may be the second window that finds nothing moving.
        assert all(is_broken(client) for client in deaf)
        assert not any(client.answer().complete for client in deaf)
        assert b"/mute" not in [request.target for request in stage.up.completed]
        stage.check()


def test_thousands_that_leave_at_any_moment_leave_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    with staged(tmp_path_factory.mktemp("leave"), plain) as stage:
        body = Random(2).randbytes(100_000)

        def script(talk: Talk) -> None:
            kind = talk.request.target[1:2]
            if kind == b"s":
                silent(talk)
            elif kind == b"l":
                talk.answer(says(body * 20))
            else:
                talk.answer(response("200 OK", "Transfer-Encoding: chunked", body=chunked(body, body)))

        stage.up.script = script

        def come_and_go(number: int) -> None:
            random = Random(number)
            for _ in range(500):
                raw = request(
                    f"{random.choice(['GET', 'POST', 'PUT'])} /{random.choice('slc')}",
                    "Transfer-Encoding: chunked",
                    body=chunked(*[body] * random.randrange(4)),
                ) * random.randrange(1, 4)
                client = Client(stage.gateway.port, buffer=random.choice([4096, None]))
                client.socket.settimeout(0.05)
                try:
                    client.upload(raw[: random.randrange(len(raw))])
                    if random.random() < 0.5:
                        client.readable(0.02)
                    if random.random() < 0.5:
                        client.exactly(random.randrange(2_000_000) if random.random() < 0.5 else 100)
                except (Ended, OSError, TimeoutError):
                    pass
                if random.random() < 0.5:
                    client.reset()
                else:
                    client.close()

        stage.settle()
        before = stage.gateway.descriptors()
        for thread in together(4, come_and_go):
            thread.join()
        stage.settle()
        stage.up.until(lambda: stage.up.open <= 32)
        stage.clear()
        resident = stage.gateway.resident()
        assert stage.gateway.descriptors() <= before + 4
        for thread in together(4, come_and_go):
            thread.join()
        stage.clear()
        assert stage.gateway.descriptors() <= before + 4
        assert stage.gateway.resident() - resident < 30 * MIB
        assert stage.ask(GET, "GET").status == 200
        stage.check()


# --------------------------------------------------------------------------------------------------------- junk


SPARKS = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"5", b"-", b"+", b"_", b"\x0b", b"\x0c", b"\x85", b"\xa0",
    b"\xff", b"chunked", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length: ", b"Host: b\r\n",
    b"Connection: close\r\n", b"Connection: ", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"\r\n\r\n",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"GET ", b"HEAD ", b"100", b"204", b"304", b"%00", b"%2f", b"/../", b"//", b"http://b.example", b"#", b"?",
    b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"f" * 17, b"1" * 19, b"a" * 9000, b"\x80", b"\xe2\x84\xaa", b"X-A : b\r\n", b" folded\r\n", b"TE: trailers\r\n",
]  # fmt: skip


def mutated(random: Random, data: bytes) -> bytes:
    """The bytes with one to four changes, of a kind that parsers have fallen over."""
    text = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 2, 3, 4])):
        at, to = random.randrange(len(text) + 1), random.randrange(len(text) + 1)
        kind = random.randrange(7)
        if kind == 0:
            text[at:at] = random.choice(SPARKS)
        elif kind == 1:
            text[at : at + random.randrange(1, 4)] = random.choice(SPARKS)
        elif kind == 2:
            text[at : at + random.randrange(1, 9)] = b""
        elif kind == 3 and at < len(text):
            text[at] = random.randrange(256)
        elif kind == 4 and at < len(text):
            text[at] ^= 1 << random.randrange(8)
        elif kind == 5:
            at, to = sorted((at, to))
            text[at:at] = text[at : min(to, at + 60)]
        else:  # a line is moved or repeated
            lines = bytes(text).split(b"\r\n")
            lines.insert(random.randrange(len(lines)), random.choice(lines))
            text = bytearray(b"\r\n".join(lines))
        if not text:
            text = bytearray(b"x")
    return bytes(text)


SEEDS = [
    request("GET /a?b=c", "Accept: */*", "Cookie: a=b"),
    request("POST /a", "Content-Length: 5", "X-A: b", body=b"hello"),
    request("POST /a", "Transfer-Encoding: chunked", "Trailer: X-T", body=b"5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nX-T: z\r\n\r\n"),
    request("PUT /a", "Expect: 100-continue", "Content-Length: 5", body=b"hello"),
    request("GET http://a.example/a/../b", "Connection: X-A, keep-alive", "X-A: b", "Keep-Alive: 5"),
    request("HEAD /a HTTP/1.0", "Connection: keep-alive"),
    request("OPTIONS /a%2Fb;c", "Upgrade: websocket", "Connection: Upgrade", "Content-Length: 0"),
    request("GET /a") + request("POST /b", "Content-Length: 2", body=b"hi") + request("GET /c"),
]  # fmt: skip


def by_h11(data: bytes) -> list[tuple[bytes, bytes, bool]]:
    """Method and body of each request in the bytes as h11 reads them, and whether it is whole; up to what it refuses."""
    found: list[tuple[bytes, bytes, bool]] = []
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=200_000)
    connection.receive_data(data.lstrip(b"\r\n"))
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                found.append((event.method, b"", False))
            elif isinstance(event, h11.Data):
                method, body, _ = found[-1]
                found[-1] = (method, body + bytes(event.data), False)
            elif isinstance(event, h11.EndOfMessage):
                method, body, _ = found[-1]
                found[-1] = (method, body, True)
                # The next request begins behind what is left.
                rest = connection.trailing_data[0].lstrip(b"\r\n")
                connection = h11.Connection(h11.SERVER, max_incomplete_event_size=200_000)
                connection.receive_data(rest)
            else:
                return found
    except h11.RemoteProtocolError as error:
        if found and not found[-1][2] and re.search("Content-Length|Transfer-Encoding", str(error), re.IGNORECASE):
            # It reads the fields of trailers as if they counted. The body before them was whole.
            found[-1] = (*found[-1][:2], True)
        return found


def test_ten_thousand_mutated_requests_are_answered_or_refused_and_read_as_h11_reads_them(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever passes is well-formed (the upstream is strict), and is what another parser finds in the same bytes."""
    random = Random(10)
    with staged(tmp_path_factory.mktemp("fuzz"), plain) as stage:
        statuses: Counter[int] = Counter()
        sent: dict[str, bytes] = {}
        resident = 0
        for number in range(10_000):
            raw = mutated(random, random.choice(SEEDS))
            # By its address it is told whose a request at the upstream is.
            source = f"127.9.{number // 250}.{number % 250 + 1}"
            sent[source] = raw
            client = stage.client(source=source)
            client.send(raw)
            try:
                while client.readable(0.02):  # else it waits for more
                    statuses[client.answer("HEAD" if b"HEAD" in raw else "GET").status] += 1
            except Ended:
                pass
            except (AssertionError, TimeoutError) as error:
                # Which answer is that to a HEAD can only be told if there is one request.
                if b"head" not in raw.lower():
                    raise AssertionError(f"{raw!r}") from error
            stage.leave()
            if stage.up.errors:
                pytest.fail(f"{raw!r} reached the upstream malformed: {stage.up.errors}")
            if number % 250 == 249:
                stage.settle()
                found: dict[str, list[tuple[bytes, bytes]]] = {}
                for got in stage.up.completed:
                    address = (got.get("x-forwarded-for") or b"").decode()
                    found.setdefault(address, []).append((got.method, got.body))
                for address, passed in found.items():
                    known = [(method, body) for method, body, whole in by_h11(sent[address]) if whole]
                    assert passed == known[: len(passed)], f"{sent[address]!r}: {passed}, {known}"
                assert stage.ask(GET).body == b"ok"
                stage.clear()
                sent.clear()
            if number == 2000:
                resident = stage.gateway.resident()
        assert stage.gateway.resident() - resident < 10 * MIB
        assert statuses[200] > 1000
        assert statuses[400] > 1000
        assert not set(statuses) & {500}
        stage.check()


ANSWERS = [
    says(b"hello"),
    response("200 OK", "Transfer-Encoding: chunked", "Trailer: X", body=b"5;x=y\r\nhello\r\n0\r\nX: y\r\n\r\n"),
    response("100 Continue") + response("103 Early Hints", "Link: </a>") + says(b"hello"),
    response("204 No Content", "X-A: b"),
    response("304 Not Modified", "Content-Length: 5", "ETag: x"),
    response("200 OK", "Connection: close, X-A", "X-A: b", "Set-Cookie: a=b", "Set-Cookie: c=d", body=b"until the end"),
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\nhello",
]  # fmt: skip


def test_ten_thousand_mutated_answers_harm_nobody_and_never_become_the_next_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The client is strict; and after each the same connection, if it lives, gives the right answer."""
    random = Random(11)

    def settings(urls: Mapping[str, str]) -> dict[str, Any]:
        pool = {"upstreams": [urls["up"]], "response_timeout": "1s", "read_timeout": "1s", **POOL}
        return {"pools": {"one": pool}, "routes": [{"match": "/*", "pool": "one"}]}

    with staged(tmp_path_factory.mktemp("fuzz"), settings) as stage:
        statuses: Counter[str] = Counter()
        resident = 0
        client = stage.client()

        def control(talk: Talk) -> None:
            talk.answer(says(talk.request.target))

        for number in range(10_000):
            raw = mutated(random, random.choice(ANSWERS))
            keeps = random.random() < 0.5

            def script(talk: Talk, raw: bytes = raw, keeps: bool = keeps) -> None:
                if keeps:
                    talk.answer(raw)
                    talk.send(b"")
                    if not talk.readable(0.005):
                        talk.close()
                else:
                    closing(raw)(talk)

            method = random.choice(["GET", "GET", "HEAD"])
            stage.up.script = script
            answer: Answer | None = None
            try:
                client.send(request(f"{method} /fuzz/{number}"))
                answer = client.answer(method)
                while answer.status < 200:
                    answer = client.answer(method)
            except Ended:
                pass
            except AssertionError as error:
                raise AssertionError(f"after {raw!r}: {error}") from error
            statuses["lost" if answer is None else f"{answer.status} {answer.complete}"] += 1
            if answer is None or not answer.complete or answer.closes:
                stage.leave()
                client = stage.client()
            stage.up.script = control
            after = client.ask(request(f"GET /control/{number}"))
            assert (after.status, after.body) == (200, b"/control/%d" % number), f"after {raw!r}: {after}"
            stage.up.requests.clear()
            if number == 2000:
                resident = stage.gateway.resident()
        assert stage.gateway.resident() - resident < 10 * MIB
        assert statuses["200 True"] > 1000
        assert statuses["502 True"] > 1000
        stage.check()
