"""Consistent hashing: a key falls to the same upstream as long as that one is there.

A ring of the positions 0 … 2³² − 1 (Karger et al., 1997). Each id has many points on it, and a key belongs to the
id whose point is the first at or after the key's own position, past the end from 0 on. Taking an id away moves
exactly its keys; a new one takes keys only for itself. With k points each, the relative standard deviation of the
ids' shares is about 1/√k (Lamping and Veach, 2014).

Where points and keys lie is fixed, version 1, and held by golden vectors in the tests: a change would move every
key of every user.

- *Points*: an id of weight w has vnodes × w points. Point n is the 32-bit big-endian word n mod 16 of the 64-byte
  BLAKE2b digest of (n div 16 as 4 bytes, big-endian) + (the id in UTF-8). A strong hash, for it is computed once
  and decides how even the shares are: with crc32 their deviation at 160 points was 0.23 and not 0.08.
- *Keys*: crc32 (of zlib; the key in UTF-8) × 0x9E3779B1 mod 2³². The factor is odd, so keys that crc32 tells apart
  stay apart. Without it keys that count up (user1, user2, …) clump: crc32 is linear, and their chi² over equal arcs
  reached 12 times its expectation; with it 1.5. BLAKE2b spreads no better and takes three times as long.
- *Collisions*: where two ids have a point at the same position, the id that sorts first (by code point) has it, and
  the other comes next. The order in which ids are given does not matter, and no point is lost: take the first away
  and its keys there fall to the other.

Neither hash has a secret, so whoever chooses a key can choose its upstream. A stronger hash would not hinder that
(one in N keys falls to a given upstream); `max_in_flight` bounds what it does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import chain, pairwise
from struct import unpack
from typing import Final
from zlib import crc32

VERSION: Final = 1
"""Of the two hashes and the rule for collisions. Whatever moves a key makes another version."""

MOST_IDS: Final = 1 << 16
"""On one ring: which id a point is of is kept in 16 bits."""

_WORDS: Final = 16  # of 32 bits, in a digest


def positions(id: str, count: int) -> list[int]:
    """The places of an id's first `count` points, in no order."""
    name = id.encode("utf-8", "surrogatepass")
    digests = (blake2b(block.to_bytes(4, "big") + name).digest() for block in range(-(-count // _WORDS)))
    return [word for digest in digests for word in unpack(">16I", digest)][:count]


def position(key: str) -> int:
    """The place of a key. (`Ring.owner` has this written out: a call would be a quarter of its cost.)"""
    return crc32(key.encode("utf-8", "surrogatepass")) * 0x9E3779B1 & 0xFFFF_FFFF


class Ring:
    """A consistent hash ring.

    - `ids`: of the upstreams, in any order.
    - `vnodes`: points of an id of weight 1 (default 160).
    - `weights`: whole numbers by id; 1 for those that are not in it.

    Raises ValueError if there is no id or the same one twice, or if a number is not positive.
    """

    __slots__ = ("_arcs", "_ids", "_points", "_shift")

    def __init__(self, ids: Iterable[str], vnodes: int = 160, weights: Mapping[str, int] | None = None) -> None:
        # In one order whatever the order given: by rank in it points that collide are sorted.
        self._ids = sorted(ids)
        weights = weights or {}
        _check(self._ids, vnodes, weights)
        # A point is position << 16 | rank: sorting numbers is much faster than sorting pairs.
        self._points = sorted(
            position << 16 | rank
            for rank, id in enumerate(self._ids)
            for position in positions(id, vnodes * weights.get(id, 1))
        )
        count = len(self._points)
        self._points.append(self._points[0] + (1 << 48))  # past the end the first is next
        # The ring is cut into arcs, more than eight a point but at most 2¹⁷. Most hold no point and have one owner,
        # which is noted when such an arc is first asked for. The others get "", and are searched.
        bits = min(17, (8 * count).bit_length())
        self._shift = 32 - bits
        self._arcs: list[str | None] = [None] * (1 << bits)

    def owner(self, key: str) -> str:
        """The id that the key belongs to."""
        try:
            data = key.encode()
        except UnicodeEncodeError:  # a lone surrogate, as JSON and file names can bring
            data = key.encode("utf-8", "surrogatepass")
        place = crc32(data) * 0x9E3779B1 & 0xFFFF_FFFF
        owner = self._arcs[place >> self._shift]
        if owner:
            return owner
        if owner is None:
            self._note(place >> self._shift)
        return self._ids[self._points[bisect_left(self._points, place << 16)] & 0xFFFF]

    def owners(self, key: str) -> Iterator[str]:
        """All ids, each once, as they come from the key's place on: whom it falls to when those before are gone."""
        points, ids = self._points, self._ids
        here = bisect_left(points, position(key) << 16)
        seen: set[int] = set()
        for place in chain(range(here, len(points) - 1), range(here)):
            rank = points[place] & 0xFFFF
            if rank not in seen:
                yield ids[rank]
                seen.add(rank)
                if len(seen) == len(ids):
                    return

    def _note(self, arc: int) -> None:
        width = self._shift + 16
        point = self._points[bisect_left(self._points, arc << width)]
        self._arcs[arc] = self._ids[point & 0xFFFF] if point >= arc + 1 << width else ""

    def __repr__(self) -> str:
        return f"<Ring of {len(self._ids)} ids, {len(self._points) - 1} points>"


def _check(ids: list[str], vnodes: int, weights: Mapping[str, int]) -> None:
    if not 0 < len(ids) <= MOST_IDS:
        raise ValueError(f"expected 1 to {MOST_IDS} ids, and not {len(ids)}")
    for one, next_ in pairwise(ids):
        if one == next_:
            raise ValueError(f"expected each id once: {one!r} is there twice")
    if vnodes < 1:
        raise ValueError(f"vnodes: expected 1 or more, and not {vnodes}")
    if strangers := weights.keys() - set(ids):
        raise ValueError(f"weights: {min(strangers)!r} is not among the ids")
    for id, weight in weights.items():
        if weight < 1:
            raise ValueError(f"weights: expected 1 or more for {id!r}, and not {weight}")
