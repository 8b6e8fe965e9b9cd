"""The parent: checks the settings, binds the socket, starts the worker and passes on signals.

The socket is bound here and inherited, so that a worker can be replaced and no queued connection is lost. The
worker is a fresh process: a fork of one that ran an event loop, or threads, would inherit their locks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Final

from gatekeeper.errors import GatekeeperError, SettingsError
from gatekeeper.keeper import Gatekeeper
from gatekeeper.settings import Address, TcpAddress, parse_address, warnings

BACKLOG: Final = 2048
_WORKER: Final = "from gatekeeper.gateway.worker import main; main()"


class BindError(GatekeeperError):
    """The address cannot be bound. The message says why."""


def serve(file: Path, listen: str | None = None) -> int:
    """Serve until a signal comes, and return the exit status. Raises SettingsError, BindError."""
    settings = Gatekeeper(file).settings
    if not settings.routes:
        raise SettingsError([f"{file}: routes: expected at least one route to a pool"])
    for warning in warnings(settings):
        sys.stderr.write(f"warning: {warning}\n")
    try:
        address = parse_address(settings.listen.address if listen is None else listen)
    except ValueError as error:
        raise SettingsError([f"--listen: {error}"]) from None
    server = bind(address)
    bound = None if isinstance(address, TcpAddress) else os.stat(address.path)
    try:
        return _Parent(file, server, told(server, address)).run()
    finally:
        server.close()
        if bound is not None and not isinstance(address, TcpAddress):
            _remove_ours(address.path, bound)


class _Parent:
    def __init__(self, file: Path, server: socket.socket, address: str) -> None:
        self._file = file
        self._server = server
        self._address = address
        self._worker: subprocess.Popen[bytes] | None = None
        self._signals = 0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        # The worker learns from its end of the pair when its parent dies, and tells through it that it is ready.
        ours, theirs = socket.socketpair()
        fds = (self._server.fileno(), theirs.fileno())
        # The gateway's name in `Via`: one for all its workers, and no other gateway's.
        name = f"gatekeeper-{secrets.token_hex(4)}"
        call = [sys.executable, "-c", _WORKER, str(self._file), *map(str, fds), name]
        self._worker = subprocess.Popen(call, pass_fds=fds, start_new_session=True)  # noqa: S603  # ourselves
        theirs.close()
        if self._signals:  # it came before there was anybody to pass it to
            self._pass_on()
        # A signal that falls between the interpreter's last look and a call that blocks is noticed only when that
        # call returns. So nothing blocks here but a select that the signal itself wakes.
        woken, wakes = socket.socketpair()
        woken.setblocking(False)
        wakes.setblocking(False)
        before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        with ours, woken, wakes:
            while True:
                ready, _, _ = select.select([ours, woken], [], [])
                if woken in ready:
                    woken.recv(4096)
                if ours in ready:
                    if not ours.recv(1):  # the worker's end is closed: it is gone
                        break
                    sys.stderr.write(f"listening on {self._address}\n")
                    sys.stderr.flush()
            status = self._worker.wait()
            signal.set_wakeup_fd(before)
        if self._signals:
            return 0 if self._signals == 1 and status in (0, -signal.SIGTERM) else 1
        sys.stderr.write(f"the worker ended by itself, with status {status}\n")
        return 1

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._worker is not None:
            self._pass_on()

    def _pass_on(self) -> None:
        assert self._worker is not None
        self._server.close()  # the worker closes its own: from here on new connections are refused
        self._worker.send_signal(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)


def bind(address: Address) -> socket.socket:
    """A listening socket. Raises BindError."""
    try:
        if isinstance(address, TcpAddress):
            return _bind_tcp(address)
        return _bind_unix(address.path)
    except OSError as error:
        raise BindError(f"{address}: {error.strerror or 'no such host'}") from None


def _bind_tcp(address: TcpAddress) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, name = found[0]
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
