"""Connections of clients: accepted within bounds, read message by message, answered in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import re
import socket
import struct
import termios
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Literal, cast

from gatekeeper.commands import Hits, Replies
from gatekeeper.gate import Destination, Gate
from gatekeeper.proxy.answers import own_answer, own_head
from gatekeeper.proxy.connections import HIGH_WATER, Connections
from gatekeeper.proxy.deadlines import Deadlines, Timed
from gatekeeper.proxy.exchange import FULL, UNREAD, UNSENT, UPSTREAM, Exchange
from gatekeeper.proxy.wire import CLAIMS, LONGEST_LINE, WireError
from gatekeeper.upstreams.pool import Upstream

LINGER: Final = 2.0
"""How long a client may go on sending what nobody reads, so that the answer reaches it, in seconds.

A connection that is closed while bytes are unread is reset, and a reset may overtake the answer (RFC 9112, 9.6).
"""

_MOST_BLANKS: Final = 2
_LONE: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)(?!\Z)")


class Front:
    """All that a worker decides by, and what it has in hand. Another may take its place while requests go on.

    Times in seconds, sizes in bytes; what each bound means is said by the settings under `[listen]`.

    - `pseudonym`: this gateway's name in `Via` (RFC 9110, 7.6.3), by which loops are known
    - `distrusted`: fields that only trusted peers may write, such as the one that names the user; from others they
      do not go on
    - `access_log`: called with each exchange and its status, None for no log
    - `counts`: how many answers there were of each status
    """

    __slots__ = (
        "_later", "aask", "access_log", "ask", "awaits", "body_timeout", "connections", "counts", "deadlines",
        "distrusted", "forwarded", "gate", "head_timeout", "idle_timeout", "is_trusted", "least_rate", "log",
        "loop", "max_body", "max_connections", "max_connections_per_address", "max_fields", "max_head", "pseudonym",
        "via",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        gate: Gate,
        *,
        ask: Callable[[Hits], Replies],
        aask: Callable[[Hits], Awaitable[Replies]],
        awaits: bool,
        is_trusted: Callable[[str | None], bool],
        distrusted: Iterable[str] = (),
        pseudonym: bytes,
        forwarded: Literal["x-forwarded", "forwarded", "none"] = "x-forwarded",
        head_timeout: float = 10.0,
        idle_timeout: float = 75.0,
        body_timeout: float = 30.0,
        least_rate: int = 256,
        max_head: int = 32 * 1024,
        max_fields: int = 100,
        max_body: int = 1 << 30,
        max_connections: int = 16384,
        max_connections_per_address: int = 512,
        access_log: Callable[[Exchange, int], None] | None = None,
    ) -> None:
        self.loop = loop
        self.gate = gate
        self.ask = ask
        self.aask = aask
        self.awaits = awaits
        self.is_trusted = is_trusted
        names = [name.lower().encode("ascii") for name in distrusted]
        self.distrusted = frozenset(name for name in names if not name.startswith(CLAIMS))  # those never go on so
        self.pseudonym = pseudonym
        self.via = b"Via: 1.1 " + pseudonym
        self.forwarded = forwarded
        self.head_timeout = head_timeout
        self.idle_timeout = idle_timeout
        self.body_timeout = body_timeout
        self.least_rate = least_rate
        self.max_head = max_head
        self.max_fields = max_fields
        self.max_body = max_body
        self.max_connections = max_connections
        self.max_connections_per_address = max_connections_per_address
        self.access_log = access_log
        self.log = logging.getLogger("gatekeeper.gateway")
        self.connections = Connections(loop)
        self.deadlines = Deadlines(loop)
        self.counts = [0] * 1000
        self._later: set[asyncio.Future[Any]] = set()

    def later(self, work: Awaitable[object]) -> None:
        """Let something be done that no request waits for."""
        task = asyncio.ensure_future(work, loop=self.loop)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def aclose(self) -> None:
        """Let go of all connections, once what is still to be done is done."""
        if self._later:
            await asyncio.wait(self._later, timeout=1.0)
        self.connections.close()
        self.deadlines.close()

    def report(self, destination: Destination, upstream: Upstream, success: bool, term: int) -> None:
        """What was seen of an upstream."""
        if destination.pool.observe(upstream, success, self.now_ns(), term):
            state = "is back" if success else "is ejected"
            self.log.warning("pool %s: upstream %s %s", destination.pool.name, upstream.id, state)

    def now_ns(self) -> int:
        return int(self.loop.time() * 1e9)


class Listener:
    """The clients of a worker."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.clients: set[ClientConnection] = set()
        self.by_address: Counter[str] = Counter()
        self.is_draining = False
        self._empty: asyncio.Future[None] | None = None

    def __call__(self) -> ClientConnection:
        return ClientConnection(self)

    def peer_of(self, transport: asyncio.BaseTransport) -> str | None:
        """The address of the other end; None on a Unix socket."""
        peer = transport.get_extra_info("peername")
        return peer[0] if isinstance(peer, tuple) else None

    def has_room(self, peer: str | None) -> bool:
        front = self.front
        if len(self.clients) >= front.max_connections or self.is_draining:
            return False
        most = front.max_connections_per_address
        return not most or not peer or self.by_address[peer] < most or front.is_trusted(peer)

    def entered(self, client: ClientConnection) -> None:
        self.clients.add(client)
        if client.peer:
            self.by_address[client.peer] += 1

    def left(self, client: ClientConnection) -> None:
        if client not in self.clients:
            return
        self.clients.discard(client)
        if client.peer:
            self.by_address[client.peer] -= 1
            if not self.by_address[client.peer]:
                del self.by_address[client.peer]
        if self._empty is not None and not self.clients and not self._empty.done():
            self._empty.set_result(None)

    async def drain(self, seconds: float) -> None:
        """Let requests in progress end, and their connections with them; those that take longer are broken off."""
        self.is_draining = True
        self._empty = self.front.loop.create_future()
        for client in list(self.clients):
            client.end_soon()
        if self.clients:
            await asyncio.wait([self._empty], timeout=seconds)
        for client in list(self.clients):
            client.abort()


class ClientConnection(Timed, asyncio.Protocol):
    """One client. Its requests are served one after the other; what comes early waits, and then is not read."""

    __slots__ = (
        "_advancing", "_blanks", "_holds", "_is_begun", "_lingers", "_listener", "_searched", "_told", "_told_host",
        "_unsent",
        "buffer", "exchange", "is_full", "is_last", "is_trusted", "peer", "transport",
    )  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self.peer: str | None = None
        self.is_trusted = False
        self.exchange: Exchange | None = None
        self.buffer = b""
        self.is_last = False  # no request is taken after the present one
        self.is_full = False
        self._advancing = False
        self._blanks = 0
        self._is_begun = False  # a head has begun to arrive
        self._searched = 0  # so much of it was there before: drop by drop, it is not searched again and again
        self._lingers = False
        self._holds = 0
        self._unsent = 0
        self._told: list[bytes] | None = None
        self._told_host = b""

    @property
    def front(self) -> Front:
        return self._listener.front

    # The event loop's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        listener = self._listener
        self.peer = listener.peer_of(transport)
        if not listener.has_room(self.peer):
            self._lingers = True
            self.transport.abort()
            return
        listener.entered(self)
        self.is_trusted = listener.front.is_trusted(self.peer)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.wait(listener.front.head_timeout)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.more(data)
        elif not self._lingers:
            self._searched = len(self.buffer)
            self.buffer = self.buffer + data if self.buffer else data
            self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        self.front.deadlines.forget(self)
        self._lingers = True
        self.buffer = b""
        self._listener.left(self)
        if self.exchange is not None:
            self.exchange.client_left()
            self.exchange = None

    def pause_writing(self) -> None:
        self.is_full = True
        self._unsent = self._not_taken()
        if self.exchange is not None:
            self.exchange.client_full(True)
        if self.exchange is None or self.exchange.head is not None:
            self.wait(self.front.body_timeout)

    def resume_writing(self) -> None:
        self.is_full = False
        if self.exchange is not None:
            self.exchange.client_full(False)
        elif self._holds and not self._lingers:
            self.hold(UNREAD, False)
            self._advance()

    # The deadlines'

    def wait(self, seconds: float) -> None:
        self._listener.front.deadlines.set(self, seconds)

    def expired(self) -> None:
        if self._lingers or self.transport.is_closing():
            # The last of what was written may still be on its way to a slow reader.
            if self._unsent and self.drained(1):
                self.wait(self.front.body_timeout)
            else:
                self.abort()
        elif self.exchange is not None:
            self.exchange.expired()
        elif self.is_full:
            if self.drained(self.front.least_rate * self.front.body_timeout):
                self.wait(self.front.body_timeout)
            else:
                self.reset()
        elif self.buffer.strip(b"\r\n"):
            self._refuse(408)
        else:
            self._close()

    def drained(self, least: float) -> bool:
        """Whether the client has read so many bytes since this was last asked."""
        unsent = self._not_taken()
        moved, self._unsent = self._unsent - unsent, unsent
        return moved > 0 and moved >= least

    def _not_taken(self) -> int:
        """Bytes that were written and the client has not acknowledged: those that wait here, and in the kernel."""
        server = self.transport.get_extra_info("socket")
        queued = 0
        if server is not None:
            # The kernel takes megabytes, and asks for more only when much of it is gone: slow readers would seem to
            # read nothing for a long time.
            with contextlib.suppress(OSError):
                (queued,) = struct.unpack("i", fcntl.ioctl(server.fileno(), termios.TIOCOUTQ, bytes(4)))
        return self.transport.get_write_buffer_size() + int(queued)

    # The exchange's

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def write_all(self, pieces: Iterable[bytes]) -> None:
        self.transport.writelines(pieces)

    def hold(self, why: int, is_held: bool) -> None:
        """Read no more while anything stands against it."""
        before = self._holds
        self._holds = before | why if is_held else before & ~why
        if bool(before) != bool(self._holds) and not self.transport.is_closing():
            (self.transport.pause_reading if self._holds else self.transport.resume_reading)()

    @property
    def is_held(self) -> bool:
        return bool(self._holds)

    def told(self, exchange: Exchange) -> list[bytes]:
        """The lines that tell the upstream of the client (RFC 7239, or X-Forwarded-*).

        Of a peer that is not trusted nothing is believed. A trusted one's words are kept, and the peer is added.
        """
        kind = self.front.forwarded
        if kind == "none":
            return [field.line for field in exchange.forwarding] if self.is_trusted else []
        peer = (self.peer or "").partition("%")[0]
        host = exchange.host or b""
        if kind == "forwarded":
            quoted = peer if ":" not in peer else f'"[{peer}]"'
            hop = b"for=%b;proto=http" % (quoted.encode() if peer else b"unknown")
            if host:
                hop += b';host="%b"' % host.replace(b'"', b"")
            return [*_joined(exchange, b"forwarded", hop, self.is_trusted)]
        if self._told is None:
            self._told = [b"X-Forwarded-Proto: http"]
            if peer:
                self._told.append(b"X-Forwarded-For: " + peer.encode())
        if not self.is_trusted or not exchange.forwarding:
            if host != self._told_host:  # a client asks for the same host again and again
                self._told_host = host
                self._told[1 + bool(peer) :] = [b"X-Forwarded-Host: " + host] if host else []
            return self._told
        lines = _joined(exchange, b"x-forwarded-for", peer.encode(), True)
        named = {field.name for field in exchange.forwarding}
        if b"x-forwarded-proto" not in named:
            lines.append(b"X-Forwarded-Proto: http")
        if b"x-forwarded-host" not in named and host:
            lines.append(b"X-Forwarded-Host: " + host)
        return lines

    def done(self, exchange: Exchange) -> None:
        """An exchange has ended; `keeps` tells whether another may follow."""
        if self.exchange is not exchange:
            return
        self.exchange = None
        if self.transport.is_closing():
            return
        if not exchange.keeps or self.is_last:
            self._close(linger=not exchange.body.is_done)
            return
        self.buffer = exchange.body.rest
        if self._holds:
            self.hold(UNSENT | UPSTREAM | FULL, False)
        if self.is_full:  # no further request, until it reads its answers
            self.hold(UNREAD, True)
            return
        if not self.buffer:
            front = self._listener.front
            front.deadlines.set(self, front.idle_timeout)
            return
        self._is_begun = False
        self._searched = 0
        if not self._advancing:
            self._advance()

    def abort(self) -> None:
        self.deadline = 0.0
        self.transport.abort()

    def reset(self) -> None:
        """Break the connection off so that nobody can take it for an end in order: with RST in place of FIN."""
        server = self.transport.get_extra_info("socket")
        if server is not None and server.family != socket.AF_UNIX:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def end_soon(self) -> None:
        """Take no further request."""
        self.is_last = True
        if self.exchange is None and not self._lingers:
            self._close()

    # Its own

    def _advance(self) -> None:
        """Begin the next request, once its head is whole; and those behind it that are answered at once."""
        self._advancing = True
        front = self._listener.front
        try:
            while self.exchange is None and self.buffer and not self._lingers and not self.transport.is_closing():
                data = self.buffer
                if data[0] == 0x0D:  # an empty line before a request line is let pass (RFC 9112, 2.2)
                    if data[:2] == b"\r\n" and self._blanks < _MOST_BLANKS:
                        self._blanks += 1
                        self._searched = 0
                        self.buffer = data[2:]
                        continue
                    if data == b"\r":
                        return
                self._blanks = 0
                if self._holds:
                    self.hold(FULL, False)
                end = data.find(b"\r\n\r\n", max(0, self._searched - 3))
                if end < 0 or end > front.max_head:
                    self._incomplete(data, front)
                    return
                exchange = Exchange(self, front)
                try:
                    exchange.read(data[:end], front.max_fields)
                except WireError as error:
                    self._refuse(error.status)
                    return
                if front.distrusted and not self.is_trusted:
                    exchange.lines = [
                        line for line in exchange.lines if line.partition(b":")[0].lower() not in front.distrusted
                    ]
                self.buffer = b""
                self._is_begun, self._searched = False, 0
                self.exchange = exchange
                exchange.begin(data[end + 4 :])
        finally:
            self._advancing = False

    def _incomplete(self, data: bytes, front: Front) -> None:
        """The head is not whole yet: told early if it never can be."""
        if not self._is_begun:  # these are its first bytes: from here it has its time
            self._is_begun = True
            self.wait(front.head_timeout)
        line, whole, _ = data.partition(b"\r\n")
        if len(line) > LONGEST_LINE:
            self._refuse(414)
        elif len(data) > front.max_head:
            self._refuse(431)
        elif _LONE.search(data, max(0, self._searched - 1)) or (whole and line.count(b" ") != 2) or b"\0" in data:
            self._refuse(400)
        elif whole and not line.endswith((b" HTTP/1.1", b" HTTP/1.0")):
            self._refuse(505 if re.search(rb" HTTP/[0-9]\.[0-9]\Z", line) else 400)

    def _refuse(self, status: int) -> None:
        """The answer to what is no request."""
        fields, body = own_answer(status, None)
        self.buffer = b""
        self.front.counts[status] += 1
        self.write(own_head(status, fields, closes=True) + body)
        self._close(linger=True)

    def _close(self, *, linger: bool = False) -> None:
        """Close, once what was written has gone out."""
        self._lingers = True
        self.buffer = b""
        if linger and self.transport.can_write_eof():
            self.transport.write_eof()
            if self._holds:
                self._holds = 0
                self.transport.resume_reading()
        else:
            self.transport.close()
        self._unsent = self._not_taken() if self.transport.get_write_buffer_size() else 0
        self.wait(self.front.body_timeout if self._unsent else LINGER)


def _joined(exchange: Exchange, name: bytes, hop: bytes, is_trusted: bool) -> list[bytes]:
    """The claims of a trusted peer, with one more hop behind those of `name`."""
    if not is_trusted:
        return [b"Forwarded: " + hop] if name == b"forwarded" else [b"X-Forwarded-For: " + hop]
    hops = [field.value for field in exchange.forwarding if field.name == name]
    others = [field.line for field in exchange.forwarding if field.name != name]
    written = b"Forwarded: " if name == b"forwarded" else b"X-Forwarded-For: "
    return [*others, written + b", ".join([*hops, hop] if hop else hops)]
