"""Connections to upstreams: made, kept, lent to one exchange at a time."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol, cast

from gatekeeper.upstreams.pool import Upstream

SWEEP: Final = 1.0
"""How often connections that were idle too long are closed, in seconds."""

HIGH_WATER: Final = 64 * 1024
"""Bytes that may wait to be written, in either direction, before the other side is not read any more."""


class Answered(Protocol):
    """Who has asked: told what comes of it."""

    def answer_received(self, data: bytes) -> None: ...

    def upstream_lost(self, error: Exception | None) -> None:
        """The connection is gone: closed by the upstream in order (None), or broken."""

    def upstream_full(self, is_full: bool) -> None:
        """Whether the upstream takes no more for now."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to an upstream."""

    __slots__ = ("_connections", "exchange", "expires", "is_open", "is_reused", "transport", "upstream")

    transport: asyncio.Transport

    def __init__(self, connections: Connections, upstream: Upstream) -> None:
        self._connections = connections
        self.upstream = upstream
        self.exchange: Answered | None = None
        self.is_open = False
        self.is_reused = False
        self.expires = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.is_open = True
        self._connections.all.add(self)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.answer_received(data)
        else:  # an answer to nothing: who would read it as the next one's is being fooled
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._connections.all.discard(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.upstream_lost(error)

    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream_full(True)

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream_full(False)

    def close(self) -> None:
        """Let go of it at once; who had asked is not told any more."""
        self.exchange = None
        if self.is_open:
            self.is_open = False
            self.transport.abort()


class Connections:
    """Those of a worker. Idle ones are used again, the last first, so that the others may end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: dict[Upstream, list[UpstreamConnection]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self.all: set[UpstreamConnection] = set()

    def kept(self, upstream: Upstream) -> UpstreamConnection | None:
        """An idle connection, if there is one that is still good as far as can be told."""
        idle = self._idle.get(upstream)
        while idle:
            connection = idle.pop()
            if (
                connection.is_open
                and connection.expires > self._loop.time()
                and not connection.transport.is_closing()
            ):
                connection.is_reused = True
                return connection
            connection.close()
        return None

    def keep(self, connection: UpstreamConnection, seconds: float) -> None:
        """Take a connection back, to be used again within so many seconds."""
        connection.exchange = None
        if not connection.is_open or seconds <= 0:
            connection.close()
            return
        connection.expires = self._loop.time() + seconds
        idle = self._idle.get(connection.upstream)
        if idle is None:
            idle = self._idle[connection.upstream] = []
        idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP, self._sweep)

    async def connect(self, upstream: Upstream, seconds: float) -> UpstreamConnection:
        """A new connection. Raises OSError, or TimeoutError (which is one) when it takes too long."""

        def make() -> UpstreamConnection:
            return UpstreamConnection(self, upstream)

        async with asyncio.timeout(seconds):
            made: tuple[Any, UpstreamConnection]
            if upstream.path is not None:
                made = await self._loop.create_unix_connection(make, upstream.path)
            else:
                made = await self._loop.create_connection(make, upstream.host, upstream.port)
        return made[1]

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._idle.clear()
        for connection in list(self.all):
            connection.close()

    def _sweep(self) -> None:
        now = self._loop.time()
        for upstream, idle in list(self._idle.items()):
            live = []
            for connection in idle:
                if connection.is_open and connection.expires > now:
                    live.append(connection)
                else:
                    connection.close()
            if live:
                self._idle[upstream] = live
            else:
                del self._idle[upstream]
        self._sweeper = self._loop.call_later(SWEEP, self._sweep) if self._idle else None
