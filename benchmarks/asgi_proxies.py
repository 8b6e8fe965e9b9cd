"""Proxies as one writes them in Python with an ASGI server and a client library: peers of the gateway.

`python -m benchmarks.asgi_proxies aiohttp|httpx URL URL` serves under uvicorn with uvloop and httptools, and prints
its port. Both take the upstream with the fewest requests in flight, stream bodies, decompress nothing, drop
hop-by-hop fields, and set X-Forwarded-For, -Proto and -Host.
"""

from __future__ import annotations

import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from random import random
from typing import Any, Final, TypeAlias

from benchmarks.loopback import HOST

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Body: TypeAlias = bytes | AsyncIterator[bytes]
RawField: TypeAlias = tuple[bytes, bytes]

DROPPED: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding"
    b" upgrade x-forwarded-for x-forwarded-proto x-forwarded-host".split()
)


class Proxy(ABC):
    """What the two share: an ASGI application."""

    def __init__(self, upstreams: Iterable[str]) -> None:
        self._in_flight = dict.fromkeys(upstreams, 0)

    @abstractmethod
    async def start(self) -> None:
        """Make the client."""

    @abstractmethod
    async def stop(self) -> None:
        """Close it."""

    @abstractmethod
    async def relay(self, method: str, url: str, fields: list[RawField], body: Body | None, send: Send) -> None:
        """Ask an upstream, and send its answer as it comes."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await self.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.stop()
            await send({"type": "lifespan.shutdown.complete"})
            return
        message = await receive()
        body: Body | None = streamed(message, receive) if message.get("more_body") else message["body"] or None
        query = scope["query_string"]
        target = scope["raw_path"] + b"?" + query if query else scope["raw_path"]
        upstream = min(self._in_flight, key=lambda url: (self._in_flight[url], random()))
        self._in_flight[upstream] += 1
        try:
            await self.relay(scope["method"], upstream + target.decode("ascii"), forwarded(scope), body, send)
        finally:
            self._in_flight[upstream] -= 1


def head(status: int, fields: Iterable[RawField]) -> Message:
    """The message that begins an answer."""
    kept = [(lower, value) for name, value in fields if (lower := name.lower()) not in DROPPED]
    return {"type": "http.response.start", "status": status, "headers": kept}


def forwarded(scope: Message) -> list[RawField]:
    """The fields that go to the upstream."""
    kept = [field for field in scope["headers"] if field[0] not in DROPPED]
    host = next((value for name, value in kept if name == b"host"), b"")
    return [
        *kept,
        (b"x-forwarded-for", scope["client"][0].encode()),
        (b"x-forwarded-proto", scope["scheme"].encode()),
        (b"x-forwarded-host", host),
    ]


async def streamed(message: Message, receive: Receive) -> AsyncIterator[bytes]:
    yield message["body"]
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError("the client left")
        yield message["body"]


class AiohttpProxy(Proxy):
    async def start(self) -> None:
        import aiohttp  # type: ignore[import-not-found, unused-ignore]  # of the extra `bench`

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def stop(self) -> None:
        await self._session.close()

    async def relay(self, method: str, url: str, fields: list[RawField], body: Body | None, send: Send) -> None:
        from yarl import URL  # type: ignore[import-not-found, unused-ignore]

        async with self._session.request(
            method,
            URL(url, encoded=True),
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields],  # type: ignore[arg-type, unused-ignore]
            data=body,
            allow_redirects=False,
        ) as response:
            await send(head(response.status, response.raw_headers))
            content = response.content
            more = True
            while more:
                chunk = await content.readany()
                more = not content.at_eof()
                await send({"type": "http.response.body", "body": chunk, "more_body": more})


class HttpxProxy(Proxy):
    async def start(self) -> None:
        import httpx  # type: ignore[import-not-found, unused-ignore]  # of the extra `bench`

        self._client = httpx.AsyncClient(
            # by default it keeps 20 connections: with 32 requests at a time it would open new ones all the time
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60),
            timeout=60,
            trust_env=False,
            follow_redirects=False,
        )

    async def stop(self) -> None:
        await self._client.aclose()

    async def relay(self, method: str, url: str, fields: list[RawField], body: Body | None, send: Send) -> None:
        request = self._client.build_request(method, url, headers=fields, content=body)
        response = await self._client.send(request, stream=True)
        try:
            await send(head(response.status_code, response.headers.raw))
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()


PROXIES: Final[dict[str, type[Proxy]]] = {"aiohttp": AiohttpProxy, "httpx": HttpxProxy}


def main(name: str, *upstreams: str) -> None:
    import uvicorn

    config = uvicorn.Config(
        PROXIES[name](upstreams),
        loop="uvloop",
        http="httptools",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,  # Date and Server are the upstream's
        date_header=False,
        timeout_keep_alive=75,
    )
    with socket.create_server((HOST, 0), backlog=1024) as listener:
        print(f"port {listener.getsockname()[1]}", flush=True)  # connections made from now on wait in its queue
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
