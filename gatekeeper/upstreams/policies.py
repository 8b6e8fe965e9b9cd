"""Policies: in which order upstreams are preferred.

An order has each upstream once: the first is the policy's choice, the rest whom to turn to if that one is ejected,
full or does not answer. Nothing is changed by asking; turn and draw come as arguments.

What falls to others is spread over them in proportion to their weights. Were it always the neighbour that follows,
this one would carry a double load while the other is away.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import gcd, inf
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from gatekeeper.upstreams.hashing import Ring

if TYPE_CHECKING:
    from gatekeeper.upstreams.pool import Upstream


class Policy(Protocol):
    """An order of preference over the upstreams that it was made for."""

    @property
    def needs_key(self) -> bool:
        """Whether the order depends on the key; if not, the key may be any text."""

    def order(self, key: str, turn: int, draw: float) -> Iterator[Upstream]:
        """Each upstream once, worked out as far as it is asked for. The same arguments give the same order.

        - `turn`: how many orders were asked for before, 0 at first
        - `draw`: a random number, 0 ≤ draw < 1
        """


class RoundRobin:
    """In turn, each as often as its weight says, and those turns spread out (nginx's smooth weighted round robin).

    Weights 5, 1, 1 give a a b a c a a. Sequences are worked out beforehand; where the weights would make one longer
    than `LONGEST` they are scaled down to that, in whole numbers.
    """

    __slots__ = ("_sequence", "_upstreams")

    needs_key: ClassVar[bool] = False
    LONGEST: ClassVar[int] = 1 << 14

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._upstreams = upstreams
        self._sequence = [
            upstreams[place] for place in interleaved([one.weight for one in upstreams], self.LONGEST)
        ]

    def order(self, key: str, turn: int, draw: float) -> Iterator[Upstream]:
        sequence = self._sequence
        first = sequence[turn % len(sequence)]
        yield first
        yield from _shuffled(self._upstreams, draw, but=first)


class Random:
    """By lot, each as likely as its weight says."""

    __slots__ = ("_ends", "_upstreams")

    needs_key: ClassVar[bool] = False

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._upstreams = upstreams
        self._ends = list(accumulate(one.weight for one in upstreams))

    def order(self, key: str, turn: int, draw: float) -> Iterator[Upstream]:
        mark = draw * self._ends[-1]
        place = bisect(self._ends, mark)
        first = self._upstreams[place]
        yield first
        left = 1 - (self._ends[place] - mark) / first.weight
        yield from _shuffled(self._upstreams, left, but=first)


class LeastConnections:
    """The one with the fewest requests in flight for its weight; among equals by lot, as their weights say.

    The first is found in one pass. The rest are sorted when they are asked for, by what they have then.
    """

    __slots__ = ("_upstreams",)

    needs_key: ClassVar[bool] = False

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._upstreams = upstreams

    def order(self, key: str, turn: int, draw: float) -> Iterator[Upstream]:
        least, weight = inf, 0
        equals: list[Upstream] = []
        for one in self._upstreams:
            load = one.in_flight / one.weight
            if load < least:
                least, weight, equals = load, one.weight, [one]
            elif load == least:
                weight += one.weight
                equals.append(one)
        first = equals[0]
        if len(equals) > 1:
            first, draw = _pick(equals, weight, draw)
        yield first
        yield from sorted(_shuffled(self._upstreams, draw, but=first), key=lambda one: one.in_flight / one.weight)


class RingOrder:
    """By a key, on a consistent hash ring; `vnodes` as of `gatekeeper.upstreams.hashing.Ring`.

    Where the first is gone its keys fall to many others, as the points on the ring are mixed.
    """

    __slots__ = ("_ring", "_upstreams")

    needs_key: ClassVar[bool] = True

    def __init__(self, upstreams: Sequence[Upstream], vnodes: int = 160) -> None:
        self._upstreams = {one.id: one for one in upstreams}
        self._ring = Ring([one.id for one in upstreams], vnodes, {one.id: one.weight for one in upstreams})

    def order(self, key: str, turn: int, draw: float) -> Iterator[Upstream]:
        first = self._ring.owner(key)
        yield self._upstreams[first]
        for id in self._ring.owners(key):
            if id != first:
                yield self._upstreams[id]


POLICIES: Final[dict[str, type[RoundRobin | Random | LeastConnections | RingOrder]]] = {
    "round_robin": RoundRobin,
    "random": Random,
    "least_connections": LeastConnections,
    "ring": RingOrder,
}
"""By the names that settings use. `ring` alone takes vnodes."""


def interleaved(weights: Sequence[int], longest: int) -> list[int]:
    """The places of the weights in the order of their turns, for one whole round.

    Each turn every one gains its weight; the one with the most, the first among equals, has the turn and pays all
    that was gained (nginx, ngx_http_upstream_get_peer).
    """
    divisor = gcd(*weights)
    total = sum(weights)
    if total // divisor > longest:
        weights = [max(1, weight * longest // total) for weight in weights]
    else:
        weights = [weight // divisor for weight in weights]
    total = sum(weights)
    gained = [0] * len(weights)
    turns = []
    for _ in range(total):
        gained = [have + weight for have, weight in zip(gained, weights, strict=True)]
        place = gained.index(max(gained))
        gained[place] -= total
        turns.append(place)
    return turns


def _pick(upstreams: Sequence[Upstream], weight: int, draw: float) -> tuple[Upstream, float]:
    """One of them, as likely as its part of their whole weight, and what is left of the draw.

    Where within the picked one's share the draw fell is again a random number in 0 … 1, and no choice has used it
    yet. So one draw serves a whole order: its 53 bits last for eight picks of a hundred. (Those after are not
    random any more; by then all is lost anyway.)
    """
    mark = draw * weight
    for one in upstreams:
        if mark < one.weight:
            return one, mark / one.weight
        mark -= one.weight
    return upstreams[-1], 0.0  # by rounding alone


def _shuffled(upstreams: Sequence[Upstream], draw: float, *, but: Upstream) -> Iterator[Upstream]:
    """All but one, each next one picked from those that are left."""
    left = [one for one in upstreams if one is not but]
    weight = sum(one.weight for one in left)
    while left:
        one, draw = _pick(left, weight, draw)
        left.remove(one)
        weight -= one.weight
        yield one
