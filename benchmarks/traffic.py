"""What goes through the proxies that are compared: a load of many connections, and the upstreams that answer it.

`python -m benchmarks.traffic upstream NAME` serves, and prints its port. `python -m benchmarks.traffic load` takes
commands on standard input, and answers each with a line: `open PORT`, `send REQUESTS`, `close`.

Both are processes of their own, on the lowest level there is in Python, so that the proxy between them is what is
busy. They read just as much HTTP as the other end, known to them, sends through an honest proxy.

Requests have 12 fields, answers 10. No two requests share their target and X-Request-Id, no two answers their ETag;
each connection has cookies and an authorization of its own, and one in eight another user agent: whoever remembers
heads that it has seen gets no more out of it here than from real clients.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from itertools import count
from typing import Any, Final

from benchmarks.loopback import HOST, Running, running
from benchmarks.measure import Unfit, peer

CONNECTIONS: Final = 32
SEEN: Final = "/seen"
"""Of this target the upstream answers, as JSON, its name and the head that came: [upstream, [line, ...]]."""

HOSTNAME: Final = "shop.example.com"
USER_AGENT: Final = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
POST_EVERY: Final = 4
LONGEST_ROUND: Final = 120.0  # seconds

GET_HEAD: Final = """\
GET /api/orders?after=%d HTTP/1.1
Host: {host}
User-Agent: {agent}
Accept: application/json, text/plain;q=0.9, */*;q=0.8
Accept-Language: en-GB,en;q=0.7,de;q=0.3
Accept-Encoding: gzip, deflate, br, zstd
Referer: https://{host}/basket
Cookie: session={session}; theme=dark; consent=1
Authorization: Bearer {token}
Cache-Control: no-cache
Sec-Fetch-Mode: cors
Sec-Fetch-Site: same-origin
X-Request-Id: %s

"""
POST_BODY: Final = '{{"order": "%012d", "article": "b0117", "quantity": 3}}'
POST_HEAD: Final = """\
POST /api/orders?after=%d HTTP/1.1
Host: {host}
User-Agent: {agent}
Accept: application/json, text/plain;q=0.9, */*;q=0.8
Accept-Language: en-GB,en;q=0.7,de;q=0.3
Accept-Encoding: gzip, deflate, br, zstd
Content-Type: application/json
Content-Length: {length}
Origin: https://{host}
Cookie: session={session}; theme=dark; consent=1
Authorization: Bearer {token}
Sec-Fetch-Mode: cors
X-Request-Id: %s

"""
ANSWER: Final = b"""\
HTTP/1.1 200 OK
Content-Type: application/json
Content-Length: %d
Date: %s
Server: upstream/1.0
Cache-Control: private, max-age=0
ETag: "%016x"
Vary: Accept-Encoding, Origin
Set-Cookie: seen=1; Path=/; HttpOnly; SameSite=Lax
X-Frame-Options: DENY
X-Request-Id: %s

""".replace(b"\n", b"\r\n")
ANSWER_BODY: Final = (
    b'{"orders":[' + b",".join([b'{"id":117,"state":"sent","total":1250}'] * 4) + b'],"next":"after=117"}'
)

EXPECTED_LENGTH: Final = b"\r\ncontent-length: %d\r\n" % len(ANSWER_BODY)


def request_id(number: int) -> bytes:
    return b"0190f5c2-7b7e-7c3a-9a53-%012x" % number


def request(place: int, number: int, *, post: bool) -> bytes:
    """A request of the client at that place, whole."""
    template = templates(place)[post]
    return template % ((number, request_id(number), number) if post else (number, request_id(number)))


def templates(place: int) -> tuple[bytes, bytes]:
    """(GET, POST) of one client, with room for the numbers of a request."""
    words = {
        "host": HOSTNAME,
        "agent": f"example-client/4.{place}" if place % 8 == 7 else USER_AGENT,
        "session": f"6f1f0c2e9b8d4a7e8c55{place:06x}",
        "token": f"8kV2mYqkq3Z5v9cJ1xT7wN4bR6sD0fHg{place:08x}",
    }
    body = POST_BODY.format()
    get, post = (text.format(**words, length=len(body % 0)).replace("\n", "\r\n") for text in (GET_HEAD, POST_HEAD))
    return get.encode(), (post + body).encode()


class Upstream(asyncio.Protocol):
    """Answers requests whose bodies, if any, have a Content-Length."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        while (end := buffer.find(b"\r\n\r\n")) >= 0:
            head = buffer[: end + 2]
            lower = head.lower()
            if b"\r\ntransfer-encoding:" in lower:  # nothing was sent in chunks, and nothing here reads them
                self._transport.abort()
                return
            whole = end + 4 + int(value(head, lower, b"content-length") or 0)
            if len(buffer) < whole:
                break
            self._transport.write(self._answer(head, lower))
            buffer = buffer[whole:]
        self._buffer = buffer

    def _answer(self, head: bytes, lower: bytes) -> bytes:
        body = ANSWER_BODY
        if head.startswith(b"GET %s " % SEEN.encode()):
            body = json.dumps([self._name, head.decode("latin-1").splitlines()]).encode()
        return ANSWER % (len(body), date(), next(numbers), value(head, lower, b"x-request-id")) + body


def value(head: bytes, lower: bytes, name: bytes) -> bytes:
    """A field's value, empty if there is none. Finding takes a tenth of what a regular expression takes."""
    at = lower.find(b"\r\n" + name + b":")
    return head[at + len(name) + 3 : head.index(b"\r\n", at + 2)].strip() if at >= 0 else b""


numbers = count(time.time_ns())  # the two upstreams do not count alike
_date = (0, b"")


def date() -> bytes:
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True).encode())
    return _date[1]


class Client(asyncio.Protocol):
    """One kept connection: the next request follows the last answer, while the load has any left."""

    def __init__(self, load: Load, place: int) -> None:
        self._load = load
        self._get, self._post = templates(place)
        self._buffer = b""
        self._awaited = b""
        self.is_lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self._awaited:
            self._load.fail(f"a connection ended before its answer: {error or 'closed'}")

    def send(self, number: int) -> None:
        self._awaited = identity = request_id(number)
        if number % POST_EVERY:
            self.transport.write(self._get % (number, identity))
        else:
            self.transport.write(self._post % (number, identity, number))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = buffer
        elif not self._is_right(buffer[: end + 2]) or not ANSWER_BODY.startswith(buffer[end + 4 :]):
            self._load.fail(f"this came: {buffer[:1000]!r}")
        elif len(buffer) < end + 4 + len(ANSWER_BODY):
            self._buffer = buffer
        else:
            self._buffer = self._awaited = b""
            self._load.answered(self)

    def _is_right(self, head: bytes) -> bool:
        if not self._awaited:  # nothing was asked
            return False
        return head.startswith(b"HTTP/1.1 200 ") and EXPECTED_LENGTH in head.lower() and self._awaited in head


class Load:
    """All connections to one proxy."""

    def __init__(self) -> None:
        self._clients: list[Client] = []
        self._numbers = count(1)
        self._left = 0
        self._in_flight = 0
        self._done: asyncio.Future[None] | None = None

    async def open(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        for place in range(CONNECTIONS):
            _, client = await loop.create_connection(lambda place=place: Client(self, place), HOST, port)  # type: ignore[misc]
            self._clients.append(client)

    async def send(self, requests: int) -> None:
        if any(client.is_lost for client in self._clients):
            raise Unfit("a kept connection was closed")
        self._done = asyncio.get_running_loop().create_future()
        self._left = requests
        for client in self._clients[:requests]:
            self._left -= 1
            self._in_flight += 1
            client.send(next(self._numbers))
        await self._done

    async def close(self) -> None:
        for client in self._clients:
            client.transport.abort()
        self._clients = []
        self._left = self._in_flight = 0

    def answered(self, client: Client) -> None:
        if self._left:
            self._left -= 1
            client.send(next(self._numbers))
            return
        self._in_flight -= 1
        if not self._in_flight and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def fail(self, what: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(Unfit(what))


class Driver:
    """Tells a process with a load what to do."""

    def __init__(self, process: Running) -> None:
        self._process = process

    def open(self, port: int) -> None:
        """Open the kept connections. Raises Unfit, as the others do, when it does not work."""
        self._tell(f"open {port}")

    def send(self, requests: int) -> None:
        """So many requests in all, each answer looked at."""
        self._tell(f"send {requests}")

    def close(self) -> None:
        self._tell("close")

    def _tell(self, line: str) -> None:
        process = self._process.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        answer = process.stdout.readline().decode().strip()
        if not answer:
            self._process.fail(f"ended at {line!r}")
        if answer != "done":
            raise Unfit(f"{line}: {answer}")


@contextmanager
def upstream(name: str) -> Iterator[int]:
    """An upstream of that name; its port."""
    peer("uvloop")
    with running(f"upstream {name}", [sys.executable, "-m", "benchmarks.traffic", "upstream", name]) as process:
        yield process.port_told(r"port (\d+)\n?")


@contextmanager
def load() -> Iterator[Driver]:
    peer("uvloop")
    with running("the load", [sys.executable, "-m", "benchmarks.traffic", "load"], talks=True) as process:
        yield Driver(process)


async def serve(name: str) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(name), HOST, 0)
    print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def obey(loop: asyncio.AbstractEventLoop) -> None:
    """One command after another. The loop runs only while one is carried out."""
    load = Load()
    for line in sys.stdin:
        do, *numbers = line.split()
        try:
            step = getattr(load, do)(*map(int, numbers))
            loop.run_until_complete(asyncio.wait_for(step, LONGEST_ROUND))
        except (OSError, TimeoutError, Unfit) as error:
            print(f"failed: {error or type(error).__name__}", flush=True)
        else:
            print("done", flush=True)


def main(what: str, *names: str) -> None:
    import uvloop

    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    if what == "load":
        obey(loop)
    else:
        loop.run_until_complete(serve(*names))


if __name__ == "__main__":
    main(*sys.argv[1:])
