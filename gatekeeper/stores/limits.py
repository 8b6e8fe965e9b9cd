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
import importlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import limits.storage
from limits.aio.storage import Storage as AioStorage
from limits.storage import Storage, storage_from_string

from gatekeeper.commands import NEVER, Batch, Hits, Limit, Receipt, Replies, Verdict
from gatekeeper.errors import GatekeeperError, MissingExtra, SettingsError, StoreError

PREFIX: Final = "limits+"
"""Put before a scheme that another store has (`limits+redis://…`) it means this store."""

SCHEMES: Final[Mapping[str, type]] = limits.storage.SCHEMES  # type: ignore[attr-defined]
"""The storages that `limits` knows, and those that the user registered with it, by the schemes of their URLs."""

_MS: Final = 1_000_000
_NS: Final = 1_000_000_000
_LATE: Final = 1.0  # seconds that an answer may be late and still be undone
_LONGEST: Final = 30 * 86_400  # memcached takes a longer lifetime for a date in 1970

_MOVING, _COUNTER, _FIXED = "moving", "counter", "fixed"
_ABILITIES: Final = {
    _MOVING: ("acquire_entry", "get_moving_window"),
    _COUNTER: ("acquire_sliding_window_entry", "get_sliding_window", "clear_sliding_window"),
    _FIXED: ("incr", "get", "get_expiry", "clear"),
}
_WAYS: Final = {
    "sliding_window": (_MOVING, _COUNTER),
    "sliding_counter": (_COUNTER,),
    "fixed_window": (_FIXED,),
}
"""By which strategy of `limits` an algorithm is counted: the first that the storage has."""

_DRIVERS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "memcached": (("pymemcache",), ("memcachio", "emcache")),
    "mongodb": (("pymongo",), ("motor",)),
    "redis": (("redis",), ("redis",)),
    "valkey": (("valkey",), ("valkey",)),
}
"""The packages of which one must be there, for blocking and for awaiting."""
_SECURE: Final = {"rediss": "redis", "valkeys": "valkey"}

Call: TypeAlias = tuple[str, tuple[Any, ...]]
"""(method of a storage, its arguments)."""

R = TypeVar("R")
Calls: TypeAlias = Generator[Call, Any, R]


class MissingDriver(MissingExtra):
    """The client library of a storage's server is not installed."""

    def __init__(self, scheme: str, packages: Iterable[str], use: str) -> None:
        wanted = " (or: ".join(f"pip install {package}" for package in packages)
        GatekeeperError.__init__(
            self, f"A {scheme} store needs a client library {use}: {wanted}{')' * ('(' in wanted)}"
        )


def schemes() -> frozenset[str]:
    """The schemes of the URLs that `limits` knows, with those that the user registered with it."""
    known = {scheme.removeprefix("async+") for scheme in SCHEMES}
    return frozenset(known | {PREFIX + scheme for scheme in known})


def weaker(url: str) -> list[str]:
    """What a store at this URL promises less than others do: a line each, for `gatekeeper check`.

    Raises SettingsError for a URL that is none of `limits`.
    """
    kind = _Kind(url)
    lines = [
        "a request that several limits are for is not decided in one step: while others ask at the same time, "
        "it can spend of one limit and be refused by another",
        "time is mostly that of the process that asks, not of the server: keep the clocks of machines in step",
        "each limit of a request is two to four round trips, one after the other",
        "a request that was not answered in time may have been counted",
    ]
    if kind.way("sliding_window") == _COUNTER:
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
    kind = _Kind(url)
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
        self._kind = kind = _Kind(url)
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
                for other in [other for other in self._aio if other.is_closed()]:
                    del self._aio[other]  # its connections know it, so that it would stay for ever
                storage = self._aio[loop] = made
        return storage

    def _run(self, storage: Storage, batch: Hits) -> Replies:
        ends = time.monotonic() + self.timeout
        steps = self._steps(batch)
        try:
            name, arguments = next(steps)
            while True:
                try:
                    if time.monotonic() > ends and not self.local:
                        raise TimeoutError
                    answer = _method(storage, name)(*arguments)
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
                    answer = await _method(storage, name)(*arguments)
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
        pool = getattr(client, "connection_pool", None)
        for owner, name in ((client, "aclose"), (client, "close"), (pool, "disconnect"), (pool, "close")):
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
        spent: list[tuple[_Counter, int, Receipt]] = []
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

    def _decided(self, batch: Hits, spent: list[tuple[_Counter, int, Receipt]]) -> Calls[Replies]:
        """Look at all, then spend of all. What was spent is put into `spent` as it happens."""
        counters = [self._counter(limit, key) for limit, key, _ in batch]
        # The same counter may stand twice: what its first hit spends, its second must see as spent.
        pending: dict[str, _Seen] = {}
        seen: list[_Seen] = []
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

    def _verdict(self, counter: _Counter, cost: int, seen: _Seen, unspent: bool, *, lost: bool = False) -> Verdict:
        """The answer to a hit of what was `seen`. `unspent`: another refused; `lost`: it was refused when spent."""
        amount = counter.amount
        if unspent:
            cost = 0
        left = amount - seen.spent - cost
        if left >= 0 and not lost:
            after = seen.after(cost)
            return Verdict(True, amount, left, _ns(after.falls(after.spent - 1)), 0, None)
        reset = _ns(seen.falls(seen.spent - 1))
        wait = NEVER if cost > amount else max(_MS, _ns(seen.falls(amount - cost)))
        return Verdict(False, amount, max(0, amount - seen.spent), reset, wait, None)

    def _counter(self, limit: Limit, key: str) -> _Counter:
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
        return _COUNTERS[way](f"{self._prefix}:{way}:{digest}", amount, period_ns // _NS, self._kind, self._clock)


class _Kind:
    """What can be known of a storage by its URL. Raises SettingsError, whose message never shows the URL."""

    __slots__ = ("_class", "family", "is_unix", "missing", "scheme", "url")

    def __init__(self, url: str) -> None:
        url = url.removeprefix(PREFIX)
        try:
            self.scheme = scheme = urlsplit(url).scheme
        except ValueError:
            scheme = ""
        if scheme not in SCHEMES or scheme.startswith("async+"):
            expected = ", ".join(sorted(f"{known}://" for known in schemes() if not known.startswith(PREFIX)))
            raise SettingsError([f"store.url: expected the URL of a storage of `limits`, one of {expected}"])
        self.url = url
        self._class = SCHEMES[scheme]
        first = scheme.partition("+")[0]
        first = _SECURE.get(first, first)
        self.family = first if first in (*_DRIVERS, "memory") else "other"
        if self._class.__module__.partition(".")[0] != "limits":
            self.family = "other"  # registered by the user, perhaps in the place of one of `limits`
        self.is_unix = self.family == "memcached" and bool(urlsplit(url).path)
        if not self.is_unix and (self.family == "memcached" or scheme.endswith(("+cluster", "+sentinel"))):
            # It would be told with the URL in the message.
            locations = urlsplit(url).netloc.rpartition("@")[2].split(",")
            if not all(
                re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+):[0-9]{1,5}", one.strip()) for one in locations
            ):
                raise SettingsError([f"store.url: expected {scheme}://HOST:PORT, with more of them after commas"])
        self.missing = tuple(
            () if any(_is_there(package) for package in packages) else packages
            for packages in _DRIVERS.get(self.family, ((), ()))
        )
        """The packages of which one is needed, for blocking and for awaiting; empty if one is there."""

    def way(self, kind: str) -> str | None:
        """By which strategy an algorithm is counted here; None if by none."""
        for way in _WAYS.get(kind, ()):
            if all(hasattr(self._class, name) for name in _ABILITIES[way]):
                return way
        return None

    def lacks(self, limit: Limit) -> str | None:
        """Why a limit cannot be counted here; None if it can."""
        way = self.way(limit.kind)
        if way is None:
            counted = " or ".join(kind for kind in _WAYS if self.way(kind) is not None)
            return f"expected {counted} in a {self.scheme} store, which cannot count {limit.kind}"
        period = limit.numbers[1] // _NS
        longest = _LONGEST // (2 if way == _COUNTER else 1)
        if self.family == "memcached" and period > longest:
            return f"expected a period of at most {longest // 86_400} days for {limit.kind} in memcached"
        return None

    def make(self, timeout: float, options: Mapping[str, Any], *, awaiting: bool) -> Any:
        """The storage. It may connect. Raises whatever its client library does."""
        ours = self._our_options(timeout, options, awaiting=awaiting)
        return storage_from_string(f"{'async+' if awaiting else ''}{self.url}", **{**ours, **options})

    def _our_options(self, timeout: float, options: Mapping[str, Any], *, awaiting: bool) -> dict[str, Any]:
        """How a client library is told not to wait for long, and not to try again by itself."""
        family = self.family
        if family == "memcached":
            if not awaiting:
                waits = dict.fromkeys(("connect_timeout", "timeout"), timeout)
                return {"no_delay": True, "client_getter": _shared_client(), **waits}
            chosen = options.get("implementation")
            if chosen == "emcache" or (chosen is None and not _is_there("memcachio")):
                return {"implementation": "emcache", "timeout": timeout}
            waits = dict.fromkeys(("connect_timeout", "read_timeout", "blocking_timeout"), timeout)
            return {"socket_nodelay": True, **waits}
        if family == "mongodb":
            return {"timeoutMS": max(1, round(timeout * 1000))}
        if family in ("redis", "valkey"):
            # Not `coredis`, its default: since its sixth version that answers only within an `async with`.
            chosen = options.get("implementation", "redispy" if family == "redis" else family)
            if chosen == "coredis":
                return {}
            library = chosen.removesuffix("py") if awaiting else family
            retry = importlib.import_module(f"{library}.asyncio.retry" if awaiting else f"{library}.retry")
            never = importlib.import_module(f"{library}.backoff").NoBackoff()
            waits = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), timeout)
            ours = {"implementation": chosen} if awaiting else {}
            return {"retry": retry.Retry(never, 0), **ours, **waits}
        return {}


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _ns(seconds: float) -> int:
    """Nanoseconds, a millisecond rounded up: storages hand times on with fewer digits than they compare."""
    return math.ceil(seconds * _NS) + _MS if seconds > 0 else 0


def _shared_client() -> Callable[..., Any]:
    """One pool of connections for all threads. `limits` makes one a thread, and nobody closes those."""
    lock, made = Lock(), list[Any]()

    def client(module: Any, hosts: list[Any], **options: Any) -> Any:
        with lock:
            if not made:
                several = len(hosts) > 1
                make = partial(module.HashClient, use_pooling=True) if several else module.PooledClient
                made.append(make(hosts if several else hosts[0], **options))
            return made[0]

    return client


def _method(storage: Any, name: str) -> Callable[..., Any]:
    if name == "decr" and not hasattr(storage, name):
        # memcached's is a method of the client. (It does not go below nothing, as that of memory does not.)
        storage = storage.bridge if hasattr(storage, "bridge") else storage.storage
    return getattr(storage, name)  # type: ignore[no-any-return]


class _Seen(Protocol):
    """What a look at a counter showed."""

    spent: int
    """Units spent and still counting, rounded down as the storage does."""

    def after(self, cost: int) -> _Seen:
        """As it will be once `cost` more are spent."""

    def falls(self, target: int) -> float:
        """Seconds until at most `target` units count, if nothing else comes; 0.0 if no more do."""


class _Counter:
    """One key of one limit. What it yields are calls of a storage."""

    __slots__ = ("_clock", "_kind", "amount", "name", "period")

    def __init__(self, name: str, amount: int, period: int, kind: _Kind, clock: Callable[[], float]) -> None:
        self.name = name
        self.amount = amount
        self.period = period
        self._kind = kind
        self._clock = clock

    def look(self) -> Calls[_Seen]:
        raise NotImplementedError

    def hit(self, cost: int, seen: Any) -> Calls[Receipt | None]:
        """Spend, if there is room for all of it: then a receipt, else None."""
        raise NotImplementedError

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        raise NotImplementedError

    def reset(self) -> Calls[None]:
        yield "clear", (self.name,)


class _MovingSeen:
    __slots__ = ("_oldest", "_period", "spent")

    def __init__(self, spent: int, oldest: float, period: int) -> None:
        self.spent = spent
        self._oldest = oldest  # seconds until the oldest hit leaves the window
        self._period = period

    def after(self, cost: int) -> _MovingSeen:
        return _MovingSeen(self.spent + cost, self._oldest if self.spent else self._period, self._period)

    def falls(self, target: int) -> float:
        if target < 0 or target >= self.spent:
            return 0.0
        # The storage tells the time of the oldest hit alone: for more than one unit only the bound is known.
        return self._oldest if target == self.spent - 1 else self._period


class _Moving(_Counter):
    """The moving window: a log of all hits, and so never more than the limit in any window.

    Entries cannot be taken out again: a give-back does nothing.
    """

    __slots__ = ()

    def look(self) -> Calls[_MovingSeen]:
        start, spent = yield "get_moving_window", (self.name, self.amount, self.period)
        oldest = min(max(0.0, start + self.period - self._clock()), self.period) if spent else 0.0
        return _MovingSeen(spent, oldest, self.period)

    def hit(self, cost: int, seen: _MovingSeen) -> Calls[Receipt | None]:
        return _MOVING if (yield "acquire_entry", (self.name, self.amount, self.period, cost)) else None

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        yield from ()


class _CounterSeen:
    __slots__ = ("_before", "_before_ends", "_ends", "_here", "_period", "spent")

    def __init__(self, before: int, before_ends: float, here: int, ends: float, period: int) -> None:
        self._before = before
        self._before_ends = before_ends  # seconds until the window before this one counts no more
        self._here = here
        self._ends = ends  # seconds until this window counts no more
        self._period = period
        self.spent = math.floor(before * before_ends / period + here)

    @property
    def left(self) -> float:
        """Seconds until this window is the one before."""
        return max(0.0, self._ends - self._period)

    def after(self, cost: int) -> _CounterSeen:
        ends = self._ends if self._here or self._before else max(self._ends, self._period)
        return _CounterSeen(self._before, self._before_ends, self._here + cost, ends, self._period)

    def falls(self, target: int) -> float:
        if target < 0 or target >= self.spent:
            return 0.0
        period, here, below = self._period, self._here, target + 1  # it is rounded down: it must fall below this
        if here < below:
            return self._before_ends - (below - here) * period / self._before
        return self.left + period * (1 - below / here)


class _SlidingCounter(_Counter):
    """The sliding window counter: two windows, of which the earlier counts by how much of it is in view."""

    __slots__ = ()

    def look(self) -> Calls[_CounterSeen]:
        before, before_ends, here, ends = yield "get_sliding_window", (self.name, self.period)
        # Where the windows begin with the first hit, there is none before it.
        return _CounterSeen(before, before_ends, here, ends or 2 * self.period, self.period)

    def hit(self, cost: int, seen: _CounterSeen) -> Calls[Receipt | None]:
        began = self._clock()
        if not (yield "acquire_sliding_window_entry", (self.name, self.amount, self.period, cost)):
            return None
        ended = self._clock()
        # Where the end of the window fell into the call, which window was charged is not known: it stays charged.
        if self._is_aligned:
            at = began if int(began / self.period) == int(ended / self.period) else 0.0
        else:
            at = began + seen.left if ended < began + seen.left else 0.0
        return at

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        if not receipt:
            return
        if self._is_aligned:
            # As `limits.storage.base.TimestampedSlidingWindow` names a window; it is an int in the name.
            yield "decr", (f"{self.name}/{int(receipt / self.period)}", cost)
        elif self._kind.family in ("redis", "valkey", "mongodb"):
            seen = yield from self.look()
            ends = self._clock() + seen.left
            if seen._here >= cost and abs(ends - receipt) < self.period / 4:
                # A negative amount is added like any other; the limit is set so high that none is refused.
                yield "acquire_sliding_window_entry", (self.name, 1 << 31, self.period, -cost)

    def reset(self) -> Calls[None]:
        yield "clear_sliding_window", (self.name, self.period)

    @property
    def _is_aligned(self) -> bool:
        """Whether windows begin at multiples of the period, rather than with a key's first hit."""
        return self._kind.family in ("memory", "memcached")


class _FixedSeen:
    __slots__ = ("_ends", "_period", "spent")

    def __init__(self, spent: int, ends: float, period: int) -> None:
        self.spent = spent
        self._ends = ends
        self._period = period

    @property
    def left(self) -> float:
        """Seconds until the window ends, or one that begins now."""
        return self._ends if self.spent else self._period

    def after(self, cost: int) -> _FixedSeen:
        return _FixedSeen(self.spent + cost, self.left, self._period)

    def falls(self, target: int) -> float:
        return self._ends if 0 <= target < self.spent else 0.0


class _Fixed(_Counter):
    """The fixed window: it begins with a key's first hit."""

    __slots__ = ()

    def look(self) -> Calls[_FixedSeen]:
        spent = max(0, (yield "get", (self.name,)))
        left = 0.0
        if spent:
            left = (yield "get_expiry", (self.name,)) - self._clock()
            if self._kind.family in ("redis", "valkey"):
                left += 0.5  # it is told in whole seconds, rounded to the nearest
            if left <= 0:
                left = self.period  # not known: memcached keeps it under a key of its own, which may be gone
        return _FixedSeen(spent, min(left, self.period), self.period)

    def hit(self, cost: int, seen: _FixedSeen) -> Calls[Receipt | None]:
        ends = self._clock() + seen.left
        if (yield "incr", (self.name, self.period, cost)) <= self.amount:
            return ends
        yield from self.give(cost, ends)  # others took of it since it was looked at
        return None

    def give(self, cost: int, receipt: Receipt) -> Calls[None]:
        if self._clock() >= receipt:
            return
        if self._kind.family in ("memory", "memcached"):
            yield "decr", (self.name, cost)
        elif self._kind.family in ("redis", "valkey", "mongodb"):
            left = yield "incr", (self.name, self.period, -cost)
            if left < 0:  # the window had ended, or was reset: what it did not hold is put back
                yield "incr", (self.name, self.period, -left)


_COUNTERS: Final[Mapping[str, type[_Counter]]] = {_MOVING: _Moving, _COUNTER: _SlidingCounter, _FIXED: _Fixed}
