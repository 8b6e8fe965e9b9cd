"""Which session store the URL of one means, through the settings of a Gatekeeper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gatekeeper import Gatekeeper
from gatekeeper.commands import Load, Record, Save, SessionStore
from gatekeeper.errors import SettingsError
from gatekeeper.storage import SESSION_STORES
from gatekeeper.stores.sessions.memory import MemorySessions
from gatekeeper.stores.sessions.redis import RedisSessions
from gatekeeper.stores.sessions.shared import SharedSessions
from gatekeeper.stores.sessions.sql import SqlSessions
from tests.redis_servers import Server, running
from tests.session_stores import key
from tests.shared_store import temporary_folder

A = key("a")
SECRET = "k7Jd0sVv3mQ2xW9zT4bN8cF1hL6pR5aY"


@pytest.fixture
def path() -> Iterator[Path]:
    folder = temporary_folder()
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def made(session: dict[str, Any], **more: Any) -> tuple[Gatekeeper, SessionStore]:
    keeper = Gatekeeper({"keys": [{"key": SECRET}], "session": {"kind": "store", **session}, **more})
    assert keeper.sessions is not None
    store = keeper.sessions.flow.store
    assert store is not None
    return keeper, store


def test_each_kind_of_url_opens_its_store_which_keeps_sessions(path: Path, tmp_path: Path, server: Server) -> None:
    """By its URL each store is opened as the settings say, and what is saved in it is loaded."""
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "memory": (MemorySessions, {"store": "memory://"}),
        "shared": (SharedSessions, {"store": f"shared://{path}", "size": "2MiB", "durable": True}),
        "redis": (RedisSessions, {"store": server.url}),
        "sql": (SqlSessions, {"store": f"sqlite:///{tmp_path}/db", "create_table": True}),
    }
    assert kinds.keys() == SESSION_STORES.keys()
    for kind, session in kinds.values():
        keeper, store = made(session, store={"url": "memory://", "timeout": "10s"})
        assert type(store) is kind
        version = store.ask(Save(store, A, b"x", version=None, ttl=60))
        assert store.ask(Load(store, A)) == Record(b"x", version)
        keeper.close()
    assert (path / "durable-sessions.mdb").stat().st_size == 2 << 20


def test_without_a_url_sessions_live_where_counters_do(path: Path, server: Server) -> None:
    """The store of the limits is taken, with files of its own or on its connections."""
    keeper, store = made({}, store={"url": f"shared://{path}", "max_keys": 1000})
    assert isinstance(store, SharedSessions)
    store.ask(Load(store, A))
    assert {"sessions.mdb", "gatekeeper.mdb"} <= {file.name for file in path.iterdir()}
    keeper.close()
    keeper, store = made({}, store={"url": server.url})
    assert isinstance(store, RedisSessions)
    assert store._store is keeper.store
    keeper.close()
    keeper, store = made({"store": f"{server.url}/1"}, store={"url": server.url})
    assert isinstance(store, RedisSessions)
    assert store._store is not keeper.store
    keeper.close()


@pytest.mark.parametrize(
    "url",
    [
        "shared://relative-verysecret", "sqlite://", "sqlite:///:memory:", "mysql+none://u:verysecret@host/db",
        "redis://u:verysecret@host:none",
    ],
)  # fmt: skip
def test_a_url_of_no_store_is_an_error_of_the_settings_that_does_not_show_it(url: str) -> None:
    """What cannot be opened is told by its place in the settings, and not repeated."""
    with pytest.raises(SettingsError, match=r"session\.store: expected") as caught:
        made({"store": url})
    assert "secret" not in str(caught.value)


def test_opening_makes_nothing(path: Path, tmp_path: Path) -> None:
    """As `gatekeeper check` wants it: neither files nor connections are made before the first command."""
    for url in (f"shared://{path}", f"sqlite:///{tmp_path}/db", "redis://127.0.0.1:1"):
        keeper, _ = made({"store": url, **({"create_table": True} if "sqlite" in url else {})})
        assert not path.exists()
        assert list(tmp_path.iterdir()) == []
        keeper.close()
