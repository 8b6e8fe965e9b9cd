"""The worker: an event loop that serves from an inherited socket until it is told to drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gatekeeper.errors import MissingExtra
from gatekeeper.gateway.supervisor import with_store
from gatekeeper.keeper import Gatekeeper
from gatekeeper.proxy.exchange import Exchange
from gatekeeper.proxy.listener import Front, Listener
from gatekeeper.settings import load_settings

try:
    import uvloop
except ImportError:
    raise MissingExtra("The gateway", "gateway") from None

_SECOND = 1e9


def front_of(
    keeper: Gatekeeper, loop: asyncio.AbstractEventLoop, pseudonym: str, log: Callable[[str], object] | None = None
) -> Front:
    """What a worker decides by, made of a Gatekeeper. `log` takes the lines of the access log, if there is one."""
    listen = keeper.settings.listen
    identity = keeper.settings.identity
    named = isinstance(identity.user, str) and identity.user.startswith("header:")
    user = str(identity.user).removeprefix("header:") if named else None
    return Front(
        loop,
        keeper.gate,
        ask=keeper.ask,
        aask=keeper.aask,
        awaits=keeper.awaits,
        is_trusted=keeper.gate.trusts,
        distrusted=[name for name in (identity.header, user) if name is not None],
        pseudonym=pseudonym.encode("ascii"),
        forwarded=listen.forwarded,
        head_timeout=listen.head_timeout / _SECOND,
        idle_timeout=listen.idle_timeout / _SECOND,
        body_timeout=listen.body_timeout / _SECOND,
        least_rate=listen.least_rate,
        max_head=listen.max_head,
        max_fields=listen.max_fields,
        max_body=listen.max_body,
        max_connections=listen.max_connections,
        max_connections_per_address=listen.max_connections_per_address,
        access_log=_access_log(log) if log is not None and listen.access_log else None,
    )


def _access_log(write: Callable[[str], object]) -> Callable[[Exchange, int], None]:
    def log(exchange: Exchange, status: int) -> None:
        path = exchange.target.partition(b"?")[0].decode("ascii")  # a query may hold secrets
        seconds = time.monotonic() - exchange.started
        method = exchange.verb.decode("ascii")
        # Whom it was counted as; where it was refused before that was known, the peer.
        address = getattr(exchange, "address", None) or exchange.peer or "-"
        write(f"{address} {method} {path} {status} {exchange.moved} {seconds:.3f}\n")

    return log


async def work(keeper: Gatekeeper, server: socket.socket, control: socket.socket, pseudonym: str) -> None:
    """Serve until SIGTERM, or until the parent is gone; then let what is in progress end."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the parent passes it on
    loop.add_reader(control, stop.set)  # it never writes: what is to be read is its end
    front = front_of(keeper, loop, pseudonym, _line_by_line)
    listener = Listener(front)
    acceptor = await loop.create_server(listener, sock=server, backlog=2048)
    # What was loaded lives as long as the process: the garbage collector need not walk it each time.
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError):
        control.send(b"r")
    await stop.wait()
    loop.remove_reader(control)
    acceptor.close()
    server.close()  # the acceptor had a duplicate: the last one must go for connections to be refused
    await listener.drain(keeper.settings.listen.drain_timeout / _SECOND)
    await front.aclose()
    await keeper.aclose()


def _line_by_line(line: str) -> None:
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except OSError:  # nobody reads the log: that stops no request
        pass


def _raise_file_limit() -> None:
    """A connection is a file, and the usual soft limit is 1024."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Started by the supervisor with: settings file, socket, control socket, pseudonym, workers, store."""
    file, server_fd, control_fd, pseudonym, workers, store = sys.argv[1:]
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s")
    _raise_file_limit()
    settings = with_store(load_settings(Path(file)), store)
    keeper = Gatekeeper(settings, workers=int(workers))
    keeper.require(awaiting=True)
    server, control = socket.socket(fileno=int(server_fd)), socket.socket(fileno=int(control_fd))
    server.setblocking(False)
    uvloop.run(work(keeper, server, control, pseudonym))
    if store and _is_orphan(control):  # nobody else clears up
        shutil.rmtree(store.removeprefix("shared://"), ignore_errors=True)


def _is_orphan(control: socket.socket) -> bool:
    """Whether the parent is gone. (Who one's parent is changes only after its sockets were closed.)"""
    control.setblocking(False)
    try:
        return not control.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
