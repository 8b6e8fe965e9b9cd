"""One request's way from a client to an upstream, and of the response back."""

from __future__ import annotations

import asyncio
import time
from random import random
from typing import TYPE_CHECKING, Final

from gatekeeper.commands import arun, run
from gatekeeper.proxy.answers import own_answer, own_head
from gatekeeper.proxy.connections import HIGH_WATER, UpstreamConnection
from gatekeeper.proxy.pinning import heard, told, unpinned
from gatekeeper.proxy.wire import (
    CHUNKED,
    LAST_CHUNK,
    LONGEST_RESPONSE_HEAD,
    UNTIL_CLOSE,
    WHOLE,
    Body,
    ResponseHead,
    WireError,
    WireRequest,
    chunk,
    may_begin_response,
    request_body,
    response_body,
)
from gatekeeper.ticket import Ticket
from gatekeeper.upstreams.retry import MOST_REPEATS, may_repeat

if TYPE_CHECKING:
    from gatekeeper.gate import Destination
    from gatekeeper.proxy.listener import ClientConnection, Front
    from gatekeeper.upstreams.pool import Upstream

CLIENT_LEFT: Final = 499
"""The status in logs of a request whose client left, as nginx writes it."""

_MOST_INTERIM: Final = 32
_RETRY_AFTER: Final = 1
_SENDS_BODY: Final = frozenset(["POST", "PUT", "PATCH"])
_UNUSUAL: Final = frozenset(["OPTIONS", "CONNECT", "TRACE"])


class Exchange(WireRequest, Ticket):
    """One request and its response; the ticket of the request, too.

    Events come from the client's connection (`more`, `client_full`, `client_left`, `expired`) and from the
    upstream's (`answer_received`, `upstream_full`, `upstream_lost`). It ends exactly once, in `_end`.
    """

    # Slots: there are more attributes than CPython keeps compact in an instance's dictionary.
    __slots__ = (
        "address", "answer", "arrived", "body", "body_taken", "candidates", "client", "connection", "destination",
        "expects", "forwarding", "front", "gate", "head", "hits", "host", "in_chunks", "is_forwarded", "is_old",
        "is_open", "is_over", "keeps", "keeps_alive", "length", "lines", "mark", "max_forwards", "method", "moved",
        "native", "now", "partial", "path", "peer", "pending", "readings", "refused", "replaced", "rules", "sent",
        "target", "task", "term", "upstream", "verb", "verdicts", "via",
    )  # fmt: skip

    # What few exchanges need is of the class until it is set.
    started = 0.0  # when, if it is logged
    timed_out = False  # the last upstream that was turned to did not answer in time
    repeats = 0  # how often it was sent again
    interim = 0  # how many 1xx came before the response
    peeked: bytes | None = None  # its body as it came, while a rule may count by a field of it
    waiting: asyncio.Future[None] | None = None  # of somebody who reads that

    def __init__(self, client: ClientConnection, front: Front) -> None:
        self.client = client
        self.front = front
        self.peer: str | None = client.peer
        # Of the ticket
        self.refused = self.sent = 0
        self.rules = self.hits = self.verdicts = ()
        self.is_open = False
        # Of the request
        self.max_forwards: int | None = None
        self.readings: tuple[str, ...] = ()
        self.pending = b""  # of its body, as it goes on, until there is a connection
        self.arrived = 0  # bytes of its body
        self.body_taken = False  # some of the body was handed to an upstream's connection
        self.is_forwarded = False  # the whole request was
        # Of its way
        self.destination: Destination | None = None
        self.upstream: Upstream | None = None
        self.term = 0  # of the upstream's health, when it was turned to
        self.connection: UpstreamConnection | None = None
        self.task: asyncio.Task[None] | None = None
        # Of the response
        self.head: ResponseHead | None = None
        self.answer: Body | None = None  # its body, as it comes in
        self.partial = b""  # of its head
        self.in_chunks = False  # how it goes out
        self.moved = 0  # bytes of its body
        self.mark = 0  # how many bytes, of either body, had moved when progress was looked at last
        self.keeps = True  # the client's connection goes on after this
        self.is_over = False

    # From the client

    def begin(self, data: bytes) -> None:
        """The head was read; `data` is what came behind it."""
        front = self.front
        if front.access_log is not None:
            self.started = time.monotonic()
        self.body = request_body(self.length)
        if self.length > front.max_body:
            self._own(413)
            return
        if front.gate.reads_body:
            self.peeked = b""
        if data:
            self.more(data)
        if self.is_over:
            return
        if front.awaits or (self.peeked is not None and not self.body.is_done):
            self._wait_for_body()
            self.task = front.loop.create_task(self._admit())
            return
        try:
            self.refused = front.gate.admit_at_once(self, front.ask, self._peek)
        except Exception:
            self._failed()
            return
        self._admitted()

    def _wait_for_body(self) -> None:
        """While it is decided, and connected, only the client may be late: what we do has bounds of its own."""
        if self.body.is_done:
            self.front.deadlines.clear(self.client)
        else:
            self.client.wait(self.front.body_timeout)

    async def _admit(self) -> None:
        try:
            refused = await arun(self.front.gate.admit(self), self.front.aask, self._read)
        except Exception:
            self._failed()
            return
        self.task = None
        if not self.is_over:
            self.refused = refused
            self._admitted()
        elif self.is_open:  # a function of the user's would not be cancelled, and it was charged after all
            self._finish()

    def _peek(self, most: int) -> bytes | None:
        """The body as far as it is here, None if it is longer."""
        return self.peeked if self.peeked is not None and len(self.peeked) <= most else None

    async def _read(self, most: int) -> bytes | None:
        """The whole body, None if it is longer."""
        if self.expects and not self.body.is_done:
            self.expects = False  # nobody need ask for it again
            self.client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self.body.is_done:
            if self._peek(most) is None or self.client.is_held:
                return None
            self.waiting = self.front.loop.create_future()
            await self.waiting
        return self._peek(most)

    def _failed(self) -> None:
        """A function of the settings raised: nobody passes who was not decided upon."""
        self.front.log.exception("%s: the request could not be decided", self.method)
        if not self.is_over:
            self._own(500)

    def more(self, data: bytes) -> None:
        """Bytes of the request behind its head."""
        body = self.body
        if body.is_done or self.head is not None:
            body.rest += data  # the next request; or a body that nobody waits for
            self.client.hold(FULL, len(body.rest) > HIGH_WATER)
            return
        try:
            piece = body.take(data)
        except WireError as error:
            self._own(error.status)
            return
        self.arrived += len(piece)
        if self.arrived + body.left > self.front.max_body:
            self._own(413)
            return
        if self.peeked is not None:
            self.peeked += piece
        is_done = self.body.is_done
        out = piece if self.length != CHUNKED else chunk(piece) + LAST_CHUNK if is_done else chunk(piece)
        connection = self.connection
        if connection is None:
            self.pending += out
            self.client.hold(UNSENT, len(self.pending) > HIGH_WATER)
            if self.waiting is not None and not self.waiting.done():
                self.waiting.set_result(None)
        elif out:
            self.body_taken = True
            connection.transport.write(out)
        if is_done and connection is not None:
            self._forwarded()

    def client_full(self, is_full: bool) -> None:
        """Whether the client takes no more for now."""
        if self.connection is not None and self.connection.is_open:
            transport = self.connection.transport
            (transport.pause_reading if is_full else transport.resume_reading)()

    def client_left(self) -> None:
        """The client is gone. What was asked for it is given up, at whatever point it is."""
        self._end(CLIENT_LEFT)

    def expired(self) -> None:
        """The client's deadline came while this was on its way."""
        front = self.front
        if self.head is not None:
            # Of the response: whom we wait for is who must have moved.
            if self.client.is_full:
                if self.client.drained(front.least_rate * front.body_timeout):
                    self.client.wait(front.body_timeout)
                else:
                    self.client.reset()
                    self._end(CLIENT_LEFT)
            elif self.moved > self.mark:
                self.mark = self.moved
                self.client.wait(self._read_timeout)
            else:
                self._break()
        elif self.connection is not None and self.is_forwarded:
            self.timed_out = True
            self._report(False)
            self._own(504, error="http_response_timeout")
        else:
            unsent = 0 if self.connection is None else self.connection.transport.get_write_buffer_size()
            taken, before = self.arrived - unsent, self.mark
            self.mark = taken
            # A client must keep to the least rate; an upstream that is full must take anything at all.
            if taken - before >= (1 if self.client.is_held else max(1.0, front.least_rate * front.body_timeout)):
                self.client.wait(front.body_timeout)
            elif self.connection is None and self.client.is_held:
                self._wait_for_body()  # enough of it is here until there is a connection
            elif self.client.is_held:
                self._report(False)
                self._own(504, error="http_response_timeout")
            else:
                self._own(408)

    # Onwards

    def _admitted(self) -> None:
        front = self.front
        self.peeked = None
        if self.refused:
            refusal = front.gate.refusal(self)
            self._answer(refusal.status, refusal.fields, refusal.body)
            return
        if self.method in _UNUSUAL or self.via:
            status = self._objection()
            if status == 204:
                self._answer(204, [(b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")], b"")
                return
            if status:
                self._own(status)
                return
        destination = front.gate.route(self)
        if destination is None:
            self._own(404)
            return
        if self.readings and not front.gate.reads_alike(self, self.readings):
            self._own(400)
            return
        self.destination = destination
        if front.gate.pin_cookies or front.gate.pin_fields:
            self.lines = unpinned(self.lines, front.gate.pin_cookies, front.gate.pin_fields)
        self.now = front.now_ns()
        self.candidates = front.gate.choose(self, destination, self.now, random())  # noqa: S311
        self._next()

    def _objection(self) -> int:
        """The status of what goes no further, 0 for what does."""
        if self.method == "CONNECT" or self.method == "TRACE":
            return 405
        if any(self.front.pseudonym in value for value in self.via):
            return 508
        if self.target == b"*" or (self.method == "OPTIONS" and self.max_forwards == 0):
            return 204
        return 0

    def _next(self) -> None:
        """Turn to the next upstream in the order of preference."""
        try:
            upstream = next(self.candidates, None)
        except Exception:  # of a policy of the user's own
            self._failed()
            return
        if upstream is None:
            if self.timed_out:
                self._own(504, error="connection_timeout")
            else:
                self._own(503, error="destination_unavailable", retry=_RETRY_AFTER)
            return
        self._turn_to(upstream, fresh=False)

    def _turn_to(self, upstream: Upstream, *, fresh: bool) -> None:
        assert self.destination is not None
        self.upstream = upstream
        self.term = self.destination.pool.take(upstream, self.now)
        connection = None if fresh else self.front.connections.kept(upstream)
        if connection is not None:
            self._send(connection)
        else:
            self._wait_for_body()
            self.task = self.front.loop.create_task(self._connect(upstream))

    async def _connect(self, upstream: Upstream) -> None:
        assert self.destination is not None
        try:
            connection = await self.front.connections.connect(upstream, self.destination.connect_timeout)
        except OSError as error:
            self.task = None
            if self.is_over:
                return
            self.now = self.front.now_ns()
            self.timed_out = isinstance(error, TimeoutError)
            self._report(False)
            self._let_go()
            self._next()
            return
        self.task = None
        if self.is_over:
            connection.close()
        elif connection.is_open:
            self._send(connection)
        else:  # it spoke before it was asked
            self._bad("http_protocol_error")

    def _send(self, connection: UpstreamConnection) -> None:
        """Hand over the request, as far as it is here."""
        self.connection = connection
        connection.exchange = self
        upstream = connection.upstream
        lines = [
            self.verb + b" " + self.target + b" HTTP/1.1",
            b"Host: " + (self.host if self.host is not None else upstream.authority),
            *self.lines,
        ]
        if self.expects and self.length:
            lines.append(b"Expect: 100-continue")
        lines += self.client.told(self)
        lines.append(self.front.via)
        assert self.destination is not None
        if self.destination.vouches and (vouched := self.front.gate.vouch(self)) is not None:
            lines.append(b"Gatekeeper-Identity: " + vouched)
        if self.length:
            lines.append(
                b"Transfer-Encoding: chunked" if self.length == CHUNKED else b"Content-Length: %d" % self.length
            )
        elif self.method in _SENDS_BODY:
            lines.append(b"Content-Length: 0")
        lines += (b"", self.pending)
        connection.transport.write(b"\r\n".join(lines))
        if self.pending:
            self.body_taken = True
            self.pending = b""
            self.client.hold(UNSENT, False)
        if self.body.is_done:
            self._forwarded()
        else:
            self.client.wait(self.front.body_timeout)

    def _forwarded(self) -> None:
        self.is_forwarded = True
        assert self.destination is not None
        self.front.deadlines.set(self.client, self.destination.response_timeout)

    # From the upstream

    def answer_received(self, data: bytes) -> None:
        if self.answer is not None:
            self._go_on(self.answer, data)
            return
        if self.partial:
            data, self.partial = self.partial + data, b""
        while True:
            end = data.find(b"\r\n\r\n")
            if (len(data) if end < 0 else end) > LONGEST_RESPONSE_HEAD:
                self._bad("http_response_header_section_size")
                return
            if end < 0:
                if may_begin_response(data):
                    self.partial = data
                else:
                    self._bad("http_protocol_error")
                return
            try:
                head = ResponseHead(data[:end], to_head=self.verb == b"HEAD")
            except WireError:
                self._bad("http_protocol_error")
                return
            data = data[end + 4 :]
            if head.status >= 200:
                self._begin_answer(head, data)
                return
            self.interim += 1
            # We have asked for no other protocol, so nobody may switch to one.
            if head.status == 101 or self.interim > _MOST_INTERIM:
                self._bad("http_upgrade_failed" if head.status == 101 else "http_protocol_error")
                return
            if not self.is_old:
                self.client.write(b"\r\n".join([b"HTTP/1.1 " + head.reason, *head.lines, b"", b""]))
            if not data:
                return

    def _begin_answer(self, head: ResponseHead, data: bytes) -> None:
        length = head.length
        if length == len(data):
            answer: Body = WHOLE
            piece = data
        else:
            answer = response_body(length)
            try:
                piece = answer.take(data)
            except WireError:
                self._bad("http_protocol_error")
                return
        self.head, self.answer, self.sent, self.moved = head, answer, head.status, len(piece)
        client = self.client
        # An answer before the end of an upload ends the upload: the client is to read it, and not to go on.
        self.keeps = self.keeps_alive and self.body.is_done and not client.is_last
        lines = [b"HTTP/1.1 " + head.reason, *head.lines]
        if self.front.gate.reports:
            lines = self._heed(lines)
        if self.held is not None:
            lines = self._pin(lines)
        if self.hits:
            lines += [name + b": " + value for name, value in self.front.gate.respond(self)]
        if length > 0:
            lines.append(b"Content-Length: " + str(length).encode())
        elif not length:
            told = head.told if self.verb == b"HEAD" or head.status == 304 else 0
            if told is not None and head.status != 204:
                lines.append(b"Content-Length: %d" % told)
        elif self.is_old:
            self.keeps = False
        else:
            self.in_chunks = True
            lines.append(b"Transfer-Encoding: chunked")
        if not self.keeps:
            lines.append(b"Connection: close")
        elif self.is_old:
            lines.append(b"Connection: keep-alive")
        if self.in_chunks:
            piece = chunk(piece) + LAST_CHUNK if answer.is_done else chunk(piece)
        lines += (b"", piece)
        client.transport.write(b"\r\n".join(lines))
        if answer.is_done:
            self._end(head.status, ended=True)
        else:
            self.mark = self.moved
            client.wait(self._read_timeout)

    def _heed(self, lines: list[bytes]) -> list[bytes]:
        """The lines of a response without those that tell us what it has cost."""
        gate, kept = self.front.gate, []
        for line in lines:
            name, _, value = line.partition(b":")
            told = name.decode("latin-1").lower()
            if told in gate.reports:
                gate.report(self, told, value.strip(b" \t").decode("latin-1"))
            else:
                kept.append(line)
        return kept

    def _pin(self, lines: list[bytes]) -> list[bytes]:
        """The lines of a response, with those that pin the client to the upstream that gave it."""
        assert self.destination is not None
        assert self.destination.affinity is not None
        assert self.upstream is not None
        lines, ends = heard(lines, self.destination.affinity.field)
        fields = self.front.gate.pin(self, self.destination, self.upstream, ends=ends)
        return told(lines, fields) if fields else lines

    def _go_on(self, answer: Body, data: bytes) -> None:
        assert self.head is not None
        try:
            piece = answer.take(data)
        except WireError:
            self._break()
            return
        self.moved += len(piece)
        client = self.client
        if self.in_chunks:
            if piece:
                client.write_all(
                    (b"%x\r\n" % len(piece), piece, b"\r\n" if not answer.is_done else b"\r\n" + LAST_CHUNK)
                )
            elif answer.is_done:
                client.write(LAST_CHUNK)
        elif piece:
            client.write(piece)
        if answer.is_done:
            self._end(self.head.status, ended=True)

    def upstream_full(self, is_full: bool) -> None:
        self.client.hold(UPSTREAM, is_full)

    def upstream_lost(self, error: Exception | None) -> None:
        connection, self.connection = self.connection, None
        assert connection is not None
        assert self.upstream is not None
        if self.head is not None:
            if self.head.length == UNTIL_CLOSE and error is None:
                if self.in_chunks:
                    self.client.write(LAST_CHUNK)
                self._end(self.head.status, ended=True)
            else:
                self._break()
            return
        upstream = self.upstream
        silent = not self.partial and not self.interim
        self.client.hold(UPSTREAM, False)
        if silent and not self.body_taken and self.repeats < MOST_REPEATS and may_repeat(self.verb.decode("ascii")):
            # A kept connection was most likely closed as we took it, which says nothing of the upstream's health.
            following = upstream if connection.is_reused else next(self.candidates, None)
            if following is not None:
                self.repeats += 1
                if not connection.is_reused:
                    self._report(False)
                self._let_go()
                self.is_forwarded = False
                self.now = self.front.now_ns()
                self._turn_to(following, fresh=connection.is_reused)
                return
        if self.is_forwarded or self.client.is_held:  # else it may have tired of a client that does not go on
            self._report(False)
        self._own(502, error="connection_terminated")

    # The end

    @property
    def _read_timeout(self) -> float:
        assert self.destination is not None
        return self.destination.read_timeout

    def _report(self, success: bool) -> None:
        if self.upstream is not None and self.destination is not None:
            self.front.report(self.destination, self.upstream, success, self.term)

    def _let_go(self) -> None:
        if self.upstream is not None and self.destination is not None:
            self.destination.pool.release(self.upstream)
            self.upstream = None

    def _bad(self, error: str) -> None:
        """The upstream answered, and not by the rules; or broke off before it did."""
        self._report(False)
        self._own(502, error=error)

    def _break(self) -> None:
        """A response that has begun cannot be brought to its end: it must not look as if it were whole."""
        self._report(False)
        self.sent = 502
        self.client.reset()
        self._end(502)

    def _own(self, status: int, *, error: str | None = None, retry: int | None = None) -> None:
        fields, body = own_answer(status, self.field("accept"), error=error, retry=retry)
        if status in (400, 405):
            self.keeps = False
        if self.hits:
            fields += self.front.gate.respond(self)
        self._answer(status, fields, body)

    def _answer(self, status: int, fields: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.sent = status
        self.keeps = self.keeps and self.keeps_alive and self.body.is_done and not self.client.is_last
        head = own_head(status, fields, closes=not self.keeps, is_old=self.is_old)
        self.client.write(head if self.verb == b"HEAD" else head + body)
        self._end(status, ended=True)

    def _end(self, status: int, *, ended: bool = False) -> None:
        """Exactly once: give back what was lent, charge by the outcome, let the client go on."""
        if self.is_over:
            return
        self.is_over = True
        if self.task is not None:
            self.task.cancel()
            self.task = None
        front = self.front
        connection, self.connection = self.connection, None
        if connection is not None:
            health = connection.upstream.health
            if ended and self.head is not None and (health.failures or health.closed_until):  # else it is no news
                self._report(True)
            if ended and self.is_forwarded and self._may_keep(connection):
                if self.client.is_full:  # its last bytes filled the client: who takes it next must be able to read
                    connection.transport.resume_reading()
                assert self.destination is not None
                front.connections.keep(connection, self.destination.idle_timeout)
            else:
                connection.close()
        self._let_go()
        if self.is_open:
            self.ended = ended
            self._finish()
        if front.access_log is not None:
            front.access_log(self, status)
        front.counts[status] += 1
        self.client.done(self)
        self.native = None

    def _may_keep(self, connection: UpstreamConnection) -> bool:
        """Whether the upstream's connection is at the end of a response, and of its request, and goes on."""
        head, answer = self.head, self.answer
        if head is None or answer is None or head.length == UNTIL_CLOSE:
            return False
        if self.body_taken and connection.transport.get_write_buffer_size():
            return False
        return head.keeps_alive and answer.is_done and not answer.rest

    def _finish(self) -> None:
        steps = self.front.gate.finish(self)
        if self.front.awaits:
            self.front.later(arun(steps, self.front.aask))
        else:
            run(steps, self.front.ask)


UNSENT, UPSTREAM, FULL, UNREAD = 1, 2, 4, 8
"""Why a client is not read for now: its body cannot go on yet; the upstream is full; much of its next requests is
here already; it does not read its answers."""
