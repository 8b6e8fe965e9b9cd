"""A stage for the gateway: the real command, scripted upstreams, and clients that speak in bytes.

Everything runs over real sockets on free ports. Both ends are strict: an upstream notes each request that is not
as RFC 9112 has it, and a client fails on such an answer, so that every test also asks what came out of the gateway.
Whatever is waited for is waited for `PATIENCE` at most.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias

PATIENCE: Final = 15.0
"""Seconds that anything is waited for: only what is broken takes so long."""

Ending: TypeAlias = Literal["fin", "reset"]

TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
FIELD: Final = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[^\r\n\0 \t](?:[^\r\n\0]*[^\r\n\0 \t])?)?)[ \t]*"
)
CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
OURS: Final = re.compile(rb"(?<=\n)(?:x-forwarded-(?:for|proto|host)|forwarded|via): ?[^\r\n]*\r\n", re.IGNORECASE)
FRAMING: Final = re.compile(rb"(?<=\n)(?:content-length|transfer-encoding): ?[^\r\n]*\r\n", re.IGNORECASE)

OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Ended(Exception):
    """The connection ended where more was expected. `got` is what had come of it."""

    def __init__(self, how: Ending, got: bytes = b"") -> None:
        super().__init__(f"the connection ended ({how}) after {got[-200:]!r}")
        self.how: Ending = how
        self.got = got


class Wire:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(PATIENCE)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()
        self.closed = False

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)

    def slowly(self, data: bytes) -> None:
        """Send byte by byte."""
        for place in range(len(data)):
            self.socket.sendall(data[place : place + 1])

    def readable(self, within: float = 0) -> bool:
        """Whether bytes, or the end, have come within so many seconds."""
        return bool(self.buffer) or bool(select.select([self.socket], [], [], within)[0])

    def more(self) -> None:
        """Wait for bytes. Raises Ended."""
        try:
            data = self.socket.recv(1 << 18)
        except (ConnectionResetError, BrokenPipeError):
            raise Ended("reset", bytes(self.buffer)) from None
        if not data:
            raise Ended("fin", bytes(self.buffer))
        self.buffer += data

    def _take(self, count: int) -> bytes:
        data = bytes(memoryview(self.buffer)[:count])
        del self.buffer[:count]
        return data

    def through(self, end: bytes) -> bytes:
        """All up to and with `end`."""
        start = 0
        while (at := self.buffer.find(end, start)) < 0:
            start = max(0, len(self.buffer) - len(end))
            self.more()
        return self._take(at + len(end))

    def wait_for(self, text: bytes) -> None:
        """Wait until this has come, and leave it there."""
        while text not in self.buffer:
            self.more()

    def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self.more()
        return self._take(count)

    def chunks(self) -> bytes:
        """A chunked body: strict, without extensions and trailers. Raises Ended with the data that came."""
        pieces: list[bytes] = []
        try:
            while True:
                line = self.through(b"\r\n")
                size = CHUNK.fullmatch(line)
                assert size is not None, f"not a chunk's size: {line[:99]!r}"
                count = int(size[1], 16)
                data = self.exactly(count)
                end = self.exactly(2)
                assert end == b"\r\n", f"after a chunk of {count}: {end!r}"
                if not count:
                    return b"".join(pieces)
                pieces.append(data)
        except Ended as ended:
            raise Ended(ended.how, b"".join([*pieces, ended.got])) from None

    def rest(self) -> tuple[bytes, Ending]:
        """All that comes until the end, and how it ends."""
        try:
            while True:
                self.more()
        except Ended as ended:
            self.buffer.clear()
            return ended.got, ended.how

    def end(self) -> Ending:
        """How the connection ends; nothing may come before."""
        rest, how = self.rest()
        assert not rest, f"before the end came {rest[:200]!r}"
        return how

    def finish(self) -> None:
        """Send the end of one's own bytes, and go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            try:  # what another thread is waiting for in it ends
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            self.socket.close()

    def reset(self) -> None:
        """Close by RST."""
        if not self.closed:
            self.closed = True
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.socket.close()


@dataclass
class Message:
    """A head as it came, and what came behind it."""

    head: bytes
    line: bytes
    fields: list[tuple[bytes, bytes]]
    """Names as they were written."""
    body: bytes = b""
    complete: bool = False
    ended: Ending | None = None
    """How the connection ended, if it did before the message's end, or as its end."""

    def all(self, name: str) -> list[bytes]:
        wanted = name.encode().lower()
        return [value for key, value in self.fields if key.lower() == wanted]

    def get(self, name: str) -> bytes | None:
        values = self.all(name)
        assert len(values) < 2, f"{name} stands {len(values)} times"
        return values[0] if values else None

    @property
    def length(self) -> int | None:
        """By Content-Length."""
        value = self.get("content-length")
        assert value is None or re.fullmatch(rb"[0-9]{1,18}", value), f"Content-Length: {value!r}"
        return None if value is None else int(value)

    @property
    def chunked(self) -> bool:
        coding = self.get("transfer-encoding")
        assert coding in (None, b"chunked"), f"Transfer-Encoding: {coding!r}"
        assert coding is None or self.get("content-length") is None, "two framings"
        return coding is not None


def parse_head(raw: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The first line and the fields of a head. AssertionError unless it is strictly well-formed."""
    assert raw.endswith(b"\r\n\r\n")
    line, *lines = raw[:-4].split(b"\r\n")
    assert not re.search(rb"[\r\n\0]", line), f"in the first line: {line[:200]!r}"
    fields = []
    for text in lines:
        found = FIELD.fullmatch(text)
        assert found is not None, f"not a field: {text[:200]!r}"
        fields.append((found[1], found[2]))
    return line, fields


@dataclass
class Request(Message):
    """A request as an upstream got it."""

    connection: int = 0
    """The how-many-th connection of the upstream it came by, from 0."""

    @property
    def method(self) -> bytes:
        return self.line.split(b" ")[0]

    @property
    def target(self) -> bytes:
        return self.line.split(b" ")[1]

    @property
    def plain(self) -> bytes:
        """The head without framing and without what the gateway adds: the client's part of it, byte for byte."""
        return FRAMING.sub(b"", OURS.sub(b"", self.head))

    @property
    def framing(self) -> str:
        """How the body is framed: "chunked", a number of bytes, or "none"."""
        return "chunked" if self.chunked else "none" if self.length is None else str(self.length)


REQUEST_LINE: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ (/[\x21\x22\x24-\x5b\x5d-\x7e]*|\*) HTTP/1\.1")
HOST: Final = re.compile(
    rb"([A-Za-z0-9._~-]|%[0-9A-Fa-f]{2}|[!$&'()*+,;=])*(:[0-9]*)?|\[[0-9a-fA-F:.]+\](:[0-9]*)?"
)
NEVER: Final = ("connection", "keep-alive", "proxy-connection", "upgrade", "proxy", "proxy-authorization", "trailer", "http2-settings")  # fmt: skip
"""Fields that no request may bring to an upstream. (Connections are kept unless it says otherwise.)"""


def parse_request(raw: bytes, connection: int) -> Request:
    line, fields = parse_head(raw)
    assert REQUEST_LINE.fullmatch(line), f"not a request line: {line[:200]!r}"
    request = Request(raw, line, fields, connection=connection)
    assert not re.search(rb"(^|/)(\.|%2e){1,2}(/|$|\?)", request.target.partition(b"?")[0], re.IGNORECASE), line
    host = request.get("host")
    assert host is not None, "no Host"
    assert HOST.fullmatch(host), f"Host: {host!r}"
    for name in NEVER:
        assert not request.all(name), f"{name}: {request.all(name)}"
    assert request.all("te") in ([], [b"trailers"])
    assert not [name for name, _ in fields if b"_" in name]
    assert not (request.chunked and request.length), "two framings"
    return request


@dataclass
class Answer(Message):
    """A response as a client got it."""

    @property
    def status(self) -> int:
        return int(self.line.split(b" ")[1])

    @property
    def closes(self) -> bool:
        return b"close" in (self.get("connection") or b"").lower()


STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 [1-9][0-9]{2} [\t\x20-\x7e\x80-\xff]*")


class Client(Wire):
    """A client's connection to a gateway."""

    def __init__(self, port: int, *, source: str | None = None, buffer: int | None = None) -> None:
        """`source`: its address, of 127.0.0.0/8; `buffer`: the bytes that the kernel keeps while it does not read."""
        sock = socket.socket(socket.AF_INET)
        try:
            if buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.settimeout(PATIENCE)
            if source is not None:
                sock.bind((source, 0))
            sock.connect(("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        super().__init__(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, data: bytes, method: str | None = None) -> Answer:
        """Send a request, and read the answer to it."""
        self.send(data)
        return self.answer(method or data.split(b" ")[0].decode("latin-1"))

    def answer(self, method: str = "GET") -> Answer:
        """The next answer, which may be an interim one. Raises Ended if none begins.

        Where the connection ends before the answer does, the answer is not `complete`, and `ended` says how.
        """
        raw = self.through(b"\r\n\r\n")
        line, fields = parse_head(raw)
        assert STATUS_LINE.fullmatch(line), f"not a status line: {line[:200]!r}"
        answer = Answer(raw, line, fields)
        length, chunked = answer.length, answer.chunked
        if answer.status < 200 or answer.status in (204, 304) or method == "HEAD":
            assert answer.status >= 200 or (length is None and not chunked)
            answer.complete = True
            return answer
        try:
            if chunked:
                answer.body = self.chunks()
            elif length is not None:
                answer.body = self.exactly(length)
            else:
                answer.body, answer.ended = self.rest()
                answer.complete = answer.ended == "fin"
                return answer
            answer.complete = True
        except Ended as ended:
            answer.body, answer.ended = ended.got, ended.how
            self.buffer.clear()
        return answer

    def upload(self, data: bytes | memoryview, piece: int = 1 << 16) -> int:
        """Send until all is sent or something comes back. Returns the number of bytes sent."""
        sent = 0
        view = memoryview(data)
        deadline = time.monotonic() + PATIENCE
        while sent < len(view):
            readable, writable, _ = select.select([self.socket], [self.socket], [], deadline - time.monotonic())
            assert readable or writable, "the upload got stuck"
            if readable:
                break
            # What is writable takes something at once, but not necessarily all.
            sent += self.socket.send(view[sent : sent + piece], socket.MSG_DONTWAIT)
        return sent

    def trickle(self, data: bytes, every: float = 0.02) -> int:
        """Send a byte each time that nothing comes for so many seconds. Returns the number of bytes sent."""
        for place in range(len(data)):
            if self.readable(every):
                return place
            try:
                self.socket.sendall(data[place : place + 1])
            except OSError:
                return place
        return len(data)


class Talk(Wire):
    """A connection of an upstream, for its script: `request` is the one to be answered; its body is not yet taken."""

    request: Request

    def __init__(self, sock: socket.socket, upstream: Upstream, number: int) -> None:
        super().__init__(sock)
        self.upstream = upstream
        self.number = number

    def take(self) -> bytes:
        """Read the rest of the request."""
        request = self.request
        if not request.complete:
            try:
                if request.chunked:
                    request.body = self.chunks()
                else:
                    request.body = self.exactly(request.length or 0)
            except Ended as ended:
                request.body, request.ended = ended.got, ended.how
                raise
            request.complete = True
            self.upstream.told()
        return request.body

    def answer(self, *pieces: bytes) -> None:
        """Read the rest of the request, and send these."""
        self.take()
        self.send(*pieces)

    def until_end(self) -> Ending:
        """Wait for the other side to end the connection."""
        how = self.rest()[1]
        self.upstream.note_end(self, how)
        return how


Script: TypeAlias = Callable[[Talk], None]


def answering(*answers: bytes) -> Script:
    """A script that gives these answers, one a request; the last again and again."""
    left = list(answers)

    def script(talk: Talk) -> None:
        talk.answer(left.pop(0) if len(left) > 1 else left[0])

    return script


def closing(answer: bytes, *, by_reset: bool = False) -> Script:
    """A script that sends so much and closes."""

    def script(talk: Talk) -> None:
        talk.answer(answer)
        if by_reset:
            talk.reset()
        else:
            talk.close()

    return script


def silent(talk: Talk) -> None:
    """A script that never answers."""
    talk.take()
    talk.until_end()


def echo(talk: Talk) -> None:
    """A script that answers with the body."""
    body = talk.take()
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)


def says(text: bytes) -> bytes:
    """A whole answer with this body."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)


class Upstream:
    """A server that does what its `script` says, and keeps all that it gets.

    - `greeting`: what is done on a new connection before anything is read, if that is something
    - `requests` in the order their heads came, whether or not the rest did; `connections`: how many were opened
    - `ends`: how the gateway ended connections, by their number
    - `errors`: what was wrong with what came
    """

    def __init__(self, path: Path | None = None) -> None:
        """On a free port of 127.0.0.1, or on a Unix socket at `path`."""
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
            self.port: int = self._listener.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(512)
            self.url = f"http+unix://{path}"
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._talks: dict[int, tuple[Talk, threading.Thread]] = {}
        self._opened = 0
        self._begin()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _begin(self) -> None:
        self.script: Script = answering(OK)
        self.greeting: Callable[[Talk], None] | None = None
        self.requests: list[Request] = []
        self.ends: dict[int, Ending] = {}
        self._first = self._opened

    @property
    def connections(self) -> int:
        return self._opened - self._first

    @property
    def open(self) -> int:
        """How many connections are open on this side."""
        return len(self._talks)

    @property
    def completed(self) -> list[Request]:
        """The requests that came with all of their body."""
        return [request for request in self.requests if request.complete]

    @property
    def targets(self) -> list[bytes]:
        return [request.target for request in self.requests]

    def one(self) -> Request:
        """The one request that came."""
        assert len(self.requests) == 1, self.targets
        assert self.requests[0].complete
        return self.requests[0]

    def told(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def note_end(self, talk: Talk, how: Ending) -> None:
        with self._changed:
            self.ends[talk.number - self._first] = how
            self._changed.notify_all()

    def until(self, true: Callable[[], object]) -> None:
        """Wait until this is true of what has come."""
        with self._changed:
            assert self._changed.wait_for(true, PATIENCE), f"waited in vain: {self.targets}, {self.ends}"

    def clear(self) -> None:
        """Close all connections and forget what came."""
        for talk, thread in list(self._talks.values()):
            try:  # the thread that waits in it ends, and closes it
                talk.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            thread.join(PATIENCE)
            assert not thread.is_alive(), "an upstream's script hangs"
        with self._changed:
            self._begin()

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(PATIENCE)
        self._listener.close()
        self.clear()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                talk = Talk(sock, self, self._opened)
                thread = threading.Thread(target=self._serve, args=(talk,), daemon=True)
                self._opened += 1
                thread.start()  # first: `clear` waits for all that are listed, and takes no lock for it
                self._talks[talk.number] = (talk, thread)
                self._changed.notify_all()

    def _serve(self, talk: Talk) -> None:
        try:
            if self.greeting is not None:
                self.greeting(talk)
            while not talk.closed:
                raw = talk.through(b"\r\n\r\n")
                talk.request = parse_request(raw, talk.number - self._first)
                with self._changed:
                    self.requests.append(talk.request)
                    self._changed.notify_all()
                self.script(talk)
                if not talk.closed:
                    talk.take()
        except Ended as ended:
            self.note_end(talk, ended.how)
        except OSError:
            self.note_end(talk, "reset")  # in the midst of sending
        except AssertionError as error:
            self.errors.append(str(error))
        finally:
            talk.close()
            with self._changed:
                del self._talks[talk.number]
                self._changed.notify_all()


SERVICE: Final = """
import asyncio, random, sys

async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\\r\\n")[0]
            body = await reader.readexactly(int(length or 0))
            await asyncio.sleep(random.random() * 0.004)
            text = head.split(b" ")[1] + b" " + body
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(text), text))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


class Service:
    """An upstream in a process of its own, that can be killed and comes back on its port. It answers target and body."""

    def __init__(self) -> None:
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVICE, str(self.port)], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        """kill -9"""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Refusing:
    """An address where nobody listens, kept from others."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET)
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self._socket.close()


class Deaf:
    """An address where connecting hangs: its queue is full and nobody accepts."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._waiting = []
        for _ in range(3):
            sock = socket.socket(socket.AF_INET)
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            self._waiting.append(sock)

    def close(self) -> None:
        for sock in [self._listener, *self._waiting]:
            sock.close()


LISTENING: Final = re.compile(r"listening on http://(.+):([0-9]+)")
ALARMING: Final = re.compile(r"Traceback|Exception|Error\b|Warning|never retrieved|was destroyed", re.MULTILINE)


def toml(value: object) -> str:
    """A value as TOML writes it on one line; JSON's strings, numbers and truths are TOML's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(key))} = {toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(part) for part in value) + "]"
    return json.dumps(value)


class Gateway:
    """The command `gatekeeper serve` with these settings, on a free port."""

    def __init__(self, settings: Mapping[str, Any], directory: Path) -> None:
        settings = {**settings, "listen": {"address": "127.0.0.1:0", **settings.get("listen", {})}}
        file = directory / f"gatekeeper-{id(self)}.toml"
        file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in settings.items()), encoding="utf-8")
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from gatekeeper.cli import main; main()", "serve", str(file)],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"COLUMNS": "500", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        """What it printed on standard output: the access log."""
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            self.port = self._listening()
        except BaseException:
            self.process.kill()
            self._reap()
            raise

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._changed:
                lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _listening(self) -> int:
        def found() -> re.Match[str] | None:
            return LISTENING.search("".join(self.errors))

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, 2 * PATIENCE)
            told = found()
        assert told is not None, "the gateway did not start:\n" + "".join(self.errors)
        return int(told[2])

    def until_line(self, true: Callable[[str], object]) -> str:
        """Wait for a line on standard output of which this is true."""
        with self._changed:
            found = self._changed.wait_for(lambda: [line for line in self.lines if true(line)], PATIENCE)
        assert found, self.lines
        return found[0]

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers."""
        parent = self.process.pid
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]

    def resident(self) -> int:
        """Bytes of memory that the workers hold."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.workers)
        return pages * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """How many files and sockets the workers hold open."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.workers)

    @property
    def calm(self) -> bool:
        """Whether nothing alarming came on standard error."""
        return not ALARMING.search("".join(self.errors))

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; returns the exit status."""
        try:
            return self.process.wait(2 * PATIENCE)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._reap()

    def _reap(self) -> None:
        self.process.wait()
        for reader in self._readers:
            reader.join(PATIENCE)
        for stream, reader in zip((self.process.stderr, self.process.stdout), self._readers, strict=True):
            assert stream is not None
            if not reader.is_alive():  # a worker that outlives its parent holds the pipe
                stream.close()

    def stop(self) -> None:
        """SIGTERM; asserts that it ended well, said nothing alarming, and that nobody accepts any more."""
        if self.process.poll() is None:
            self.signal()
        status = self.wait()
        told = "".join(self.errors)
        assert status == 0, f"exit status {status}:\n{told}"
        assert self.calm, told
        assert self.refuses(), "somebody still accepts connections"

    def refuses(self) -> bool:
        """Whether a connection is refused."""
        with socket.socket(socket.AF_INET) as sock:
            sock.settimeout(PATIENCE)
            return sock.connect_ex(("127.0.0.1", self.port)) != 0


@dataclass
class Stage:
    """A gateway and what stands behind it. `clear` makes it new for the next test, in which nothing is connected."""

    gateway: Gateway
    upstreams: Mapping[str, Upstream]
    clients: list[Client] = field(default_factory=list)

    @property
    def up(self) -> Upstream:
        """The upstream named "up"."""
        return self.upstreams["up"]

    def client(self, **options: Any) -> Client:
        client = Client(self.gateway.port, **options)
        self.clients.append(client)
        return client

    def ask(self, data: bytes, method: str | None = None) -> Answer:
        """The answer to a request on a connection of its own."""
        with self.client() as client:
            return client.ask(data, method)

    def settle(self) -> None:
        """Let the gateway see all that has reached its sockets by now.

        It refuses this request, which no upstream sees, in a turn of its loop that also brings what came before.
        """
        for _ in range(2):
            with Client(self.gateway.port) as client:
                assert client.ask(b"TRACE / HTTP/1.1\r\nHost: a.example\r\n\r\n").status == 405

    def leave(self) -> None:
        """Close all clients' connections."""
        for client in self.clients:
            client.close()
        self.clients.clear()

    def clear(self) -> None:
        self.leave()
        for upstream in self.upstreams.values():
            upstream.clear()
        self.settle()
        for upstream in self.upstreams.values():
            upstream.clear()

    def check(self) -> None:
        """What holds after every test."""
        told = "".join(self.gateway.errors)
        assert self.gateway.process.poll() is None, f"the gateway died:\n{told}"
        assert self.gateway.calm, told
        for name, upstream in self.upstreams.items():
            errors, upstream.errors = upstream.errors, []
            assert not errors, f"malformed at {name}: {errors}"


POOL: Final = {"health": {"failures": 1000}}
"""Settings of a pool whose upstreams may fail again and again."""


@contextmanager
def staged(
    directory: Path,
    settings: Callable[[Mapping[str, str]], Mapping[str, Any]],
    names: Iterable[str] = ("up",),
    others: Iterable[Refusing | Deaf] = (),
) -> Iterator[Stage]:
    """A stage with upstreams of these names; `settings` is asked with their addresses."""
    with ExitStack() as stack:
        for other in others:
            stack.callback(other.close)
        upstreams: dict[str, Upstream] = {}
        for name in names:
            upstreams[name] = Upstream()
            stack.callback(upstreams[name].close)
        gateway = Gateway(settings({name: upstream.url for name, upstream in upstreams.items()}), directory)
        stack.callback(gateway.stop)
        stage = Stage(gateway, upstreams)
        stack.callback(stage.leave)
        yield stage


def request(line: str, *fields: str | bytes, host: str | None = "a.example", body: bytes = b"") -> bytes:
    """The bytes of a request: its line (HTTP/1.1 if it names no version), Host, fields, body."""
    start = line.encode("latin-1") + (b"" if " HTTP/" in line else b" HTTP/1.1")
    lines = [start, *([b"Host: " + host.encode()] if host is not None else [])]
    lines += [text.encode("latin-1") if isinstance(text, str) else text for text in fields]
    return b"\r\n".join([*lines, b"", b""]) + body


def response(line: str, *fields: str | bytes, body: bytes = b"") -> bytes:
    """The bytes of a response."""
    lines = [f"HTTP/1.1 {line}".encode("latin-1")]
    lines += [text.encode("latin-1") if isinstance(text, str) else text for text in fields]
    return b"\r\n".join([*lines, b"", b""]) + body


def chunked(*pieces: bytes) -> bytes:
    """A chunked body of these."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"
