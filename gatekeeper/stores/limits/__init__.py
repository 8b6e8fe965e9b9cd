"""Counters in any storage of the library `limits`: memcached, MongoDB, its Redis, one registered by the user.

For those who have such a server and no other. `limits` decides one hit at a time, so that this store promises
less than the others; `weaker` says what, and `unsupported` what it cannot count at all.

The storages are asked directly, below the library's own strategies: those put the amount into the key (a raised
limit would forget what was used), let ("a/b", "c") and ("a", "b/c") be one key, and spend of a fixed window even
when they refuse. The steps are a generator that yields one call of a storage after the other; a blocking and an
awaiting driver carry them out, on the two storages that `limits` has for each kind of server.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from limits.aio.storage import Storage as AioStorage
from limits.storage import Storage

from gatekeeper.commands import NEVER, Batch, Hits, Limit, Receipt, Replies, Verdict
from gatekeeper.errors import SettingsError, StoreError
from gatekeeper.stores.limits.counters import COUNTERS, Calls, Counter, Seen, to_ns
from gatekeeper.stores.limits.kinds import COUNTER, MS, NS, Kind, MissingDriver, schemes

__all__ = ["LimitsStore", "MissingDriver", "schemes", "unsupported", "weaker"]

_LATE: Final = 1.0  # seconds that an answer may be late and still be undone

R = TypeVar("R")


def weaker(url: str) -> list[str]:
    """What a store at this URL promises less than others do: a line each, for `gatekeeper check`.

    Raises SettingsError for a URL that is none of `limits`.
    """
    kind = Kind(url)
    lines = [
        "a request that several limits are for is not decided in one step: while others ask at the same time, "
        "it can spend of one limit and be refused by another",
        "time is mostly that of the process that asks, not of the server: keep the clocks of machines in step",
        "each limit of a request is two to four round trips, one after the other",
        "a request that was not answered in time may have been counted",
    ]
    if kind.way("sliding_window") == COUNTER:
        lines.append(
            "sliding_window is counted as sliding_counter: nearly twice the limit can fall into one period"
        )
    else:
        lines += [
            "sliding_window: each unit of cost is an entry of its own in the storage, up to the whole limit a key",
            "sliding_window: nothing is given back (give_back has no effect, a refused request that had begun to "
            "be charged stays charged)",
            "sliding_window: a client that asks for a cost above 1 is told to wait the whole period",
        ]
    if kind.family == "other":
        lines.append("nothing is given back (give_back has no effect)")
    else:
        lines.append("sliding_counter and fixed_window: what is given back after its window has ended is lost")
    if kind.family == "memcached":
        lines += [
            "memcached counts in whole seconds: a fixed_window can end up to a second early",
            "memcached puts out the oldest counters when it is full, and forgets all when it restarts",
        ]
    return lines


def unsupported(url: str, limits: Iterable[Limit]) -> list[str]:
    """Which of the limits a store at this URL cannot count, and why: a line each, for a SettingsError.

    Raises SettingsError for a URL that is none of `limits`.
    """
    kind = Kind(url)
    return [f"{limit.space.partition('/')[0]}: {why}" for limit in limits if (why := kind.lacks(limit)) is not None]


class LimitsStore:
    """A Store in a storage of `limits`.

    - `url`: as `limits` takes it for blocking use: `memcached://HOST:PORT,HOST:PORT`, `mongodb://…`, `redis://…`
      and so on, with or without `limits+` before it. The awaiting twin (`async+…`) is made of the same URL.
    - `timeout`: seconds in which a batch must be decided (default 0.05). Blocking calls are given it as the
      timeout of their sockets and are not begun once it has passed, so that they take at most twice as long.
    - `options`: for the constructor of the storage (its client library reads them); they win over our own.
    - `prefix`: what each key begins with (default "gatekeeper"): 1 to 64 letters, digits, ".", "_" or "-".
    - `clock`: the time in seconds since 1970, for tests. The storage reads its own.

    Algorithms: `sliding_window` by the moving window of `limits` where the storage has it, else (memcached) by
    its sliding window counter; `sliding_counter` by that; `fixed_window` by its own. `gcra`, `concurrency` and
    bans cannot be counted: hits of them are answered with a StoreError, so ask `unsupported` at start-up.

    Raises SettingsError for a URL that is none of `limits`, MissingDriver if neither a blocking nor an awaiting
    client library for it is installed. If only one is, the other face raises MissingDriver: see `require`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 0.05,
        options: Mapping[str, Any] | None = None,
        prefix: str = "gatekeeper",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._kind = kind = Kind(url)
        self.local = kind.family == "memory"
        self.timeout = timeout
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", prefix):
            raise SettingsError(["store.prefix: expected 1 to 64 letters, digits, '.', '_' or '-'"])
        self._prefix = prefix
        self._options = dict(options or {})
        self._clock = clock
        self._lock = Lock()
        self._storage: Storage | None = None
        # A connection belongs to the event loop that opened it.
        self._aio: WeakKeyDictionary[asyncio.AbstractEventLoop, AioStorage] = WeakKeyDictionary()
        self._late: set[asyncio.Task[Any]] = set()
        self._pid = os.getpid()
        self._is_proven = False
        if kind.missing[False] and kind.missing[True]:
            self.require(awaiting=False)

    def require(self, *, awaiting: bool) -> None:
        """Raises MissingDriver, with the package's name, if `ask` (or, `awaiting`, `aask`) will lack its driver.

        Raises SettingsError for a memcached at a Unix socket, if it is to be awaited: `limits` cannot.
        """
        kind = self._kind
        if kind.missing[awaiting]:
            use = "for awaiting" if awaiting else "for blocking use"
            raise MissingDriver(kind.scheme, kind.missing[awaiting], use)
        if awaiting and kind.is_unix:
            raise SettingsError(
                ["store.url: expected memcached://HOST:PORT: a Unix socket of it cannot be awaited"]
            )

    def weaker(self) -> list[str]:
        """What is promised less than by other stores: a line each."""
        return weaker(self._kind.url)

    def unsupported(self, limits: Iterable[Limit]) -> list[str]:
        """Which of the limits cannot be counted here, and why: a line each."""
        return unsupported(self._kind.url, limits)

    def ask(self, batch: Hits) -> Replies:
        self.require(awaiting=False)
        try:
            storage = self._blocking()
        except Exception as error:
            return self._failed(batch, error)
        replies = self._run(storage, batch)
        if not self._is_proven:
            self._prove(replies)
        return replies

    async def aask(self, batch: Hits) -> Replies:
        if self.local:
            return self.ask(batch)
        self.require(awaiting=True)
        try:
            storage = self._awaiting()
        except Exception as error:
            return self._failed(batch, error)
        # A task of its own, never cancelled in the middle of a call: it can be undone once it has ended, and no
        # connection is left with an answer on its way to nobody.
        task = asyncio.ensure_future(self._arun(storage, batch))
        try:
            await asyncio.wait((task,), timeout=self.timeout)
        except asyncio.CancelledError:
            self._undo(storage, batch, task)
            raise
        if task.done():
            return task.result()
        self._undo(storage, batch, task)
        return self._failed(batch, TimeoutError())

    def keys(self, limit: Limit) -> list[str]:
        raise StoreError(f"the {self._kind.scheme} store cannot list keys")

    async def akeys(self, limit: Limit) -> list[str]:
        return self.keys(limit)

    def close(self) -> None:
        with self._lock:
            storage, self._storage = self._storage, None
            self._forget_closed()
        if storage is not None:
            self._shut(storage)

    async def aclose(self) -> None:
        loop = asyncio.get_running_loop()
        late = [task for task in self._late if task.get_loop() is loop]
        if late:
            await asyncio.wait(late, timeout=_LATE)
        with self._lock:
            storage = self._aio.pop(loop, None)
        if storage is not None:
            closing = self._shut(storage)
            if closing is not None:
                with contextlib.suppress(Exception):
                    await closing
        self.close()

    def __repr__(self) -> str:
        return f"<LimitsStore {self._kind.scheme}>"  # the rest of the URL may hold a password

    def _blocking(self) -> Storage:
        storage = self._storage
        if storage is None or self._pid != os.getpid():
            with self._lock:
                storage = self._storage
                # A connection from before a fork is the parent's.
                if storage is None or self._pid != os.getpid():
                    made = self._kind.make(self.timeout, self._options, awaiting=False)
                    assert isinstance(made, Storage)
                    storage = self._storage = made
                    self._pid = os.getpid()
        return storage

    def _prove(self, replies: Replies) -> None:
        """That of MongoDB makes its indices at its first use and never again, even if that failed: begin anew."""
        if not any(isinstance(reply, StoreError) for reply in replies):
            self._is_proven = True
        elif self._kind.family == "mongodb":
            self.close()

    def _awaiting(self) -> AioStorage:
        loop = asyncio.get_running_loop()
        storage = self._aio.get(loop)
        if storage is None:
            made = self._kind.make(self.timeout, self._options, awaiting=True)
            assert isinstance(made, AioStorage)
            with self._lock:
                self._forget_closed()
                storage = self._aio[loop] = made
        return storage

    def _forget_closed(self) -> None:
        """Drop what belongs to loops that are closed. Its connections know them, so that it would stay for ever."""
        for loop in [loop for loop in self._aio if loop.is_closed()]:
            storage = self._aio.pop(loop)
            if self._kind.family == "mongodb":  # which alone can still be closed: its sockets are a thread's
                self._shut(storage)

    def _run(self, storage: Storage, batch: Hits) -> Replies:
        ends = time.monotonic() + self.timeout
        steps = self._steps(batch)
        try:
            name, arguments = next(steps)
            while True:
                try:
                    if time.monotonic() > ends and not self.local:
                        raise TimeoutError
                    answer = method_of(storage, name)(*arguments)
                except Exception as error:
                    name, arguments = steps.throw(error)
                else:
                    name, arguments = steps.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _arun(self, storage: AioStorage, batch: Hits) -> Replies:
        steps = self._steps(batch)
        try:
            name, arguments = next(steps)
            while True:
                try:
                    answer = await method_of(storage, name)(*arguments)
                except Exception as error:
                    name, arguments = steps.throw(error)
                else:
                    name, arguments = steps.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _undo(self, storage: AioStorage, batch: Hits, asked: asyncio.Task[Replies]) -> None:
        """Give back, once it is known, what a batch spent whose answer nobody waits for any more."""

        async def undo() -> None:
            await asyncio.wait((asked,), timeout=_LATE)
            if not asked.done():
                asked.cancel()
            elif not asked.cancelled():
                gives = [
                    (*hit, reply.receipt)
                    for hit, reply in zip(batch, asked.result(), strict=True)
                    if isinstance(reply, Verdict) and reply.receipt is not None
                ]
                if gives:
                    await asyncio.wait_for(self._arun(storage, Batch(gives=gives)), _LATE)

        task = asyncio.ensure_future(undo())
        self._late.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: what could not be undone stays spent

    def _failed(self, batch: Hits, error: Exception) -> Replies:
        # Never the error's own words: client libraries put addresses and URIs into them.
        told = StoreError(f"the {self._kind.scheme} store did not answer: {type(error).__name__}")
        return [error if isinstance(error, StoreError) else told for _ in batch]

    def _shut(self, storage: Storage | AioStorage) -> Any:
        """Close what a storage holds open; an awaitable if it has to be awaited. No storage has a method for it."""
        bridge = getattr(storage, "bridge", None)
        client: Any
        if self._kind.family == "memory":
            storage.timer.cancel()  # type: ignore[union-attr]  # the thread that drops what has expired
            return None
        if bridge is not None:
            client = getattr(bridge, "_storage", None) or getattr(bridge, "storage", None)
        elif self._kind.family == "mongodb":
            client = getattr(storage, "_storage", None) or (
                storage.storage if isinstance(storage, AioStorage) else None  # type: ignore[attr-defined]
            )
        else:
            client = getattr(storage, "storage", None)
        if self._kind.family == "mongodb":
            ways = [(client, "close")]  # any other name is that of a database in it
        else:
            pool = getattr(client, "connection_pool", None)
            ways = [(client, "aclose"), (client, "close"), (pool, "disconnect"), (pool, "close")]
        for owner, name in ways:
            close = getattr(owner, name, None)
            if close is not None:
                try:
                    closing = close()
                except Exception:
                    return None
                return closing if hasattr(closing, "__await__") else None
        return None

    # The steps of a batch.

    def _steps(self, batch: Hits) -> Calls[Replies]:
        spent: list[tuple[Counter, int, Receipt]] = []
        try:
            if isinstance(batch, Batch):
                yield from self._undone(batch)
            return (yield from self._decided(batch, spent))
        except Exception as error:
            for counter, cost, receipt in spent:
                try:
                    yield from counter.give(cost, receipt)
                except Exception:
                    break  # it does not answer at all
            return self._failed(batch, error)

    def _undone(self, batch: Batch) -> Calls[None]:
        """Gives, resets and takes."""
        for limit, key, cost, receipt in batch.gives:
            yield from self._counter(limit, key).give(cost, receipt)
        for limit, key in batch.resets:
            yield from self._counter(limit, key).reset()
        for limit, key, cost in batch.takes:
            counter = self._counter(limit, key)
            for _ in range(2):  # once more, where another took of it in between
                seen = yield from counter.look()
                part = min(cost, counter.amount - seen.spent)
                if part <= 0 or (yield from counter.hit(part, seen)) is not None:
                    break

    def _decided(self, batch: Hits, spent: list[tuple[Counter, int, Receipt]]) -> Calls[Replies]:
        """Look at all, then spend of all. What was spent is put into `spent` as it happens."""
        counters = [self._counter(limit, key) for limit, key, _ in batch]
        # The same counter may stand twice: what its first hit spends, its second must see as spent.
        pending: dict[str, Seen] = {}
        seen: list[Seen] = []
        fits: list[bool] = []
        for (_, _, cost), counter in zip(batch, counters, strict=True):
            if counter.name not in pending:
                pending[counter.name] = yield from counter.look()
            now = pending[counter.name]
            seen.append(now)
            fits.append(now.spent + cost <= counter.amount)
            if fits[-1]:
                pending[counter.name] = now.after(cost)
        refused = any(not fit and not limit.shadow for (limit, _, _), fit in zip(batch, fits, strict=True))
        verdicts: Replies = [
            self._verdict(counter, cost, now, fit and refused)
            for (_, _, cost), counter, now, fit in zip(batch, counters, seen, fits, strict=True)
        ]
        if refused or (isinstance(batch, Batch) and not batch.spend):
            return verdicts
        # The one nearest to its end first: where another request took the last of it in between, nothing else is
        # spent yet.
        order = sorted(
            (place for place, fit in enumerate(fits) if fit and batch[place][2]),
            key=lambda place: counters[place].amount - seen[place].spent - batch[place][2],
        )
        for place in order:
            limit, _, cost = batch[place]
            counter = counters[place]
            receipt = yield from counter.hit(cost, seen[place])
            verdict = verdicts[place]
            assert isinstance(verdict, Verdict)
            if receipt is not None:
                verdict.receipt = receipt
                spent.append((counter, cost, receipt))
                continue
            late = yield from counter.look()
            verdicts[place] = self._verdict(counter, cost, late, False, lost=True)
            if limit.shadow:
                continue
            while spent:
                yield from spent[-1][0].give(*spent[-1][1:])
                spent.pop()
            # None of the others is spent now, as far as this can be undone.
            return [
                self._verdict(counters[other], batch[other][2], seen[other], fits[other])
                if fits[other] and other != place
                else verdict
                for other, verdict in enumerate(verdicts)
            ]
        return verdicts

    def _verdict(self, counter: Counter, cost: int, seen: Seen, unspent: bool, *, lost: bool = False) -> Verdict:
        """The answer to a hit of what was `seen`. `unspent`: another refused; `lost`: it was refused when spent."""
        amount = counter.amount
        if unspent:
            cost = 0
        left = amount - seen.spent - cost
        if left >= 0 and not lost:
            after = seen.after(cost)
            return Verdict(True, amount, left, to_ns(after.falls(after.spent - 1)), 0, None)
        reset = to_ns(seen.falls(seen.spent - 1))
        wait = NEVER if cost > amount else max(MS, to_ns(seen.falls(amount - cost)))
        return Verdict(False, amount, max(0, amount - seen.spent), reset, wait, None)

    def _counter(self, limit: Limit, key: str) -> Counter:
        why = self._kind.lacks(limit)
        if why is not None:
            raise StoreError(why)
        amount, period_ns = limit.numbers[:2]
        way = self._kind.way(limit.kind)
        assert way is not None
        # Of a length that each server takes, of characters that each server takes, and never another's: the table's
        # length stands before it, so that its end is known. The amount is not part of it.
        digest = hashlib.blake2b(
            f"{len(limit.space)}:{limit.space}{key}".encode("utf-8", "surrogatepass"), digest_size=20
        ).hexdigest()
        return COUNTERS[way](f"{self._prefix}:{way}:{digest}", amount, period_ns // NS, self._kind, self._clock)


def method_of(storage: Any, name: str) -> Callable[..., Any]:
    if name == "decr" and not hasattr(storage, name):
        # memcached's is a method of the client. (It does not go below nothing, as that of memory does not.)
        storage = storage.bridge if hasattr(storage, "bridge") else storage.storage
    return getattr(storage, name)  # type: ignore[no-any-return]
