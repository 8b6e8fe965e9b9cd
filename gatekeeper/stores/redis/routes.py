"""Which server a counter is on. What must be asked for that is yielded, and carried out by a driver."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

from hiredis import ReplyError

from gatekeeper.commands import Hits
from gatekeeper.stores.redis.address import Address, Target
from gatekeeper.stores.redis.packing import SLOTS, command

R = TypeVar("R")


class Send(NamedTuple):
    """A command for a server.

    - `batch`: what it carries out, so that it can be undone if nobody waits for the answer any more.
    - `asking`: it follows a redirection to a server that is only about to take over the slot.
    """

    address: Address
    packet: bytes
    batch: Hits | None = None
    asking: bool = False


Answer: TypeAlias = Any
"""What the server answered, an error of its (ReplyError), or a StoreError if it did not."""

Rounds: TypeAlias = Generator[list[Send], list[Answer], R]
"""Yields commands that are to be carried out at the same time, and is sent their answers, in order.

No commands: it waits for another's, and wants to be asked again in a few milliseconds.
"""

_SLOTS: Final = command(b"CLUSTER", b"SLOTS")


class Routes(Protocol):
    is_stale: bool
    """Whether `find` should be run before the next question."""

    def address(self, slot: int) -> Address | None:
        """Where the counters of a slot are; None as long as nothing is known."""

    def masters(self) -> list[Address]:
        """All servers that hold counters."""

    def moved(self, slot: int, address: Address) -> None:
        """A server said that a slot is another's."""

    def lost(self) -> None:
        """A server did not answer, or is none that may write."""

    def find(self) -> Rounds[bool]:
        """Ask where everything is. True if somebody knew."""


class Single:
    """One server, always the same."""

    is_stale = False

    def __init__(self, target: Target) -> None:
        (self._address,) = target.addresses

    def address(self, slot: int) -> Address | None:
        return self._address

    def masters(self) -> list[Address]:
        return [self._address]

    def moved(self, slot: int, address: Address) -> None:
        pass

    def lost(self) -> None:
        pass

    def find(self) -> Rounds[bool]:
        yield from ()  # nothing is to be asked
        return True


class Sentinel:
    """One server at a time, and the sentinels know which."""

    def __init__(self, target: Target) -> None:
        self.is_stale = True
        self._sentinels = list(target.addresses)
        self._question = command(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", target.service)
        self._address: Address | None = None

    def address(self, slot: int) -> Address | None:
        return self._address

    def masters(self) -> list[Address]:
        return [] if self._address is None else [self._address]

    def moved(self, slot: int, address: Address) -> None:
        pass

    def lost(self) -> None:
        self.is_stale = True

    def find(self) -> Rounds[bool]:
        for sentinel in list(self._sentinels):
            (answer,) = yield [Send(sentinel, self._question)]
            if isinstance(answer, list) and len(answer) == 2:
                self._address = Address(_text(answer[0]), int(answer[1]))
                self.is_stale = False
                return True
            # The next question begins with the next one.
            self._sentinels.remove(sentinel)
            self._sentinels.append(sentinel)
        return False


class Cluster:
    """The slots divided among servers, each of which knows the division."""

    def __init__(self, target: Target) -> None:
        self.is_stale = True
        self._seeds = list(target.addresses)
        self._others: list[Address] = []
        self._table: list[Address | None] = []

    def address(self, slot: int) -> Address | None:
        return self._table[slot] if self._table else None

    def masters(self) -> list[Address]:
        return list(dict.fromkeys(address for address in self._table if address is not None))

    def moved(self, slot: int, address: Address) -> None:
        if self._table:
            self._table[slot] = address
        self.is_stale = True

    def lost(self) -> None:
        self.is_stale = True

    def find(self) -> Rounds[bool]:
        for node in dict.fromkeys([*self._others, *self._seeds]):
            (answer,) = yield [Send(node, _SLOTS)]
            if isinstance(answer, list) and answer:
                self._learn(answer, node)
                return True
            if node in self._others:  # to the end, so that the next question begins with another
                self._others.remove(node)
                self._others.append(node)
        return False

    def _learn(self, division: list[Any], told_by: Address) -> None:
        table: list[Address | None] = [None] * SLOTS
        others: dict[Address, None] = {}
        for first, last, *nodes in division:
            # A server that does not know by which name it is reached leaves that out.
            addresses = [Address(_text(node[0]) or told_by.host, int(node[1])) for node in nodes]
            others.update(dict.fromkeys(addresses))
            table[first : last + 1] = [addresses[0]] * (last - first + 1)
        self._table = table
        # Who knew goes first.
        self._others = sorted(others, key=lambda address: address != told_by)
        self.is_stale = False


def routes_to(target: Target) -> Routes:
    match target.topology:
        case "single":
            return Single(target)
        case "sentinel":
            return Sentinel(target)
        case "cluster":
            return Cluster(target)


def redirection(error: ReplyError, asked: Address) -> tuple[int, Address]:
    """(slot, address) of MOVED or ASK."""
    _, slot, place = str(error).split(" ")[:3]
    host, _, port = place.rpartition(":")
    return int(slot), Address(host or asked.host, int(port))


def _text(value: bytes | None) -> str:
    return "" if value is None or value == b"?" else value.decode()
