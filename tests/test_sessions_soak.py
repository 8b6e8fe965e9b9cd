"""Long trials of sessions in files, by `make soak`: a hundred processes killed at work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from gatekeeper.stores.sessions.shared import SharedSessions
from gatekeeper.stores.sessions.sql import SqlSessions
from tests.session_stores import kill_at_work
from tests.shared_store import temporary_folder

pytestmark = pytest.mark.soak

KILLS = 100


@pytest.fixture
def path() -> Iterator[Path]:
    folder = temporary_folder()
    yield folder
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_hundred_processes_are_killed_and_nothing_is_lost(path: Path, how: str, durable: bool) -> None:
    """What they had been told is there, their sessions are whole and listed, and the others go on."""
    kill_at_work(partial(SharedSessions, path, durable=durable, size=16 << 20), how, kills=KILLS)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_hundred_processes_that_use_sqlite_are_killed_and_nothing_is_lost(tmp_path: Path, how: str) -> None:
    """What they had been told is in SQLite's file, their sessions are whole and listed, and the others go on."""
    kill_at_work(partial(SqlSessions, f"sqlite:///{tmp_path}/db", create=True, timeout=30), how, kills=KILLS)
