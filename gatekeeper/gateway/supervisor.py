"""The parent: checks the settings, binds the sockets, starts the workers and passes on signals.

Sockets are bound here and inherited, so that a worker can be replaced and no queued connection is lost. A worker is
a fresh process: a fork of one that ran an event loop, or threads, would inherit their locks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from gatekeeper.errors import GatekeeperError, SettingsError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import Address, Settings, TcpAddress, load_settings, parse_address, warnings

BACKLOG: Final = 2048

MEMORY: Final = "/dev/shm"  # noqa: S108  # where files lie in memory, on Linux
SHARED_SIZE: Final = 48 << 20
"""The bytes of the store that workers share if the settings say nothing: containers give 64 MB of such memory."""

_WORKER: Final = "from gatekeeper.gateway.worker import main; main()"


class BindError(GatekeeperError):
    """The address cannot be bound. The message says why."""


def serve(file: Path, listen: str | None = None, workers: int | None = None) -> int:
    """Serve until a signal comes, and return the exit status. Raises SettingsError, BindError, MissingExtra."""
    settings = load_settings(file)
    if not settings.routes:
        raise SettingsError([f"{file}: routes: expected at least one route to a pool"])
    count = settings.listen.workers if workers is None else workers
    try:
        address = parse_address(settings.listen.address if listen is None else listen)
    except ValueError as error:
        raise SettingsError([f"--listen: {error}"]) from None
    with _store_of_all(settings, count) as store:
        Gatekeeper(with_store(settings, store), workers=count).close()  # what is wrong is told here, and once
        for warning in warnings(settings, count):
            sys.stderr.write(f"warning: {warning}\n")
        return _serve(file, address, count, store)


@contextlib.contextmanager
def _store_of_all(settings: Settings, workers: int) -> Iterator[str]:
    """The URL of the store that several workers share where the settings name none; else nothing."""
    if workers == 1 or settings.store.url is not None:
        yield ""
        return
    home = MEMORY if os.access(MEMORY, os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="gatekeeper-", dir=home)
    try:
        yield f"shared://{folder}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def with_store(settings: Settings, url: str) -> Settings:
    """The settings with the store that all workers share."""
    if not url:
        return settings
    store = settings.store.model_copy(update={"url": url, "size": settings.store.size or SHARED_SIZE})
    return settings.model_copy(update={"store": store})


def _serve(file: Path, address: Address, count: int, store: str) -> int:
    servers = bind(address, count)
    bound = None if isinstance(address, TcpAddress) else os.stat(address.path)
    try:
        return _Parent(file, servers, told(servers[0], address), store).run()
    finally:
        for server in servers:
            server.close()
        if bound is not None and not isinstance(address, TcpAddress):
            _remove_ours(address.path, bound)


class _Parent:
    def __init__(self, file: Path, servers: list[socket.socket], address: str, store: str) -> None:
        self._file = file
        self._servers = servers
        self._address = address
        self._store = store
        # A worker by our end of a pair of sockets: it learns from its own when we die, and tells through it that it
        # is ready.
        self._workers: dict[socket.socket, subprocess.Popen[bytes]] = {}
        self._signals = 0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        # The gateway's name in `Via`: one for all its workers, and no other gateway's.
        name = f"gatekeeper-{secrets.token_hex(4)}"
        for server in self._servers:
            self._start(server, name)
        if self._signals:  # it came before there was anybody to pass it to
            self._pass_on()
        # A signal that falls between the interpreter's last look and a call that blocks is noticed only when that
        # call returns. So nothing blocks here but a select that the signal itself wakes.
        woken, wakes = socket.socketpair()
        woken.setblocking(False)
        wakes.setblocking(False)
        before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        with woken, wakes:
            statuses = self._watch(woken)
            signal.set_wakeup_fd(before)
        if self._signals:
            is_clean = all(status in (0, -signal.SIGTERM) for status in statuses)
            return 0 if self._signals == 1 and is_clean else 1
        sys.stderr.write(f"the worker ended by itself, with status {statuses[0]}\n")
        return 1

    def _start(self, server: socket.socket, name: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (server.fileno(), theirs.fileno())
            call = [sys.executable, "-c", _WORKER, str(self._file), *map(str, fds), name]
            call += [str(len(self._servers)), self._store]
            worker = subprocess.Popen(call, pass_fds=fds, start_new_session=True)  # noqa: S603  # ourselves
        self._workers[ours] = worker

    def _watch(self, woken: socket.socket) -> list[int]:
        """Until all workers are gone: their statuses, in the order in which they went. One that goes takes all."""
        statuses: list[int] = []
        starting = set(self._workers)
        while self._workers:
            ready, _, _ = select.select([*self._workers, woken], [], [])
            if woken in ready:
                woken.recv(4096)
            for ours in [one for one in ready if one is not woken]:
                if ours.recv(1):
                    starting.discard(ours)
                    if not starting and not statuses:
                        sys.stderr.write(f"listening on {self._address}\n")
                        sys.stderr.flush()
                    continue
                with ours:  # its end is closed: it is gone
                    statuses.append(self._workers.pop(ours).wait())
                if not self._signals:
                    self._stop(signal.SIGTERM)
        return statuses

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if len(self._workers) == len(self._servers) or self._signals > 1:
            self._pass_on()

    def _pass_on(self) -> None:
        self._stop(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _stop(self, number: signal.Signals) -> None:
        for server in self._servers:
            server.close()  # the workers close their own: from here on new connections are refused
        for worker in self._workers.values():
            worker.send_signal(number)


def bind(address: Address, count: int) -> list[socket.socket]:
    """A listening socket for each worker, among which the kernel shares out connections. Raises BindError."""
    try:
        if not isinstance(address, TcpAddress):
            return _shared(_bind_unix(address.path), count)
        if count == 1 or not hasattr(socket, "SO_REUSEPORT") or sys.platform != "linux":
            return _shared(_bind_tcp(address), count)
        # One that is alone tells whether the address is another's, for such as share it would share with that, too.
        with _bind_tcp(address) as alone:
            address = TcpAddress(address.host, alone.getsockname()[1])
        return [_bind_tcp(address, is_shared=True) for _ in range(count)]
    except OSError as error:
        raise BindError(f"{address}: {error.strerror or 'no such host'}") from None


def _shared(server: socket.socket, count: int) -> list[socket.socket]:
    """The one socket, for all workers."""
    return [server, *(server.dup() for _ in range(count - 1))]


def _bind_tcp(address: TcpAddress, *, is_shared: bool = False) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, name = found[0]
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(name)
        server.listen(BACKLOG)
    except OSError:
        server.close()
        raise
    return server


def _bind_unix(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        server.bind(path)
        server.listen(BACKLOG)
    except OSError:
        server.close()
        raise
    return server


def _remove_ours(path: str, bound: os.stat_result) -> None:
    """Remove the socket that was bound, unless a successor has put its own in its place."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), bound):
            os.unlink(path)


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more. One that is in use, or another file, stays."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        Path(path).unlink(missing_ok=True)


def told(server: socket.socket, address: Address) -> str:
    """The address as a URL, with the port that was found."""
    if not isinstance(address, TcpAddress):
        return f"http+unix://{address.path}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"http://{host}:{server.getsockname()[1]}"
