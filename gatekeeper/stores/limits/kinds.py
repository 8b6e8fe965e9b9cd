"""What is known of a storage of `limits` by its URL: what it can, what it lacks, and how its client is made."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit

import limits.storage
from limits.storage import storage_from_string

from gatekeeper.commands import Limit
from gatekeeper.errors import GatekeeperError, MissingExtra, SettingsError

PREFIX: Final = "limits+"
"""Put before a scheme that another store has (`limits+redis://…`) it means this store."""

SCHEMES: Final[Mapping[str, type]] = limits.storage.SCHEMES  # type: ignore[attr-defined]
"""The storages that `limits` knows, and those that the user registered with it, by the schemes of their URLs."""

MS: Final = 1_000_000
NS: Final = 1_000_000_000
_LONGEST: Final = 30 * 86_400  # memcached takes a longer lifetime for a date in 1970
MOVING, COUNTER, FIXED = "moving", "counter", "fixed"
_ABILITIES: Final = {
    MOVING: ("acquire_entry", "get_moving_window"),
    COUNTER: ("acquire_sliding_window_entry", "get_sliding_window", "clear_sliding_window"),
    FIXED: ("incr", "get", "get_expiry", "clear"),
}
_WAYS: Final = {
    "sliding_window": (MOVING, COUNTER),
    "sliding_counter": (COUNTER,),
    "fixed_window": (FIXED,),
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


class Kind:
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
            () if any(is_there(package) for package in packages) else packages
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
        period = limit.numbers[1] // NS
        longest = _LONGEST // (2 if way == COUNTER else 1)
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
            if chosen == "emcache" or (chosen is None and not is_there("memcachio")):
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


def is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


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
