"""The awaiting driver: on each event loop one connection to a server, and what one tick asks in one pipeline."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, Final, TypeVar, cast

import hiredis

from gatekeeper.commands import Hits, Replies
from gatekeeper.errors import StoreError
from gatekeeper.stores.redis.address import Address
from gatekeeper.stores.redis.asking import LATE, LOST, MOMENT, Core, is_elsewhere
from gatekeeper.stores.redis.blocking import ASKING, agree, greeting, is_readable, told_of
from gatekeeper.stores.redis.routes import Answer, Rounds, Send

_OPENING: Final = 1.0
"""Seconds that opening a connection may take. Who waits for an answer does not wait so long."""

_GRACE: Final = 0.01
"""Seconds more for a server, where this loop was so busy that it looks for the answer too late by as much."""

_MANY: Final = 16
"""So many commands are sent at once, though the tick goes on: the server works on them meanwhile."""

_LINGER: Final = 1.0
"""Seconds for which late answers are still read, so that what they spent is given back."""

R = TypeVar("R")


class Line(asyncio.Protocol):
    """A connection of one loop to one server. Answers come in the order of the commands.

    `_waiting` has for each command sent, or to be sent, the future of its answer, its batch and its deadline; while
    the connection is being opened, the commands themselves lie in `_outbox` in the same order. An answer whose
    future is done already, because it came too late or nobody waits any more, is undone.
    """

    def __init__(self, home: Home, address: Address) -> None:
        self._home = home
        self._core = home.core
        self._loop = home.loop
        self._address = address
        self._timeout = home.core.timeout
        self._gets, self._feed = (reader := hiredis.Reader()).gets, reader.feed
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._outbox: deque[bytes] = deque()
        self._waiting: deque[tuple[asyncio.Future[Answer] | None, Hits | None, float]] = deque()
        self._greeted: deque[asyncio.Future[Answer]] = deque()
        self._is_open = self._is_to_flush = self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._graced = 0.0
        self._opening = self._loop.create_task(self._open())

    def ask(self, packet: bytes, batch: Hits | None) -> asyncio.Future[Answer]:
        """Send a command at the end of this tick. The answer may be a StoreError; it is never raised."""
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting.append((future, batch, self._loop.time() + self._timeout))
        self._outbox.append(packet)
        if self._is_open:
            if len(self._outbox) >= _MANY:
                self._flush()  # the server begins while we go on
            elif not self._is_to_flush:
                self._is_to_flush = True
                self._loop.call_soon(self._flush)
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._look)
        return future

    def tell(self, packet: bytes) -> None:
        """Send a command whose answer nobody waits for."""
        self._waiting.append((None, None, self._loop.time() + self._timeout))
        self._outbox.append(packet)
        if not self._is_to_flush and self._is_open:
            self._is_to_flush = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Close, and fail what is still waited for."""
        if not self._is_closed:
            self._end(StoreError(LOST))

    def _end(self, told: StoreError) -> None:
        self._is_closed = True
        self._is_open = False
        self._home.drop(self._address, self)
        self._opening.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
        self._outbox.clear()
        while self._waiting:
            future, _, _ = self._waiting.popleft()
            if future is not None and not future.done():
                future.set_result(told)

    # The protocol's side.

    def data_received(self, data: bytes) -> None:
        waiting, gets = self._waiting, self._gets
        try:
            self._feed(data)
            if self._greeted:
                self._greet()
            answered = False
            while waiting:
                answer: Any = gets()
                if answer is False:
                    break
                answered = True
                future, batch, _ = waiting.popleft()
                if future is not None and not future.done():
                    future.set_result(answer)
                elif batch is not None:
                    self.undo(batch, answer)
        except hiredis.ProtocolError:
            self._lose()
            return
        if answered:
            self._core.answered(self._address)
            if not waiting and self._home.lines.get(self._address) is not self:
                self.close()  # it was late, and has been replaced: its last answers are read

    def connection_lost(self, error: Exception | None) -> None:
        self._lose()
        self._home.closed(self)

    # How.

    async def _open(self) -> None:
        loop, address = self._loop, self._address
        try:
            await self._home.guard()
            async with asyncio.timeout(max(self._timeout, _OPENING)):
                # From here on the transport is ours to close, however this ends: `self` is the protocol.
                if address.path is not None:
                    transport, _ = await loop.create_unix_connection(lambda: self, address.path)
                else:
                    tls = self._core.target.tls
                    transport, _ = await loop.create_connection(
                        lambda: self,
                        address.host,
                        address.port,
                        ssl=tls,
                        server_hostname=address.host if tls is not None else None,
                    )
                words = greeting(self._core, address)
                if words:
                    self._greeted.extend(loop.create_future() for _ in words)
                    answers = asyncio.gather(*self._greeted)
                    transport.write(b"".join(words))
                    for answer in await answers:
                        agree(answer)
        except Exception as error:  # whatever it was, there is no connection
            self._lose(error)
            return
        self._is_open = True
        if self._outbox:
            self._flush()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._home.opened(self)
        if self._is_closed:
            self._transport.abort()
            return
        self._socket = transport.get_extra_info("socket")
        if self._address.path is None and self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def _greet(self) -> None:
        while self._greeted:
            answer: Any = self._gets()
            if answer is False:
                break
            future = self._greeted.popleft()
            if not future.done():
                future.set_result(answer)

    def _flush(self) -> None:
        self._is_to_flush = False
        if self._transport is not None and self._outbox:
            self._transport.write(b"".join(self._outbox))
            self._outbox.clear()

    def undo(self, batch: Hits, answer: Answer) -> None:
        """Give back what an answer says was spent: nobody knows of it."""
        if isinstance(answer, list):
            undoing = self._core.undoing(batch, self._core.replies(batch, answer))
            if undoing is not None:
                self.tell(self._core.packer.pack(undoing))

    def _lose(self, error: Exception | None = None) -> None:
        """The server is not to be reached on this connection (any more)."""
        if self._is_closed:
            return
        failed = sum(future is not None and not future.done() for future, _, _ in self._waiting)
        if failed or not self._is_open:
            self._core.failed(self._address)
            for _ in range(failed - 1):
                self._core.failed(self._address)
        self._end(told_of(error) if isinstance(error, OSError) else StoreError(LOST))

    def _look(self) -> None:
        """The deadline of the first that waited when this was set has come."""
        self._timer = None
        loop, waiting = self._loop, self._waiting
        now = loop.time()
        if not waiting:
            return
        first = waiting[0][2]
        if first <= now and self._is_open:
            if self._is_readable():
                # The answer is there, and it is this loop that was too busy to read it.
                self._timer = loop.call_later(0.001, self._look)
                return
            if now - first > _GRACE and self._graced < first:
                # This comes late itself: the machine is busy, and the server may have had to wait as well.
                self._graced = now
                self._timer = loop.call_later(_GRACE, self._look)
                return
        late = 0
        for future, _, deadline in waiting:
            if deadline > now:
                break
            if future is not None and not future.done():
                future.set_result(StoreError(LATE))
                late += 1
        for _ in range(late):
            self._core.failed(self._address)
        if not self._is_open:
            # None of it was sent, and now it shall not be.
            while waiting and waiting[0][2] <= now:
                waiting.popleft()
                self._outbox.popleft()
        elif late:
            # Others shall not wait behind these: they get a connection of their own.
            self._home.drop(self._address, self)
        if not waiting:
            return
        last = waiting[-1][2] if waiting[0][2] <= now else None
        if last is not None and now >= last + _LINGER:
            self.close()
            return
        coming = next((deadline for _, _, deadline in waiting if deadline > now), (last or now) + _LINGER)
        self._timer = loop.call_later(max(coming - now, 0.001), self._look)

    def _is_readable(self) -> bool:
        descriptor = -1 if self._socket is None else self._socket.fileno()
        return descriptor >= 0 and is_readable(descriptor)


class Home:
    """What the store has on one event loop."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        self.core = core
        self.loop = loop
        self.lines: dict[Address, Line] = {}
        self._all: set[Line] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._guard: AsyncGenerator[None, None] | None = None

    def line(self, address: Address) -> Line:
        return self.lines.get(address) or self.lines.setdefault(address, Line(self, address))

    async def decide(self, batch: Hits) -> Replies:
        """Carry out a batch, by the long way. If nobody waits for it any more, it is undone once it is known."""
        task = self.start(self.run(self.core.decide(batch)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: self._undo(batch, done))
            raise

    async def run(self, rounds: Rounds[R]) -> R:
        answers: list[Answer] | None = None
        try:
            while True:
                sends = next(rounds) if answers is None else rounds.send(answers)
                if not sends:
                    await asyncio.sleep(MOMENT)
                answers = [await future for future in [self._sent(send) for send in sends]]
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            rounds.close()

    def start(self, steps: Any) -> asyncio.Task[Any]:
        task = self.loop.create_task(steps)
        self._tasks.add(task)  # the loop itself holds tasks but weakly
        task.add_done_callback(self._tasks.discard)
        return task

    async def guard(self) -> None:
        """See to it that the connections are closed before the loop is."""
        if self._guard is None:
            self._guard = self._until_the_end()
            await anext(self._guard)

    def close(self) -> None:
        for line in [*self._all, *self.lines.values()]:
            line.close()

    async def aclose(self) -> None:
        self.close()
        for _ in range(100):  # what is closed is told to the protocols by the loop, a turn or a few later
            if not self._all:
                break
            await asyncio.sleep(0)

    # What lines tell.

    def opened(self, line: Line) -> None:
        self._all.add(line)

    def closed(self, line: Line) -> None:
        self._all.discard(line)

    def drop(self, address: Address, line: Line) -> None:
        if self.lines.get(address) is line:
            del self.lines[address]

    def _sent(self, send: Send) -> asyncio.Future[Answer]:
        line = self.line(send.address)
        if send.asking:
            line.tell(ASKING)
        return line.ask(send.packet, send.batch)

    def _undo(self, batch: Hits, done: asyncio.Task[Replies]) -> None:
        if not done.cancelled():
            undoing = self.core.undoing(batch, done.result())
            if undoing is not None:
                self.start(self.run(self.core.decide(undoing)))

    async def _until_the_end(self) -> AsyncGenerator[None, None]:
        # A loop that ends closes its asynchronous generators, after its tasks: `asyncio.run` sees to it.
        try:
            yield
        finally:
            self._guard = None
            await self.aclose()


async def ask(home: Home, batch: Hits) -> Replies:
    """Carry out a batch, by the short way where there is one: a server that is known, and answers."""
    core = home.core
    if core.is_single:
        address = core.target.addresses[0]
        if core.breaker(address).is_calm:
            line = home.line(address)
            asked = line.ask(core.packer.pack(batch), batch)
            try:
                answer = await asked
            except asyncio.CancelledError:
                if asked.done() and not asked.cancelled():  # it came, and who waited was cancelled before it woke
                    line.undo(batch, asked.result())
                raise
            if not isinstance(answer, hiredis.ReplyError) or not is_elsewhere(answer):
                return core.replies(batch, answer)
    return await home.decide(batch)
