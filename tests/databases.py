"""Real databases for tests: SQLite's files, and servers of PostgreSQL and MariaDB on sockets of their own."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

STARTS_WITHIN: Final = 60.0


def unprivileged() -> dict[str, Any]:
    """What makes a process that root starts one of nobody: databases refuse to run as root."""
    if os.geteuid():
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def program(*names: str) -> str:
    """A program of the PATH, or of where Debian puts those of databases. Skips the test without it."""
    places = [os.environ.get("PATH", ""), "/usr/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
    for name in names:
        found = shutil.which(name, path=os.pathsep.join(places))
        if found is not None:
            return found
    pytest.skip(f"there is no {names[0]} on this machine")


class Database:
    """A server, started anew in the same folder as often as wanted. `url` is SQLAlchemy's."""

    def __init__(self, url: str, command: list[str], folder: Path, answers: Callable[[], bool]) -> None:
        self.url = url
        self.folder = folder
        self._command = command
        self._answers = answers
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        self.start()

    def start(self) -> None:
        self._process = self._begin()
        end = time.monotonic() + STARTS_WITHIN
        while not self._answers():
            assert time.monotonic() < end, (self.folder / "log").read_text("utf-8", "replace")[-600:]
            time.sleep(0.05)
            # PostgreSQL refuses to begin while a process of the killed one still ends.
            if self._process.poll() is not None:
                self._process = self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self.folder, **unprivileged())

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        # PostgreSQL has a process for each connection, in a group of its own.
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        mine = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        for pid in [self._process.pid, *mine]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        if os.getpid() == self._owner:
            self.kill()
            shutil.rmtree(self.folder, ignore_errors=True)


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gk-db-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    owner = unprivileged().get("user")
    if owner is not None:
        os.chown(folder, owner, -1)
    return folder


def postgresql() -> Database:
    """A new server. Skips the test where there is none, or no driver."""
    psycopg = pytest.importorskip("psycopg")
    initdb, server = program("initdb"), program("postgres")
    folder = _folder()
    made = [
        initdb,
        "-D",
        str(folder / "data"),
        "-U",
        "gate",
        "--auth=trust",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C",
    ]
    subprocess.run(made, check=True, capture_output=True, cwd=folder, **unprivileged())
    command = [server, "-D", str(folder / "data"), "-k", str(folder), "-h", "", "-F", "-c", "max_connections=100"]
    address = {"host": str(folder), "user": "gate", "dbname": "postgres"}

    def answers() -> bool:
        try:
            psycopg.connect(**address, connect_timeout=2).close()
        except psycopg.Error:
            return False
        return True

    return Database(f"postgresql+psycopg://gate@/postgres?host={folder}", command, folder, answers)


def mariadb() -> Database:
    """A new server. Skips the test where there is none, or no driver."""
    pymysql = pytest.importorskip("pymysql")
    install, server = program("mariadb-install-db", "mysql_install_db"), program("mariadbd", "mysqld")
    folder = _folder()
    data, place = folder / "data", folder / "socket"
    made = [
        install,
        "--no-defaults",
        f"--datadir={data}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ]
    subprocess.run(made, check=True, capture_output=True, cwd=folder, **unprivileged())
    command = [
        server, "--no-defaults", f"--datadir={data}", f"--socket={place}", f"--pid-file={folder / 'pid'}",
        "--skip-networking", "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M",
    ]  # fmt: skip

    def answers() -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:  # for pymysql leaves one that fails open
                probe.connect(str(place))
        except OSError:
            return False
        try:
            wire = pymysql.connect(unix_socket=str(place), user="root", connect_timeout=2)
        except pymysql.Error:
            return False
        with wire, wire.cursor() as cursor:
            cursor.execute("CREATE DATABASE IF NOT EXISTS gate")
        return True

    return Database(f"mysql+pymysql://root@localhost/gate?unix_socket={place}", command, folder, answers)


KINDS: Final = {"postgresql": postgresql, "mariadb": mariadb}


@cache
def shared_database(kind: str) -> Database:
    """One for all tests of this process, which empty their table."""
    return KINDS[kind]()
