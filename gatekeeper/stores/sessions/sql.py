"""Sessions in a database, through SQLAlchemy."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any, Final

from gatekeeper.commands import Delete, Load, Owned, Record, Save, SessionCommand
from gatekeeper.errors import MissingExtra, StoreError

try:
    import sqlalchemy as sql
    from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
except ImportError:
    raise MissingExtra("sessions in a database", "sql") from None

TABLE: Final = "gatekeeper_sessions"

GREATEST: Final = 1 << 20
"""The most bytes of a session."""

_ATTEMPTS: Final = 16
_PORTION: Final = 1000
_MOST_OWNED: Final = 10_000

# Of each database the driver that blocks and the one that is awaited; some are both.
_TWINS: Final = {
    "sqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "sqlite+pysqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "sqlite+aiosqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql+psycopg": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql+psycopg2": ("postgresql+psycopg2", "postgresql+asyncpg"),
    "postgresql+asyncpg": ("postgresql+psycopg", "postgresql+asyncpg"),
    "mysql": ("mysql+pymysql", "mysql+aiomysql"),
    "mysql+pymysql": ("mysql+pymysql", "mysql+aiomysql"),
    "mysql+aiomysql": ("mysql+pymysql", "mysql+aiomysql"),
    "mysql+asyncmy": ("mysql+pymysql", "mysql+asyncmy"),
    "mariadb": ("mariadb+pymysql", "mariadb+aiomysql"),
    "mariadb+pymysql": ("mariadb+pymysql", "mariadb+aiomysql"),
    "mariadb+aiomysql": ("mariadb+pymysql", "mariadb+aiomysql"),
    "mariadb+asyncmy": ("mariadb+pymysql", "mariadb+asyncmy"),
}

_metadata = sql.MetaData()
_table = sql.Table(
    TABLE,
    _metadata,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("data", sql.LargeBinary(GREATEST), nullable=False),
    sql.Column("version", sql.BigInteger, nullable=False),
    sql.Column("expires", sql.BigInteger, nullable=False, index=True),
    sql.Column("owner", sql.String(64), nullable=True, index=True),
)
_columns = _table.c

_Rounds = Generator[Any, Any, Any]


class SqlSessions:
    """A SessionStore in a database: SQLite, PostgreSQL, MariaDB or MySQL.

    - `url`: as SQLAlchemy takes it. Of `sqlite`, `postgresql`, `mysql` and `mariadb` without a driver the usual one
      is taken: pysqlite and aiosqlite, psycopg, PyMySQL and aiomysql.
    - `create`: whether the table (`gatekeeper_sessions`) is made if it is not there
    - `clock`: the seconds since the epoch, by which sessions expire

    Each command is one or a few statements, each a transaction of its own: a write names the version that it
    replaces, so nothing is locked in between.

    Raises ValueError for a URL that is none; the message does not repeat it. Nothing is connected before the first
    question.
    """

    local = False

    def __init__(self, url: str, *, create: bool = False, clock: Callable[[], float] = time.time) -> None:
        try:
            self._url = sql.make_url(url)
        except ArgumentError:
            raise ValueError("expected a URL of SQLAlchemy") from None
        if self._url.drivername not in _TWINS:
            raise ValueError(f"expected a database and driver among {', '.join(_TWINS)}")
        self._create = create
        self._clock = clock
        self._engine: sql.Engine | None = None
        # Of each event loop its own: connections are bound to theirs.
        self._engines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = (
            weakref.WeakKeyDictionary()
        )
        self._is_made = not create
        _stores.add(self)

    def ask(self, command: SessionCommand) -> Any:
        return self._run(self._answer(command))

    async def aask(self, command: SessionCommand) -> Any:
        return await self._arun(self._answer(command))

    def sweep(self) -> int:
        """Drop what has expired, a thousand at a time; how many that were. Raises StoreError."""
        return _count(self._run(self._swept()))

    async def asweep(self) -> int:
        return _count(await self._arun(self._swept()))

    def close(self) -> None:
        """Close the blocking connections. Those of event loops are closed by `aclose`, each by its own."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    async def aclose(self) -> None:
        engine = self._engines.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.dispose()
        self.close()

    # What is asked.

    def _answer(self, command: SessionCommand) -> _Rounds:
        if isinstance(command, Load):
            return (yield from self._load(command.key))
        if isinstance(command, Save):
            return (yield from self._save(command))
        if isinstance(command, Delete):
            return (yield from self._delete(command.key))
        assert isinstance(command, Owned)
        wanted = sql.select(_columns.key, _columns.data, _columns.version).where(
            _columns.owner == _digest(command.owner), _columns.expires > self._now()
        )
        found = (yield wanted.limit(_MOST_OWNED)).all()
        return [(key, Record(bytes(data), version)) for key, data, version in found]

    def _load(self, key: str) -> _Rounds:
        wanted = sql.select(_columns.data, _columns.version)
        found = (yield wanted.where(_columns.key == key, _columns.expires > self._now())).first()
        return None if found is None else Record(bytes(found.data), found.version)

    def _save(self, save: Save) -> _Rounds:
        if len(save.data) > GREATEST:
            return StoreError(f"a session has more than {GREATEST} bytes")
        now = self._now()
        values = {
            "data": save.data,
            "expires": now + save.ttl,
            "owner": None if save.owner is None else _digest(save.owner),
        }
        if save.version is not None:
            same = (_columns.key == save.key, _columns.version == save.version, _columns.expires > now)
            result = yield sql.update(_table).where(*same).values(version=save.version + 1, **values)
            return save.version + 1 if result.rowcount else (yield from self._load(save.key))
        for _ in range(_ATTEMPTS):
            try:
                yield sql.insert(_table).values(key=save.key, version=1, **values)
            except IntegrityError:
                found = yield from self._load(save.key)
                if found is not None:
                    return found
                yield sql.delete(_table).where(_columns.key == save.key, _columns.expires <= now)
            else:
                return 1
        return StoreError("the session was changed by others again and again")

    def _delete(self, key: str) -> _Rounds:
        for _ in range(_ATTEMPTS):
            found = yield from self._load(key)
            if found is None:
                return None
            result = yield sql.delete(_table).where(_columns.key == key, _columns.version == found.version)
            if result.rowcount:
                return found
        return StoreError("the session was changed by others again and again")

    def _swept(self) -> _Rounds:
        now, count = self._now(), 0
        while True:
            found = yield sql.select(_columns.key).where(_columns.expires <= now).limit(_PORTION)
            keys = [key for (key,) in found.all()]
            if not keys:
                return count
            gone = yield sql.delete(_table).where(_columns.key.in_(keys), _columns.expires <= now)
            count += gone.rowcount

    def _now(self) -> int:
        return int(self._clock())

    # How.

    def _run(self, rounds: _Rounds) -> Any:
        try:
            engine = self._engine or self._open()
            with engine.connect() as connection:
                if not self._is_made:
                    _metadata.create_all(connection)
                    self._is_made = True
                statement = next(rounds)
                while True:
                    try:
                        result = connection.execute(statement)
                    except IntegrityError as error:
                        statement = rounds.throw(error)
                    else:
                        statement = rounds.send(result)
        except StopIteration as stop:
            return stop.value
        except SQLAlchemyError as error:
            return _told(error)
        finally:
            rounds.close()

    async def _arun(self, rounds: _Rounds) -> Any:
        try:
            engine = self._engines.get(asyncio.get_running_loop()) or self._aopen()
            async with engine.connect() as connection:
                if not self._is_made:
                    await connection.run_sync(_metadata.create_all)
                    self._is_made = True
                statement = next(rounds)
                while True:
                    try:
                        result = await connection.execute(statement)
                    except IntegrityError as error:
                        statement = rounds.throw(error)
                    else:
                        statement = rounds.send(result)
        except StopIteration as stop:
            return stop.value
        except SQLAlchemyError as error:
            return _told(error)
        finally:
            rounds.close()

    def _open(self) -> sql.Engine:
        url = self._url.set(drivername=_TWINS[self._url.drivername][0])
        engine: sql.Engine = _made(lambda: sql.create_engine(url, **_OPTIONS))
        _prepare(engine)
        self._engine = engine
        return engine

    def _aopen(self) -> AsyncEngine:
        url = self._url.set(drivername=_TWINS[self._url.drivername][1])
        engine: AsyncEngine = _made(lambda: create_async_engine(url, **_OPTIONS))
        _prepare(engine.sync_engine)
        self._engines[asyncio.get_running_loop()] = engine
        return engine

    def _forked(self) -> None:
        # The connections are the parent's: here they are forgotten, and not closed.
        if self._engine is not None:
            self._engine.dispose(close=False)
        self._engine = None
        for engine in self._engines.values():
            engine.sync_engine.dispose(close=False)
        self._engines.clear()


_OPTIONS: Final[dict[str, Any]] = {"isolation_level": "AUTOCOMMIT", "pool_pre_ping": True}


def _made(make: Callable[[], Any]) -> Any:
    """An engine. Raises MissingExtra if the driver is not installed."""
    try:
        return make()
    except ImportError as error:  # it names the package
        raise MissingExtra(f"the database ({error.name} is the driver)", "sql") from None


def _prepare(engine: sql.Engine) -> None:
    """SQLite lets one write while others read, and waits for who writes, in place of an error."""
    if engine.dialect.name != "sqlite":
        return

    @sql.event.listens_for(engine, "connect")
    def begin(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=NORMAL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


def _told(error: SQLAlchemyError) -> StoreError:
    """What went wrong, without the statement, its values or the URL."""
    kind = type(error).__name__
    if isinstance(error, ProgrammingError | OperationalError) and TABLE in str(error.orig):
        return StoreError(f"the table {TABLE} is not there, or not ours; session.create_table = true makes it")
    return StoreError(f"the database did not do as it was asked: {kind}")


def _count(reply: int | StoreError) -> int:
    if isinstance(reply, StoreError):
        raise reply
    return reply


def _digest(owner: str) -> str:
    return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()


_stores: weakref.WeakSet[SqlSessions] = weakref.WeakSet()


def _forked() -> None:
    for store in list(_stores):
        store._forked()


os.register_at_fork(after_in_child=_forked)
