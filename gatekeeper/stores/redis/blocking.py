"""The blocking driver: pooled connections, each used by one thread at a time."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from threading import BoundedSemaphore
from typing import Any, Final, TypeVar

import hiredis

from gatekeeper.errors import StoreError
from gatekeeper.stores.redis.address import Address
from gatekeeper.stores.redis.asking import LATE, LOST, MOMENT, REFUSED, Core
from gatekeeper.stores.redis.packing import command
from gatekeeper.stores.redis.routes import Answer, Rounds, Send

ASKING: Final = command(b"ASKING")

R = TypeVar("R")


class Wire:
    """A connection. All its methods raise OSError (a TimeoutError is one); then it is of no more use."""

    __slots__ = ("_reader", "_socket")

    def __init__(self, core: Core, address: Address, deadline: float) -> None:
        target = core.target
        if address.path is not None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made.settimeout(_left(deadline))
            try:
                made.connect(address.path)
            except OSError:
                made.close()
                raise
        else:
            made = socket.create_connection((address.host, address.port), _left(deadline))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = made
        self._reader = hiredis.Reader()
        try:
            if target.tls is not None:
                made.settimeout(_left(deadline))
                self._socket = target.tls.wrap_socket(made, server_hostname=address.host)
            words = greeting(core, address)
            if words:
                self.send(b"".join(words), deadline)
                for answer in self.receive(len(words), deadline):
                    agree(answer)
        except BaseException:
            self._socket.close()
            raise

    @property
    def is_stale(self) -> bool:
        """Whether something came while nothing was asked: mostly that the server closed it."""
        return is_readable(self._socket.fileno())

    def send(self, data: bytes, deadline: float) -> None:
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(data)

    def receive(self, count: int, deadline: float) -> list[Answer]:
        answers: list[Answer] = []
        reader = self._reader
        while True:
            while len(answers) < count:
                answer: Any = reader.gets()
                if answer is False:
                    break
                answers.append(answer)
            else:
                return answers
            # However late it is, what has come by now is read: a thread that had to wait is no dead store.
            self._socket.settimeout(_left(deadline))
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError
            try:
                reader.feed(data)
            except hiredis.ProtocolError:
                raise ConnectionError from None

    def close(self) -> None:
        self._socket.close()


class Pool:
    """The idle connections to one server, the last used on top, and leave to open so many."""

    __slots__ = ("idle", "leave")

    def __init__(self, most: int) -> None:
        self.idle: deque[Wire] = deque()
        self.leave = BoundedSemaphore(most)


class Blocking:
    """Carries out what the core yields, for any number of threads."""

    def __init__(self, core: Core, max_connections: int) -> None:
        self._core = core
        self._most = max_connections
        self._pools: dict[Address, Pool] = {}

    def run(self, rounds: Rounds[R]) -> R:
        deadline = time.monotonic() + self._core.timeout
        answers: list[Answer] | None = None
        try:
            while True:
                sends = next(rounds) if answers is None else rounds.send(answers)
                if not sends:
                    time.sleep(MOMENT)
                answers = self._round(sends, deadline)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def close(self) -> None:
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            while pool.idle:
                pool.idle.pop().close()

    def _round(self, sends: Sequence[Send], deadline: float) -> list[Answer]:
        """The answers to commands: all are sent, to each server its own on one connection, before any is read."""
        answers: list[Answer] = [None] * len(sends)
        by_server: dict[Address, list[int]] = {}
        for place, send in enumerate(sends):
            by_server.setdefault(send.address, []).append(place)
        sent: list[tuple[Address, list[int], Pool, Wire]] = []
        try:
            for address, places in by_server.items():
                packets = [
                    ASKING + sends[place].packet if sends[place].asking else sends[place].packet for place in places
                ]
                try:
                    pool, wire = self._sent(address, b"".join(packets), deadline)
                except (OSError, StoreError) as error:
                    self._fail(address, places, answers, error)
                else:
                    sent.append((address, places, pool, wire))
            while sent:
                address, places, pool, wire = sent[-1]
                try:
                    got = wire.receive(sum(1 + sends[place].asking for place in places), deadline)
                except OSError as error:
                    self._fail(address, places, answers, error)
                else:
                    sent.pop()
                    self._core.answered(address)
                    if self._pools.get(address) is pool:
                        pool.idle.append(wire)
                    else:  # the store was closed meanwhile
                        wire.close()
                    pool.leave.release()
                    for place in reversed(places):
                        answers[place] = got.pop()
                        if sends[place].asking:
                            got.pop()
                    continue
                sent.pop()
                wire.close()
                pool.leave.release()
        finally:
            for (
                _,
                _,
                pool,
                wire,
            ) in sent:  # interrupted: what is still to come on these would be taken for another's
                wire.close()
                pool.leave.release()
        return answers

    def _sent(self, address: Address, data: bytes, deadline: float) -> tuple[Pool, Wire]:
        """Send on an idle connection, or a new one. Raises OSError, StoreError."""
        pool = self._pools.get(address) or self._pools.setdefault(address, Pool(self._most))
        if not pool.leave.acquire(timeout=_left(deadline)):
            raise StoreError("all connections to the store are in use")
        wire = None
        try:
            while pool.idle:
                try:
                    wire = pool.idle.pop()
                except IndexError:  # another thread was faster
                    break
                if not wire.is_stale:
                    break
                wire.close()
                wire = None
            if wire is None:
                wire = Wire(self._core, address, deadline)
            wire.send(data, deadline)
        except BaseException:
            if wire is not None:
                wire.close()
            pool.leave.release()
            raise
        return pool, wire

    def _fail(self, address: Address, places: list[int], answers: list[Answer], error: Exception) -> None:
        if isinstance(error, OSError):
            self._core.failed(address)
            error = told_of(error)
        for place in places:
            answers[place] = error


def greeting(core: Core, address: Address) -> list[bytes]:
    """What is said first on a connection."""
    login = core.target.sentinel_login if address.sentinel else core.target.login
    words = [command(b"AUTH", *login)] if login else []
    if core.target.db and not address.sentinel:
        words.append(command(b"SELECT", b"%d" % core.target.db))
    return words


class Refused(ConnectionError):
    """What was said first on a connection was not agreed to."""


def agree(answer: Answer) -> None:
    """Raises Refused."""
    if isinstance(answer, hiredis.ReplyError):
        raise Refused


def told_of(error: OSError) -> StoreError:
    """What befell a connection, as an error that may be shown."""
    if isinstance(error, Refused):
        return StoreError(REFUSED)
    return StoreError(LATE if isinstance(error, TimeoutError) else LOST)


def is_readable(descriptor: int) -> bool:
    """Whether something has come that was not read yet, be it the end."""
    if hasattr(select, "poll"):  # where there is one; `select` knows only the first thousand descriptors
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([descriptor], [], [], 0)[0])


def _left(deadline: float) -> float:
    """The seconds until then, and at least a moment, in which what is there already is found."""
    return max(deadline - time.monotonic(), 0.001)
