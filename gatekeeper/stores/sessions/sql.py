"""Sessions in a database, through SQLAlchemy: SQLite, PostgreSQL, MariaDB and MySQL.

Each command is one statement that writes, without a transaction around it, so nothing is ever done by halves. What
decides is in the statement: `UPDATE … WHERE key AND version`, an `INSERT` that the primary key refuses.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import MissingExtra, StoreError
from gatekeeper.stores.sessions import LONGEST, too_long

try:
    from sqlalchemy import (
        CHAR,
        BigInteger,
        Column,
        Connection,
        Engine,
        LargeBinary,
        MetaData,
        String,
        Table,
        bindparam,
        create_engine,
        delete,
        insert,
        make_url,
        select,
        text,
        update,
    )
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, TimeoutError
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
except ImportError:
    raise MissingExtra("The SQL store", "sql") from None

TABLE: Final = Table(
    "gatekeeper_sessions",
    MetaData(),
    Column("key", CHAR(64), primary_key=True),
    Column("data", LargeBinary((1 << 24) - 1), nullable=False),  # so long that MySQL makes it a MEDIUMBLOB
    Column("version", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False, index=True),  # milliseconds since the epoch
    Column("owner", String(64), index=True),  # the SHA-256 of the owner, as hexadecimal digits
)
"""The table. For a tool of migrations: `TABLE.to_metadata(metadata)`."""

EXPECTED: Final = (
    "expected a URL of SQLAlchemy: sqlite:////PATH, postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or "
    "mysql+pymysql://USER:PASSWORD@HOST/DATABASE"
)
LATE: Final = "the database did not answer in time"

_AWAITING: Final = {"postgresql": ("psycopg", "asyncpg"), "mysql": ("asyncmy", "aiomysql")}
_BLOCKING: Final = {"postgresql": ("psycopg", "psycopg2"), "mysql": ("pymysql", "mysqldb"), "sqlite": ("pysqlite",)}
_PORTION: Final = 500
_ATTEMPTS: Final = 16
_FAR: Final = (1 << 63) - 1

_c: Final = TABLE.c
_AT: Final = _c.key == bindparam("at")
_ALIVE: Final = _c.expires > bindparam("now")
_OVER: Final = _c.expires <= bindparam("now")
_NEW: Final[dict[str, Any]] = {name: bindparam(f"new_{name}") for name in ("data", "version", "expires", "owner")}
_LOAD: Final = select(_c.data, _c.version).where(_AT, _ALIVE)
_CREATE: Final = insert(TABLE).values(key=bindparam("at"), **_NEW)
_CREATE_OVER: Final = update(TABLE).where(_AT, _OVER).values(**_NEW)
_CHANGE: Final = update(TABLE).where(_AT, _ALIVE, _c.version == bindparam("was")).values(**_NEW)
_LOOK: Final = select(_c.data, _c.version, _c.expires).where(_AT)
_DELETE: Final = delete(TABLE).where(_AT, _c.version == bindparam("was"))
_DELETE_RETURNING: Final = delete(TABLE).where(_AT).returning(_c.data, _c.version, _c.expires)
_OWNED: Final = select(_c.key, _c.data, _c.version).where(_c.owner == bindparam("whose"), _ALIVE)
_EXPIRED: Final = select(_c.key).where(_OVER).limit(_PORTION)
_DROP: Final = delete(TABLE).where(_c.key.in_(bindparam("keys", expanding=True)), _OVER)


class SqlSessions:
    """A SessionStore in a database, shared by all that reach it.

    - `where`: a URL of SQLAlchemy, or an `Engine` or `AsyncEngine`, which is then left open. What the other face
      needs is made from the same URL, with a driver for asyncio (psycopg, asyncpg; asyncmy, aiomysql). Where there
      is none, and for SQLite, an awaiting caller waits for a thread. SQLite needs a file.
    - `create`: whether the table is made if it is not there (default False), as the first command comes
    - `timeout`: seconds until a database counts as one that does not answer (default 5)
    - `clock`: the seconds since the epoch; keep those of machines in step

    A session has at most 1 MiB. What has expired is dropped by `sweep`, and by nothing else. Raises ValueError for
    a wrong URL, which is not repeated, and StoreError where no driver is installed. Nothing is connected before the
    first question.

    A blocking caller that waits for PostgreSQL is told by the server that it took too long; so a server that is
    stopped, and not gone, holds it up.
    """

    local = False

    def __init__(
        self,
        where: str | URL | Engine | AsyncEngine,
        *,
        create: bool = False,
        timeout: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._create = create
        self._timeout = timeout
        self._clock = clock
        self._tasks: set[asyncio.Task[Any]] = set()
        self._homes: dict[asyncio.AbstractEventLoop, tuple[AsyncEngine, AsyncGenerator[None, None]]] = {}
        self._given = None if isinstance(where, str | URL) else where
        self._url = _url_of(where)
        self._has_wal = self._given is None and create and self._url.get_backend_name() == "sqlite"
        self._begin()
        if self._engine is None and self._awaiting() is None:
            raise StoreError(f"no driver for {self._url.get_backend_name()} is installed: pip install one")
        _stores.add(self)

    def ask(self, command: SessionCommand) -> Any:
        return self._blocked(self._carry_out, command)

    async def aask(self, command: SessionCommand) -> Any:
        return await self._within(self._carry_out, command)

    def sweep(self) -> int:
        found, last = 0, _PORTION
        while last >= _PORTION:
            last = _raised(self._blocked(self._sweep))
            found += last
        return found

    async def asweep(self) -> int:
        found, last = 0, _PORTION
        while last >= _PORTION:
            last = _raised(await self._within(self._sweep))
            found += last
        return found

    def close(self) -> None:
        """Close all connections that are not of an engine that was given."""
        if self._engine is not None and not isinstance(self._given, Engine):
            self._engine.dispose()
        for loop, (_, guard) in list(self._homes.items()):
            self._homes.pop(loop, None)
            with suppress(RuntimeError):  # the loop is closed, and has closed what was on it
                loop.call_soon_threadsafe(_end, loop, guard)

    async def aclose(self) -> None:
        """Close all connections, and wait for those of this loop."""
        home = self._homes.pop(asyncio.get_running_loop(), None)
        if home is not None:
            await home[1].aclose()
        self.close()

    # The engines.

    def _begin(self) -> None:
        """At first, and after a fork: the connections are the parent's."""
        self._is_created = not self._create
        self._tasks.clear()
        self._homes.clear()
        if isinstance(self._given, Engine):
            self._engine: Engine | None = self._given.execution_options(isolation_level="AUTOCOMMIT")
        else:
            self._engine = self._blocking()

    def _blocking(self) -> Engine | None:
        url = self._url
        drivers = _BLOCKING.get(_backend(url), ()) if _is_async(url) else (url.get_driver_name(),)
        engine: Engine | None = _first(create_engine, url, drivers, self._options)
        return engine

    def _awaiting(self) -> AsyncEngine | None:
        url = self._url
        drivers = (url.get_driver_name(),) if _is_async(url) else _AWAITING.get(_backend(url), ())
        engine: AsyncEngine | None = _first(create_async_engine, url, drivers, self._options)
        return engine

    def _options(self, driver: str) -> dict[str, Any]:
        """What an engine is made with. What the URL says itself stands."""
        seconds, whole = self._timeout, max(2, round(self._timeout))
        milliseconds = round(seconds * 1000)
        by_driver: dict[str, dict[str, Any]] = {
            "pysqlite": {"timeout": seconds},
            "aiosqlite": {"timeout": seconds},
            "psycopg": {
                "connect_timeout": whole,
                "options": f"-c statement_timeout={milliseconds}",
                "tcp_user_timeout": milliseconds,
            },
            "psycopg2": {"connect_timeout": whole, "options": f"-c statement_timeout={milliseconds}"},
            "asyncpg": {"timeout": seconds, "command_timeout": seconds},
            "pymysql": {"connect_timeout": whole, "read_timeout": whole, "write_timeout": whole},
            "asyncmy": {"connect_timeout": whole},
            "aiomysql": {"connect_timeout": whole},
        }
        arguments = by_driver.get(driver, {})
        options: dict[str, Any] = {
            "isolation_level": "AUTOCOMMIT",
            "connect_args": {name: value for name, value in arguments.items() if name not in self._url.query},
            "hide_parameters": True,
        }
        if _backend(self._url) != "sqlite":
            # A connection that the server has closed meanwhile is found out before it is used.
            options |= {"pool_pre_ping": True, "pool_timeout": seconds}
        return options

    async def _engine_here(self) -> AsyncEngine | None:
        """The engine of this loop; None where a thread is to be waited for."""
        if isinstance(self._given, AsyncEngine):
            return self._given.execution_options(isolation_level="AUTOCOMMIT")
        loop = asyncio.get_running_loop()
        home = self._homes.get(loop)
        if home is not None:
            return home[0]
        engine = self._awaiting()
        if engine is None:
            return None
        guard = self._until_the_end(loop, engine)
        self._homes[loop] = engine, guard
        await anext(guard)
        return engine

    async def _until_the_end(
        self, loop: asyncio.AbstractEventLoop, engine: AsyncEngine
    ) -> AsyncGenerator[None, None]:
        # A loop that ends closes its asynchronous generators, after its tasks: `asyncio.run` sees to it.
        try:
            yield
        finally:
            home = self._homes.get(loop)
            if home is not None and home[0] is engine:
                del self._homes[loop]
            await engine.dispose()

    def _forked(self) -> None:
        for engine in (self._engine, self._given):
            sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
            if sync is not None:
                _LEFT.append(sync.pool)
                sync.dispose(close=False)
        _LEFT.extend(engine for engine, _ in self._homes.values())
        self._begin()

    # How.

    def _blocked(self, work: Callable[..., Any], *asked: Any) -> Any:
        """`work(connection, *asked)`, or the error that befell it."""
        if self._engine is None:
            return StoreError("no driver that blocks is installed for the database: pip install one")
        try:
            with self._engine.connect() as connection:
                return work(connection, *asked)
        except Exception as error:  # whatever a driver raises
            return _told(error)

    async def _within(self, work: Callable[..., Any], *asked: Any) -> Any:
        """As `_blocked`, in a task of its own, for who waits may be cancelled; and until the time is over."""
        engine = await self._engine_here()
        if engine is not None:
            task = asyncio.ensure_future(_awaited(engine, work, *asked))
        else:
            task = asyncio.ensure_future(asyncio.to_thread(self._blocked, work, *asked))
        self._tasks.add(task)  # the loop itself holds tasks but weakly
        task.add_done_callback(self._tasks.discard)
        done, _ = await asyncio.wait({task}, timeout=self._timeout)
        if not done:
            task.cancel()
            return StoreError(LATE)
        return task.result()

    def _carry_out(self, connection: Connection, command: SessionCommand) -> Any:
        if not self._is_created:
            self._make_table(connection)
        now = self._now()
        if isinstance(command, Load):
            row = connection.execute(_LOAD, {"at": command.key, "now": now}).first()
            return None if row is None else Record(bytes(row[0]), row[1])
        if isinstance(command, Save):
            return self._save(connection, command, now)
        if isinstance(command, Delete):
            return self._delete(connection, command.key, now)
        assert isinstance(command, Owned)
        rows = connection.execute(_OWNED, {"whose": _digest(command.owner), "now": now}).all()
        return [(key, Record(bytes(data), version)) for key, data, version in rows]

    def _save(self, connection: Connection, command: Save, now: int) -> int | Record | StoreError | None:
        if len(command.data) > LONGEST:
            return too_long(command.data)
        version = secrets.randbits(60)  # another than any before, whoever seeds what
        new = {
            "at": command.key,
            "now": now,
            "new_data": command.data,
            "new_version": version,
            "new_expires": min(now + command.ttl * 1000, _FAR),
            "new_owner": None if command.owner is None else _digest(command.owner),
        }
        for _ in range(_ATTEMPTS):
            if command.version is not None:
                if connection.execute(_CHANGE, {**new, "was": command.version}).rowcount:
                    return version
            else:
                try:
                    connection.execute(_CREATE, {name: value for name, value in new.items() if name != "now"})
                    return version
                except IntegrityError:
                    pass
                if connection.execute(_CREATE_OVER, new).rowcount:
                    return version
            row = connection.execute(_LOAD, {"at": command.key, "now": now}).first()
            if row is not None:
                return Record(bytes(row[0]), row[1])
            if command.version is not None:
                return None
        return StoreError("the session was begun and ended by others again and again")

    def _delete(self, connection: Connection, key: str, now: int) -> Record | StoreError | None:
        if connection.dialect.delete_returning:
            row = connection.execute(_DELETE_RETURNING, {"at": key}).first()
            return Record(bytes(row[0]), row[1]) if row is not None and row[2] > now else None
        for _ in range(_ATTEMPTS):
            row = connection.execute(_LOOK, {"at": key}).first()
            if row is None:
                return None
            if connection.execute(_DELETE, {"at": key, "was": row[1]}).rowcount:
                return Record(bytes(row[0]), row[1]) if row[2] > now else None
        return StoreError("the session was changed by others again and again")

    def _sweep(self, connection: Connection) -> int:
        """Drop some of what has expired; how many that were."""
        if not self._is_created:
            self._make_table(connection)
        now = self._now()
        keys = connection.execute(_EXPIRED, {"now": now}).scalars().all()
        return connection.execute(_DROP, {"keys": keys, "now": now}).rowcount if keys else 0

    def _make_table(self, connection: Connection) -> None:
        if self._has_wal:
            # So that who reads does not wait for who writes. It is kept in the file; if others are in it, without.
            with suppress(DBAPIError):
                connection.execute(text("PRAGMA journal_mode=WAL"))
        try:
            TABLE.create(connection, checkfirst=True)
        except DBAPIError:  # another process was faster, and this one did not see it
            TABLE.create(connection, checkfirst=True)
        self._is_created = True

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _end(loop: asyncio.AbstractEventLoop, guard: AsyncGenerator[None, None]) -> None:
    task = loop.create_task(guard.aclose())
    _ENDING.add(task)
    task.add_done_callback(_ENDING.discard)


async def _awaited(engine: AsyncEngine, work: Callable[..., Any], *asked: Any) -> Any:
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(work, *asked)
    except Exception as error:
        return _told(error)


def _url_of(where: str | URL | Engine | AsyncEngine) -> URL:
    """Raises ValueError, which does not repeat it."""
    try:
        url = make_url(where) if isinstance(where, str | URL) else where.url
        url.get_dialect()
    except (ArgumentError, ValueError):
        raise ValueError(EXPECTED) from None
    if _backend(url) == "sqlite" and (url.database or ":memory:") == ":memory:":
        raise ValueError("expected a file of SQLite (sqlite:////PATH): for sessions in memory give memory://")
    return url


def _backend(url: URL) -> str:
    name = url.get_backend_name()
    return "mysql" if name == "mariadb" else name


def _is_async(url: URL) -> bool:
    """Whether its driver is one for asyncio alone; psycopg is both."""
    return bool(url.get_dialect().is_async)


def _first(make: Callable[..., Any], url: URL, drivers: Sequence[str], options: Callable[[str], Any]) -> Any:
    """The engine with the first of these drivers that is installed; None for none."""
    for driver in drivers:
        with suppress(ImportError, ArgumentError):
            return make(url.set(drivername=f"{url.get_backend_name()}+{driver}"), **options(driver))
    return None


def _digest(owner: str) -> str:
    return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()


def _raised(reply: Any) -> Any:
    if isinstance(reply, StoreError):
        raise reply
    return reply


def _told(error: Exception) -> StoreError:
    """What befell a statement, as an error that may be shown: neither the URL nor SQL."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, TimeoutError):
        return StoreError("all connections to the database are in use")
    cause = getattr(error, "orig", None) or error
    if TABLE.name in str(cause):
        return StoreError(f"the table {TABLE.name} is not there, or not ours; session.create_table = true makes it")
    return StoreError(f"the database answered with an error, or not at all ({type(cause).__name__})")


_stores: Final[weakref.WeakSet[SqlSessions]] = weakref.WeakSet()
_LEFT: Final[list[Any]] = []  # a parent's, not to be touched in the child
_ENDING: Final[set[asyncio.Task[None]]] = set()


def _forked() -> None:
    for store in list(_stores):
        store._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
