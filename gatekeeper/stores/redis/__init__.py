"""Counters in Redis or Valkey: one script call a batch, on the server's own time.

The parts, from the inside out: the Lua files are the algorithms and the batch; `packing` makes the calls; `routes`
knows which server a counter is on; `asking` is the store without sockets, and yields what is to be sent; `blocking`
and `awaiting` send it; `breaker` and `refusals` save questions.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from gatekeeper.commands import Hits, Limit, Replies
from gatekeeper.errors import MissingExtra

try:
    import hiredis  # noqa: F401
except ImportError:
    raise MissingExtra("The Redis store", "redis") from None

from gatekeeper.stores.redis import awaiting
from gatekeeper.stores.redis.address import Target
from gatekeeper.stores.redis.asking import Core
from gatekeeper.stores.redis.blocking import Blocking
from gatekeeper.stores.redis.packing import Packer
from gatekeeper.stores.redis.refusals import Refusals
from gatekeeper.stores.redis.routes import Rounds

__all__ = ["RedisStore"]

R = TypeVar("R")


class RedisStore:
    """A Store in Redis (5 or newer) or Valkey, shared by any number of processes and machines.

    - `url`: `redis://`, `rediss://` (TLS), `unix://`, `redis+cluster://h1:p1,h2:p2`,
      `redis+sentinel://h1:p1,h2:p2/SERVICE[/DB]`, or the same with `valkey` in place of `redis`. User and password
      are percent-encoded. TLS options stand in the query, as redis-py calls them (`ssl_ca_certs`, `ssl_certfile`,
      `ssl_keyfile`, `ssl_cert_reqs`, `ssl_check_hostname`), a login for the sentinels, too (`sentinel_username`,
      `sentinel_password`).
    - `timeout`: seconds until a server counts as one that does not answer (default 0.05), connecting included.
    - `prefix`: what all keys begin with; no braces, which would decide the slot (default "gatekeeper").
    - `max_connections`: of the blocking side, to each server (default 64). The awaiting side has one a loop.
    - `cache_refusals`: whether refusals that last are answered from memory until they end (default True).
    - `clock`: nanoseconds in place of the server's time, for tests.

    Raises ValueError for a wrong URL or prefix; the message does not repeat it. Nothing is connected before the
    first question.

    A question that is not answered in time may have been carried out: that cannot be known. The awaiting side still
    reads answers for a second and gives back what they spent; the blocking side closes the connection.

    On a cluster, a batch whose keys lie on several slots is asked of all at the same time, and if one refuses what
    the others admitted is given back: in between, others may see that quota spent, and may be refused for it; never
    is more admitted. The tag of a key is the text that is counted, so rules that count by the
    same text share a slot.
    """

    local = False

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 0.05,
        prefix: str = "gatekeeper",
        max_connections: int = 64,
        cache_refusals: bool = True,
        clock: Callable[[], int] | None = None,
    ) -> None:
        if not prefix or "{" in prefix or "}" in prefix:
            raise ValueError("expected a prefix that is not empty and has no braces")
        self._core = Core(Target(url), Packer(prefix, clock), timeout)
        self._blocking = Blocking(self._core, max_connections)
        self._homes: dict[asyncio.AbstractEventLoop, awaiting.Home] = {}
        self._refusals = Refusals(clock or time.monotonic_ns) if cache_refusals else None
        _stores.add(self)

    def ask(self, batch: Hits) -> Replies:
        refusals = self._refusals
        if refusals is None:
            return self._blocking.run(self._core.decide(batch))
        known = refusals.answer(batch)
        if known is not None:
            return known
        asked = refusals.begin()
        replies = self._blocking.run(self._core.decide(batch))
        refusals.keep(batch, replies, asked)
        return replies

    async def aask(self, batch: Hits) -> Replies:
        refusals = self._refusals
        if refusals is None:
            return await awaiting.ask(self._home(), batch)
        known = refusals.answer(batch)
        if known is not None:
            return known
        asked = refusals.begin()
        replies = await awaiting.ask(self._home(), batch)
        refusals.keep(batch, replies, asked)
        return replies

    def run(self, rounds: Rounds[R]) -> R:
        """Carry out what is asked for beside limits, blocking."""
        return self._blocking.run(rounds)

    async def arun(self, rounds: Rounds[R]) -> R:
        """As `run`, awaiting: together with what else this tick of the loop asks."""
        return await self._home().run(rounds)

    @property
    def core(self) -> Core:
        """Where the servers are, and how they are asked."""
        return self._core

    def keys(self, limit: Limit) -> list[str]:
        """The keys of a `listed` limit, at most 100,000. It goes through all keys of all servers (SCAN).

        Raises StoreError.
        """
        return self._blocking.run(self._core.keys(limit))

    async def akeys(self, limit: Limit) -> list[str]:
        """As `keys`."""
        return await self._home().run(self._core.keys(limit))

    def close(self) -> None:
        """Close all connections; those of event loops are closed by these, as soon as they turn."""
        self._blocking.close()
        for loop, home in list(self._homes.items()):
            self._homes.pop(loop, None)
            with suppress(RuntimeError):  # it is closed, and has closed what was on it
                loop.call_soon_threadsafe(home.close)

    async def aclose(self) -> None:
        """Close all connections, and wait for those of this loop."""
        home = self._homes.pop(asyncio.get_running_loop(), None)
        if home is not None:
            await home.aclose()
        self.close()

    def __repr__(self) -> str:
        return f"<RedisStore {self._core.target!r}>"

    def _home(self) -> awaiting.Home:
        loop = asyncio.get_running_loop()
        home = self._homes.get(loop)
        if home is None:
            for other in list(self._homes):
                if other.is_closed():
                    self._homes.pop(other, None)
            home = self._homes.setdefault(loop, awaiting.Home(self._core, loop))
        return home

    def _forked(self) -> None:
        # The connections are the parent's: here they are forgotten, not closed by their protocols.
        self._core.begin()
        self._blocking.close()
        self._homes.clear()


_stores: weakref.WeakSet[RedisStore] = weakref.WeakSet()


def _forked() -> None:
    for store in list(_stores):
        store._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
