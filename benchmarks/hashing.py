"""The ring: `gatekeeper.upstreams.hashing.Ring` and `HashRing` of uhashring, both with its default of 160 points.

100 upstreams. An owner is asked for each of 10,000 keys, over and over, by the same plain loop on both sides;
building is timed alone. The rings do not put keys in the same places, for their hashes differ (theirs is MD5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from statistics import median, pstdev
from typing import Any, Final

from benchmarks.measure import Progress, Result, Row, Unfit, Work, interleave, median_ratio, peer
from gatekeeper.upstreams.hashing import Ring

IDS: Final = [f"http://10.0.0.{number}:8080" for number in range(100)]
KEYS: Final = [f"user{number}" for number in range(10_000)]
VNODES: Final = 160


def run(quick: bool, progress: Progress) -> Result:
    against = peer("uhashring")
    rounds, repeats = (5, 2) if quick else (15, 20)
    make_theirs: Callable[..., Any] = import_module("uhashring").HashRing
    ours, theirs = Ring(IDS, VNODES), make_theirs(IDS, vnodes=VNODES)
    verify(ours, theirs)
    works: Mapping[str, Work] = {
        "our owner": lambda: asked(ours.owner, KEYS, repeats),
        "their owner": lambda: asked(theirs.get_node, KEYS, repeats),
        "our ring": lambda: Ring(IDS, VNODES),
        "their ring": lambda: make_theirs(IDS, vnodes=VNODES),
    }
    seconds = interleave(lambda number: works, rounds, progress=progress)
    rows = []
    for what, work, unit, scale, bar in (
        ("an owner", "owner", "µs", 1e6 / (len(KEYS) * repeats), 4.0),
        ("building it", "ring", "ms", 1e3, 3.0),
    ):
        mine, other = seconds[f"our {work}"], seconds[f"their {work}"]
        rows.append(
            Row(
                what=f"ring of {len(IDS)} × {VNODES} points: {what}, against {against}",
                unit=unit,
                ours=median(mine) * scale,
                peer=median(other) * scale,
                ratio=median_ratio(other, mine),
                at_least=bar,
            )
        )
    return Result(rows)


def asked(owner: Callable[[str], str], keys: Sequence[str], repeats: int) -> None:
    for _ in range(repeats):
        for key in keys:
            owner(key)


def verify(ours: Ring, theirs: Any) -> None:
    """Both have all the points, and spread keys evenly. Raises Unfit."""
    points = len(IDS) * VNODES
    if theirs.size != points or f" {points} points" not in repr(ours):
        raise Unfit(f"theirs has {theirs.size} points and not {points}, ours is {ours!r}")
    for name, owner in (("ours", ours.owner), ("theirs", theirs.get_node)):
        shares = dict.fromkeys(IDS, 0)
        for key in KEYS:
            shares[owner(key)] += 1
        deviation = pstdev(shares.values()) * len(IDS) / len(KEYS)
        if deviation > 0.2:  # about 0.13: 1/√160 of the points, and 1/√100 of the keys
            raise Unfit(f"the deviation of {name} is {deviation:.2f}")
