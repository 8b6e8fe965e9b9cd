"""The keys of an identity provider, read from its URL: cached, and asked for no more often than need be."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from typing import Final
from urllib.parse import urlsplit

from gatekeeper.sessions.foreign import KeySet, parse_key_set

GREATEST: Final = 512 * 1024
"""The greatest set of keys, in bytes."""

PAUSE: Final = 60.0
"""The seconds from one reading to the next at least, whatever clients send."""

PAUSE_EMPTY: Final = 5.0
"""The same, as long as there are no keys at all."""


class Jwks:
    """A JWK Set behind a URL: a KeySource.

    - `url`: of https, or of http on this machine. No redirect is followed
    - `timeout`: the seconds that reading it may take
    - `every`: the seconds after which it is read again
    - `warn`: is told when it cannot be read, and when it can again; the keys that were read last hold on

    One thread reads at a time; who needs the keys waits for it, and who has them does not.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 2.0,
        every: float = 3600.0,
        warn: Callable[[str], object] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keys: KeySet = {}
        self._url = url
        self._timeout = timeout
        self._every = every
        self._warn = warn
        self._clock = clock
        self._lock = threading.Lock()
        self._reading: Future[None] | None = None
        self._begun = self._read = float("-inf")
        self._fails = False
        held = weakref.ref(self)

        def again() -> None:
            source = held()
            if source is not None:  # what reads is a thread of the parent's
                source._lock, source._reading = threading.Lock(), None

        os.register_at_fork(after_in_child=again)

    def is_old(self) -> bool:
        return bool(self.keys) and self._clock() - self._read >= self._every and self._may_begin()

    def is_due(self) -> bool:
        with self._lock:  # as it is begun, both change together
            return self._reading is not None or self._may_begin()

    def begin(self, nothing: object = None) -> Future[None] | None:
        """Have them read, unless that was done lately. What is done once they are; None if nothing is read."""
        with self._lock:
            if self._reading is None and self._may_begin():
                self._begun = self._clock()
                reading: Future[None] = Future()
                with suppress(RuntimeError):  # there are threads enough: later
                    threading.Thread(
                        target=self._work, args=(reading,), name="gatekeeper-jwks", daemon=True
                    ).start()
                    self._reading = reading
            return self._reading

    def refresh(self, nothing: object = None) -> None:
        reading = self.begin()
        if reading is not None:
            wait([reading], timeout=self._timeout)

    async def arefresh(self, nothing: object = None) -> None:
        reading = self.begin()
        if reading is not None:
            # `wait` cancels nothing when its own task is cancelled: others wait for the same.
            await asyncio.wait([asyncio.wrap_future(reading)], timeout=self._timeout)

    def _may_begin(self) -> bool:
        return self._clock() - self._begun >= (PAUSE if self.keys else PAUSE_EMPTY)

    def _work(self, reading: Future[None]) -> None:
        try:
            self.keys = parse_key_set(fetch(self._url, self._timeout))
            self._read = self._clock()
            if self._fails:
                self._fails = False
                self._warn(f"{_host(self._url)}: the keys of the issuer are read again")
        except Exception as error:  # of whatever kind: the keys hold on, and it is tried again
            if not self._fails:
                self._fails = True
                self._warn(f"{_host(self._url)}: the keys of the issuer are as they were: {_told(error)}")
        finally:
            with self._lock:
                if self._reading is reading:
                    self._reading = None
            reading.set_result(None)


def fetch(url: str, timeout: float) -> bytes:
    """The body behind a URL, within so many seconds from the connection on.

    Raises OSError or HTTPException for an answer that is not 200, that is too long, or that takes too long.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with closing(kind(parts.hostname or "", parts.port, timeout=timeout)) as connection:
        connection.connect()
        # A time-out of the socket is for one reading of it; who sends a byte now and then never meets it.
        guard = threading.Timer(timeout, _cut, [connection.sock])
        guard.daemon = True
        guard.start()
        try:
            connection.request(
                "GET",
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                headers={"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close"},
            )
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"expected an answer of 200, and it was {response.status}")
            raw = response.read(GREATEST + 1)
        finally:
            guard.cancel()
    if len(raw) > GREATEST:
        raise OSError(f"expected at most {GREATEST} bytes")
    return raw


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _host(url: str) -> str:
    """As much of a URL as is told: a query may hold a secret."""
    return urlsplit(url).hostname or "the issuer"


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
