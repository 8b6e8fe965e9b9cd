"""Which store the URL of one means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from gatekeeper.commands import Limit, SessionStore, Store
from gatekeeper.errors import SettingsError, StoreError
from gatekeeper.settings import Settings, StoreSettings, store_scheme
from gatekeeper.settings.session import is_sql
from gatekeeper.stores.memory import MemoryStore
from gatekeeper.stores.sessions.memory import MemorySessions


def _memory(url: str, settings: StoreSettings) -> Store:
    if url != "memory://":
        raise ValueError("expected memory:// and nothing behind it")
    return MemoryStore(max_keys=settings.max_keys)


def _shared(url: str, settings: StoreSettings) -> Store:
    from gatekeeper.stores.shared import SharedStore

    return SharedStore(url.removeprefix("shared://"), max_keys=settings.max_keys, size=settings.size)


def _redis(url: str, settings: StoreSettings) -> Store:
    from gatekeeper.stores.redis import RedisStore

    return RedisStore(url, timeout=settings.timeout / 1e9)


def _limits(url: str, settings: StoreSettings) -> Store:
    from gatekeeper.stores.limits import LimitsStore

    return LimitsStore(url, timeout=settings.timeout / 1e9)


STORES: Final[dict[str, Callable[[str, StoreSettings], Store]]] = {
    "memory": _memory,
    "shared": _shared,
    "redis": _redis,
    "limits": _limits,
}
"""Stores by their kind, as `store_scheme` tells it of a URL."""


def _memory_sessions(url: str, settings: Settings, store: Store) -> SessionStore:
    return MemorySessions()


def _redis_sessions(url: str, settings: Settings, store: Store) -> SessionStore:
    from gatekeeper.stores.redis import RedisStore
    from gatekeeper.stores.sessions.redis import RedisSessions

    if isinstance(store, RedisStore) and url == settings.store.url:
        return RedisSessions(store)
    return RedisSessions(RedisStore(url, timeout=settings.store.timeout / 1e9), owns=True)


def _shared_sessions(url: str, settings: Settings, store: Store) -> SessionStore:
    from gatekeeper.stores.sessions.shared import SharedSessions

    path = url.removeprefix("shared://")
    if not path.startswith("/"):
        raise ValueError("expected an absolute path: shared:///PATH, with three slashes")
    session = settings.session
    assert session is not None
    return SharedSessions(path, durable=session.durable, size=session.size)


def _sql_sessions(url: str, settings: Settings, store: Store) -> SessionStore:
    from gatekeeper.stores.sessions.sql import SqlSessions

    session = settings.session
    assert session is not None
    return SqlSessions(url, create=session.create_table)


SESSION_STORES: Final[dict[str, Callable[[str, Settings, Store], SessionStore]]] = {
    "memory": _memory_sessions,
    "redis": _redis_sessions,
    "shared": _shared_sessions,
    "sql": _sql_sessions,
}
"""Stores of sessions by their kind. `store` is the one that limits are counted in: it may be on the same server."""


def open_sessions(settings: Settings, store: Store) -> SessionStore | None:
    """The store of sessions that settings name; None if they need none. Raises SettingsError, MissingExtra."""
    session = settings.session
    if session is None or (session.kind == "token" and session.store is None):
        return None
    url = session.store or settings.store.url or "memory://"
    kind = "sql" if is_sql(url) else store_scheme(url)
    if kind not in SESSION_STORES:  # that of the limits is taken, and keeps none
        raise SettingsError(["session.store: expected one, for store.url is of a kind that keeps no sessions"])
    try:
        return SESSION_STORES[kind](url, settings, store)
    except (ValueError, StoreError) as error:  # whose messages never show a URL
        raise SettingsError([f"session.store: {error}"]) from None


def open_store(settings: StoreSettings, limits: Iterable[Limit] = ()) -> Store:
    """The store that settings name. Raises SettingsError, also if it cannot count one of the limits.

    Raises MissingExtra if it needs packages that are not installed.
    """
    check_store(settings, limits)
    return _made(settings)


def check_store(settings: StoreSettings, limits: Iterable[Limit]) -> None:
    """Raises SettingsError if the store that settings name cannot be, or cannot count one of the limits.

    It is not opened, and nothing is made. Raises MissingExtra.
    """
    url = settings.url or "memory://"
    kind = store_scheme(url)
    if kind == "limits":
        from gatekeeper.stores.limits import unsupported

        problems = unsupported(url, limits)
        if problems:
            raise SettingsError([f"store.url: {problem}" for problem in problems])
    elif kind == "shared":
        import gatekeeper.stores.shared  # noqa: F401  # it tells what is not installed

        if not url.removeprefix("shared://").startswith("/"):
            raise SettingsError(["store.url: expected an absolute path: shared:///PATH, with three slashes"])
    else:  # these connect to nothing before they are asked
        _made(settings).close()


def is_unused(settings: StoreSettings) -> bool:
    """Whether the store is one that is made by who uses it first, and nobody has. Raises MissingExtra."""
    url = settings.url or "memory://"
    if store_scheme(url) != "shared":
        return False
    from gatekeeper.stores.shared.files import is_made

    return not is_made(url.removeprefix("shared://"))


def _made(settings: StoreSettings) -> Store:
    url = settings.url or "memory://"
    try:
        return STORES[store_scheme(url)](url, settings)
    except SettingsError:
        raise
    except (ValueError, StoreError) as error:  # whose messages never show a URL
        raise SettingsError([f"store.url: {error}"]) from None


def checked_store(store: Store) -> Store:
    """A store of the user's own. Raises SettingsError for what is none."""
    if not all(hasattr(store, name) for name in ("ask", "aask", "keys", "akeys", "local", "close", "aclose")):
        raise SettingsError([f"store: expected a store (gatekeeper.commands.Store), not {type(store).__name__}"])
    return store
